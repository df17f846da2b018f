// A few rows times a few panels, the loop in which nearly all of a step's time goes.
#ifndef DUET_TILE_H
#define DUET_TILE_H

#include "vectors.h"

enum { MAX_TILE_ROWS = 14, MAX_TILE_PANELS = 4 };

struct tile {
    const char *rows;
    int64_t row_stride;                          // bytes
    const uint32_t *panels[MAX_TILE_PANELS];     // fewer than tile_panels() asks for: the last one again
    const int32_t *corrections[MAX_TILE_PANELS]; // int8 where it is packed: [16] for each panel
    int64_t num_words;                           // words of a row that count, lines of a panel
    const char *prefetch[MAX_TILE_PANELS];       // fetched to the second level of the cache meanwhile, where not NULL:
    int64_t prefetch_step;                       // a line every so many bytes
};

// Most rows, and the panels for a number of rows, whose sums fit the registers. The panels are 2 or 4.
int64_t tile_rows(void);
int64_t tile_panels(int64_t num_rows);

// sums: [num_rows, tile_panels(num_rows), 16], of a format; of int8 without its scales.
void multiply_tile(const struct tile *tile, enum format format, int64_t num_rows, float *sums);

#endif
