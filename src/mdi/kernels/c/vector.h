// Vectors of floats of one instruction set, under the same names in each: kernels above them are written once.
//
// LANES is the number of floats in a vector. Contraction must be off (-ffp-contract=off): only vf_fma fuses.
//
//   vf_zero vf_set1 vf_load vf_store            float32 in memory (unaligned)
//   vf_load_bf16 vf_store_bf16 vf_load_f16 ...  converted; stores round to nearest even and keep NaN
//   vf_load_as vf_store_as vf_load_some_as ...  of a dtype given as a constant; "some": the first n lanes, others 0
//   vf_add vf_sub vf_mul vf_div vf_fma          vf_fma(a, b, c) = a * b + c
//   vf_max vf_min vf_abs vf_sqrt                vf_max(a, b), vf_min(a, b) are b where either is NaN
//   vf_sum vf_largest                           across lanes, in a fixed order
//   vf_exp vf_exp2 vf_sigmoid vf_gelu vf_tanh_gelu vf_tanh
//   vi_zero vi_set1 vi_add vi_sub vi_round vi_to_float vi_store_int8   int32 lanes; vi_round: to nearest even
//   vi_byte vi_transpose                        byte i of each lane, with its sign; LANES vectors, rows to columns
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "kernel.h"

#define INLINE static inline __attribute__((always_inline))

// Before a loop of constant length over vectors, which then stay in registers.
#if defined(MDI_SCALAR) || defined(EMULATED_AVX512)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// Types of tensors, as kernels are given them.
enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float from_bf16(uint16_t value) { return float_of((uint32_t)value << 16); }

INLINE uint16_t to_bf16(float value) {
    uint32_t bits = bits_of(value);
    if (value != value) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_f16(uint16_t value) {
    uint32_t sign = (uint32_t)(value & 0x8000) << 16, rest = value & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 1u << 22 : 0));
    float scaled = float_of(rest << 13) * 0x1p112f;  // exact, subnormals too
    return float_of(sign | bits_of(scaled));
}

