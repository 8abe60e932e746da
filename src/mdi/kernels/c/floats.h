// Rows of numbers of any dtype as float32, and back.
#pragma once

#include "vector.h"

INLINE void widen_row_of(const void *from, long at, long n, float *to, int dtype) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(to + i, vf_load_as(from, at + i, dtype));
    for (; i < n; i++) to[i] = load_as(from, at + i, dtype);
}

INLINE void narrow_row_of(const float *from, void *to, long at, long n, int dtype) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) vf_store_as(to, at + i, vf_load(from + i), dtype);
    for (; i < n; i++) store_as(to, at + i, from[i], dtype);
}

// n numbers from index `at` on.
static inline void widen_row(const void *from, long at, int dtype, long n, float *to) {
    switch (dtype) {
        case FLOAT32: memcpy(to, (const float *)from + at, sizeof(float) * n); break;
        case BFLOAT16: widen_row_of(from, at, n, to, BFLOAT16); break;
        case FLOAT16: widen_row_of(from, at, n, to, FLOAT16); break;
    }
}

static inline void narrow_row(const float *from, void *to, long at, int dtype, long n) {
    switch (dtype) {
        case FLOAT32: memcpy((float *)to + at, from, sizeof(float) * n); break;
        case BFLOAT16: narrow_row_of(from, to, at, n, BFLOAT16); break;
        case FLOAT16: narrow_row_of(from, to, at, n, FLOAT16); break;
    }
}

// The sum of n numbers, or of their squares: LANES partial sums, one after the other.
INLINE float sum_row(const float *from, long n) {
    vfloat sums = vf_zero();
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums = vf_add(sums, vf_load(from + i));
    if (i < n) sums = vf_add(sums, vf_load_some_as(from, i, (int)(n - i), FLOAT32));
    return vf_sum(sums);
}

INLINE float sum_squares(const float *from, long n) {
    vfloat sums = vf_zero();
    long i = 0;
    for (; i + LANES <= n; i += LANES) sums = vf_fma(vf_load(from + i), vf_load(from + i), sums);
    if (i < n) {
        vfloat rest = vf_load_some_as(from, i, (int)(n - i), FLOAT32);
        sums = vf_fma(rest, rest, sums);
    }
    return vf_sum(sums);
}
