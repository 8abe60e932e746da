// Memory in huge pages: a page of 4 KiB costs a stream of weights a fifth of its rate.
#define _GNU_SOURCE
#include "memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

static const size_t HUGE_PAGE = (size_t)2 << 20, PAGE = 4096, BLOCK_SIZE = (size_t)32 << 20;

// Weights lie one behind the other in blocks, so that huge pages are full of them. What is freed is not used again; a
// block is given back when nothing in it is in use.
typedef struct Block {
    struct Block *next;
    char *begin;
    size_t size, used;
    long parts;  // in use
} Block;

static Block *blocks;
static pthread_mutex_t blocks_lock = PTHREAD_MUTEX_INITIALIZER;

static size_t rounded(size_t size, size_t to) { return (size + to - 1) & ~(to - 1); }

static char *map(size_t size) {
    char *mapped = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return NULL;
    char *aligned = (char *)rounded((uintptr_t)mapped, HUGE_PAGE);
    size_t before = (size_t)(aligned - mapped);
    if (before) munmap(mapped, before);
    if (before < HUGE_PAGE) munmap(aligned + size, HUGE_PAGE - before);
#if defined(MADV_HUGEPAGE)
    madvise(aligned, size, MADV_HUGEPAGE);  // where the system refuses, small pages do
#endif
    return aligned;
}

static Block *new_block(size_t size) {
    Block *block = malloc(sizeof *block);
    if (!block) return NULL;
    *block = (Block){.next = blocks, .size = size > BLOCK_SIZE ? rounded(size, HUGE_PAGE) : BLOCK_SIZE};
    block->begin = map(block->size);
    if (!block->begin) {
        free(block);
        return NULL;
    }
    return blocks = block;
}

void *mdi_allocate(size_t size) {
    size = rounded(size, PAGE);
    pthread_mutex_lock(&blocks_lock);
    Block *block = blocks;
    while (block && block->size - block->used < size) block = block->next;
    if (!block) block = new_block(size);
    char *memory = block ? block->begin + block->used : NULL;
    if (block) block->used += size, block->parts++;
    pthread_mutex_unlock(&blocks_lock);
    return memory;
}

void mdi_free(void *memory) {
    pthread_mutex_lock(&blocks_lock);
    Block **at = &blocks;
    while ((char *)memory < (*at)->begin || (char *)memory >= (*at)->begin + (*at)->size) at = &(*at)->next;
    Block *block = *at;
    if (--block->parts == 0) {
        *at = block->next;
        munmap(block->begin, block->size);
        free(block);
    }
    pthread_mutex_unlock(&blocks_lock);
}

typedef struct {
    size_t size;
    void *memory;
} Scratch;

static pthread_key_t scratch_key;

static void end_scratch(void *ended) {
    Scratch *scratch = ended;
    free(scratch->memory);
    free(scratch);
}

static void make_scratch_key(void) { pthread_key_create(&scratch_key, end_scratch); }

void *mdi_scratch(size_t size) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_scratch_key);
    Scratch *scratch = pthread_getspecific(scratch_key);
    if (!scratch) {
        scratch = calloc(1, sizeof *scratch);
        if (!scratch || pthread_setspecific(scratch_key, scratch)) {
            free(scratch);
            return NULL;
        }
    }
    if (size > scratch->size) {
        free(scratch->memory);
        scratch->size = (size + 4095) & ~(size_t)4095;
        scratch->memory = aligned_alloc(64, scratch->size);
        if (!scratch->memory) scratch->size = 0;
    }
    return scratch->memory;
}
