#include "tile.h"

// Registers: 32 vectors of 16 with AVX-512, 16 of 8 with AVX2. A tile keeps its sums, a line of each panel and one
// value of a row in them.
enum { TILE_ROWS = LANES == 16 ? 14 : LANES == 8 ? 3 : 2 };

ALWAYS_INLINE int panels_for(int num_rows) {
    return LANES == 16 && num_rows <= 6 ? 4 : 2;
}

int64_t tile_rows(void) { return TILE_ROWS; }

int64_t tile_panels(int64_t num_rows) { return panels_for((int)num_rows); }

// Constant arguments but for the tile: every loop over rows, panels and parts is unrolled, so that sums are registers.
// A sum takes its terms in the order of the inputs, whatever the number of rows: a row's result is its own.
ALWAYS_INLINE void multiply(const struct tile *tile, const enum format format, const int num_rows, float *results) {
    const int num_panels = panels_for(num_rows);
    const int num_inputs = is_packed(format) ? 1 : (int)inputs_per_word(format);
    const bool is_integer = format == FORMAT_INT8 && is_packed(format);
    ints sums[MAX_TILE_ROWS][MAX_TILE_PANELS][PARTS];
#pragma GCC unroll 16
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 4
        for (int panel = 0; panel < num_panels; panel++)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++)
                sums[row][panel][part] = is_integer ? load(tile->corrections[panel] + part * LANES) : (ints){0};

    for (int64_t word = 0; word < tile->num_words; word++) {
        if (tile->prefetch[0])
#pragma GCC unroll 4
            for (int panel = 0; panel < num_panels; panel++)
                __builtin_prefetch(tile->prefetch[panel] + word * tile->prefetch_step, 0, 2);
        ints lines[MAX_TILE_PANELS][PARTS];
#pragma GCC unroll 4
        for (int panel = 0; panel < num_panels; panel++)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++)
                lines[panel][part] = load(tile->panels[panel] + word * PANEL + part * LANES);
#pragma GCC unroll 4
        for (int input = 0; input < num_inputs; input++)
#pragma GCC unroll 16
            for (int row = 0; row < num_rows; row++) {
                const char *values = tile->rows + row * tile->row_stride + (word * num_inputs + input) * 4;
#pragma GCC unroll 4
                for (int panel = 0; panel < num_panels; panel++)
#pragma GCC unroll 4
                    for (int part = 0; part < PARTS; part++) {
                        ints *sum = &sums[row][panel][part];
                        ints line = lines[panel][part];
                        if (is_packed(format))
                            *sum = add_packed_product(format, *sum, line, *(const int32_t *)values);
                        else
                            *sum = (ints)((floats)*sum + unpack_line(format, line, input) * *(const float *)values);
                    }
            }
    }
#pragma GCC unroll 16
    for (int row = 0; row < num_rows; row++)
#pragma GCC unroll 4
        for (int panel = 0; panel < num_panels; panel++)
#pragma GCC unroll 4
            for (int part = 0; part < PARTS; part++) {
                ints sum = sums[row][panel][part];
                if (is_integer)
                    sum = (ints)__builtin_convertvector(sum, floats);
                store(results + (row * num_panels + panel) * PANEL + part * LANES, sum);
            }
}

// One loop for each number of rows that a tile may have.
ALWAYS_INLINE void multiply_rows(const struct tile *tile, const enum format format, int64_t num_rows, float *sums) {
    switch (num_rows) {
    case 1: multiply(tile, format, 1, sums); return;
    case 2: multiply(tile, format, 2, sums); return;
    case 3: if (TILE_ROWS >= 3) multiply(tile, format, 3, sums); return;
    case 4: if (TILE_ROWS >= 4) multiply(tile, format, 4, sums); return;
    case 5: if (TILE_ROWS >= 5) multiply(tile, format, 5, sums); return;
    case 6: if (TILE_ROWS >= 6) multiply(tile, format, 6, sums); return;
    case 7: if (TILE_ROWS >= 7) multiply(tile, format, 7, sums); return;
    case 8: if (TILE_ROWS >= 8) multiply(tile, format, 8, sums); return;
    case 9: if (TILE_ROWS >= 9) multiply(tile, format, 9, sums); return;
    case 10: if (TILE_ROWS >= 10) multiply(tile, format, 10, sums); return;
    case 11: if (TILE_ROWS >= 11) multiply(tile, format, 11, sums); return;
    case 12: if (TILE_ROWS >= 12) multiply(tile, format, 12, sums); return;
    case 13: if (TILE_ROWS >= 13) multiply(tile, format, 13, sums); return;
    case 14: if (TILE_ROWS >= 14) multiply(tile, format, 14, sums); return;
    }
}

void multiply_tile(const struct tile *tile, enum format format, int64_t num_rows, float *sums) {
    switch (format) {
    case FORMAT_FLOAT: multiply_rows(tile, FORMAT_FLOAT, num_rows, sums); return;
    case FORMAT_BF16: multiply_rows(tile, FORMAT_BF16, num_rows, sums); return;
    case FORMAT_INT8: multiply_rows(tile, FORMAT_INT8, num_rows, sums); return;
    }
}
