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
    const float *attention_post_norm, *mlp_post_norm;  // [hidden_size]: of what is added to hidden; or NULL
    const float *cos, *sin;              // [rows][head_dim / 2], or NULL: nothing is rotated
    void *cache;                         // [slots][slot_rows][2][kv_heads][head_dim]
    float *scales;                       // [slots][slot_rows][2][kv_heads], of an int8 cache
    int64_t window;                      // as `Attention` has it
} Layer;

typedef struct {
    const Layer *layers;
    void *hidden;            // [rows][hidden_size]: what the layers get, then what they give
    const Run *runs;
    int64_t n_layers, n_runs, rows, slot_rows, hidden_size, heads, kv_heads, head_dim;
    float eps;
    int32_t dtype, cache_dtype;
    const Shards *out, *down, *expert_down;  // of the inputs of these products; NULL where there is one
    // A rank of a group, which has the shards from first_shard on, writes their sums here, else NULL: those of attention
    // and of MLPs, [2][n_shards][rows][hidden_size] of dtype. The calling thread sends rows of them, in order, and receives
    // the others' before it needs them; few rows are exchanged at once, all in the first part. What is not 0 ends the call.
    void *partials;
    int64_t first_shard, n_shards;
    int (*exchange)(int64_t what, int64_t which, int64_t first_row, int64_t last_row);
} Step;

enum { NO_MEMORY = 1, NOT_EXCHANGED = 2 };
enum { SEND, RECEIVE, SEND_AND_RECEIVE };  // what
enum { ATTENTION, INNER };                 // which: of attention; of an MLP or of experts

// Runs the layers over a batch and writes its keys and values. Returns 0, or why it could not.
int KERNEL(decoder)(const Step *step);
