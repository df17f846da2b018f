// What Python hands over, and how everything lies in memory. kernels/cpu/library.py mirrors these structures.
//
// Panels: the weight of a linear layer, [out_features, in_features], as the inner loop reads it from end to end.
// 16 outputs are a panel. A line of it is 64 bytes: for each of the 16 outputs a word of 32 bits, which holds one
// float, two bfloat16 or four int8, the weights of as many consecutive inputs. With bfloat16:
//
//                 output 0          output 1                output 15
//     line 0    [ w(0,0) w(0,1) | w(1,0) w(1,1) | .......  | w(15,0) w(15,1) ]      panel 0 = lines for all inputs
//     line 1    [ w(0,2) w(0,3) | w(1,2) w(1,3) | .......  | w(15,2) w(15,3) ]      panel 1 = outputs 16 to 31, ...
//
// What is missing from the last panel, or from the last word of a line, is zero.
//
// Rows: the inputs of a linear layer, one after the other, in the words that the processor multiplies with a line:
// words like those of a line where it has an instruction for that (see vectors.h), else one float for each input.
//
// The KV cache of a layer: [num_blocks, kv_heads, 2, block_size, head_dim], keys at 0 and values at 1; token
// `position` of a sequence lies in block block_table[position / block_size].
#ifndef DUET_LAYOUT_H
#define DUET_LAYOUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PANEL = 16 }; // outputs

// Numbers of weights, rows and caches. Caches know the first two.
enum format { FORMAT_FLOAT = 0, FORMAT_BF16 = 1, FORMAT_INT8 = 2 };

struct linear {
    int64_t in_features;
    int64_t out_features;
    int32_t format;
    int32_t is_gate_up;        // whether the outputs are gate, then up, a multiple of 16 each: see run_gate_up
    const uint32_t *panels;    // see above
    const float *scales;       // [out_features, up to whole panels], int8: what a weight is multiplied with; else NULL
    const int32_t *corrections; // as long; int8: minus 128 times the sum of the output's weights; else NULL
    const float *bias;         // [out_features], or NULL
};

struct layer {
    struct linear qkv;           // outputs: queries, keys, values; its bias is qkv_bias, which comes before qk_norm
    struct linear attention_out;
    struct linear gate_up;
    struct linear down;
    const float *input_norm;     // [hidden_size]
    const float *post_attention_norm; // [hidden_size]
    const float *qk_norm;        // [heads + kv_heads, head_dim], or NULL
    void *kv_cache;              // of the model's cache_format
};

struct model {
    int32_t num_layers;
    int32_t hidden_size;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t block_size;
    int32_t cache_format;        // FORMAT_FLOAT or FORMAT_BF16
    float norm_eps;
    const float *inv_freq;       // [head_dim / 2], radians per position
    const struct layer *layers;  // [num_layers]
    const void *embedding;       // [vocab_size, hidden_size] of the cache_format; NULL: that of the LM head's panels
    const float *norm;           // [hidden_size]
    struct linear lm_head;
};

// The tokens of a step, one sequence after the other; each sequence's tokens are the tail of its context.
struct batch {
    int64_t num_tokens;
    int64_t num_sequences;
    const int64_t *token_ids;    // [num_tokens]
    const int64_t *positions;    // [num_tokens]
    const int32_t *query_starts; // [num_sequences + 1], the first token of each
    const int32_t *block_tables; // [num_sequences, block_table_stride]
    int64_t block_table_stride;
};

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Inputs that a word of 32 bits holds.
static inline int64_t inputs_per_word(enum format format) {
    return format == FORMAT_FLOAT ? 1 : format == FORMAT_BF16 ? 2 : 4;
}

static inline int64_t words_of(int64_t in_features, enum format format) {
    return ceil_div(in_features, inputs_per_word(format));
}

static inline int64_t panel_words(const struct linear *linear) {
    return words_of(linear->in_features, (enum format)linear->format) * PANEL;
}

#endif
