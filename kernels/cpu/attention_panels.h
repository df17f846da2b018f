// Keys and values of a chunk out of the KV cache, as panels (see layout.h): what multiply_tile takes.
#ifndef DUET_ATTENTION_PANELS_H
#define DUET_ATTENTION_PANELS_H

#include "attention.h"

// The dimensions of a head, rounded up to whole vectors of words and to panels; and the words of a query.
int64_t padded_dim(const struct attention *attention);
int64_t words_a_query(const struct attention *attention);

struct chunk_panels {
    uint32_t *keys;   // [CHUNK / 16 panels, words_a_query, 16]; outputs are keys
    uint32_t *values; // [padded_dim / 16 panels, words of the chunk's keys, 16]; outputs are dimensions
    char *padded;     // [2, CHUNK, padded_dim] floats: room for keys and values of a head that is no multiple of 32
};

// num_keys: at most CHUNK. Keys that are missing from the last panel, or from the last word of a line, are zero.
void make_panels(const struct attention *attention, const struct attention_call *call, int64_t first_key,
                 int64_t num_keys, const struct chunk_panels *panels);

#endif
