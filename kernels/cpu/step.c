// A step, operation by operation. Between two of them the threads wait for each other, so that each may read what all
// have written.
#include <string.h>

#include "elementwise.h"
#include "engine.h"
#include "panels.h"

static void embed(const struct engine *engine, int64_t token) {
    const struct model *model = &engine->model;
    int64_t size = model->hidden_size, id = engine->batch->token_ids[token];
    float *hidden = engine->hidden + token * size;
    if (!model->embedding)
        unpack_output(&model->lm_head, id, hidden);
    else if (model->cache_format == FORMAT_FLOAT)
        memcpy(hidden, (const float *)model->embedding + id * size, (size_t)size * sizeof(float));
    else
        for (int64_t i = 0; i < size; i++)
            hidden[i] = from_bf16(((const uint16_t *)model->embedding)[id * size + i]);
}

static void embed_tokens(const struct member *member, const struct engine *engine) {
    const struct model *model = &engine->model;
    struct part tokens = part_of(member, engine->batch->num_tokens);
    for (int64_t token = tokens.start; token < tokens.end; token++) {
        embed(engine, token);
        rotation_factors(engine->batch->positions[token], model->inv_freq, model->head_dim,
                         engine->factors + token * model->head_dim);
    }
}

static void make_engine_row(const struct engine *engine, const struct linear *linear, const float *x, int64_t row) {
    enum format format = (enum format)linear->format;
    make_row(format, x, linear->in_features, engine->rows.values + row * row_stride(linear->in_features, format),
             engine->rows.scales + row);
}

static float *own_row(const struct member *member, const struct engine *engine) {
    const struct model *model = &engine->model;
    return engine->row_memory + member->index * most(model->hidden_size, (int64_t)model->num_heads * model->head_dim);
}

// hidden: [num_rows, hidden_size]; rows for `linear` of its norm.
static void norm_rows(const struct member *member, const struct engine *engine, const float *hidden, int64_t num_rows,
                      const float *weight, const struct linear *linear) {
    const struct model *model = &engine->model;
    float *normed = own_row(member, engine);
    struct part rows = part_of(member, num_rows);
    for (int64_t row = rows.start; row < rows.end; row++) {
        rms_norm(hidden + row * model->hidden_size, weight, model->hidden_size, model->norm_eps, normed);
        make_engine_row(engine, linear, normed, row);
    }
}

// One token's heads that share a kv head: norms, rotations; queries become rows, keys and values go to the cache.
static void prepare_heads(const struct engine *engine, const struct layer *layer, int64_t token, int64_t kv_head) {
    const struct model *model = &engine->model;
    const struct attention *attention = &engine->attention;
    int64_t dim = model->head_dim, group = attention->group, num_heads = model->num_heads;
    float *heads = engine->qkv + token * (num_heads + 2 * model->num_kv_heads) * dim;
    const float *factors = engine->factors + token * dim;
    char *queries = engine->queries + (kv_head * engine->batch->num_tokens + token) * group * query_bytes(attention);
    for (int64_t i = 0; i <= group; i++) { // the last one is the key
        int64_t head = i < group ? kv_head * group + i : num_heads + kv_head;
        float *x = heads + head * dim;
        if (layer->qk_norm)
            rms_norm(x, layer->qk_norm + head * dim, dim, model->norm_eps, x);
        rotate(x, factors, dim);
        if (i < group)
            make_row(query_format(attention), x, dim, queries + i * query_bytes(attention), NULL);
    }
    const struct batch *batch = engine->batch;
    int64_t position = batch->positions[token], block_size = model->block_size;
    const int32_t *table = batch->block_tables + engine->sequence_of_token[token] * batch->block_table_stride;
    int64_t value_bytes = model->cache_format == FORMAT_FLOAT ? 4 : 2;
    int64_t plane = (table[position / block_size] * (int64_t)model->num_kv_heads + kv_head) * 2;
    char *cache = (char *)layer->kv_cache + (plane * block_size + position % block_size) * dim * value_bytes;
    const float *key = heads + (num_heads + kv_head) * dim, *value = key + model->num_kv_heads * dim;
    store_rounded((enum format)model->cache_format, key, dim, cache);
    store_rounded((enum format)model->cache_format, value, dim, cache + block_size * dim * value_bytes);
}

static void prepare_attention(const struct member *member, const struct engine *engine, const struct layer *layer) {
    int64_t num_kv_heads = engine->model.num_kv_heads;
    struct part units = part_of(member, engine->batch->num_tokens * num_kv_heads);
    for (int64_t unit = units.start; unit < units.end; unit++)
        prepare_heads(engine, layer, unit / num_kv_heads, unit % num_kv_heads);
}

