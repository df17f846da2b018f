#include "attention_panels.h"

#include <string.h>

int64_t padded_dim(const struct attention *attention) { return ceil_div(attention->head_dim, 32) * 32; }

static int64_t value_bytes(const struct attention *attention) { return attention->cache_format == FORMAT_FLOAT ? 4 : 2; }

enum format query_format(const struct attention *attention) {
    return is_packed(attention->cache_format) ? FORMAT_BF16 : FORMAT_FLOAT;
}

int64_t words_a_query(const struct attention *attention) {
    return words_of(padded_dim(attention), query_format(attention));
}

int64_t query_bytes(const struct attention *attention) { return words_a_query(attention) * 4; }

// LANES words of a key or value, from word `first` on, as query_format has them.
ALWAYS_INLINE ints load_words(const struct attention *attention, const char *row, int64_t first) {
    if (attention->cache_format == FORMAT_FLOAT || is_packed(FORMAT_BF16))
        return load(row + first * 4);
    ints words;
    const uint16_t *values = (const uint16_t *)row + first;
    for (int i = 0; i < LANES; i++)
        words[i] = (int32_t)((uint32_t)values[i] << 16);
    return words;
}

// rows[i] lane j becomes rows[j] lane i: blocks of 1, then 2, 4 and 8 lanes change places.
ALWAYS_INLINE void transpose(ints rows[LANES]) {
    ints lane;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        lane[i] = i;
#pragma GCC unroll 4
    for (int block = 1; block < LANES; block *= 2) {
        ints second = (lane & block) != 0; // -1 where a lane comes from the second row
        ints from_low = lane + (second & (LANES - block)), from_high = from_low + block;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) {
            if (i & block)
                continue;
            ints low = rows[i], high = rows[i + block];
            rows[i] = __builtin_shuffle(low, high, from_low);
            rows[i + block] = __builtin_shuffle(low, high, from_high);
        }
    }
}

// keys: [num_keys] rows of a head; missing ones are zero.
static void make_key_panels(const struct attention *attention, const char *const *keys, int64_t num_keys,
                            uint32_t *panels) {
    int64_t num_words = words_a_query(attention);
    for (int64_t first_key = 0; first_key < num_keys; first_key += LANES) {
        uint32_t *lines = panels + first_key / PANEL * num_words * PANEL + first_key % PANEL;
        for (int64_t word = 0; word < num_words; word += LANES) {
            ints rows[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                rows[i] = first_key + i < num_keys ? load_words(attention, keys[first_key + i], word) : (ints){0};
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                store(lines + (word + i) * PANEL, rows[i]);
        }
    }
}

static void make_value_panels(const struct attention *attention, const char *const *values, int64_t num_keys,
                              uint32_t *panels) {
    static const uint16_t nothing[PANEL];
    int64_t dim = padded_dim(attention), num_words = words_of(num_keys, query_format(attention));
    for (int64_t first_dim = 0; first_dim < dim; first_dim += PANEL) {
        uint32_t *lines = panels + first_dim * num_words;
        for (int64_t word = 0; word < num_words; word++, lines += PANEL) {
            if (is_packed(attention->cache_format)) {
                const uint16_t *even = (const uint16_t *)values[2 * word] + first_dim;
                const uint16_t *odd = 2 * word + 1 < num_keys ? (const uint16_t *)values[2 * word + 1] + first_dim : nothing;
                for (int i = 0; i < PANEL; i++)
                    lines[i] = even[i] | (uint32_t)odd[i] << 16;
            } else {
                for (int64_t i = 0; i < PANEL; i += LANES)
                    store(lines + i, load_words(attention, values[word], first_dim + i));
            }
        }
    }
}

static const char *find_row(const struct attention *attention, const struct attention_call *call, int64_t position,
                            int64_t is_value) {
    int64_t block_size = attention->block_size, block = call->block_table[position / block_size];
    int64_t plane = (block * attention->num_kv_heads + call->kv_head) * 2 + is_value;
    return (const char *)call->kv_cache +
           (plane * block_size + position % block_size) * attention->head_dim * value_bytes(attention);
}

// Lets the cache fetch the keys, or the values, of the next chunk, while this one is worked on.
static void prefetch_rows(const struct attention *attention, const struct attention_call *call, int64_t first_key,
                          int64_t end_key, int64_t is_value) {
    for (int64_t position = first_key; position < least(first_key + CHUNK, end_key); position++) {
        const char *row = find_row(attention, call, position, is_value);
        for (int64_t byte = 0; byte < attention->head_dim * value_bytes(attention); byte += 64)
            __builtin_prefetch(row + byte, 0, 2);
    }
}

// The keys of a head, or its values, of a chunk: pointers to [head_dim], or to a copy with zeros behind it.
static void find_rows(const struct attention *attention, const struct attention_call *call, int64_t first_key,
                      int64_t num_keys, int64_t is_value, char *padded, const char **rows) {
    int64_t row_bytes = attention->head_dim * value_bytes(attention);
    int64_t padded_bytes = padded_dim(attention) * value_bytes(attention);
    prefetch_rows(attention, call, first_key + CHUNK, call->end_key, is_value);
    for (int64_t i = 0; i < num_keys; i++) {
        rows[i] = find_row(attention, call, first_key + i, is_value);
        if (row_bytes == padded_bytes)
            continue;
        char *copy = padded + i * padded_bytes;
        memcpy(copy, rows[i], (size_t)row_bytes);
        memset(copy + row_bytes, 0, (size_t)(padded_bytes - row_bytes));
        rows[i] = copy;
    }
}

void make_panels(const struct attention *attention, const struct attention_call *call, int64_t first_key,
                 int64_t num_keys, const struct chunk_panels *panels) {
    const char *rows[CHUNK];
    find_rows(attention, call, first_key, num_keys, 0, panels->padded, rows);
    make_key_panels(attention, rows, num_keys, panels->keys);
    find_rows(attention, call, first_key, num_keys, 1, panels->padded + CHUNK * padded_dim(attention) * 4, rows);
    make_value_panels(attention, rows, num_keys, panels->values);
}
