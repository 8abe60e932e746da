// Vectors of 8 floats in plain C: for machines without any of the other instruction sets, and the tests' reference.
#pragma once

#define LANES 8
typedef struct { float lane[LANES]; } vfloat;
typedef struct { int32_t lane[LANES]; } vint;

#define EACH_LANE for (int i = 0; i < LANES; i++)

INLINE vfloat vf_set1(float value) { vfloat r; EACH_LANE r.lane[i] = value; return r; }
INLINE vfloat vf_zero(void) { return vf_set1(0.0f); }
INLINE vfloat vf_load(const float *from) { vfloat r; EACH_LANE r.lane[i] = from[i]; return r; }
INLINE void vf_store(float *to, vfloat a) { EACH_LANE to[i] = a.lane[i]; }

INLINE vfloat vf_add(vfloat a, vfloat b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
INLINE vfloat vf_sub(vfloat a, vfloat b) { EACH_LANE a.lane[i] -= b.lane[i]; return a; }
INLINE vfloat vf_mul(vfloat a, vfloat b) { EACH_LANE a.lane[i] *= b.lane[i]; return a; }
INLINE vfloat vf_div(vfloat a, vfloat b) { EACH_LANE a.lane[i] /= b.lane[i]; return a; }
INLINE vfloat vf_fma(vfloat a, vfloat b, vfloat c) { EACH_LANE c.lane[i] += a.lane[i] * b.lane[i]; return c; }
INLINE vfloat vf_max(vfloat a, vfloat b) { EACH_LANE b.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; return b; }
INLINE vfloat vf_min(vfloat a, vfloat b) { EACH_LANE b.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; return b; }
INLINE vfloat vf_abs(vfloat a) { EACH_LANE a.lane[i] = fabsf(a.lane[i]); return a; }
INLINE vfloat vf_sqrt(vfloat a) { EACH_LANE a.lane[i] = sqrtf(a.lane[i]); return a; }

INLINE vint vi_set1(int32_t value) { vint r; EACH_LANE r.lane[i] = value; return r; }
INLINE vint vi_zero(void) { return vi_set1(0); }
INLINE vint vi_add(vint a, vint b) { EACH_LANE a.lane[i] += b.lane[i]; return a; }
INLINE vint vi_sub(vint a, vint b) { EACH_LANE a.lane[i] -= b.lane[i]; return a; }
INLINE vint vi_halve(vint a) { EACH_LANE a.lane[i] >>= 1; return a; }
INLINE vfloat vi_to_float(vint a) { vfloat r; EACH_LANE r.lane[i] = (float)a.lane[i]; return r; }
INLINE vfloat vf_power2(vint n) { vfloat r; EACH_LANE r.lane[i] = float_of((uint32_t)(n.lane[i] + 127) << 23); return r; }

INLINE vint vi_round(vfloat a) {  // what is no int32 becomes the smallest one, as on x86
    vint r;
    EACH_LANE r.lane[i] = fabsf(a.lane[i]) < 0x1p31f ? (int32_t)rintf(a.lane[i]) : INT32_MIN;
    return r;
}

INLINE float vf_sum(vfloat a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.lane[i] += a.lane[i + half];
    return a.lane[0];
}

INLINE float vf_largest(vfloat a) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
    return a.lane[0];
}

INLINE vfloat vf_load_bf16(const uint16_t *from) { vfloat r; EACH_LANE r.lane[i] = from_bf16(from[i]); return r; }
INLINE void vf_store_bf16(uint16_t *to, vfloat a) { EACH_LANE to[i] = to_bf16(a.lane[i]); }
INLINE vfloat vf_load_f16(const uint16_t *from) { vfloat r; EACH_LANE r.lane[i] = from_f16(from[i]); return r; }
INLINE void vf_store_f16(uint16_t *to, vfloat a) { EACH_LANE to[i] = to_f16(a.lane[i]); }

// LANES int8 values, saturated.
INLINE void vi_store_int8(int8_t *to, vint a) {
    EACH_LANE to[i] = (int8_t)(a.lane[i] > 127 ? 127 : a.lane[i] < -128 ? -128 : a.lane[i]);
}

// Products: see vector_avx2.h.
enum { PANEL = 2 * LANES, TILE_ROWS = 6, FEW_ROWS = 3 };

INLINE vint vi_load(const void *from) { vint r; memcpy(&r, from, sizeof r); return r; }
INLINE vfloat vf_low_bf16(vint a) { vfloat r; EACH_LANE r.lane[i] = float_of((uint32_t)a.lane[i] << 16); return r; }
INLINE vfloat vf_high_bf16(vint a) { vfloat r; EACH_LANE r.lane[i] = float_of((uint32_t)a.lane[i] & 0xffff0000); return r; }