static void attend_item(const struct member *member, const struct engine *engine, const struct layer *layer,
                        const struct attention_item *item) {
    const struct model *model = &engine->model;
    const struct attention *attention = &engine->attention;
    const struct batch *batch = engine->batch;
    int64_t first_position = batch->positions[item->first_token];
    int64_t num_chunks = ceil_div(first_position + item->num_tokens, CHUNK), num_spans = engine->num_spans;
    int64_t num_dims = (int64_t)model->num_heads * model->head_dim, first_head = item->kv_head * attention->group;
    int64_t first_query = (item->kv_head * batch->num_tokens + item->first_token) * attention->group;
    struct attention_call call = {
        .queries = engine->queries + first_query * query_bytes(attention),
        .num_tokens = item->num_tokens,
        .first_position = first_position,
        .kv_head = item->kv_head,
        .kv_cache = layer->kv_cache,
        .block_table = batch->block_tables + item->sequence * batch->block_table_stride,
        .first_key = num_chunks * item->span / num_spans * CHUNK,
        .end_key = num_chunks * (item->span + 1) / num_spans * CHUNK,
        .values = span_values(engine, item->span) + item->first_token * num_dims + first_head * model->head_dim,
        .weights = span_weights(engine, item->span) + (item->first_token * (int64_t)model->num_heads + first_head) * 2,
        .value_stride = num_dims,
        .weight_stride = model->num_heads * 2,
    };
    attend(attention, &call, engine->scratch + member->index * attention_scratch_bytes(attention));
}

// Items differ in length, so that each thread takes the next one when it is done with its last.
static void attend_items(const struct member *member, const struct engine *engine, int64_t layer) {
    for (;;) {
        int64_t item = atomic_fetch_add_explicit(&engine->next_items[layer], 1, memory_order_relaxed);
        if (item >= engine->num_items)
            return;
        attend_item(member, engine, &engine->model.layers[layer], &engine->items[item]);
    }
}

static void merge_attention(const struct member *member, const struct engine *engine, const struct linear *linear) {
    const struct model *model = &engine->model;
    int64_t num_heads = model->num_heads, dim = model->head_dim, num_tokens = engine->batch->num_tokens;
    float *merged = own_row(member, engine);
    struct part tokens = part_of(member, num_tokens);
    for (int64_t token = tokens.start; token < tokens.end; token++) {
        for (int64_t head = 0; head < num_heads; head++)
            merge_spans(engine->values + (token * num_heads + head) * dim, num_tokens * num_heads * dim,
                        engine->weights + (token * num_heads + head) * 2, num_tokens * num_heads * 2, engine->num_spans,
                        dim, merged + head * dim);
        make_engine_row(engine, linear, merged, token);
    }
}

static void run_attention(const struct member *member, struct engine *engine, int64_t index) {
    const struct model *model = &engine->model;
    const struct layer *layer = &model->layers[index];
    int64_t num_tokens = engine->batch->num_tokens;
    int64_t num_qkv = (model->num_heads + 2 * model->num_kv_heads) * (int64_t)model->head_dim;
    norm_rows(member, engine, engine->hidden, num_tokens, layer->input_norm, &layer->qkv);
    team_wait(member);
    run_linear(member, &layer->qkv, &engine->rows, engine->qkv, num_qkv, false, &layer->attention_out);
    team_wait(member);
    prepare_attention(member, engine, layer);
    team_wait(member);
    attend_items(member, engine, index);
    team_wait(member);
    merge_attention(member, engine, &layer->attention_out);
    team_wait(member);
    run_linear(member, &layer->attention_out, &engine->rows, engine->hidden, model->hidden_size, true, &layer->gate_up);
    team_wait(member);
}

static void make_activation_rows(const struct member *member, const struct engine *engine, const struct linear *down) {
    struct part tokens = part_of(member, engine->batch->num_tokens);
    for (int64_t token = tokens.start; token < tokens.end; token++)
        make_engine_row(engine, down, engine->activations + token * down->in_features, token);
}

static void run_feed_forward(const struct member *member, struct engine *engine, int64_t index) {
    const struct model *model = &engine->model;
    const struct layer *layer = &model->layers[index];
    bool is_last = index + 1 == model->num_layers;
    const struct linear *next = is_last ? &model->lm_head : &model->layers[index + 1].qkv;
    int64_t num_tokens = engine->batch->num_tokens, size = layer->down.in_features;
    norm_rows(member, engine, engine->hidden, num_tokens, layer->post_attention_norm, &layer->gate_up);
    team_wait(member);
    // Activations become rows at once, where a row does not depend on all of its values; those are other rows than the
    // ones that are being read.
    struct rows down_rows = {(char *)engine->activations, engine->rows.scales, num_tokens};
    if (layer->down.format == FORMAT_INT8) {
        run_gate_up(member, &layer->gate_up, &engine->rows, engine->activations, size * 4, &layer->down);
        team_wait(member);
        make_activation_rows(member, engine, &layer->down);
        down_rows = engine->rows;
    } else {
        int64_t stride = row_stride(size, (enum format)layer->down.format);
        run_gate_up(member, &layer->gate_up, &engine->rows, engine->activations, stride, &layer->down);
    }
    team_wait(member);
    run_linear(member, &layer->down, &down_rows, engine->hidden, model->hidden_size, true, next);
    team_wait(member);
}

void run_layers(const struct member *member, void *context) {
    struct engine *engine = context;
    embed_tokens(member, engine);
    team_wait(member);
    for (int64_t layer = 0; layer < engine->model.num_layers; layer++) {
        run_attention(member, engine, layer);
        run_feed_forward(member, engine, layer);
    }
}

void run_logits(const struct member *member, void *context) {
    struct engine *engine = context;
    const struct linear *head = &engine->model.lm_head;
    struct rows rows = {engine->rows.values, engine->rows.scales, engine->num_logits};
    norm_rows(member, engine, engine->logits_input, engine->num_logits, engine->model.norm, head);
    team_wait(member);
    run_linear(member, head, &rows, engine->logits, head->out_features, false, NULL);
}
