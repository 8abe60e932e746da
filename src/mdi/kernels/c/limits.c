// What this machine can do at best, for benchmarks: bytes read from memory, and operations on registers.
#include <stddef.h>

#include "pool.h"
#include "vector.h"
#if defined(MDI_AMX)
#include "tiles.h"
#endif

typedef struct {
    const char *from;
    size_t size;
    long steps;
    int result;  // so that nothing is left out
} Trial;

static void read_part(void *context, int thread, int n_threads) {
    Trial *trial = context;
    size_t step = 4 * sizeof(vint), steps = trial->size / step;
    vint sum[4] = {vi_zero(), vi_zero(), vi_zero(), vi_zero()};
    for (size_t i = steps * (size_t)thread / (size_t)n_threads; i < steps * ((size_t)thread + 1) / (size_t)n_threads; i++)
        for (int j = 0; j < 4; j++) sum[j] = vi_add(sum[j], vi_load(trial->from + i * step + (size_t)j * sizeof(vint)));
    int32_t lanes[LANES];
    vi_store(lanes, vi_add(vi_add(sum[0], sum[1]), vi_add(sum[2], sum[3])));
    __atomic_fetch_add(&trial->result, lanes[0], __ATOMIC_RELAXED);
}

// Reads memory once, each thread of the pool one stream.
int KERNEL(limit_read)(const void *from, size_t size) {
    Trial trial = {.from = from, .size = size};
    mdi_parallel(read_part, &trial);
    return trial.result;
}

enum { SUMS = 12 };

static void float_part(void *context, int thread, int n_threads) {
    (void)n_threads;
    Trial *trial = context;
    vfloat sum[SUMS], weights[2] = {vf_set1((float)thread), vf_set1(0.5f)};
    for (int i = 0; i < SUMS; i++) sum[i] = vf_zero();
    for (long step = 0; step < trial->steps; step++) {
        vfloat x = vf_set1((float)(step & 7));
        _Pragma("GCC unroll 16") for (int i = 0; i < SUMS; i++) sum[i] = vf_fma(weights[i % 2], x, sum[i]);
    }
    for (int i = 1; i < SUMS; i++) sum[0] = vf_add(sum[0], sum[i]);
    __atomic_fetch_add(&trial->result, (int)bits_of(vf_sum(sum[0])), __ATOMIC_RELAXED);
}

#if defined(MDI_AMX)
INLINE void tiles_part(Trial *trial, int is_int8) {
    tiles_configure(TILE_HEIGHT, TILE_BYTES);
    for (long step = 0; step < trial->steps; step++) {
        if (is_int8) {
            tile_dot_int8(0, 4, 6);
            tile_dot_int8(1, 4, 7);
            tile_dot_int8(2, 5, 6);
            tile_dot_int8(3, 5, 7);
        } else {
            tile_dot_bf16(0, 4, 6);
            tile_dot_bf16(1, 4, 7);
            tile_dot_bf16(2, 5, 6);
            tile_dot_bf16(3, 5, 7);
        }
    }
    tiles_release();
}
enum { TILE_PRODUCTS = 4 * TILE_HEIGHT * TILE_BYTES / 4 * TILE_BYTES };  // of int8, in a step

static void int8_part(void *context, int thread, int n_threads) { (void)thread, (void)n_threads, tiles_part(context, 1); }
static void bf16_part(void *context, int thread, int n_threads) { (void)thread, (void)n_threads, tiles_part(context, 0); }
enum { INT8_OPERATIONS = 2 * TILE_PRODUCTS, BF16_OPERATIONS = TILE_PRODUCTS };
#else
// Without products of pairs, bfloat16 is computed as float32.
static void bf16_part(void *context, int thread, int n_threads) {
    if (!HAS_BF16_DOT) {
        float_part(context, thread, n_threads);
        return;
    }
    Trial *trial = context;
    vfloat sum[SUMS];
    vint weights[2] = {vi_set1(0x3f003f00 + thread), vi_set1(0x3f013f01 + thread)};
    for (int i = 0; i < SUMS; i++) sum[i] = vf_zero();
    for (long step = 0; step < trial->steps; step++) {
        vint x = vi_set1((int32_t)(step & 7) << 16);
        _Pragma("GCC unroll 16") for (int i = 0; i < SUMS; i++) sum[i] = vf_dot_bf16(sum[i], weights[i % 2], x);
    }
    for (int i = 1; i < SUMS; i++) sum[0] = vf_add(sum[0], sum[i]);
    __atomic_fetch_add(&trial->result, (int)bits_of(vf_sum(sum[0])), __ATOMIC_RELAXED);
}
enum { INT8_OPERATIONS = 8 * SUMS * LANES, BF16_OPERATIONS = (HAS_BF16_DOT ? 4 : 2) * SUMS * LANES };

static void int8_part(void *context, int thread, int n_threads) {
    (void)n_threads;
    Trial *trial = context;
    int32_t x[SUMS];
    for (int i = 0; i < SUMS; i++) x[i] = 0x01010101 * (thread + i);
    vint sum[SUMS], weights[2] = {vi_set1(0x0f0e0d0c * (1 + (thread & 1))), vi_set1(0x01020304)};
    for (int i = 0; i < SUMS; i++) sum[i] = vi_zero();
    for (long step = 0; step < trial->steps; step++) {
        __asm__ volatile("" : : "r"(x) : "memory");  // activations are loaded in every step
        _Pragma("GCC unroll 16") for (int i = 0; i < SUMS; i++) sum[i] = vi_dot(sum[i], weights[i % 2], vi_set1(x[i / 2]));
    }
    for (int i = 1; i < SUMS; i++) sum[0] = vi_add(sum[0], sum[i]);
    int32_t lanes[LANES];
    vi_store(lanes, sum[0]);
    __atomic_fetch_add(&trial->result, lanes[0], __ATOMIC_RELAXED);
}
#endif

// Computes on every thread: returns the operations of one thread.
long KERNEL(limit_floats)(long steps) {
    Trial trial = {.steps = steps};
    mdi_parallel(float_part, &trial);
    return 2L * steps * SUMS * LANES;
}

long KERNEL(limit_int8)(long steps) {
    Trial trial = {.steps = steps};
    mdi_parallel(int8_part, &trial);
    return steps * INT8_OPERATIONS;
}

long KERNEL(limit_bf16)(long steps) {
    Trial trial = {.steps = steps};
    mdi_parallel(bf16_part, &trial);
    return steps * BF16_OPERATIONS;
}
