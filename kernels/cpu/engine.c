// What Python calls: making an engine, and running steps on it.
#include "engine.h"

#include <stdlib.h>
#include <string.h>

#include "duet.h"

static void *allocate(int64_t num_bytes) {
    size_t size = (size_t)ceil_div(most(num_bytes, 1), 64) * 64;
    void *memory = aligned_alloc(64, size);
    if (memory)
        memset(memory, 0, size);
    return memory;
}

static int64_t widest_row(const struct model *model) {
    int64_t widest = 0;
    for (int64_t i = 0; i < model->num_layers; i++) {
        const struct layer *layer = &model->layers[i];
        const struct linear *linears[] = {&layer->qkv, &layer->attention_out, &layer->gate_up, &layer->down, &model->lm_head};
        for (int j = 0; j < 5; j++)
            widest = most(widest, row_stride(linears[j]->in_features, (enum format)linears[j]->format));
    }
    return widest;
}

static bool allocate_buffers(struct engine *engine) {
    const struct model *model = &engine->model;
    const struct attention *attention = &engine->attention;
    int64_t max_rows = engine->max_tokens + MAX_TILE_ROWS, max_spans = max_rows + ITEMS_A_THREAD * engine->num_threads;
    int64_t dim = model->head_dim, num_heads = model->num_heads, intermediate = model->layers[0].down.in_features;
    engine->items = allocate(max_spans * model->num_kv_heads * (int64_t)sizeof(struct attention_item));
    engine->sequence_of_token = allocate(max_rows * 4);
    engine->next_items = allocate(model->num_layers * (int64_t)sizeof(atomic_int));
    engine->hidden = allocate(max_rows * model->hidden_size * 4);
    engine->rows.values = allocate(max_rows * widest_row(model));
    engine->rows.scales = allocate(max_rows * 4);
    engine->qkv = allocate(max_rows * (num_heads + 2 * model->num_kv_heads) * dim * 4);
    engine->factors = allocate(max_rows * dim * 4);
    engine->queries = allocate(max_rows * num_heads * query_bytes(attention));
    engine->values = allocate(max_spans * num_heads * dim * 4);
    engine->weights = allocate(max_spans * num_heads * 2 * 4);
    engine->activations = allocate(max_rows * row_stride(intermediate, FORMAT_FLOAT));
    engine->row_memory = allocate(engine->num_threads * most(model->hidden_size, num_heads * dim) * 4);
    engine->scratch = allocate(engine->num_threads * attention_scratch_bytes(attention));
    return engine->items && engine->sequence_of_token && engine->next_items && engine->hidden && engine->rows.values &&
           engine->rows.scales && engine->qkv && engine->factors && engine->queries && engine->values &&
           engine->weights && engine->activations && engine->row_memory && engine->scratch;
}

struct engine *duet_engine_create(const struct model *model, int64_t max_tokens, int64_t num_threads,
                                  const int32_t *cores) {
    struct engine *engine = allocate(sizeof *engine);
    if (!engine)
        return NULL;
    engine->model = *model;
    engine->max_tokens = max_tokens;
    engine->num_threads = num_threads;
    engine->attention = (struct attention){
        .num_kv_heads = model->num_kv_heads,
        .group = model->num_heads / model->num_kv_heads,
        .head_dim = model->head_dim,
        .block_size = model->block_size,
        .cache_format = (enum format)model->cache_format,
    };
    engine->team = team_create(num_threads, cores);
    if (engine->team && allocate_buffers(engine))
        return engine;
    duet_engine_destroy(engine);
    return NULL;
}

void duet_engine_destroy(struct engine *engine) {
    if (engine->team)
        team_destroy(engine->team);
    void *buffers[] = {
        engine->items, engine->sequence_of_token, engine->next_items, engine->hidden, engine->rows.values,
        engine->rows.scales, engine->qkv, engine->factors, engine->queries, engine->values,
        engine->weights, engine->activations, engine->row_memory, engine->scratch, engine,
    };
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        free(buffers[i]);
}

static void begin_step(struct engine *engine, const struct batch *batch) {
    engine->batch = batch;
    engine->rows.num_rows = batch->num_tokens;
    plan_attention(engine);
}

void duet_forward(struct engine *engine, const struct batch *batch, float *hidden) {
    begin_step(engine, batch);
    team_run(engine->team, run_layers, engine);
    memcpy(hidden, engine->hidden, (size_t)(batch->num_tokens * engine->model.hidden_size) * sizeof(float));
}

static void run_whole_step(const struct member *member, void *context) {
    run_layers(member, context);
    run_logits(member, context);
}

void duet_decode_step(struct engine *engine, const struct batch *batch, float *logits) {
    begin_step(engine, batch);
    engine->logits_input = engine->hidden;
    engine->num_logits = batch->num_tokens;
    engine->logits = logits;
    team_run(engine->team, run_whole_step, engine);
}

void duet_logits(struct engine *engine, const float *hidden, int64_t num_rows, float *logits) {
    int64_t hidden_size = engine->model.hidden_size, vocab_size = engine->model.lm_head.out_features;
    for (int64_t start = 0; start < num_rows; start += engine->num_logits) {
        engine->num_logits = least(engine->max_tokens, num_rows - start);
        engine->logits_input = hidden + start * hidden_size;
        engine->logits = logits + start * vocab_size;
        team_run(engine->team, run_logits, engine);
    }
}
