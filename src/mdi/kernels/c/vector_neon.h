// Vectors of 4 floats: NEON with dot products, and with bf16 where the compiler is told so.
#pragma once

#if !defined(__clang__)  // GCC takes no extension from -mcpu=generic
#if defined(MDI_NEONBF16)
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm+bf16")
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#endif
#include <arm_neon.h>

#define LANES 4
typedef float32x4_t vfloat;
typedef int32x4_t vint;

INLINE vfloat vf_zero(void) { return vdupq_n_f32(0); }
INLINE vfloat vf_set1(float value) { return vdupq_n_f32(value); }
INLINE vfloat vf_load(const float *from) { return vld1q_f32(from); }
INLINE void vf_store(float *to, vfloat value) { vst1q_f32(to, value); }

INLINE vfloat vf_add(vfloat a, vfloat b) { return vaddq_f32(a, b); }
INLINE vfloat vf_sub(vfloat a, vfloat b) { return vsubq_f32(a, b); }
INLINE vfloat vf_mul(vfloat a, vfloat b) { return vmulq_f32(a, b); }
INLINE vfloat vf_div(vfloat a, vfloat b) { return vdivq_f32(a, b); }
INLINE vfloat vf_fma(vfloat a, vfloat b, vfloat c) { return vfmaq_f32(c, a, b); }
INLINE vfloat vf_max(vfloat a, vfloat b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE vfloat vf_min(vfloat a, vfloat b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
INLINE vfloat vf_abs(vfloat a) { return vabsq_f32(a); }
INLINE vfloat vf_sqrt(vfloat a) { return vsqrtq_f32(a); }

INLINE vint vi_zero(void) { return vdupq_n_s32(0); }
INLINE vint vi_set1(int32_t value) { return vdupq_n_s32(value); }
INLINE vint vi_load(const void *from) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)from)); }
INLINE void vi_store(void *to, vint value) { vst1q_u8((uint8_t *)to, vreinterpretq_u8_s32(value)); }
INLINE vint vi_add(vint a, vint b) { return vaddq_s32(a, b); }
INLINE vint vi_sub(vint a, vint b) { return vsubq_s32(a, b); }
INLINE vint vi_halve(vint a) { return vshrq_n_s32(a, 1); }
INLINE vint vi_round(vfloat a) { return vcvtnq_s32_f32(a); }
INLINE vfloat vi_to_float(vint a) { return vcvtq_f32_s32(a); }
INLINE vfloat vf_power2(vint n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }

INLINE vint vi_byte(vint a, int i) { return vshrq_n_s32(vshlq_s32(a, vdupq_n_s32(24 - 8 * i)), 24); }

INLINE void vi_transpose(vint rows[LANES]) {
    int32x4x2_t low = vzipq_s32(rows[0], rows[2]), high = vzipq_s32(rows[1], rows[3]);
    int32x4x2_t first = vzipq_s32(low.val[0], high.val[0]), last = vzipq_s32(low.val[1], high.val[1]);
    rows[0] = first.val[0], rows[1] = first.val[1], rows[2] = last.val[0], rows[3] = last.val[1];
}

INLINE float vf_sum(vfloat a) {
    float32x2_t two = vadd_f32(vget_low_f32(a), vget_high_f32(a));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

INLINE float vf_largest(vfloat a) { return vmaxvq_f32(a); }

INLINE vfloat vf_load_bf16(const uint16_t *from) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from), 16)); }

INLINE void vf_store_bf16(uint16_t *to, vfloat value) {
    uint32x4_t bits = vreinterpretq_u32_f32(value), high = vshrq_n_u32(bits, 16);
    uint32x4_t odd = vandq_u32(high, vdupq_n_u32(1));
    uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    uint32x4_t quiet = vorrq_u32(high, vdupq_n_u32(0x40));
    vst1_u16(to, vmovn_u32(vbslq_u32(vceqq_f32(value, value), rounded, quiet)));
}

INLINE vfloat vf_load_f16(const uint16_t *from) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))); }
INLINE void vf_store_f16(uint16_t *to, vfloat value) { vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(value))); }

INLINE vfloat vf_load_int8(const int8_t *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}

INLINE vfloat vf_load_uint8(const uint8_t *from) {
    uint32_t four;
    memcpy(&four, from, 4);
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four))))));
}

// LANES int8 values, saturated.
INLINE void vi_store_int8(int8_t *to, vint a) {
    int16x4_t words = vqmovn_s32(a);
    int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    int32_t four = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
    memcpy(to, &four, 4);
}

// Products: 16 outputs in a panel, 6 rows by 4 vectors in the registers; up to 3 rows take two panels at once.
enum { PANEL = 16, TILE_ROWS = 6, FEW_ROWS = 3, INT_ROWS = 6 };

INLINE vfloat vf_low_bf16(vint pairs) { return vreinterpretq_f32_s32(vshlq_n_s32(pairs, 16)); }
INLINE vfloat vf_high_bf16(vint pairs) { return vreinterpretq_f32_s32(vandq_s32(pairs, vdupq_n_s32(-0x10000))); }

#if defined(MDI_NEONBF16)
#define HAS_BF16_DOT 1
INLINE vfloat vf_dot_bf16(vfloat sum, vint weights, vint x) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_s32(weights), vreinterpretq_bf16_s32(x));
}
#else
#define HAS_BF16_DOT 0
INLINE vfloat vf_dot_bf16(vfloat sum, vint weights, vint x) {  // adds the products of two pairs of bfloat16
    return vf_fma(vf_high_bf16(weights), vf_high_bf16(x), vf_fma(vf_low_bf16(weights), vf_low_bf16(x), sum));
}
#endif

INLINE vint vi_low_nibbles(vint bytes) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(bytes), vdupq_n_u8(15)));
}
INLINE vint vi_high_nibbles(vint bytes) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(bytes), 4)); }

// Dot products: see vector_avx2.h.
enum { WEIGHT_OFFSET = 0, SMALL_IN_HALVES = 0 };
INLINE vint vi_dot(vint sum, vint weights, vint x) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(x));
}
INLINE vint vi_dot_small(vint sum, vint weights, vint x) { return vi_dot(sum, weights, x); }
INLINE vint vi_small_total(vint sum) { return sum; }

#if defined(MDI_NEONBF16)  // with i8mm: two rows by two outputs, eight inputs at a time
#define HAS_ROW_PAIRS 1
INLINE vint vi_dot_rows(vint sum, vint rows, vint outputs) {
    return vmmlaq_s32(sum, vreinterpretq_s8_s32(rows), vreinterpretq_s8_s32(outputs));
}
INLINE vint vi_two_outputs(vint first, vint second, int high) {  // of two steps of 4 outputs
    return high ? vzip2q_s32(first, second) : vzip1q_s32(first, second);
}
INLINE vint vi_two_rows(const int8_t *first, const int8_t *second) {  // of two steps
    int32x2_t a = vreinterpret_s32_s8(vld1_s8(first)), b = vreinterpret_s32_s8(vld1_s8(second));
    return vcombine_s32(vzip1_s32(a, b), vzip2_s32(a, b));
}
INLINE vint vi_row_of(vint low, vint high, int second) {  // of sums of outputs 0 and 1, and 2 and 3
    int64x2_t a = vreinterpretq_s64_s32(low), b = vreinterpretq_s64_s32(high);
    return vreinterpretq_s32_s64(second ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
}
#endif
