// Queries and keys are normalised (some models), rotated in float32 and rounded once: queries in place, keys into the KV
// cache beside the values. An int8 cache has a scale for each token, head and kind: largest magnitude / 127.
//
// The second half of a head's channels is paired with the first, as in transformers:
//   (a, b) -> (a cos - b sin, b cos + a sin)
#include "rotary.h"

#include <math.h>

#include "floats.h"
#include "norms.h"
#include "pool.h"

static void rotated(const Rotary *rotary, long row, long at, const float *norm, float *head) {
    long half = rotary->head_dim / 2;
    widen_row(rotary->heads, at, rotary->dtype, rotary->head_dim, head);
    if (norm) KERNEL(rms_norm_row)(head, norm, rotary->head_dim, rotary->eps);
    if (!rotary->cos) return;
    const float *cosines = rotary->cos + row * half, *sines = rotary->sin + row * half;
    long i = 0;
    for (; i + LANES <= half; i += LANES) {
        vfloat a = vf_load(head + i), b = vf_load(head + half + i);
        vfloat cosine = vf_load(cosines + i), sine = vf_load(sines + i);
        vf_store(head + i, vf_sub(vf_mul(a, cosine), vf_mul(b, sine)));
        vf_store(head + half + i, vf_add(vf_mul(b, cosine), vf_mul(a, sine)));
    }
    for (; i < half; i++) {
        float a = head[i], b = head[half + i];
        head[i] = a * cosines[i] - b * sines[i];
        head[half + i] = b * cosines[i] + a * sines[i];
    }
}

static void write_int8(const float *head, long head_dim, int8_t *to, float *scale) {
    float largest = 0.0f;
    int broken = 0;
    for (long i = 0; i < head_dim; i++) {
        largest = fabsf(head[i]) > largest ? fabsf(head[i]) : largest;
        broken |= !isfinite(head[i]);
    }
    *scale = broken ? NAN : largest / 127.0f;  // NaN reaches the output, where stages look for it
    float factor = largest > 0.0f && !broken ? 127.0f / largest : 0.0f;
    for (long i = 0; i < head_dim; i++) to[i] = broken ? 0 : (int8_t)rintf(head[i] * factor);
}

static void write_head(const Rotary *rotary, const float *head, long index) {
    long at = index * rotary->head_dim;
    if (rotary->cache_dtype == INT8_CACHE)
        write_int8(head, rotary->head_dim, (int8_t *)rotary->cache + at, rotary->scales + index);
    else narrow_row(head, rotary->cache, at, rotary->cache_dtype, rotary->head_dim);
}

static void rotate_row(const Rotary *rotary, long row, long slot, long position) {
    long dim = rotary->head_dim, kv_heads = rotary->kv_heads, n_heads = rotary->n_heads;
    long at = row * (n_heads + 2 * kv_heads) * dim, index = (slot * rotary->slot_rows + position) * 2 * kv_heads;
    float head[dim];
    for (long h = 0; h < n_heads; h++, at += dim) {
        rotated(rotary, row, at, rotary->q_norm, head);
        narrow_row(head, rotary->heads, at, rotary->dtype, dim);
    }
    for (long h = 0; h < kv_heads; h++, at += dim) {
        rotated(rotary, row, at, rotary->k_norm, head);
        if (rotary->cache) write_head(rotary, head, index + h);
        else narrow_row(head, rotary->heads, at, rotary->dtype, dim);
    }
    for (long h = 0; h < kv_heads && rotary->cache; h++, at += dim) {
        widen_row(rotary->heads, at, rotary->dtype, dim, head);
        write_head(rotary, head, index + kv_heads + h);
    }
}

void KERNEL(rotate_part)(const Rotary *rotary, int thread, int n_threads) {
    long begin = rotary->rows * thread / n_threads, end = rotary->rows * (thread + 1) / n_threads;
    for (const Run *run = rotary->runs; run < rotary->runs + rotary->n_runs; run++)
        for (long i = 0; i < run->length; i++)
            if (run->row + i >= begin && run->row + i < end) rotate_row(rotary, run->row + i, run->slot, run->start + i);
}

static void run_rotate(void *rotary, int thread, int n_threads) { KERNEL(rotate_part)(rotary, thread, n_threads); }

void KERNEL(rotate)(const Rotary *rotary) { mdi_parallel(run_rotate, (void *)rotary); }
