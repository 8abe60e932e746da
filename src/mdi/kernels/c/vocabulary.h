// What drawing a token needs of all logits of a row.
#pragma once

#include <stdint.h>

#include "kernel.h"

enum { BLOCK = 1024 };  // logits that are summed together: VOCABULARY_BLOCK of core/group.py

// logits: float32 [rows][size]. scales: [rows], positive. Of each block of a row: the highest logit, and the sum of
// e^((logit - highest) * scale): no block's numbers depend on another one. highest, sums: [rows][blocks].
typedef struct {
    const float *logits, *scales;
    float *highest;
    double *sums;
    int64_t rows, size;
} Peaks;

void KERNEL(peaks)(const Peaks *peaks);

// The indices of the `count` highest logits of a row, ascending, 1 <= count <= size; of equals the first. Those that are
// minus infinity are left out. Returns how many there are, or -1 without memory.
int64_t KERNEL(highest)(const float *logits, int64_t size, int64_t count, int64_t *indices);
