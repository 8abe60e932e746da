// Tiles of a product: 1 to TILE_ROWS rows by one panel of outputs, or two for FEW_ROWS. Sums stay in registers.
//
// x: a tile of activations, [inputs][rows] float32. w: the first panel's part that is multiplied; the second panel lies
// `jump` bytes behind it. sums: [rows][PANEL] float32, the second panel's SUMS_JUMP floats behind; they are added to.
#pragma once

#include "products.h"
#include "vector.h"

enum { PANEL_VECTORS = PANEL / LANES, ROWS_AT_ONCE = 516, SUMS_JUMP = TILE_ROWS * PANEL };

#define UNROLL _Pragma("GCC unroll 16")

INLINE float *sums_of(float *sums, int row, int vector) {
    return sums + vector / PANEL_VECTORS * SUMS_JUMP + row * PANEL + vector % PANEL_VECTORS * LANES;
}

// A vector of step `step`, where a step of a panel has step_size bytes.
INLINE const char *weights_of(const char *w, long jump, long step_size, int vector) {
    return w + vector / PANEL_VECTORS * jump + vector % PANEL_VECTORS * (step_size / PANEL_VECTORS);
}

INLINE void float_tile(int kind, int rows, int panels, const float *x, const char *w, long jump, long inputs, float *sums) {
    int vectors = panels * PANEL_VECTORS;
    long step_size = kind == FLOAT16 ? 2 * PANEL : 4 * PANEL;
    vfloat sum[TILE_ROWS][2 * PANEL_VECTORS], weights[2 * PANEL_VECTORS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = vf_load(sums_of(sums, r, v));
    for (long k = 0; k < inputs; k++, x += rows) {
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
        case 2: float_tile(kind, 2, panels, x, w, jump, inputs, sums); break;
        case 3: float_tile(kind, 3, panels, x, w, jump, inputs, sums); break;
        case 4: float_tile(kind, 4, 1, x, w, jump, inputs, sums); break;
        case 5: float_tile(kind, 5, 1, x, w, jump, inputs, sums); break;
        case 6: float_tile(kind, 6, 1, x, w, jump, inputs, sums); break;
    }
}
