// Products of float weights. A tile is 1 to TILE_ROWS rows by one panel of outputs, or up to FEW_ROWS by two: its sums stay
// in registers while inputs are added in order. Many rows take blocks of inputs, unpacked to float32, that stay in the
// first cache.
#pragma once

#include "work.h"

enum { BLOCK_INPUTS = 256, DIRECT_ROWS = 4 * TILE_ROWS };
enum { BF16_PAIRS = 16 };  // kind of a tile: weights and activations in bfloat16, two inputs a step

// x: [inputs][rows]. w: the first panel's part that is multiplied; the second panel's is `jump` bytes behind. The sums
// [rows][PANEL] are added to.
INLINE void float_tile(int kind, int rows, int panels, const float *x, const char *w, long jump, long inputs, float *sums) {
    int vectors = panels * PANEL_VECTORS;
    long step_size = kind == FLOAT16 ? 2 * PANEL : 4 * PANEL;
    vfloat sum[TILE_ROWS][2 * PANEL_VECTORS], weights[2 * PANEL_VECTORS] = {vf_zero()};
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_load(sums_of(sums, r, v));
    for (long k = 0; k < inputs; k++, x += rows) {
        if (rows <= FETCH_ROWS) fetch_ahead(w, jump, panels, step_size);
        if (kind == BF16_PAIRS) {
            k++;
            vint pairs[2 * PANEL_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++) pairs[v] = vi_load(weights_of(w, jump, step_size, v));
            UNROLL for (int r = 0; r < rows; r++) {
                vint value = vi_set1((int32_t)bits_of(x[r]));
                UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_dot_bf16(sum[r][v], pairs[v], value);
            }
            w += step_size;
            continue;
        }
        UNROLL for (int v = 0; v < vectors; v++) {
            const char *from = weights_of(w, jump, step_size, v);
            if (kind == FLOAT32) weights[v] = vf_load((const float *)from);
            if (kind == FLOAT16) weights[v] = vf_load_f16((const uint16_t *)from);
            if (kind == BFLOAT16) weights[v] = vf_low_bf16(vi_load(from));
        }
        UNROLL for (int r = 0; r < rows; r++) {
            vfloat value = vf_set1(x[r]);
            UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_fma(weights[v], value, sum[r][v]);
        }
        if (kind == BFLOAT16) {  // the second input of the pair
            k++, x += rows;
            UNROLL for (int v = 0; v < vectors; v++)
                weights[v] = vf_high_bf16(vi_load(weights_of(w, jump, step_size, v)));
            UNROLL for (int r = 0; r < rows; r++) {
                vfloat value = vf_set1(x[r]);
                UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_fma(weights[v], value, sum[r][v]);
            }
        }
        w += step_size;
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) vf_store(sums_of(sums, r, v), sum[r][v]);
}

INLINE void float_tile_of(int kind, int rows, int panels, const float *x, const char *w, long jump, long inputs, float *sums) {
    switch (rows) {
        case 1: float_tile(kind, 1, panels, x, w, jump, inputs, sums); break;
        case 2: if ((panels == 1 ? TILE_ROWS : FEW_ROWS) >= 2) float_tile(kind, 2, panels, x, w, jump, inputs, sums); break;
        case 3: if ((panels == 1 ? TILE_ROWS : FEW_ROWS) >= 3) float_tile(kind, 3, panels, x, w, jump, inputs, sums); break;
        case 4: if (TILE_ROWS >= 4) float_tile(kind, 4, 1, x, w, jump, inputs, sums); break;
        case 5: if (TILE_ROWS >= 5) float_tile(kind, 5, 1, x, w, jump, inputs, sums); break;
        case 6: if (TILE_ROWS >= 6) float_tile(kind, 6, 1, x, w, jump, inputs, sums); break;
    }
}

// A block of a panel as float32, for many rows.
static void unpack(int kind, const char *panel, long begin, long end, float *block) {
    for (long k = begin; k < end; k++, block += PANEL)
        for (int v = 0; v < PANEL_VECTORS; v++) {
            if (kind == FLOAT16) vf_store(block + v * LANES, vf_load_f16((const uint16_t *)panel + k * PANEL + v * LANES));
            if (kind == BFLOAT16) {
                vint pair = vi_load(panel + k / 2 * 4 * PANEL + v * 4 * LANES);
                vf_store(block + v * LANES, k % 2 ? vf_high_bf16(pair) : vf_low_bf16(pair));
            }
        }
}

INLINE void float_tiles(const Work *work, int kind, int panels, const char *w, long jump, long first, long rows, long begin,
                        long end) {
    for (long row = first; row < first + rows; row += work->x.tile_rows) {
        int count = tile_rows(&work->x, work->product->rows, row);
        const float *x = work->x.floats + (row * work->x.inputs + begin * count) / (kind == BF16_PAIRS ? 2 : 1);
        float *sums = work->sums + (row - first) * PANEL;
        if (panels == 2 && FEW_ROWS) float_tile_of(kind, count, 2, x, w, jump, end - begin, sums);
        else float_tile_of(kind, count, 1, x, w, jump, end - begin, sums);
    }
}

// Adds inputs [begin, end) to the sums of rows from `first` on.
INLINE void multiply_floats_of(const Work *work, int kind, int panels, const char *panel, long jump, long first, long rows, long begin,
                        long end) {
    long item = kind == FLOAT32 ? 4 : 2;
    if (rows <= DIRECT_ROWS) {
        float_tiles(work, kind, panels, panel + begin * item * PANEL, jump, first, rows, begin, end);
        return;
    }
    for (long stop, k = begin; k < end; k = stop) {
        stop = k + BLOCK_INPUTS < end ? k + BLOCK_INPUTS : end;
        const char *block = panel + k * item * PANEL;
        if (kind == FLOAT16 || kind == BFLOAT16) {
            unpack(kind, panel, k, stop, (float *)work->block);
            block = work->block;
        }
        float_tiles(work, kind == BF16_PAIRS ? BF16_PAIRS : FLOAT32, 1, block, 0, first, rows, k, stop);
    }
}

static void multiply_floats(const Work *work, int panels, const char *panel, long jump, long first, long rows, long begin,
                            long end) {
    switch (work->x.in_pairs ? BF16_PAIRS : work->weight->kind) {
        case BF16_PAIRS: if (HAS_BF16_DOT) multiply_floats_of(work, BF16_PAIRS, panels, panel, jump, first, rows, begin, end); break;
        case FLOAT32: multiply_floats_of(work, FLOAT32, panels, panel, jump, first, rows, begin, end); break;
        case BFLOAT16: multiply_floats_of(work, BFLOAT16, panels, panel, jump, first, rows, begin, end); break;
        case FLOAT16: multiply_floats_of(work, FLOAT16, panels, panel, jump, first, rows, begin, end); break;
    }
}
