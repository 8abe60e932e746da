// Vectors of 8 floats: AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#define LANES 8
typedef __m256 vfloat;
typedef __m256i vint;

INLINE vfloat vf_zero(void) { return _mm256_setzero_ps(); }
INLINE vfloat vf_set1(float value) { return _mm256_set1_ps(value); }
INLINE vfloat vf_load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void vf_store(float *to, vfloat value) { _mm256_storeu_ps(to, value); }

INLINE vfloat vf_add(vfloat a, vfloat b) { return _mm256_add_ps(a, b); }
INLINE vfloat vf_sub(vfloat a, vfloat b) { return _mm256_sub_ps(a, b); }
INLINE vfloat vf_mul(vfloat a, vfloat b) { return _mm256_mul_ps(a, b); }
INLINE vfloat vf_div(vfloat a, vfloat b) { return _mm256_div_ps(a, b); }
INLINE vfloat vf_fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vfloat vf_max(vfloat a, vfloat b) { return _mm256_max_ps(a, b); }
INLINE vfloat vf_min(vfloat a, vfloat b) { return _mm256_min_ps(a, b); }
INLINE vfloat vf_abs(vfloat a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE vfloat vf_sqrt(vfloat a) { return _mm256_sqrt_ps(a); }

INLINE vint vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vint vi_set1(int32_t value) { return _mm256_set1_epi32(value); }
INLINE vint vi_add(vint a, vint b) { return _mm256_add_epi32(a, b); }
INLINE vint vi_sub(vint a, vint b) { return _mm256_sub_epi32(a, b); }
INLINE vint vi_halve(vint a) { return _mm256_srai_epi32(a, 1); }
INLINE vint vi_round(vfloat a) { return _mm256_cvtps_epi32(a); }
INLINE vfloat vi_to_float(vint a) { return _mm256_cvtepi32_ps(a); }
INLINE vfloat vf_power2(vint n) {  // -126 <= n <= 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}

INLINE vint vi_byte(vint a, int i) { return _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * i), 24); }

INLINE void vi_transpose(vint rows[LANES]) {
    vint pairs[8], fours[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

INLINE float vf_sum(vfloat a) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float vf_largest(vfloat a) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE vfloat vf_load_bf16(const uint16_t *from) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

INLINE void vf_store_bf16(uint16_t *to, vfloat value) {
    __m256i bits = _mm256_castps_si256(value), high = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, is_nan);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
    _mm_storeu_si128((__m128i *)to, packed);
}

INLINE vfloat vf_load_f16(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }

INLINE void vf_store_f16(uint16_t *to, vfloat value) {
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

// LANES int8 values, saturated.
INLINE void vi_store_int8(int8_t *to, vint a) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i *)to, _mm_packs_epi16(words, words));
}

INLINE vfloat vf_load_int8(const int8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

// Products: 16 outputs in a panel, 6 rows by 2 vectors in the registers; up to 3 rows take two panels at once.
enum { PANEL = 16, TILE_ROWS = 6, FEW_ROWS = 3, INT_ROWS = 3 };

INLINE vint vi_load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void vi_store(void *to, vint value) { _mm256_storeu_si256((__m256i *)to, value); }
INLINE vfloat vf_low_bf16(vint pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
INLINE vfloat vf_high_bf16(vint pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)));
}

#define HAS_BF16_DOT 0
INLINE vfloat vf_dot_bf16(vfloat sum, vint weights, vint x) {  // adds the products of two pairs of bfloat16
    return vf_fma(vf_high_bf16(weights), vf_high_bf16(x), vf_fma(vf_low_bf16(weights), vf_low_bf16(x), sum));
}

INLINE vfloat vf_load_uint8(const uint8_t *from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)));
}

INLINE vint vi_low_nibbles(vint bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
INLINE vint vi_high_nibbles(vint bytes) { return vi_low_nibbles(_mm256_srli_epi16(bytes, 4)); }

// Dot products: to every int32 lane, add the four products of its bytes. vi_dot takes weights as WEIGHT_OFFSET says,
// vi_dot_small weights of 0 to 15, whose sums over 32 inputs may stand in 16 bits until vi_small_total.
#if defined(MDI_AVX2VNNI)
enum { WEIGHT_OFFSET = 128, SMALL_IN_HALVES = 0 };
INLINE vint vi_dot(vint sum, vint weights, vint x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
INLINE vint vi_dot_small(vint sum, vint weights, vint x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
INLINE vint vi_small_total(vint sum) { return sum; }
#else
enum { WEIGHT_OFFSET = 0, SMALL_IN_HALVES = 1 };
INLINE vint vi_dot(vint sum, vint weights, vint x) {  // |w| * (x with the sign of w): two products are at most 32,512
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE vint vi_dot_small(vint sum, vint weights, vint x) {  // 16 products of at most 15 * 127 fit 16 bits
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
}
INLINE vint vi_small_total(vint sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
#endif
