// A stage's decoder layers in one call: see decoder.c.
#pragma once

#include "attention.h"
#include "experts.h"

typedef struct {
    const Weight *qkv, *out, *gate_up, *down;
    const Experts *experts;              // in place of gate_up and down, or NULL
    const float *qkv_bias;               // or NULL
    const float *input_norm, *mlp_norm;  // [hidden_size]
    const float *q_norm, *k_norm;        // [head_dim], or NULL
    void *cache;                         // [slots][slot_rows][2][kv_heads][head_dim]
    float *scales;                       // [slots][slot_rows][2][kv_heads], of an int8 cache
    int64_t window;                      // as `Attention` has it
    int64_t rotates;                     // whether queries and keys are rotated
} Layer;

typedef struct {
    const Layer *layers;
    void *hidden;            // [rows][hidden_size]: what the layers get, then what they give
    const float *cos, *sin;  // [rows][head_dim / 2]
    const Run *runs;
    int64_t n_layers, n_runs, rows, slot_rows, hidden_size, heads, kv_heads, head_dim;
    float eps;
    int32_t dtype, cache_dtype, shards;
} Step;

// Runs the layers over a batch and writes its keys and values. Returns 0, or 1 where memory is short.
int KERNEL(decoder)(const Step *step);
