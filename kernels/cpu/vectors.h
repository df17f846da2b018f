// Vectors of the width that this build is for, and the two instructions that not every processor has.
//
// GCC computes with vectors of any size by itself; only where a product of packed words is one instruction, it needs
// to be told. Loops without vectors in them are left to GCC, which vectorises them.
#ifndef DUET_VECTORS_H
#define DUET_VECTORS_H

#include "layout.h"

#if defined(__AVX512BF16__) || defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { PARTS = PANEL / LANES }; // vectors of a line

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int32_t ints_in_memory __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define ALWAYS_INLINE static inline __attribute__((always_inline))

// Whether rows are multiplied in packed words: 2 bfloat16 or 4 int8 in one instruction.
#if defined(__AVX512BF16__)
enum { HAS_BF16_PRODUCTS = 1 };
#else
enum { HAS_BF16_PRODUCTS = 0 };
#endif
#if defined(__AVX512VNNI__)
enum { HAS_INT8_PRODUCTS = 1 };
#else
enum { HAS_INT8_PRODUCTS = 0 };
#endif

ALWAYS_INLINE bool is_packed(enum format format) {
    return (format == FORMAT_BF16 && HAS_BF16_PRODUCTS) || (format == FORMAT_INT8 && HAS_INT8_PRODUCTS);
}

// Words of a row, and bytes from one row to the next. The 64 bytes between them keep rows of a power of two out of
// the same lines of the cache.
ALWAYS_INLINE int64_t row_words(int64_t in_features, enum format format) {
    int64_t words = words_of(in_features, format);
    return is_packed(format) ? words : words * inputs_per_word(format);
}

ALWAYS_INLINE int64_t row_stride(int64_t in_features, enum format format) {
    return ceil_div(row_words(in_features, format) * 4, 64) * 64 + 64;
}

ALWAYS_INLINE ints load(const void *address) { return (ints)*(const ints_in_memory *)address; }
ALWAYS_INLINE void store(void *address, ints value) { *(ints_in_memory *)address = (ints_in_memory)value; }

// sum + line * word for the packed formats; int8: signed weights in the line, unsigned inputs in the word.
ALWAYS_INLINE ints add_packed_product(enum format format, ints sum, ints line, int32_t word) {
#if defined(__AVX512BF16__)
    if (format == FORMAT_BF16)
        return (ints)_mm512_dpbf16_ps((__m512)sum, (__m512bh)line, (__m512bh)_mm512_set1_epi32(word));
#endif
#if defined(__AVX512VNNI__)
    if (format == FORMAT_INT8)
        return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(word), (__m512i)line);
#endif
    (void)format, (void)line, (void)word;
    return sum;
}

// The weights of one of the inputs that the words of a line hold.
ALWAYS_INLINE floats unpack_line(enum format format, ints line, int input) {
    if (format == FORMAT_BF16)
        return (floats)(input == 0 ? line << 16 : line & (int32_t)0xffff0000);
    if (format == FORMAT_INT8)
        return __builtin_convertvector(line << (24 - 8 * input) >> 24, floats);
    return (floats)line;
}

union word {
    float value;
    uint32_t bits;
};

ALWAYS_INLINE float as_float(uint32_t bits) { return (union word){.bits = bits}.value; }
ALWAYS_INLINE uint32_t as_bits(float value) { return (union word){.value = value}.bits; }
ALWAYS_INLINE float from_bf16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

// The nearest, the even one of two. A NaN that a processor makes stays one.
ALWAYS_INLINE uint16_t to_bf16(float value) {
    uint32_t bits = as_bits(value);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// e to the x within 2 units in the last place, for x from -87 to 88, at whose ends it stays; NaN for NaN.
// Source: Cephes' expf: x = n ln 2 + r, and a polynomial in r. Adding 1.5 * 2^23 rounds to an integer.
ALWAYS_INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float shift = 12582912.0f;
    float shifted = x * 1.44269504088896341f + shift;
    float n = shifted - shift;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * as_float((as_bits(shifted) - as_bits(shift) + 127) << 23);
}

#endif
