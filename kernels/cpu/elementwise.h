// Norms, rotations and activations of single rows; kernels/reference.py says what each computes.
#ifndef DUET_ELEMENTWISE_H
#define DUET_ELEMENTWISE_H

#include "vectors.h"

// y = the RMS norm of x; x, weight, y: [size]. y may be x.
void rms_norm(const float *x, const float *weight, int64_t size, float eps, float *y);

// Turns x, [size], into a row for a linear layer whose weights have the format; *scale: of int8, what the row's
// products are multiplied with.
void make_row(enum format format, const float *x, int64_t size, void *row, float *scale);

// x, [size], in the cache's format.
void store_rounded(enum format format, const float *x, int64_t size, void *y);

// Cosines, then sines, of position * inv_freq: [head_dim] for an inv_freq of [head_dim / 2].
void rotation_factors(int64_t position, const float *inv_freq, int64_t head_dim, float *factors);

// Rotates x, [head_dim], in place.
void rotate(float *x, const float *factors, int64_t head_dim);

// y = silu(gate) * up, all [size].
void silu_and_mul(const float *gate, const float *up, int64_t size, float *y);

#endif
