// RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) over rows, in float32, rounded once.
#include "norms.h"

#include <math.h>

#include "floats.h"
#include "pool.h"

void KERNEL(rms_norm_row)(float *row, const float *weight, long size, float eps) {
    float scale = 1.0f / sqrtf(sum_squares(row, size) / (float)size + eps);
    for (long i = 0; i < size; i++) row[i] = row[i] * scale * weight[i];
}

static void layer_norm_row(float *row, const float *weight, const float *bias, long size, float eps) {
    float mean = sum_row(row, size) / (float)size;
    for (long i = 0; i < size; i++) row[i] -= mean;
    float scale = 1.0f / sqrtf(sum_squares(row, size) / (float)size + eps);
    for (long i = 0; i < size; i++) row[i] = row[i] * scale * weight[i] + bias[i];
}

INLINE void norm_part(const Norm *norm, int thread, int n_threads, int centred) {
    float row[norm->size];
    for (long r = norm->rows * thread / n_threads; r < norm->rows * (thread + 1) / n_threads; r++) {
        widen_row(norm->x, r * norm->size, norm->dtype, norm->size, row);
        if (centred) layer_norm_row(row, norm->weight, norm->bias, norm->size, norm->eps);
        else KERNEL(rms_norm_row)(row, norm->weight, norm->size, norm->eps);
        narrow_row(row, norm->out, r * norm->size, norm->dtype, norm->size);
    }
}

void KERNEL(rms_norm_part)(const Norm *norm, int thread, int n_threads) { norm_part(norm, thread, n_threads, 0); }
void KERNEL(layer_norm_part)(const Norm *norm, int thread, int n_threads) { norm_part(norm, thread, n_threads, 1); }

static void run_rms_norm(void *norm, int thread, int n_threads) { KERNEL(rms_norm_part)(norm, thread, n_threads); }
static void run_layer_norm(void *norm, int thread, int n_threads) { KERNEL(layer_norm_part)(norm, thread, n_threads); }

void KERNEL(rms_norm)(const Norm *norm) { mdi_parallel(run_rms_norm, (void *)norm); }
void KERNEL(layer_norm)(const Norm *norm) { mdi_parallel(run_layer_norm, (void *)norm); }
