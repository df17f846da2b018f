// For each chunk of 64 keys: make panels of the keys and of the values, then, a tile of queries at a time, multiply
// with the keys, weigh (a softmax that is corrected as larger scores come, arXiv:2205.14135), multiply with the values.
//
//     panels of keys:   outputs are keys, inputs are the dimensions of a head     scores  = queries x keys
//     panels of values: outputs are dimensions, inputs are keys                   results = weights x values
//
// Making panels takes about as long as multiplying three queries with them, and then decoding and prefill, whose
// queries are a group or hundreds, are the same code.
#include "attention.h"

#include <math.h>
#include <string.h>

#include "elementwise.h"

// The dimensions of a head, rounded up to whole vectors of words and to panels.
static int64_t padded_dim(const struct attention *attention) { return ceil_div(attention->head_dim, 32) * 32; }

static int64_t value_bytes(const struct attention *attention) { return attention->cache_format == FORMAT_FLOAT ? 4 : 2; }

enum format query_format(const struct attention *attention) {
    return is_packed(attention->cache_format) ? FORMAT_BF16 : FORMAT_FLOAT;
}

static int64_t words_a_query(const struct attention *attention) {
    return words_of(padded_dim(attention), query_format(attention));
}

int64_t query_bytes(const struct attention *attention) { return words_a_query(attention) * 4; }

// A thread's memory, cut up.
struct scratch {
    uint32_t *keys;    // [CHUNK / 16 panels, words_a_query, 16]
    uint32_t *values;  // [padded_dim / 16 panels, CHUNK / keys in a word, 16]
    char *padded;      // [2, CHUNK, padded_dim] of the cache's format: keys and values of a head that is no multiple of 32
    float *weights;    // [MAX_TILE_ROWS, CHUNK], scores first
    char *weight_rows; // [MAX_TILE_ROWS, CHUNK] in query_format
    float *sums;       // [MAX_TILE_ROWS, MAX_TILE_PANELS, 16]
};

static char *take(char **memory, int64_t num_bytes) {
    char *start = *memory;
    *memory += ceil_div(num_bytes, 64) * 64;
    return start;
}

static int64_t lay_out(const struct attention *attention, char *memory, struct scratch *scratch) {
    int64_t dim = padded_dim(attention);
    char *end = memory;
    scratch->keys = (uint32_t *)take(&end, CHUNK * words_a_query(attention) * 4);
    scratch->values = (uint32_t *)take(&end, CHUNK * dim * 4);
    scratch->padded = take(&end, 2 * CHUNK * dim * 4);
    scratch->weights = (float *)take(&end, MAX_TILE_ROWS * CHUNK * 4);
    scratch->weight_rows = take(&end, MAX_TILE_ROWS * CHUNK * 4);
    scratch->sums = (float *)take(&end, MAX_TILE_ROWS * MAX_TILE_PANELS * PANEL * 4);
    return end - memory;
}

int64_t attention_scratch_bytes(const struct attention *attention) {
    struct scratch unused;
    return lay_out(attention, (char *)64, &unused);
}

