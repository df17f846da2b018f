// Steps of a small random model, run under sanitizers: a prompt in one piece, in chunks, and decoded token by token
// beside others must give the same logits. `python -m tests.kernels.cpu.sanitize` builds and runs it.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "duet.h"

enum { HIDDEN = 48, HEADS = 6, KV_HEADS = 2, INTERMEDIATE = 80, VOCAB = 70, LAYERS = 2, BLOCK = 4, BLOCKS = 64 };
enum { SEQUENCES = 3, LENGTH = 37, MAX_TOKENS = 128 };

static uint32_t state = 1;

static float random_value(void) {
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 8388608.0f - 1.0f;
}

static float *random_values(int64_t count, float scale, float shift) {
    float *values = malloc((size_t)count * sizeof *values);
    for (int64_t i = 0; i < count; i++)
        values[i] = random_value() * scale + shift;
    return values;
}

static struct linear random_linear(int64_t in_features, int64_t out_features, int32_t format) {
    int64_t padded = ceil_div(out_features, PANEL) * PANEL;
    struct linear linear = {
        .in_features = in_features,
        .out_features = out_features,
        .format = format,
        .panels = malloc((size_t)duet_panel_bytes(in_features, out_features, format)),
        .scales = format == FORMAT_INT8 ? malloc((size_t)padded * 4) : NULL,
        .corrections = format == FORMAT_INT8 ? malloc((size_t)padded * 4) : NULL,
        .bias = random_values(out_features, 0.1f, 0),
    };
    float *weight = random_values(in_features * out_features, 0.3f, 0);
    duet_pack(&linear, weight, FORMAT_FLOAT);
    free(weight);
    return linear;
}

static void free_linear(struct linear linear) {
    free((void *)linear.panels);
    free((void *)linear.scales);
    free((void *)linear.corrections);
    free((void *)linear.bias);
}

static struct model random_model(struct layer *layers, int64_t dim, int32_t weight_format, int32_t cache_format) {
    for (int i = 0; i < LAYERS; i++) {
        layers[i] = (struct layer){
            .qkv = random_linear(HIDDEN, (HEADS + 2 * KV_HEADS) * dim, weight_format),
            .attention_out = random_linear(HEADS * dim, HIDDEN, weight_format),
            .gate_up = random_linear(HIDDEN, 2 * INTERMEDIATE, weight_format),
            .down = random_linear(INTERMEDIATE, HIDDEN, weight_format),
            .input_norm = random_values(HIDDEN, 0.1f, 1),
            .post_attention_norm = random_values(HIDDEN, 0.1f, 1),
            .qk_norm = random_values((HEADS + KV_HEADS) * dim, 0.1f, 1),
            .kv_cache = calloc((size_t)(BLOCKS * KV_HEADS * 2 * BLOCK * dim), cache_format == FORMAT_FLOAT ? 4 : 2),
        };
        layers[i].gate_up.is_gate_up = 1;
    }
    return (struct model){
        .num_layers = LAYERS,
        .hidden_size = HIDDEN,
        .num_heads = HEADS,
        .num_kv_heads = KV_HEADS,
        .head_dim = (int32_t)dim,
        .block_size = BLOCK,
        .cache_format = cache_format,
        .norm_eps = 1e-5f,
        .inv_freq = random_values(dim / 2, 0.3f, 0.5f),
        .layers = layers,
        .norm = random_values(HIDDEN, 0.1f, 1),
        .lm_head = random_linear(HIDDEN, VOCAB, weight_format),
    };
}

static void free_model(const struct model *model) {
    for (int i = 0; i < LAYERS; i++) {
        const struct layer *layer = &model->layers[i];
        struct linear linears[] = {layer->qkv, layer->attention_out, layer->gate_up, layer->down};
        for (int j = 0; j < 4; j++)
            free_linear(linears[j]);
        free((void *)layer->input_norm);
        free((void *)layer->post_attention_norm);
        free((void *)layer->qk_norm);
        free(layer->kv_cache);
    }
    free_linear(model->lm_head);
    free((void *)model->inv_freq);
    free((void *)model->norm);
}

