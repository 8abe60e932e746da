// Memory in huge pages: a page of 4 KiB costs a stream of weights a fifth of its rate.
#define _GNU_SOURCE
#include "memory.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>

static const size_t HUGE_PAGE = (size_t)2 << 20;

static size_t rounded(size_t size) { return (size + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1); }

void *mdi_allocate(size_t size) {
    size_t used = rounded(size);
    char *mapped = mmap(NULL, used + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return NULL;
    char *aligned = (char *)rounded((uintptr_t)mapped);
    size_t before = (size_t)(aligned - mapped);
    if (before) munmap(mapped, before);
    if (before < HUGE_PAGE) munmap(aligned + used, HUGE_PAGE - before);
#if defined(MADV_HUGEPAGE)
    madvise(aligned, used, MADV_HUGEPAGE);  // where the system refuses, small pages do
#endif
    return aligned;
}

void mdi_free(void *memory, size_t size) { munmap(memory, rounded(size)); }

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
