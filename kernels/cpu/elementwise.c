#include "elementwise.h"

#include <math.h>
#include <string.h>

void rms_norm(const float *x, const float *weight, int64_t size, float eps, float *y) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++)
        sum += x[i] * x[i];
    float factor = 1.0f / sqrtf(sum / (float)size + eps);
    for (int64_t i = 0; i < size; i++)
        y[i] = x[i] * factor * weight[i];
}

static void make_bf16_row(const float *x, int64_t size, void *row) {
    if (is_packed(FORMAT_BF16)) {
        uint16_t *values = row;
        for (int64_t i = 0; i < size; i++)
            values[i] = to_bf16(x[i]);
        if (size % 2)
            values[size] = 0;
        return;
    }
    float *values = row;
    for (int64_t i = 0; i < size; i++)
        values[i] = from_bf16(to_bf16(x[i]));
    if (size % 2)
        values[size] = 0;
}

// Symmetric: the largest magnitude becomes 127. A value that is not finite must not get lost: it makes the scale NaN.
static void make_int8_row(const float *x, int64_t size, void *row, float *scale) {
    float largest = 0, poison = 0;
#pragma omp simd reduction(max : largest) reduction(+ : poison)
    for (int64_t i = 0; i < size; i++) {
        float magnitude = fabsf(x[i]);
        largest = magnitude > largest ? magnitude : largest;
        poison += x[i] * 0.0f;
    }
    *scale = largest / 127.0f + poison;
    float inverse = largest > 0 && poison == 0 ? 127.0f / largest : 0.0f;
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
    int64_t padded = ceil_div(size, 4) * 4;
    if (is_packed(FORMAT_INT8)) { // the instruction takes unsigned inputs: 128 is added, and `corrections` undo it
        uint8_t *values = row;
        for (int64_t i = 0; i < size; i++)
            values[i] = (uint8_t)(as_bits(x[i] * inverse + shift) + 128);
        for (int64_t i = size; i < padded; i++)
            values[i] = 128;
        return;
    }
    float *values = row;
    for (int64_t i = 0; i < size; i++)
        values[i] = (x[i] * inverse + shift) - shift;
    for (int64_t i = size; i < padded; i++)
        values[i] = 0;
}

void make_row(enum format format, const float *x, int64_t size, void *row, float *scale) {
    if (format == FORMAT_INT8)
        make_int8_row(x, size, row, scale);
    else if (format == FORMAT_BF16)
        make_bf16_row(x, size, row);
    else
        memcpy(row, x, (size_t)size * sizeof(float));
}

void store_rounded(enum format format, const float *x, int64_t size, void *y) {
    if (format == FORMAT_FLOAT) {
        memcpy(y, x, (size_t)size * sizeof(float));
        return;
    }
    uint16_t *values = y;
    for (int64_t i = 0; i < size; i++)
        values[i] = to_bf16(x[i]);
}

void rotation_factors(int64_t position, const float *inv_freq, int64_t head_dim, float *factors) {
    int64_t half = head_dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float angle = (float)position * inv_freq[i];
        factors[i] = cosf(angle);
        factors[half + i] = sinf(angle);
    }
}

void rotate(float *x, const float *factors, int64_t head_dim) {
    int64_t half = head_dim / 2;
    const float *cosines = factors, *sines = factors + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[i] + first * sines[i];
    }
}

void silu_and_mul(const float *gate, const float *up, int64_t size, float *y) {
#pragma omp simd
    for (int64_t i = 0; i < size; i++)
        y[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}