// LANES words of a key or value, from word `first` on, as query_format has them.
ALWAYS_INLINE ints load_words(const struct attention *attention, const char *row, int64_t first) {
    if (attention->cache_format == FORMAT_FLOAT || is_packed(FORMAT_BF16))
        return load(row + first * 4);
    ints words;
    const uint16_t *values = (const uint16_t *)row + first;
    for (int i = 0; i < LANES; i++)
        words[i] = values[i] << 16;
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

// A tile of queries within a chunk of keys.
struct place {
    int64_t first_query;
    int64_t num_queries;
    int64_t first_key;
    int64_t num_keys;
};

static int64_t visible_keys(const struct attention *attention, const struct attention_call *call,
                            const struct place *place, int64_t query) {
    int64_t position = call->first_position + query / attention->group;
    return most(0, least(place->num_keys, position + 1 - place->first_key));
}

static void compute_scores(const struct attention *attention, const struct attention_call *call,
                           const struct place *place, struct scratch *scratch) {
    int64_t num_words = words_a_query(attention), width = tile_panels(place->num_queries);
    int64_t num_panels = ceil_div(place->num_keys, PANEL);
    struct tile tile = {
        .rows = call->queries + place->first_query * query_bytes(attention),
        .row_stride = query_bytes(attention),
        .num_words = num_words,
    };
    for (int64_t first = 0; first < num_panels; first += width) {
        for (int64_t p = 0; p < width; p++)
            tile.panels[p] = scratch->keys + least(first + p, num_panels - 1) * num_words * PANEL;
        multiply_tile(&tile, query_format(attention), place->num_queries, scratch->sums);
        for (int64_t i = 0; i < place->num_queries; i++)
            for (int64_t p = 0; p < least(width, num_panels - first); p++)
                memcpy(scratch->weights + i * CHUNK + (first + p) * PANEL, scratch->sums + (i * width + p) * PANEL,
                       PANEL * sizeof(float));
    }
}

// Turns a query's scores into weights, and scales down what earlier chunks gave it where a larger score has come.
// weights: [num_keys], the first num_visible of them scores; values: [head_dim]; sum_and_largest: [2].
static void weigh(float *weights, int64_t num_visible, int64_t num_keys, float scale, float *values, int64_t head_dim,
                  float *sum_and_largest) {
    float largest = sum_and_largest[1], sum = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < num_visible; i++)
        largest = weights[i] * scale > largest ? weights[i] * scale : largest;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < num_visible; i++) {
        weights[i] = exponential(weights[i] * scale - largest);
        sum += weights[i];
    }
    for (int64_t i = num_visible; i < num_keys; i++)
        weights[i] = 0;
    float correction = sum_and_largest[0] > 0 ? exponential(sum_and_largest[1] - largest) : 0;
    for (int64_t i = 0; i < head_dim; i++)
        values[i] *= correction;
    sum_and_largest[0] = sum_and_largest[0] * correction + sum;
    sum_and_largest[1] = largest;
}

static void weigh_queries(const struct attention *attention, const struct attention_call *call,
                          const struct place *place, struct scratch *scratch) {
    int64_t group = attention->group, dim = attention->head_dim, padded_keys = ceil_div(place->num_keys, 2) * 2;
    for (int64_t i = 0; i < place->num_queries; i++) {
        int64_t query = place->first_query + i, token = query / group, head = query % group;
        int64_t num_visible = visible_keys(attention, call, place, query);
        float *weights = scratch->weights + i * CHUNK;
        if (num_visible)
            weigh(weights, num_visible, padded_keys, 1.0f / sqrtf((float)dim),
                  call->values + token * call->value_stride + head * dim, dim,
                  call->weights + token * call->weight_stride + head * 2);
        else
            memset(weights, 0, (size_t)padded_keys * sizeof(float));
        make_row(query_format(attention), weights, padded_keys, scratch->weight_rows + i * CHUNK * 4, NULL);
    }
}

