// Vectors of 16 floats: AVX-512 with VNNI, with and without bf16.
#pragma once

#include <immintrin.h>

#define LANES 16
typedef __m512 vfloat;
typedef __m512i vint;

INLINE vfloat vf_zero(void) { return _mm512_setzero_ps(); }
INLINE vfloat vf_set1(float value) { return _mm512_set1_ps(value); }
INLINE vfloat vf_load(const float *from) { return _mm512_loadu_ps(from); }
INLINE void vf_store(float *to, vfloat value) { _mm512_storeu_ps(to, value); }

INLINE vfloat vf_add(vfloat a, vfloat b) { return _mm512_add_ps(a, b); }
INLINE vfloat vf_sub(vfloat a, vfloat b) { return _mm512_sub_ps(a, b); }
INLINE vfloat vf_mul(vfloat a, vfloat b) { return _mm512_mul_ps(a, b); }
INLINE vfloat vf_div(vfloat a, vfloat b) { return _mm512_div_ps(a, b); }
INLINE vfloat vf_fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vfloat vf_max(vfloat a, vfloat b) { return _mm512_max_ps(a, b); }
INLINE vfloat vf_min(vfloat a, vfloat b) { return _mm512_min_ps(a, b); }
INLINE vfloat vf_abs(vfloat a) { return _mm512_abs_ps(a); }
INLINE vfloat vf_sqrt(vfloat a) { return _mm512_sqrt_ps(a); }

INLINE vint vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vint vi_set1(int32_t value) { return _mm512_set1_epi32(value); }
INLINE vint vi_load(const void *from) { return _mm512_loadu_si512(from); }
INLINE void vi_store(void *to, vint value) { _mm512_storeu_si512(to, value); }
INLINE vint vi_add(vint a, vint b) { return _mm512_add_epi32(a, b); }
INLINE vint vi_sub(vint a, vint b) { return _mm512_sub_epi32(a, b); }
INLINE vint vi_halve(vint a) { return _mm512_srai_epi32(a, 1); }
INLINE vint vi_round(vfloat a) { return _mm512_cvtps_epi32(a); }
INLINE vfloat vi_to_float(vint a) { return _mm512_cvtepi32_ps(a); }
INLINE vfloat vf_power2(vint n) {  // -126 <= n <= 127
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23));
}

INLINE vint vi_byte(vint a, int i) {
    return _mm512_srai_epi32(_mm512_slli_epi32(a, (unsigned)(24 - 8 * i)), 24);
}

INLINE void vi_transpose(vint rows[LANES]) {
    vint pairs[16], fours[16], halves[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {  // fours[i + j]: column 4k + j of four rows, in the quarter k
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    UNROLL for (int i = 0; i < 16; i += 8)  // halves: quarters 0 and 2, and 1 and 3, of eight rows
        UNROLL for (int j = i; j < i + 4; j++) {
            halves[j] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0x88);
            halves[j + 4] = _mm512_shuffle_i32x4(fours[j], fours[j + 4], 0xdd);
        }
    UNROLL for (int j = 0; j < 8; j++) {
        rows[j] = _mm512_shuffle_i32x4(halves[j], halves[j + 8], 0x88);
        rows[j + 8] = _mm512_shuffle_i32x4(halves[j], halves[j + 8], 0xdd);
    }
}

INLINE float vf_sum(vfloat a) {
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

INLINE float vf_largest(vfloat a) {
    __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE vfloat vf_load_bf16(const uint16_t *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// With integers: the instruction for it makes subnormal numbers zero.
INLINE void vf_store_bf16(uint16_t *to, vfloat value) {
    __m512i bits = _mm512_castps_si512(value), high = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, quiet);
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(result));
}

INLINE vfloat vf_load_f16(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

INLINE void vf_store_f16(uint16_t *to, vfloat value) {
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
}

INLINE vfloat vf_load_int8(const int8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

INLINE vfloat vf_load_uint8(const uint8_t *from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from)));
}

// LANES int8 values, saturated.
INLINE void vi_store_int8(int8_t *to, vint a) { _mm_storeu_si128((__m128i *)to, _mm512_cvtsepi32_epi8(a)); }

// Products: 64 outputs in a panel, 6 rows by 4 vectors in the registers.
enum { PANEL = 64, TILE_ROWS = 6, FEW_ROWS = 0, INT_ROWS = 6 };

INLINE vfloat vf_low_bf16(vint pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE vfloat vf_high_bf16(vint pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
}

#if defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
INLINE vfloat vf_dot_bf16(vfloat sum, vint weights, vint x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
}
#else
#define HAS_BF16_DOT 0
INLINE vfloat vf_dot_bf16(vfloat sum, vint weights, vint x) { return (void)weights, (void)x, sum; }  // never called
#endif

INLINE vint vi_low_nibbles(vint bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
INLINE vint vi_high_nibbles(vint bytes) { return vi_low_nibbles(_mm512_srli_epi16(bytes, 4)); }

// Dot products: see vector_avx2.h.
enum { WEIGHT_OFFSET = 128, SMALL_IN_HALVES = 0 };
INLINE vint vi_dot(vint sum, vint weights, vint x) { return _mm512_dpbusd_epi32(sum, weights, x); }
INLINE vint vi_dot_small(vint sum, vint weights, vint x) { return _mm512_dpbusd_epi32(sum, weights, x); }
INLINE vint vi_small_total(vint sum) { return sum; }
