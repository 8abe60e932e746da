// What drawing a token needs of all logits of a row.
#pragma once

#include <stdint.h>

#include "kernel.h"

// logits: float32 [rows][size]. scales: [rows], positive. Of each row: the index of the highest logit, the first of
// equals, and the sum of e^((logit - highest) * scale).
typedef struct {
    const float *logits, *scales;
    int64_t *highest;
    double *sums;
    int64_t rows, size;
} Peaks;

void KERNEL(peaks)(const Peaks *peaks);

// The indices of the `count` highest logits of a row, ascending, 1 <= count <= size; of equals the first. Those that are
// minus infinity are left out. Returns how many there are, or -1 without memory.
int64_t KERNEL(highest)(const float *logits, int64_t size, int64_t count, int64_t *indices);
