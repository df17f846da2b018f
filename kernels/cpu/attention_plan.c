#include "engine.h"

// So many queries share the panels that are made of keys and values.
enum { QUERIES_A_CALL = 128 };
// Fewer keys are not worth a span of their own.
enum { LEAST_SPAN = 128 };

static int64_t context_len(const struct batch *batch, int64_t sequence) {
    return batch->positions[batch->query_starts[sequence + 1] - 1] + 1;
}

static int64_t choose_num_spans(const struct engine *engine, const struct batch *batch) {
    int64_t longest = 0;
    for (int64_t i = 0; i < batch->num_sequences; i++)
        longest = most(longest, context_len(batch, i));
    int64_t wanted = ceil_div(ITEMS_A_THREAD * engine->num_threads, batch->num_tokens * engine->model.num_kv_heads);
    return most(1, least(wanted, longest / LEAST_SPAN));
}

static void add_items(struct engine *engine, int64_t sequence, int64_t first_token, int64_t num_tokens) {
    for (int32_t kv_head = 0; kv_head < engine->model.num_kv_heads; kv_head++)
        for (int32_t span = 0; span < engine->num_spans; span++)
            engine->items[engine->num_items++] = (struct attention_item){
                (int32_t)sequence, kv_head, (int32_t)first_token, (int32_t)num_tokens, span,
            };
}

void plan_attention(struct engine *engine) {
    const struct batch *batch = engine->batch;
    engine->num_items = 0;
    engine->num_spans = choose_num_spans(engine, batch);
    int64_t tokens_a_call = most(1, QUERIES_A_CALL / engine->attention.group);
    for (int64_t sequence = 0; sequence < batch->num_sequences; sequence++) {
        int64_t start = batch->query_starts[sequence], end = batch->query_starts[sequence + 1];
        for (int64_t token = start; token < end; token++)
            engine->sequence_of_token[token] = (int32_t)sequence;
        // The last tokens of a chunk have the most keys: they come first.
        for (int64_t last = end; last > start; last -= least(tokens_a_call, last - start)) {
            int64_t num_tokens = least(tokens_a_call, last - start);
            add_items(engine, sequence, last - num_tokens, num_tokens);
        }
    }
    for (int64_t layer = 0; layer < engine->model.num_layers; layer++)
        atomic_store_explicit(&engine->next_items[layer], 0, memory_order_relaxed);
}

static int64_t num_query_dims(const struct engine *engine) {
    return (int64_t)engine->model.num_heads * engine->model.head_dim;
}

float *span_values(const struct engine *engine, int64_t span) {
    return engine->values + span * engine->batch->num_tokens * num_query_dims(engine);
}

float *span_weights(const struct engine *engine, int64_t span) {
    return engine->weights + span * engine->batch->num_tokens * engine->model.num_heads * 2;
}
