// Attention of some of a sequence's tokens over its part of the paged KV cache, decoding and prefill alike.
#ifndef DUET_ATTENTION_H
#define DUET_ATTENTION_H

#include "threads.h"
#include "tile.h"

enum { CHUNK = 64 }; // keys that are worked on at a time

// Sizes and memory that all calls of a model share. A query is a token and a head; the `group` queries of a token that
// share a kv head follow each other.
struct attention {
    int64_t num_kv_heads;
    int64_t group;     // query heads for each kv head
    int64_t head_dim;
    int64_t block_size;
    enum format cache_format;
};

// Bytes from one query to the next among those that a call is given, and a query's size; in the words that the
// processor multiplies with a line of keys: bfloat16 where there is an instruction for it and the cache has it, else
// floats.
int64_t query_bytes(const struct attention *attention);
enum format query_format(const struct attention *attention);

// Bytes of the memory that a thread needs for itself.
int64_t attention_scratch_bytes(const struct attention *attention);

// One kv head's queries of a few tokens at consecutive positions, over a span of keys: those from first_key to end_key
// that each may see, which are the ones up to its own position. What the span contributes to a query is the sum of the
// values, each weighed with exp(score - largest); the sum of the weights; and the largest score.
struct attention_call {
    const char *queries;        // [num_tokens * group] in query_format
    int64_t num_tokens;
    int64_t first_position;     // of the first token
    int64_t kv_head;
    const void *kv_cache;
    const int32_t *block_table;
    int64_t first_key;          // a multiple of CHUNK
    int64_t end_key;
    float *values;              // query (token, i) has [head_dim] at token * value_stride + i * head_dim
    float *weights;             // query (token, i) has the sum and the largest score at token * weight_stride + i * 2
    int64_t value_stride;
    int64_t weight_stride;
};

void attend(const struct attention *attention, const struct attention_call *call, void *scratch);

// y, [size] = the merged values of a query's spans; values: [num_spans] x [size], weights: [num_spans] x [2], with
// strides in floats. A span without keys has a sum of 0.
void merge_spans(const float *values, int64_t value_stride, const float *weights, int64_t weight_stride,
                 int64_t num_spans, int64_t size, float *y);

#endif
