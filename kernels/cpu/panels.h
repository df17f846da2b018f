// Making panels of weights, and reading single outputs' weights back: an embedding that shares them with the LM head.
#ifndef DUET_PANELS_H
#define DUET_PANELS_H

#include "vectors.h"

// Fills panels of `out->format` from weight, [out_features, in_features] of source_format (float or bfloat16), and for
// int8 scales and corrections. All of `out` but the sizes and the format is memory to be written.
void pack_panels(const struct linear *out, const void *weight, enum format source_format);

// The weights of one output: row, [in_features].
void unpack_output(const struct linear *linear, int64_t output, float *row);

#endif