// Tokens start to end of each sequence; logits: [SEQUENCES, LENGTH, VOCAB], of which those tokens' are written.
static void run(struct engine *engine, int64_t start, int64_t end, float *logits) {
    int64_t token_ids[MAX_TOKENS], positions[MAX_TOKENS], count = end - start;
    int32_t starts[SEQUENCES + 1], tables[SEQUENCES * BLOCKS / SEQUENCES];
    float *own = malloc((size_t)(SEQUENCES * count * VOCAB) * sizeof *own);
    for (int64_t sequence = 0; sequence < SEQUENCES; sequence++) {
        starts[sequence + 1] = (int32_t)(count * (sequence + 1));
        for (int64_t i = 0; i < count; i++) {
            token_ids[sequence * count + i] = (7 * (start + i) + 3 * sequence) % VOCAB;
            positions[sequence * count + i] = start + i;
        }
        for (int64_t block = 0; block < BLOCKS / SEQUENCES; block++)
            tables[sequence * (BLOCKS / SEQUENCES) + block] = (int32_t)(block * SEQUENCES + sequence);
    }
    starts[0] = 0;
    struct batch batch = {SEQUENCES * count, SEQUENCES, token_ids, positions, starts, tables, BLOCKS / SEQUENCES};
    if (count == 1) {
        duet_decode_step(engine, &batch, own);
    } else {
        float *hidden = malloc((size_t)(SEQUENCES * count * HIDDEN) * sizeof *hidden);
        duet_forward(engine, &batch, hidden);
        duet_logits(engine, hidden, SEQUENCES * count, own);
        free(hidden);
    }
    for (int64_t sequence = 0; sequence < SEQUENCES; sequence++)
        memcpy(logits + (sequence * LENGTH + start) * VOCAB, own + sequence * count * VOCAB,
               (size_t)(count * VOCAB) * sizeof *own);
    free(own);
}

static float largest_difference(const float *a, const float *b) {
    float largest = 0;
    for (int i = 0; i < SEQUENCES * LENGTH * VOCAB; i++)
        largest = fmaxf(largest, isfinite(b[i]) ? fabsf(a[i] - b[i]) : INFINITY);
    return largest;
}

static int check(int64_t dim, int32_t weight_format, int32_t cache_format, float tolerance) {
    static float whole[SEQUENCES * LENGTH * VOCAB], parts[SEQUENCES * LENGTH * VOCAB];
    struct layer layers[LAYERS];
    struct model model = random_model(layers, dim, weight_format, cache_format);
    int32_t cores[3] = {0, 0, 0};
    struct engine *engine = duet_engine_create(&model, MAX_TOKENS, 3, cores);
    run(engine, 0, LENGTH, whole);
    run(engine, 0, 9, parts);
    run(engine, 9, 30, parts);
    for (int64_t position = 30; position < LENGTH; position++)
        run(engine, position, position + 1, parts);
    duet_engine_destroy(engine);
    free_model(&model);
    float difference = largest_difference(whole, parts);
    printf("head_dim %d, weights %d, cache %d: chunks differ by %g\n", (int)dim, weight_format, cache_format, difference);
    return difference <= tolerance ? 0 : 1;
}

int main(void) {
    int failures = 0;
    for (int64_t dim = 8; dim <= 128; dim *= 4) {
        failures += check(dim, FORMAT_FLOAT, FORMAT_FLOAT, 1e-4f);
        failures += check(dim, FORMAT_BF16, FORMAT_BF16, 0.1f);
        failures += check(dim, FORMAT_INT8, FORMAT_BF16, 0.3f);
        failures += check(dim, FORMAT_INT8, FORMAT_FLOAT, 0.3f);
    }
    return failures != 0;
}
