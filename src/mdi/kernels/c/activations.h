// Packs the activations of a product: converted to float32, or quantised to int8 by row and group.
#pragma once

#include "work.h"

// Inputs [begin, end) of one tile of rows.
INLINE void pack_rows(const void *x, long stride, long first, int rows, long begin, long end, float *packed, int dtype) {
    for (int r = 0; r < rows; r++) {
        long from = (first + r) * stride, k = begin;
        for (; k + LANES <= end; k += LANES) {
            vfloat values = vf_load_as(x, from + k, dtype);
            if (rows == 1) {
                vf_store(packed + k, values);
                continue;
            }
            float lanes[LANES];
            vf_store(lanes, values);
            for (int i = 0; i < LANES; i++) packed[(k + i) * rows + r] = lanes[i];
        }
        for (; k < end; k++) packed[k * rows + r] = load_as(x, from + k, dtype);
    }
}

// Pairs of bfloat16, as they are. Where the number of inputs is odd, the last pair's second one is zero.
static void pack_pairs(const Product *product, const Activations *packed, int thread, int n_threads) {
    long inputs = product->weight->inputs, pairs = packed->inputs / 2;
    long begin = pairs * thread / n_threads, end = pairs * (thread + 1) / n_threads;
    const uint16_t *x = product->x;
    for (long row = 0; row < product->rows; row++, x += inputs) {
        int r = (int)(row % packed->tile_rows), rows = tile_rows(packed, product->rows, row - r);
        float *tile = packed->floats + (row - r) * pairs;
        for (long pair = begin; pair < end; pair++) {
            uint32_t low = x[2 * pair], high = 2 * pair + 1 < inputs ? x[2 * pair + 1] : 0;
            tile[pair * rows + r] = float_of(low | high << 16);
        }
    }
}

// Steps of 64 bytes, as they are.
static void pack_steps(const Product *product, const Activations *packed, int thread, int n_threads) {
    long steps = packed->inputs * 2 / STEP_BYTES, begin = steps * thread / n_threads, end = steps * (thread + 1) / n_threads;
    const char *x = product->x;
    for (long row = 0; row < product->rows; row++, x += steps * STEP_BYTES) {
        int r = (int)(row % packed->tile_rows), rows = tile_rows(packed, product->rows, row - r);
        char *tile = (char *)packed->floats + ((row - r) * steps + r) * STEP_BYTES;
        for (long step = begin; step < end; step++)
            memcpy(tile + step * rows * STEP_BYTES, x + step * STEP_BYTES, STEP_BYTES);
    }
}

static void pack_floats(const Product *product, const Activations *packed, int thread, int n_threads) {
    long inputs = product->weight->inputs, filled = packed->inputs;
    long begin = inputs * thread / n_threads, end = inputs * (thread + 1) / n_threads;
    for (long first = 0; first < product->rows; first += packed->tile_rows) {
        int rows = tile_rows(packed, product->rows, first);
        float *tile = packed->floats + first * filled;
        if (product->dtype == FLOAT32) pack_rows(product->x, inputs, first, rows, begin, end, tile, FLOAT32);
        if (product->dtype == BFLOAT16) pack_rows(product->x, inputs, first, rows, begin, end, tile, BFLOAT16);
        if (product->dtype == FLOAT16) pack_rows(product->x, inputs, first, rows, begin, end, tile, FLOAT16);
        if (end == inputs)
            for (long k = inputs * rows; k < filled * rows; k++) tile[k] = 0;
    }
}

enum { MAX_GROUP = 256 };

// One group of one row: 127 is the largest number. A group with an infinite number or NaN has the scale NaN.
// sums: of the first and of the second half of every four values.
static float quantize_group(const float *x, int group, int8_t *values, int32_t sums[2]) {
    vfloat largest = vf_zero(), check = vf_zero();
    for (int k = 0; k < group; k += LANES) {
        vfloat part = vf_load(x + k);
        largest = vf_max(largest, vf_abs(part));
        check = vf_fma(part, vf_zero(), check);
    }
    float scale = vf_largest(largest) / 127;
    int usual = vf_sum(check) == 0;
    if (!(scale >= 0x1p-126f)) scale = 0;  // its inverse would be infinite
    vfloat inverse = vf_set1(usual && scale > 0 ? 1 / scale : 0);
    vint total = vi_zero();
    for (int k = 0; k < group; k += LANES) {
        vint rounded = usual ? vi_round(vf_mul(vf_load(x + k), inverse)) : vi_zero();
        total = vi_add(total, rounded);
        vi_store_int8(values + k, rounded);
    }
    int32_t lanes[LANES];
    vi_store(lanes, total);
    sums[0] = sums[1] = 0;
    for (int i = 0; i < LANES; i++) sums[i / 2 % 2] += lanes[i];
    return usual ? scale : NAN;
}

// What the integer sum of a group begins with, so that it ends as that of signed weights; for those with offsets the sum
// of the values, see `first_dot`.
INLINE int32_t first_sum(const Weight *weight, const int32_t sums[2]) {
    if (weight->offsets) return sums[0] + sums[1];
    if (weight->kind == INT8) return -WEIGHT_OFFSET * (sums[0] + sums[1]);
    if (SMALL_IN_HALVES) return (int32_t)((uint32_t)(-8 * sums[1]) << 16 | ((uint32_t)(-8 * sums[0]) & 0xffff));
    return -8 * (sums[0] + sums[1]);
}

INLINE void load_group(const void *x, long index, int group, int dtype, float *to) {
    for (int k = 0; k < group; k += LANES) vf_store(to + k, vf_load_as(x, index + k, dtype));
}

INLINE void gather_group(const void *x, long row, const int32_t *order, int group, int dtype, float *to) {
    for (int k = 0; k < group; k++) to[k] = load_as(x, row + order[k], dtype);
}

// A group of the row that begins at `row`, in the order of the weight's inputs.
INLINE void read_group(const Product *product, long row, long begin, int group, int dtype, float *to) {
    const int32_t *order = product->weight->order;
    if (order) gather_group(product->x, row, order + begin, group, dtype, to);
    else load_group(product->x, row + begin, group, dtype, to);
}

static void quantize_activations(const Product *product, const Activations *packed, int thread, int n_threads) {
    const Weight *weight = product->weight;
    int group = weight->group;
    long inputs = weight->inputs, groups = inputs / group;
    long begin = groups * thread / n_threads, end = groups * (thread + 1) / n_threads;
    float x[MAX_GROUP];
    int8_t values[MAX_GROUP];
    int32_t sums[2];
    for (long row = 0; row < product->rows; row++) {
        int r = (int)(row % packed->tile_rows), rows = tile_rows(packed, product->rows, row - r);
        for (long g = begin; g < end; g++) {
            long at = (row - r) * groups + g * rows + r;
            if (product->dtype == FLOAT32) read_group(product, row * inputs, g * group, group, FLOAT32, x);
            if (product->dtype == BFLOAT16) read_group(product, row * inputs, g * group, group, BFLOAT16, x);
            if (product->dtype == FLOAT16) read_group(product, row * inputs, g * group, group, FLOAT16, x);
            packed->scales[at] = quantize_group(x, group, values, sums);
            packed->sums[at] = first_sum(weight, sums);
            int8_t *to = packed->values + (row - r) * inputs + g * group * rows;
            if (packed->on_tiles) memcpy(to + group * r, values, (size_t)group);
            else for (int k = 0; k < group; k += 4) memcpy(to + k * rows + 4 * r, values + k, 4);
        }
    }
}
