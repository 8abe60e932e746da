// Memory in huge pages, for packed weights.
#ifndef MDI_MEMORY_H
#define MDI_MEMORY_H
#include <stddef.h>

// Zeroed memory that begins at a page and may lie in huge pages; NULL where there is none.
void *mdi_allocate(size_t size);
void mdi_free(void *memory);

// Memory of the calling thread, at least so large, aligned to 64 bytes: its contents last until the next call. NULL where
// there is none.
void *mdi_scratch(size_t size);

#endif
