// Norms of rows: see norms.c.
#pragma once

#include <stdint.h>

#include "kernel.h"

typedef struct {
    const void *x;              // [rows][size]
    void *out;                  // the same, perhaps the same memory
    const float *weight, *bias; // [size]; bias: of LayerNorm
    const void *residual;       // like x, is added before all is rounded; or NULL; perhaps the memory of out
    int64_t rows, size;
    float eps;
    int32_t dtype;  // of x and out
} Norm;

// x / sqrt(mean of x^2 + eps) * weight, one row after the other: numbers in place.
void KERNEL(rms_norm_row)(float *row, const float *weight, long size, float eps);

// One thread's rows, inside a task of the pool.
void KERNEL(rms_norm_part)(const Norm *norm, int thread, int n_threads);
void KERNEL(layer_norm_part)(const Norm *norm, int thread, int n_threads);

// All rows, in the pool.
void KERNEL(rms_norm)(const Norm *norm);
void KERNEL(layer_norm)(const Norm *norm);
