// The matrix tiles of AMX: up to 16 rows of 64 bytes each.
//
//   tiles_configure(rows, bytes)   what follows: sums of `rows` rows by 16 columns, `rows` rows of `bytes` bytes of
//                                  activations, and weights of bytes / 4 rows by 16 columns of 4 bytes
//   tile_load, tile_store          rows that lie `stride` bytes apart
//   tile_dot_bf16(sum, x, w)       sum += x w in float32: even and odd inputs of a tile are summed apart, then added
//   tile_dot_int8(sum, x, w)       exact; x is signed, w unsigned
//
// Tiles are numbered, by digits: 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights.
#pragma once

#include "vector.h"

enum { N_TILES = 8, TILE_HEIGHT = 16, TILE_BYTES = 64 };

typedef struct {  // as the processor reads it
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileSizes;

static TileSizes tile_sizes(int rows, int bytes) {
    TileSizes sizes = {.palette = 1};
    for (int tile = 0; tile < N_TILES; tile++) {
        sizes.rows[tile] = (uint8_t)(tile < 6 ? rows : bytes / 4);
        sizes.row_bytes[tile] = (uint16_t)(tile == 4 || tile == 5 ? bytes : TILE_BYTES);
    }
    return sizes;
}

#if defined(MDI_AMX) && !defined(EMULATED_AVX512)
static void tiles_configure(int rows, int bytes) {
    TileSizes sizes = tile_sizes(rows, bytes);
    _tile_loadconfig(&sizes);
}
#define tiles_release() _tile_release()
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_dot_bf16(sum, x, w) _tile_dpbf16ps(sum, x, w)
#define tile_dot_int8(sum, x, w) _tile_dpbsud(sum, x, w)
#else  // in plain C, so that tests run what is built on tiles anywhere
static _Thread_local struct {
    TileSizes sizes;
    char of[N_TILES][TILE_HEIGHT][TILE_BYTES];
} tiles;

static void tiles_configure(int rows, int bytes) { tiles.sizes = tile_sizes(rows, bytes); }
static void tiles_release(void) { tiles.sizes = (TileSizes){0}; }
static void tile_zero(int tile) { memset(tiles.of[tile], 0, sizeof tiles.of[tile]); }
static void tile_load(int tile, const void *from, long stride) {
    tile_zero(tile);
    for (int row = 0; row < tiles.sizes.rows[tile]; row++)
        memcpy(tiles.of[tile][row], (const char *)from + row * stride, tiles.sizes.row_bytes[tile]);
}
static void tile_store(int tile, void *to, long stride) {
    for (int row = 0; row < tiles.sizes.rows[tile]; row++)
        memcpy((char *)to + row * stride, tiles.of[tile][row], tiles.sizes.row_bytes[tile]);
}
static void tile_dot_bf16(int sum, int x, int w) {
    for (int row = 0; row < tiles.sizes.rows[sum]; row++)
        for (int n = 0; n < LANES; n++) {
            const uint16_t *a = (const uint16_t *)tiles.of[x][row];
            float total, even = 0, odd = 0;
            for (int k = 0; k < tiles.sizes.rows[w]; k++) {
                const uint16_t *b = (const uint16_t *)tiles.of[w][k] + 2 * n;
                even += from_bf16(a[2 * k]) * from_bf16(b[0]);
                odd += from_bf16(a[2 * k + 1]) * from_bf16(b[1]);
            }
            memcpy(&total, tiles.of[sum][row] + 4 * n, sizeof total);
            total += even + odd;
            memcpy(tiles.of[sum][row] + 4 * n, &total, sizeof total);
        }
}
static void tile_dot_int8(int sum, int x, int w) {
    for (int row = 0; row < tiles.sizes.rows[sum]; row++)
        for (int n = 0; n < LANES; n++) {
            int32_t total;
            memcpy(&total, tiles.of[sum][row] + 4 * n, sizeof total);
            for (int k = 0; k < 4 * tiles.sizes.rows[w]; k++)
                total += (int8_t)tiles.of[x][row][k] * (uint8_t)tiles.of[w][k / 4][4 * n + k % 4];
            memcpy(tiles.of[sum][row] + 4 * n, &total, sizeof total);
        }
}
#endif