INLINE uint16_t to_f16(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // 65520 rounds to infinity
    if (rest < 0x38800000)                                      // subnormal: adding 0.5 rounds at 2^-24
        return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

INLINE long dtype_bytes(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE float load_as(const void *from, long index, int dtype) {
    if (dtype == FLOAT32) return ((const float *)from)[index];
    uint16_t value = ((const uint16_t *)from)[index];
    return dtype == BFLOAT16 ? from_bf16(value) : from_f16(value);
}

INLINE void store_as(void *to, long index, float value, int dtype) {
    if (dtype == FLOAT32) ((float *)to)[index] = value;
    else ((uint16_t *)to)[index] = dtype == BFLOAT16 ? to_bf16(value) : to_f16(value);
}

#if defined(EMULATED_AVX512)
#include "vector_scalar.h"
#elif defined(MDI_AVX512) || defined(MDI_AVX512BF16) || defined(MDI_AMX)
#include "vector_avx512.h"
#elif defined(MDI_AVX2) || defined(MDI_AVX2VNNI)
#include "vector_avx2.h"
#elif defined(MDI_NEON) || defined(MDI_NEONBF16)
#include "vector_neon.h"
#else
#include "vector_scalar.h"
#endif

INLINE vfloat vf_load_as(const void *from, long index, int dtype) {
    if (dtype == FLOAT32) return vf_load((const float *)from + index);
    const uint16_t *halves = (const uint16_t *)from + index;
    return dtype == BFLOAT16 ? vf_load_bf16(halves) : vf_load_f16(halves);
}

INLINE void vf_store_as(void *to, long index, vfloat value, int dtype) {
    if (dtype == FLOAT32) vf_store((float *)to + index, value);
    else if (dtype == BFLOAT16) vf_store_bf16((uint16_t *)to + index, value);
    else vf_store_f16((uint16_t *)to + index, value);
}

// The first n of LANES values, 0 in the other lanes.
INLINE vfloat vf_load_some_as(const void *from, long index, int n, int dtype) {
    float values[LANES] = {0};
    for (int lane = 0; lane < n; lane++) values[lane] = load_as(from, index + lane, dtype);
    return vf_load(values);
}

INLINE void vf_store_some_as(void *to, long index, vfloat value, int n, int dtype) {
    float values[LANES];
    vf_store(values, value);
    for (int lane = 0; lane < n; lane++) store_as(to, index + lane, values[lane], dtype);
}

// The first n values, mostly all of them.
INLINE vfloat vf_load_few_as(const void *from, long index, int n, int dtype) {
    return n == LANES ? vf_load_as(from, index, dtype) : vf_load_some_as(from, index, n, dtype);
}

INLINE void vf_store_few_as(void *to, long index, vfloat value, int n, int dtype) {
    if (n == LANES) vf_store_as(to, index, value, dtype);
    else vf_store_some_as(to, index, value, n, dtype);
}

INLINE vfloat vf_round_as(vfloat value, int dtype) {
    if (dtype == FLOAT32) return value;
    uint16_t rounded[LANES];
    vf_store_as(rounded, 0, value, dtype);
    return vf_load_as(rounded, 0, dtype);
}

// e^x within 2 units in the last place: 2^n * e^r with |r| <= ln 2 / 2, e^r by its Taylor series of degree 7. 0 below
// -104, infinity above 89, subnormal between -87.3 and -104: 2^n is multiplied in two factors.
INLINE vfloat vf_exp(vfloat x) {
    x = vf_min(vf_set1(89.0f), vf_max(vf_set1(-104.0f), x));
    vint n = vi_round(vf_mul(x, vf_set1(1.44269504088896f)));
    vfloat whole = vi_to_float(n);
    vfloat r = vf_fma(whole, vf_set1(-0.693145751953125f), x);
    r = vf_fma(whole, vf_set1(-1.42860682030941723e-6f), r);
    vfloat series = vf_set1(1.0f / 5040);
    series = vf_fma(series, r, vf_set1(1.0f / 720));
    series = vf_fma(series, r, vf_set1(1.0f / 120));
    series = vf_fma(series, r, vf_set1(1.0f / 24));
    series = vf_fma(series, r, vf_set1(1.0f / 6));
    series = vf_fma(series, r, vf_set1(0.5f));
    series = vf_fma(series, r, vf_set1(1.0f));
    series = vf_fma(series, r, vf_set1(1.0f));
    vint half = vi_halve(n);
    return vf_mul(vf_mul(series, vf_power2(half)), vf_power2(vi_sub(n, half)));
}

// 2^x for x <= 0 within 2 units in the last place, exactly 1 for 0; 2^-126 below. 2^r with |r| <= 0.5 by the polynomial of
// degree 5 with the least relative error.
INLINE vfloat vf_exp2(vfloat x) {
    x = vf_max(vf_set1(-126.0f), x);
    vint n = vi_round(x);
    vfloat r = vf_sub(x, vi_to_float(n)), series = vf_set1(0.001326472731307149f);
    series = vf_fma(series, r, vf_set1(0.009671512991189957f));
    series = vf_fma(series, r, vf_set1(0.05550733581185341f));
    series = vf_fma(series, r, vf_set1(0.24022242426872253f));
    series = vf_fma(series, r, vf_set1(0.6931470036506653f));
    series = vf_fma(series, r, vf_set1(1.0f));
    return vf_mul(series, vf_power2(n));
}

INLINE vfloat vf_sigmoid(vfloat x) {
    return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), x))));
}

// x times the normal distribution's integral up to x, within 1e-7 of max(1, |x|): erf by Abramowitz and Stegun, 7.1.26.
INLINE vfloat vf_gelu(vfloat x) {
    vfloat size = vf_abs(x), z = vf_mul(size, vf_set1(0.70710678f));
    vfloat t = vf_div(vf_set1(1.0f), vf_fma(z, vf_set1(0.3275911f), vf_set1(1.0f)));
    vfloat series = vf_set1(1.061405429f);
    series = vf_fma(series, t, vf_set1(-1.453152027f));
    series = vf_fma(series, t, vf_set1(1.421413741f));
    series = vf_fma(series, t, vf_set1(-0.284496736f));
    series = vf_fma(series, t, vf_set1(0.254829592f));
    vfloat outside = vf_mul(vf_mul(series, t), vf_exp(vf_sub(vf_zero(), vf_mul(z, z))));  // 1 - erf(z)
    vfloat lost = vf_mul(vf_mul(size, vf_set1(0.5f)), outside);
    return vf_sub(vf_max(vf_zero(), x), lost);
}

// x (1 + tanh(y)) / 2 = x sigmoid(2y) with y = sqrt(2 / pi) (x + 0.044715 x^3): arXiv:1606.08415, section 2.
INLINE vfloat vf_tanh_gelu(vfloat x) {
    vfloat cubed = vf_mul(vf_mul(x, x), vf_mul(x, vf_set1(0.044715f)));
    return vf_mul(x, vf_sigmoid(vf_mul(vf_set1(1.5957691f), vf_add(x, cubed))));
}

// 2 sigmoid(2x) - 1: absolute error below 2e-7, relative error large near 0.
INLINE vfloat vf_tanh(vfloat x) {
    return vf_sub(vf_mul(vf_set1(2.0f), vf_sigmoid(vf_mul(vf_set1(2.0f), x))), vf_set1(1.0f));
}
