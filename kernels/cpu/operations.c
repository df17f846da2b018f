#include <stdlib.h>

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
    struct rows rows = make_rows(linear, x, num_rows);
    if (rows.values && rows.scales)
        run_gate_up(&ALONE, linear, &rows, y, linear->out_features / 2 * 4, NULL);
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
