// A model, the threads that compute it and the memory between its operations.
#ifndef DUET_ENGINE_H
#define DUET_ENGINE_H

#include <stdatomic.h>

#include "attention.h"
#include "linear.h"

// A part of a layer's attention that one thread computes.
struct attention_item {
    int32_t sequence;
    int32_t kv_head;
    int32_t first_token; // of the batch
    int32_t num_tokens;
    int32_t span; // of num_spans, evenly cut
};

struct engine {
    struct model model;
    struct attention attention;
    struct team *team;
    int64_t num_threads;
    int64_t max_tokens;
    // Of the step that runs.
    const struct batch *batch;
    struct attention_item *items;
    int64_t num_items;
    int64_t num_spans;             // of every query; more than one only where there are few
    int32_t *sequence_of_token;    // [max_tokens]
    atomic_int *next_items;        // [num_layers], the first item that no thread has taken
    const float *logits_input;     // [num_logits, hidden_size]: hidden states, before the last norm
    int64_t num_logits;
    float *logits;                 // [num_logits, vocab_size]
    // What one operation leaves for the next. max_rows is max_tokens and MAX_TILE_ROWS more, max_spans also has
    // ITEMS_A_THREAD more for each thread.
    float *hidden;                 // [max_rows, hidden_size], the sum of all layers so far
    struct rows rows;              // the input of the next linear layer
    float *qkv;                    // [max_rows, (heads + 2 * kv_heads) * head_dim]
    float *factors;                // [max_rows, head_dim], see rotation_factors
    char *queries;                 // [kv_heads, max_rows, group] in query_format
    float *values;                 // [num_spans, num_tokens, heads, head_dim] of max_spans: see attention_call
    float *weights;                // [num_spans, num_tokens, heads, 2]
    float *activations;            // [max_rows, intermediate_size], of int8
    float *row_memory;             // [num_threads, the larger of hidden_size and heads * head_dim]
    char *scratch;                 // [num_threads] of attention_scratch_bytes()
};

// So many items for each thread that none waits long for another.
enum { ITEMS_A_THREAD = 4 };

// Cuts the attention of the engine's batch into items, and contexts into spans where there are few items.
void plan_attention(struct engine *engine);

// Where span `span` of token 0 has its values, and its weights.
float *span_values(const struct engine *engine, int64_t span);
float *span_weights(const struct engine *engine, int64_t span);

// What each thread of the team runs; context: the engine. All layers for the batch: `hidden` at the end.
void run_layers(const struct member *member, void *context);

// The last norm and the LM head.
void run_logits(const struct member *member, void *context);

#endif
