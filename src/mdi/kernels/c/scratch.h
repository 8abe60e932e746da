// Memory that a thread keeps and that only grows.
#pragma once

#include <stdlib.h>

typedef struct {
    void *memory;
    size_t size;
} Room;

// At least `size` bytes at a multiple of 64, with any contents. The process ends where there are none.
static inline void *room_for(Room *room, size_t size) {
    if (room->size >= size) return room->memory;
    free(room->memory);
    room->size = (size + 4095) / 4096 * 4096;
    room->memory = aligned_alloc(64, room->size);
    if (!room->memory) abort();
    return room->memory;
}
