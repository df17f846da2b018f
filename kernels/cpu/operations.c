#include <stdlib.h>

#include "attention.h"
#include "duet.h"
#include "elementwise.h"
#include "linear.h"
#include "panels.h"

int64_t duet_panel_bytes(int64_t in_features, int64_t out_features, int32_t format) {
    return ceil_div(out_features, PANEL) * PANEL * words_of(in_features, (enum format)format) * 4;
}

void duet_pack(const struct linear *out, const void *weight, int32_t source_format) {
    pack_panels(out, weight, (enum format)source_format);
}

void duet_unpack(const struct linear *linear, const int64_t *outputs, int64_t num_outputs, float *rows) {
    for (int64_t i = 0; i < num_outputs; i++)
        unpack_output(linear, outputs[i], rows + i * linear->in_features);
}

static const struct member ALONE = {NULL, 0, 1};

// Rows of x, [num_rows, in_features], for the layer; NULL values where there is no memory.
static struct rows make_rows(const struct linear *linear, const float *x, int64_t num_rows) {
    enum format format = (enum format)linear->format;
    int64_t stride = row_stride(linear->in_features, format), room = num_rows + MAX_TILE_ROWS;
    struct rows rows = {calloc((size_t)room, (size_t)stride), calloc((size_t)room, sizeof(float)), num_rows};
    for (int64_t row = 0; rows.values && rows.scales && row < num_rows; row++)
        make_row(format, x + row * linear->in_features, linear->in_features, rows.values + row * stride,
                 rows.scales + row);
    return rows;
}

void duet_linear(const struct linear *linear, const float *x, int64_t num_rows, float *y) {
    struct rows rows = make_rows(linear, x, num_rows);
    if (rows.values && rows.scales)
        run_linear(&ALONE, linear, &rows, y, linear->out_features, false, NULL);
    free(rows.values);
    free(rows.scales);
}

void duet_gate_up(const struct linear *linear, const float *x, int64_t num_rows, float *y) {
    int64_t size = linear->out_features / 2;
    bool is_bf16 = linear->format == FORMAT_BF16 && is_packed(FORMAT_BF16);
    struct rows rows = make_rows(linear, x, num_rows);
    uint16_t *rounded = calloc((size_t)(num_rows * size), sizeof *rounded);
    if (rows.values && rows.scales && rounded) {
        run_gate_up(&ALONE, linear, &rows, is_bf16 ? (void *)rounded : y, size * (is_bf16 ? 2 : 4), NULL);
        for (int64_t i = 0; is_bf16 && i < num_rows * size; i++)
            y[i] = from_bf16(rounded[i]);
    }
    free(rounded);
    free(rows.values);
    free(rows.scales);
}

void duet_rms_norm(const float *x, const float *weight, int64_t num_rows, int64_t size, float eps, float *y) {
    for (int64_t row = 0; row < num_rows; row++)
        rms_norm(x + row * size, weight, size, eps, y + row * size);
}

void duet_rotate(float *x, const int64_t *positions, const float *inv_freq, int64_t num_tokens, int64_t num_heads,
                 int64_t head_dim) {
    float *factors = malloc((size_t)head_dim * sizeof(float));
    for (int64_t token = 0; factors && token < num_tokens; token++) {
        rotation_factors(positions[token], inv_freq, head_dim, factors);
        for (int64_t head = 0; head < num_heads; head++)
            rotate(x + (token * num_heads + head) * head_dim, factors, head_dim);
    }
    free(factors);
}

// One kv head of duet_attention, in memory that is large enough.
static void attend_head(const struct attention *attention, const struct duet_sequence *sequence, const float *q,
                        struct attention_call *call, float *y, int64_t num_spans, char *queries, void *scratch) {
    int64_t dim = attention->head_dim, group = attention->group, num_heads = group * attention->num_kv_heads;
    int64_t num_queries = sequence->num_tokens * group, num_chunks;
    float *values = call->values, *weights = call->weights;
    for (int64_t query = 0; query < num_queries; query++) {
        int64_t head = query / group * num_heads + call->kv_head * group + query % group;
        make_row(query_format(attention), q + head * dim, dim, queries + query * query_bytes(attention), NULL);
    }
    num_chunks = ceil_div(sequence->first_position + sequence->num_tokens, CHUNK);
    for (int64_t span = 0; span < num_spans; span++) {
        call->first_key = num_chunks * span / num_spans * CHUNK;
        call->end_key = num_chunks * (span + 1) / num_spans * CHUNK;
        call->values = values + span * num_queries * dim;
        call->weights = weights + span * num_queries * 2;
        attend(attention, call, scratch);
    }
    for (int64_t query = 0; query < num_queries; query++) {
        int64_t head = query / group * num_heads + call->kv_head * group + query % group;
        merge_spans(values + query * dim, num_queries * dim, weights + query * 2, num_queries * 2, num_spans, dim,
                    y + head * dim);
    }
    call->values = values, call->weights = weights;
}

void duet_attention(const struct duet_sequence *sequence, const float *q, int64_t num_spans, float *y) {
    struct attention attention = {
        .num_kv_heads = sequence->num_kv_heads,
        .group = sequence->num_heads / sequence->num_kv_heads,
        .head_dim = sequence->head_dim,
        .block_size = sequence->block_size,
        .cache_format = (enum format)sequence->cache_format,
    };
    int64_t num_queries = sequence->num_tokens * attention.group;
    char *queries = calloc((size_t)num_queries, (size_t)query_bytes(&attention));
    float *values = calloc((size_t)(num_spans * num_queries * attention.head_dim), sizeof(float));
    float *weights = calloc((size_t)(num_spans * num_queries * 2), sizeof(float));
    void *scratch = malloc((size_t)attention_scratch_bytes(&attention));
    struct attention_call call = {
        .queries = queries,
        .num_tokens = sequence->num_tokens,
        .first_position = sequence->first_position,
        .kv_cache = sequence->kv_cache,
        .block_table = sequence->block_table,
        .values = values,
        .weights = weights,
        .value_stride = attention.group * attention.head_dim,
        .weight_stride = attention.group * 2,
    };
    if (queries && values && weights && scratch)
        for (call.kv_head = 0; call.kv_head < attention.num_kv_heads; call.kv_head++)
            attend_head(&attention, sequence, q, &call, y, num_spans, queries, scratch);
    free(queries);
    free(values);
    free(weights);
    free(scratch);
}
