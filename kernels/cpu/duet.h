// Everything that Python calls; kernels/cpu/library.py declares it there.
//
// One thread at a time may use an engine, and all pointers within a model stay valid as long as the engine exists.
#ifndef DUET_H
#define DUET_H

#include "layout.h"

struct engine;

// max_tokens: most of a batch. cores: [num_threads], where the threads beside the caller's run. NULL: no memory or no
// threads left.
struct engine *duet_engine_create(const struct model *model, int64_t max_tokens, int64_t num_threads,
                                  const int32_t *cores);
void duet_engine_destroy(struct engine *engine);

// Runs all layers, which writes the keys and values of the batch's tokens to the caches. hidden: [num_tokens,
// hidden_size], the sum of all layers, before the last norm.
void duet_forward(struct engine *engine, const struct batch *batch, float *hidden);

// hidden: [num_rows, hidden_size] out of duet_forward; logits: [num_rows, vocab_size].
void duet_logits(struct engine *engine, const float *hidden, int64_t num_rows, float *logits);

// Both, for every token of the batch; logits: [num_tokens, vocab_size].
void duet_decode_step(struct engine *engine, const struct batch *batch, float *logits);

// Bytes of a linear layer's panels.
int64_t duet_panel_bytes(int64_t in_features, int64_t out_features, int32_t format);

// See pack_panels in panels.h.
void duet_pack(const struct linear *out, const void *weight, int32_t source_format);

// The operations one by one, on one thread, as tests compare them with kernels/reference.py.
void duet_linear(const struct linear *linear, const float *x, int64_t num_rows, float *y);
void duet_gate_up(const struct linear *linear, const float *x, int64_t num_rows, float *y); // is_gate_up
void duet_rms_norm(const float *x, const float *weight, int64_t num_rows, int64_t size, float eps, float *y);
void duet_rotate(float *x, const int64_t *positions, const float *inv_freq, int64_t num_tokens, int64_t num_heads,
                 int64_t head_dim);

// Tokens at consecutive positions of a sequence whose keys and values are all in the cache.
struct duet_sequence {
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int32_t cache_format;
    const void *kv_cache;
    const int32_t *block_table;
    int64_t first_position;
    int64_t num_tokens;
};

// q, y: [num_tokens, num_heads, head_dim]; the context is cut into num_spans, which are merged.
void duet_attention(const struct duet_sequence *sequence, const float *q, int64_t num_spans, float *y);

// The weights of some outputs: rows, [num_outputs, in_features].
void duet_unpack(const struct linear *linear, const int64_t *outputs, int64_t num_outputs, float *rows);

#endif
