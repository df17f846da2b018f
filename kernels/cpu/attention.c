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

#include "attention_panels.h"
#include "elementwise.h"

// A thread's memory, cut up.
struct scratch {
    struct chunk_panels panels;
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
    scratch->panels.keys = (uint32_t *)take(&end, CHUNK * words_a_query(attention) * 4);
    scratch->panels.values = (uint32_t *)take(&end, CHUNK * dim * 4);
    scratch->panels.padded = take(&end, 2 * CHUNK * dim * 4);
    scratch->weights = (float *)take(&end, MAX_TILE_ROWS * CHUNK * 4);
    scratch->weight_rows = take(&end, MAX_TILE_ROWS * CHUNK * 4);
    scratch->sums = (float *)take(&end, MAX_TILE_ROWS * MAX_TILE_PANELS * PANEL * 4);
    return end - memory;
}

int64_t attention_scratch_bytes(const struct attention *attention) {
    struct scratch unused;
    return lay_out(attention, (char *)64, &unused);
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
            tile.panels[p] = scratch->panels.keys + least(first + p, num_panels - 1) * num_words * PANEL;
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
            tile.panels[p] = scratch->panels.values + least(first + p, num_panels - 1) * num_words * PANEL;
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
        make_panels(attention, call, key, place.num_keys, &scratch.panels);
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
