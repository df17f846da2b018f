// Linear layers over panels.
#ifndef DUET_LINEAR_H
#define DUET_LINEAR_H

#include "threads.h"
#include "tile.h"
#include "vectors.h"

// The inputs of a linear layer: see layout.h.
struct rows {
    char *values;   // [num_rows + MAX_TILE_ROWS] rows, row_stride() apart; what the last ones hold does not matter
    float *scales;  // as many, of int8
    int64_t num_rows;
};

// y, [num_rows, out_features] with y_stride floats between rows, = or += x W^T + bias. This thread's part of it.
// next: the layer that comes then, whose first panels are fetched towards the end; or NULL.
void run_linear(const struct member *member, const struct linear *linear, const struct rows *x, float *y,
                int64_t y_stride, bool is_added, const struct linear *next);

// y = silu(gate) * up of a layer with is_gate_up, y_stride bytes between rows: rows for a layer of the same format; of
// int8, whose rows need all of y first, floats. This thread's part of it.
void run_gate_up(const struct member *member, const struct linear *linear, const struct rows *x, void *y,
                 int64_t y_stride, const struct linear *next);

#endif
