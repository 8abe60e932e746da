// Vectors of 4 floats in C without intrinsics: for machines without any of the other instruction sets, and the tests' reference.
#pragma once

// With EMULATED_AVX512 they have the sizes and the integer rules of vector_avx512.h, so that tests run its kernels anywhere.
#if defined(EMULATED_AVX512)
#define LANES 16
#define HAS_BF16_DOT 1
enum { PANEL = 64, TILE_ROWS = 6, FEW_ROWS = 0, INT_ROWS = 6, WEIGHT_OFFSET = 128 };
#else
#define LANES 4
#define HAS_BF16_DOT 0
enum { PANEL = 16, TILE_ROWS = 1, FEW_ROWS = 0, INT_ROWS = 1, WEIGHT_OFFSET = 0 };
#endif
typedef float vfloat __attribute__((vector_size(4 * LANES)));
typedef int32_t vint __attribute__((vector_size(4 * LANES)));

#define EACH_LANE for (int i = 0; i < LANES; i++)

INLINE vfloat vf_set1(float value) { vfloat r = {0}; EACH_LANE r[i] = value; return r; }
INLINE vfloat vf_zero(void) { return vf_set1(0.0f); }
INLINE vfloat vf_load(const float *from) { vfloat r = {0}; EACH_LANE r[i] = from[i]; return r; }
INLINE void vf_store(float *to, vfloat a) { EACH_LANE to[i] = a[i]; }

INLINE vfloat vf_add(vfloat a, vfloat b) { return a + b; }
INLINE vfloat vf_sub(vfloat a, vfloat b) { return a - b; }
INLINE vfloat vf_mul(vfloat a, vfloat b) { return a * b; }
INLINE vfloat vf_div(vfloat a, vfloat b) { return a / b; }
INLINE vfloat vf_fma(vfloat a, vfloat b, vfloat c) { return a * b + c; }
INLINE vfloat vf_max(vfloat a, vfloat b) { EACH_LANE b[i] = a[i] > b[i] ? a[i] : b[i]; return b; }
INLINE vfloat vf_min(vfloat a, vfloat b) { EACH_LANE b[i] = a[i] < b[i] ? a[i] : b[i]; return b; }
INLINE vfloat vf_abs(vfloat a) { EACH_LANE a[i] = fabsf(a[i]); return a; }
INLINE vfloat vf_sqrt(vfloat a) { EACH_LANE a[i] = sqrtf(a[i]); return a; }

INLINE vint vi_set1(int32_t value) { vint r = {0}; EACH_LANE r[i] = value; return r; }
INLINE vint vi_zero(void) { return vi_set1(0); }
INLINE vint vi_add(vint a, vint b) { return a + b; }
INLINE vint vi_sub(vint a, vint b) { return a - b; }
INLINE vint vi_halve(vint a) { return a >> 1; }
INLINE vfloat vi_to_float(vint a) { return __builtin_convertvector(a, vfloat); }
INLINE vfloat vf_power2(vint n) { return (vfloat)((n + 127) << 23); }

INLINE vint vi_round(vfloat a) {  // what is no int32 becomes the smallest one, as on x86
    vint r = {0};
    EACH_LANE r[i] = fabsf(a[i]) < 0x1p31f ? (int32_t)rintf(a[i]) : INT32_MIN;
    return r;
}

INLINE float vf_sum(vfloat a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] += a[i + half];
    return a[0];
}

INLINE float vf_largest(vfloat a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
    return a[0];
}

INLINE vfloat vf_load_bf16(const uint16_t *from) { vfloat r = {0}; EACH_LANE r[i] = from_bf16(from[i]); return r; }
INLINE void vf_store_bf16(uint16_t *to, vfloat a) { EACH_LANE to[i] = to_bf16(a[i]); }
INLINE vfloat vf_load_f16(const uint16_t *from) { vfloat r = {0}; EACH_LANE r[i] = from_f16(from[i]); return r; }
INLINE void vf_store_f16(uint16_t *to, vfloat a) { EACH_LANE to[i] = to_f16(a[i]); }

// LANES int8 values, saturated.
INLINE void vi_store_int8(int8_t *to, vint a) {
    EACH_LANE to[i] = (int8_t)(a[i] > 127 ? 127 : a[i] < -128 ? -128 : a[i]);
}

INLINE vint vi_load(const void *from) { vint r; memcpy(&r, from, sizeof r); return r; }
INLINE void vi_store(void *to, vint value) { memcpy(to, &value, sizeof value); }
INLINE vfloat vf_low_bf16(vint a) { return (vfloat)(a << 16); }
INLINE vfloat vf_high_bf16(vint a) { return (vfloat)(a & -0x10000); }
INLINE vfloat vf_load_uint8(const uint8_t *from) { vfloat r = {0}; EACH_LANE r[i] = from[i]; return r; }

INLINE vfloat vf_load_int8(const int8_t *from) { vfloat r = {0}; EACH_LANE r[i] = from[i]; return r; }

INLINE vint vi_byte(vint a, int i) { return a << (24 - 8 * i) >> 24; }

INLINE void vi_transpose(vint rows[LANES]) {
    vint columns[LANES];
    for (int column = 0; column < LANES; column++) EACH_LANE columns[column][i] = rows[i][column];
    memcpy(rows, columns, sizeof columns);
}

INLINE vint vi_low_nibbles(vint a) { return a & 0x0f0f0f0f; }
INLINE vint vi_high_nibbles(vint a) { return a >> 4 & 0x0f0f0f0f; }

enum { SMALL_IN_HALVES = 0 };
INLINE vint dot_bytes(vint sum, vint weights, vint x, int is_unsigned) {
    uint8_t w[4 * LANES];
    int8_t values[4 * LANES];
    memcpy(w, &weights, sizeof w);
    memcpy(values, &x, sizeof values);
    EACH_LANE for (int j = 4 * i; j < 4 * i + 4; j++) sum[i] += (is_unsigned ? w[j] : (int8_t)w[j]) * values[j];
    return sum;
}
INLINE vint vi_dot(vint sum, vint weights, vint x) { return dot_bytes(sum, weights, x, WEIGHT_OFFSET != 0); }
INLINE vint vi_dot_small(vint sum, vint weights, vint x) { return vi_dot(sum, weights, x); }
INLINE vint vi_small_total(vint sum) { return sum; }

INLINE vfloat vf_dot_bf16(vfloat sum, vint weights, vint x) {  // adds the products of two pairs of bfloat16
    return vf_fma(vf_high_bf16(weights), vf_high_bf16(x), vf_fma(vf_low_bf16(weights), vf_low_bf16(x), sum));
}
