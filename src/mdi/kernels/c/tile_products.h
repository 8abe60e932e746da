// Products on the matrix tiles of AMX: bfloat16 of any number of rows, quantised weights of many.
//
// A step is 64 bytes of a row's inputs (32 of int4), which lie together for each of up to 16 rows. Sums of bfloat16 stay in
// tiles. Integer sums leave theirs after each group, and are scaled and added as int_products.h does it: the bits are equal.
// Behind the last rows of a tile lies other memory: what is computed of it is never used.
#pragma once

#include "int_products.h"
#include "tiles.h"

enum { STEP_BF16 = STEP_BYTES / 2, BLOCK_BF16 = 1024, LEAST_TILE_ROWS = INT_ROWS + 1 };

// Whether a product is computed on tiles. For bfloat16 that must not depend on the number of rows, nor on
// which of the shards a rank has.
static int takes_tiles(const Product *product) {
    const Weight *weight = product->weight;
    int pairs = weight->kind == BFLOAT16 && product->dtype == BFLOAT16;
    long step = product->shards ? product->shards->step : weight->inputs;
    if (pairs) return product->rows > 0 && weight->inputs % STEP_BF16 == 0 && step % STEP_BF16 == 0;
    if (product->rows < LEAST_TILE_ROWS) return 0;
    return weight->kind == INT4 || (weight->kind == INT8 && (weight->group == STEP_BYTES || weight->group == STEP_BYTES / 2));
}

// Before and after a thread's part of a product.
static void begin_tiles(const Product *product) {
    const Weight *weight = product->weight;
    if (weight->kind != BFLOAT16) tiles_configure(TILE_HEIGHT, weight->group);
    else tiles_configure(product->rows < TILE_HEIGHT ? (int)product->rows : TILE_HEIGHT, STEP_BYTES);
}

typedef struct {  // up to 16 rows: of their steps the first one, bytes from step to step
    const char *x;
    long step;
} TileRows;

static TileRows tile_rows_at(const Work *work, long row, long begin) {
    long count = tile_rows(&work->x, work->product->rows, row);
    return (TileRows){(const char *)work->x.floats + 2 * (row * work->x.inputs + begin * count), count * STEP_BYTES};
}

// One or two tiles of rows by 32 outputs.
INLINE void bf16_tile(int n_rows, TileRows first, TileRows second, const char *w, long steps, float *sums) {
    enum { STRIDE = 4 * PANEL };
    tile_load(0, sums, STRIDE);
    tile_load(1, sums + LANES, STRIDE);
    if (n_rows == 2) tile_load(2, sums + TILE_HEIGHT * PANEL, STRIDE);
    if (n_rows == 2) tile_load(3, sums + TILE_HEIGHT * PANEL + LANES, STRIDE);
    for (long step = 0; step < steps; step++, w += TILE_HEIGHT * STRIDE) {
        tile_load(4, first.x + step * first.step, STEP_BYTES);
        tile_load(6, w, STRIDE);
        tile_load(7, w + TILE_BYTES, STRIDE);
        tile_dot_bf16(0, 4, 6);
        tile_dot_bf16(1, 4, 7);
        if (n_rows == 1) continue;
        tile_load(5, second.x + step * second.step, STEP_BYTES);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(3, 5, 7);
    }
    tile_store(0, sums, STRIDE);
    tile_store(1, sums + LANES, STRIDE);
    if (n_rows == 2) tile_store(2, sums + TILE_HEIGHT * PANEL, STRIDE);
    if (n_rows == 2) tile_store(3, sums + TILE_HEIGHT * PANEL + LANES, STRIDE);
}

// Half a panel's block stays in the first cache while all rows pass.
static void multiply_bf16_tiles(const Work *work, const char *panel, long first, long rows, long begin, long end) {
    long block = rows > 2 * TILE_HEIGHT ? BLOCK_BF16 : end - begin;
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + block < end ? k + block : end;
        long steps = (stop - k) / STEP_BF16;
        for (int half = 0; half < PANEL; half += 2 * LANES) {
            const char *w = panel + k * 2 * PANEL + 4 * half;
            for (long row = 0; row < rows; row += 2 * TILE_HEIGHT) {
                float *sums = work->sums + row * PANEL + half;
                TileRows one = tile_rows_at(work, first + row, k);
                if (row + TILE_HEIGHT < rows)
                    bf16_tile(2, one, tile_rows_at(work, first + row + TILE_HEIGHT, k), w, steps, sums);
                else bf16_tile(1, one, one, w, steps, sums);
            }
        }
    }
}