static void add_values(const struct attention *attention, const struct attention_call *call, const struct place *place,
                       struct scratch *scratch) {
    int64_t num_words = words_of(place->num_keys, query_format(attention)), width = tile_panels(place->num_queries);
    int64_t dim = attention->head_dim, num_panels = ceil_div(dim, PANEL);
    struct tile tile = {.rows = scratch->weight_rows, .row_stride = CHUNK * 4, .num_words = num_words};
    for (int64_t first = 0; first < num_panels; first += width) {
        for (int64_t p = 0; p < width; p++)
            tile.panels[p] = scratch->values + least(first + p, num_panels - 1) * num_words * PANEL;
        multiply_tile(&tile, query_format(attention), place->num_queries, scratch->sums);
        for (int64_t i = 0; i < place->num_queries; i++) {
            int64_t query = place->first_query + i;
            float *values = call->values + query / attention->group * call->value_stride +
                            query % attention->group * dim + first * PANEL;
            const float *sums = scratch->sums + i * width * PANEL;
            int64_t count = least(width * PANEL, dim - first * PANEL);
            for (int64_t d = 0; d < count; d++)
                values[d] += sums[d];
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
static void find_rows(const struct attention *attention, const struct attention_call *call, const struct place *place,
                      int64_t is_value, char *padded, const char **rows) {
    int64_t row_bytes = attention->head_dim * value_bytes(attention);
    int64_t padded_bytes = padded_dim(attention) * value_bytes(attention);
    prefetch_rows(attention, call, place->first_key + CHUNK, call->end_key, is_value);
    for (int64_t i = 0; i < place->num_keys; i++) {
        rows[i] = find_row(attention, call, place->first_key + i, is_value);
        if (row_bytes == padded_bytes)
            continue;
        char *copy = padded + i * padded_bytes;
        memcpy(copy, rows[i], (size_t)row_bytes);
        memset(copy + row_bytes, 0, (size_t)(padded_bytes - row_bytes));
        rows[i] = copy;
    }
}

static void make_panels(const struct attention *attention, const struct attention_call *call, const struct place *place,
                        struct scratch *scratch) {
    const char *rows[CHUNK];
    find_rows(attention, call, place, 0, scratch->padded, rows);
    make_key_panels(attention, rows, place->num_keys, scratch->keys);
    find_rows(attention, call, place, 1, scratch->padded + CHUNK * padded_dim(attention) * 4, rows);
    make_value_panels(attention, rows, place->num_keys, scratch->values);
}

void attend(const struct attention *attention, const struct attention_call *call, void *memory) {
    struct scratch scratch;
    lay_out(attention, memory, &scratch);
    int64_t num_queries = call->num_tokens * attention->group;
    for (int64_t token = 0; token < call->num_tokens; token++)
        for (int64_t i = 0; i < attention->group; i++) {
            memset(call->values + token * call->value_stride + i * attention->head_dim, 0,
                   (size_t)attention->head_dim * sizeof(float));
            float *weights = call->weights + token * call->weight_stride + i * 2;
            weights[0] = 0, weights[1] = -INFINITY;
        }
    int64_t end_key = least(call->end_key, call->first_position + call->num_tokens);
    for (int64_t key = call->first_key; key < end_key; key += CHUNK) {
        struct place place = {.first_key = key, .num_keys = least(CHUNK, end_key - key)};
        make_panels(attention, call, &place, &scratch);
        // Tokens before the chunk's first key see nothing of it.
        int64_t first = most(0, key - call->first_position) * attention->group;
        for (; first < num_queries; first += place.num_queries) {
            place.first_query = first;
            place.num_queries = least(tile_rows(), num_queries - first);
            compute_scores(attention, call, &place, &scratch);
            weigh_queries(attention, call, &place, &scratch);
            add_values(attention, call, &place, &scratch);
        }
    }
}

void merge_spans(const float *values, int64_t value_stride, const float *weights, int64_t weight_stride,
                 int64_t num_spans, int64_t size, float *y) {
    float largest = -INFINITY, total = 0;
    for (int64_t span = 0; span < num_spans; span++)
        largest = fmaxf(largest, weights[span * weight_stride + 1]);
    memset(y, 0, (size_t)size * sizeof(float));
    for (int64_t span = 0; span < num_spans; span++) {
        const float *own = weights + span * weight_stride;
        if (own[0] == 0)
            continue;
        float factor = exponential(own[1] - largest);
        total += factor * own[0];
        for (int64_t i = 0; i < size; i++)
            y[i] += factor * values[span * value_stride + i];
    }
    for (int64_t i = 0; i < size; i++)
        y[i] /= total;
}
