#include "panels.h"

#include <math.h>
#include <string.h>

static float source_value(const void *weight, enum format format, int64_t index) {
    return format == FORMAT_FLOAT ? ((const float *)weight)[index] : from_bf16(((const uint16_t *)weight)[index]);
}

// The bytes of weight (output, input) within panels of the format.
static void *place_of(const struct linear *linear, int64_t output, int64_t input) {
    int64_t inputs = inputs_per_word((enum format)linear->format);
    const uint32_t *panel = linear->panels + output / PANEL * panel_words(linear);
    const uint32_t *word = panel + input / inputs * PANEL + output % PANEL;
    return (char *)word + input % inputs * (4 / inputs);
}

// Symmetric for each output: the largest magnitude becomes 127.
static void pack_int8_output(const struct linear *out, int64_t output, const void *weight, enum format source_format) {
    int64_t size = out->in_features, start = output * size;
    float largest = 0;
    for (int64_t i = 0; i < size; i++)
        largest = fmaxf(largest, fabsf(source_value(weight, source_format, start + i)));
    float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < size; i++) {
        int32_t value = (int32_t)lrintf(source_value(weight, source_format, start + i) * inverse);
        *(int8_t *)place_of(out, output, i) = (int8_t)value;
        sum += value;
    }
    ((float *)out->scales)[output] = largest / 127.0f;
    ((int32_t *)out->corrections)[output] = -128 * sum;
}

static void pack_output(const struct linear *out, int64_t output, const void *weight, enum format source_format) {
    int64_t size = out->in_features, start = output * size;
    for (int64_t i = 0; i < size; i++) {
        float value = source_value(weight, source_format, start + i);
        if (out->format == FORMAT_FLOAT)
            *(float *)place_of(out, output, i) = value;
        else
            *(uint16_t *)place_of(out, output, i) = to_bf16(value);
    }
}

void pack_panels(const struct linear *out, const void *weight, enum format source_format) {
    int64_t num_panels = ceil_div(out->out_features, PANEL);
    memset((void *)out->panels, 0, (size_t)(num_panels * panel_words(out)) * 4);
    if (out->format == FORMAT_INT8) {
        memset((void *)out->scales, 0, (size_t)(num_panels * PANEL) * 4);
        memset((void *)out->corrections, 0, (size_t)(num_panels * PANEL) * 4);
    }
    for (int64_t output = 0; output < out->out_features; output++) {
        if (out->format == FORMAT_INT8)
            pack_int8_output(out, output, weight, source_format);
        else
            pack_output(out, output, weight, source_format);
    }
}

void unpack_output(const struct linear *linear, int64_t output, float *row) {
    for (int64_t i = 0; i < linear->in_features; i++) {
        const void *place = place_of(linear, output, i);
        if (linear->format == FORMAT_FLOAT)
            row[i] = *(const float *)place;
        else if (linear->format == FORMAT_BF16)
            row[i] = from_bf16(*(const uint16_t *)place);
        else
            row[i] = *(const int8_t *)place * linear->scales[output];
    }
}