// 16 rows by 16 outputs, group by group. w: the group's first step; scales: of its weights; both `size` bytes apart.
INLINE void int_tile_16(int kind, int group, int group_scales, int offsets, Tile x, const char *w, const char *scales,
                        long size, long groups, float *sums) {
    int32_t dots[2][TILE_HEIGHT * LANES] __attribute__((aligned(64)));
    vfloat sum[TILE_HEIGHT];
    UNROLL for (int r = 0; r < TILE_HEIGHT; r++) sum[r] = vf_load(sums + r * PANEL);
    for (long g = 0; g < groups; g++, w += size, scales += size, x.scales += x.stride, x.sums += x.stride) {
        int32_t *dot = dots[g % 2];
        tile_zero(0);
        tile_load(4, x.values + g * group * x.stride, group);
        tile_load(6, w, 4 * PANEL);
        tile_dot_int8(0, 4, 6);
        tile_store(0, dot, TILE_BYTES);
        vfloat scale = group_scales ? vf_load((const float *)scales) : vf_zero();
        vfloat offset = offsets ? vf_load((const float *)scales + PANEL) : vf_zero();
        UNROLL for (int r = 0; r < TILE_HEIGHT; r++) {
            vint total = vi_load(dot + r * LANES);
            if (kind == INT8 || !offsets) total = vi_add(total, vi_set1(first_dot(kind, offsets, x.sums[r])));
            sum[r] = add_group(group_scales, offsets, vi_to_float(total), x.scales[r], x.sums[r], offset, scale, sum[r]);
        }
    }
    UNROLL for (int r = 0; r < TILE_HEIGHT; r++) vf_store(sums + r * PANEL, sum[r]);
}

// All rows with the groups of a panel at w, each of `size` bytes: scales and offsets in float32, where there are any,
// then `head` bytes behind the group's beginning its steps.
INLINE void int_tiles_16(const Work *work, int kind, int group_scales, int offsets, const char *w, long head, long size,
                         long first, long rows, long begin, long end) {
    int group = work->weight->group;
    long all = work->x.inputs / group, groups = (end - begin) / group;
    for (int n = 0; n < PANEL; n += LANES)
        for (long row = first; row < first + rows; row += TILE_HEIGHT) {
            long count = tile_rows(&work->x, work->product->rows, row), at = row * all + begin / group * count;
            const int8_t *values = work->x.values + row * work->x.inputs + begin * count;
            Tile x = {values, work->x.scales + at, work->x.sums + at, count};
            float *sums = work->sums + (row - first) * PANEL + n;
            int_tile_16(kind, group, group_scales, offsets, x, w + head + 4 * n, w + 4 * n, size, groups, sums);
        }
}

static void multiply_int8_tiles(const Work *work, const char *panel, long first, long rows, long begin, long end) {
    int by_group = work->weight->group_scales, offsets = work->weight->offsets, group = work->weight->group;
    long head = head8_size(work->weight), size = group8_size(work->weight);
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + BLOCK8 < end ? k + BLOCK8 : end;
        const char *w = panel + k / group * size;
        if (offsets) int_tiles_16(work, INT8, 1, MINIMUMS, w, head, size, first, rows, k, stop);
        else if (by_group) int_tiles_16(work, INT8, 1, NO_OFFSETS, w, head, size, first, rows, k, stop);
        else int_tiles_16(work, INT8, 0, NO_OFFSETS, w, head, size, first, rows, k, stop);
    }
}

static void multiply_int4_tiles(const Work *work, const char *panel, long first, long rows, long begin, long end) {
    int offsets = work->weight->offsets;
    long head = 8 * PANEL;
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + BLOCK4 < end ? k + BLOCK4 : end;
        unpack4(panel + k / GROUP4 * group4_size(offsets), offsets, (stop - k) / GROUP4, work->block);
        if (offsets == ZEROS) int_tiles_16(work, INT4, 1, ZEROS, work->block, head, UNPACKED4, first, rows, k, stop);
        else if (offsets) int_tiles_16(work, INT4, 1, MINIMUMS, work->block, head, UNPACKED4, first, rows, k, stop);
        else int_tiles_16(work, INT4, 1, NO_OFFSETS, work->block, head, UNPACKED4, first, rows, k, stop);
    }
}

static void multiply_tiles(const Work *work, const char *panel, long first, long rows, long begin, long end) {
    if (work->weight->kind == BFLOAT16) multiply_bf16_tiles(work, panel, first, rows, begin, end);
    if (work->weight->kind == INT8) multiply_int8_tiles(work, panel, first, rows, begin, end);
    if (work->weight->kind == INT4) multiply_int4_tiles(work, panel, first, rows, begin, end);
}
