// RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) over rows, in float32, rounded once.
#include "norms.h"

#include <math.h>

#include "floats.h"
#include "pool.h"

// row * scale * weight + bias, or without bias.
static void scale_row(float *row, float scale, const float *weight, const float *bias, long size) {
    long i = 0;
    for (; i + LANES <= size; i += LANES) {
        vfloat scaled = vf_mul(vf_mul(vf_load(row + i), vf_set1(scale)), vf_load(weight + i));
        vf_store(row + i, bias ? vf_add(scaled, vf_load(bias + i)) : scaled);
    }
    for (; i < size; i++) row[i] = row[i] * scale * weight[i] + (bias ? bias[i] : 0.0f);
}

void KERNEL(rms_norm_row)(float *row, const float *weight, long size, float eps) {
    float scale = 1.0f / sqrtf(sum_squares(row, size) / (float)size + eps);
    scale_row(row, scale, weight, NULL, size);
}

static void layer_norm_row(float *row, const float *weight, const float *bias, long size, float eps) {
    float mean = sum_row(row, size) / (float)size;
    long i = 0;
    for (; i + LANES <= size; i += LANES) vf_store(row + i, vf_sub(vf_load(row + i), vf_set1(mean)));
    for (; i < size; i++) row[i] -= mean;
    float scale = 1.0f / sqrtf(sum_squares(row, size) / (float)size + eps);
    scale_row(row, scale, weight, bias, size);
}

static void add_row(float *row, const Norm *norm, long from) {
    float residual[norm->size];
    widen_row(norm->residual, from, norm->dtype, norm->size, residual);
    for (long i = 0; i < norm->size; i++) row[i] += residual[i];
}

INLINE void norm_part(const Norm *norm, int thread, int n_threads, int centred) {
    float row[norm->size];
    for (long r = norm->rows * thread / n_threads; r < norm->rows * (thread + 1) / n_threads; r++) {
        widen_row(norm->x, r * norm->size, norm->dtype, norm->size, row);
        if (centred) layer_norm_row(row, norm->weight, norm->bias, norm->size, norm->eps);
        else KERNEL(rms_norm_row)(row, norm->weight, norm->size, norm->eps);
        if (norm->residual) add_row(row, norm, r * norm->size);
        narrow_row(row, norm->out, r * norm->size, norm->dtype, norm->size);
    }
}

void KERNEL(rms_norm_part)(const Norm *norm, int thread, int n_threads) { norm_part(norm, thread, n_threads, 0); }
void KERNEL(layer_norm_part)(const Norm *norm, int thread, int n_threads) { norm_part(norm, thread, n_threads, 1); }

static void run_rms_norm(void *norm, int thread, int n_threads) { KERNEL(rms_norm_part)(norm, thread, n_threads); }
static void run_layer_norm(void *norm, int thread, int n_threads) { KERNEL(layer_norm_part)(norm, thread, n_threads); }

void KERNEL(rms_norm)(const Norm *norm) { mdi_parallel(run_rms_norm, (void *)norm); }
void KERNEL(layer_norm)(const Norm *norm) { mdi_parallel(run_layer_norm, (void *)norm); }
