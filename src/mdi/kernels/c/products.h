// Products of rows of activations with a weight that is packed for one instruction set.
//
// A weight [outputs, inputs] is cut into panels of PANEL outputs. Of a panel come all its inputs, in order, each step for
// all of its outputs: a thread reads its panels as one stream, and every output has one accumulator.
//
//   FLOAT32    [inputs][PANEL] float32
//   FLOAT16    [inputs][PANEL] float16
//   BFLOAT16   [inputs / 2][PANEL][2] bfloat16
//   INT8       groups of: [PANEL] float32 scales, where they are per group, [PANEL] float32 minimums, where there are any,
//              then [group / 4][PANEL][4] int8
//   INT4       groups of 32 inputs: [PANEL] float16 scales, [PANEL] uint8 zeros or float16 minimums, where there are any,
//              [4][PANEL][4] bytes: byte i of step s has input 8 s + i in its low half and 8 s + 4 + i in its high half
//
// Inputs of a quantised weight may be stored in another order than activations come in: these are gathered.
// With a gate (SwiGLU, GeGLU) a panel has PANEL / 2 outputs of the gate and then the same ones of the other half.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernel.h"

enum { INT8 = 3, INT4 = 4 };  // kinds of weights, beside the dtypes of vector.h
enum { NO_OFFSETS = 0, ZEROS = 1, MINIMUMS = 2 };  // of groups: (value - zero) * scale, or value * scale + minimum
enum { NONE = 0, GELU = 1, QUICK_GELU = 2, TANH_GELU = 3, SILU = 4 };

typedef struct {
    long outputs, inputs;
    int kind;
    int group;          // inputs that share an activation scale; 0 for float weights
    int gate;           // its activation, where gate and up are interleaved; NONE: there is no gate
    int group_scales;   // int8: scales per group, not per output
    int offsets;        // of groups: int4 may have zeros; int4, and int8 with scales per group, minimums
    long n_panels;
    size_t panel_size;  // bytes
    char *panels;
    float *scales;      // int8 with one scale per output: [n_panels][PANEL]
    int32_t *order;     // [inputs]: which activation each input takes; NULL where they are as they come
} Weight;

// Parts of a product's inputs: each is summed from zero, and its sum rounded to the product's dtype.
typedef struct {
    int64_t count;
    int64_t step;           // divides all bounds, those of other ranks' shards too
    const int64_t *bounds;  // [count + 1]
} Shards;

typedef struct {
    const Weight *weight;
    const void *x;         // [rows, inputs] of dtype
    void *out;             // [rows, outputs], or [rows, outputs / 2] with a gate
    const float *bias;     // [outputs] or NULL
    const void *residual;  // like out, or NULL
    long rows;
    int dtype;
    int activation;
    const Shards *shards;  // whose sums are added in order; NULL: one, whose sum is not rounded by itself
    int64_t shard_stride;  // in out, from a shard's sums to the next's, where each stays by itself: numbers; else 0
    char *scratch;
} Product;

// Packs a weight. values: row-major [outputs, inputs], int4 two to a byte; the rest: see QuantizedTensor.
// Returns NULL where memory is short; *has_nan is set where a float value, a scale or a minimum is NaN.
Weight *KERNEL(pack)(long outputs, long inputs, int kind, int group, int gate, int group_scales, const void *values,
                     const void *scales, const uint8_t *zeros, const void *minimums, const int32_t *order, int *has_nan);
void KERNEL(discard)(Weight *weight);

// Bytes of scratch memory that a product needs in a pool of so many threads.
size_t KERNEL(product_scratch)(const Product *product, int n_threads);

// One thread's part, inside a task of the pool; has a barrier inside.
void KERNEL(product_part)(const Product *product, int thread, int n_threads);

// The same of several products, whose panels the threads share as if they were one weight's. The first one's scratch is
// that of all. Bytes of it, at most, for products of so many inputs that together have so many rows:
size_t KERNEL(products_scratch)(long rows, long inputs, long count, int n_threads);
void KERNEL(products_part)(const Product *products, long count, int thread, int n_threads);

// A whole product, in the pool. Returns 0, or 1 where memory is short.
int KERNEL(product)(const Weight *weight, const void *x, void *out, long rows, int dtype, const float *bias,
                    const void *residual, int activation, const Shards *shards, int64_t shard_stride);
