#include "linear.h"

#include "elementwise.h"

// What becomes of the sums of a row and a panel.
struct output {
    enum { STORE, ADD, SILU } kind;
    char *y;
    int64_t stride; // bytes from row to row
};

// Panels that are multiplied together; of a layer with is_gate_up the first half are of the gate.
struct panels {
    int64_t ids[MAX_TILE_PANELS];
    int64_t width;
    int64_t num_valid; // units below, without those that only fill the width
};

// A unit is what a team shares: a panel, or one of the gate and the same one of up.
static int64_t num_units(const struct linear *linear) {
    return ceil_div(linear->out_features, PANEL) / (linear->is_gate_up ? 2 : 1);
}

static int64_t units_at_a_time(const struct linear *linear, int64_t width) {
    return linear->is_gate_up ? width / 2 : width;
}

static struct panels choose_panels(const struct linear *linear, int64_t first_unit, int64_t end_unit, int64_t width) {
    int64_t each = units_at_a_time(linear, width);
    struct panels panels = {.width = width, .num_valid = least(each, end_unit - first_unit)};
    for (int64_t p = 0; p < width; p++)
        panels.ids[p] = p / each * num_units(linear) + least(first_unit + p % each, end_unit - 1);
    return panels;
}

static const uint32_t *panel_address(const struct linear *linear, int64_t panel) {
    return linear->panels + panel * panel_words(linear);
}

// sums, [16] of a row and a panel, become the layer's outputs.
static void finish_sums(const struct linear *linear, int64_t panel, const float *row_scale, float *sums) {
    if (linear->format == FORMAT_INT8)
        for (int i = 0; i < PANEL; i++)
            sums[i] *= *row_scale * linear->scales[panel * PANEL + i];
    if (linear->bias) {
        int64_t count = least(PANEL, linear->out_features - panel * PANEL);
        for (int64_t i = 0; i < count; i++)
            sums[i] += linear->bias[panel * PANEL + i];
    }
}

static void write_panel(const struct linear *linear, const struct output *output, int64_t row, int64_t panel,
                        const float *sums) {
    float *y = (float *)(output->y + row * output->stride) + panel * PANEL;
    int64_t count = least(PANEL, linear->out_features - panel * PANEL);
    if (output->kind == ADD)
        for (int64_t i = 0; i < count; i++)
            y[i] += sums[i];
    else
        for (int64_t i = 0; i < count; i++)
            y[i] = sums[i];
}

static void write_activation(const struct linear *linear, const struct output *output, int64_t row, int64_t unit,
                             const float *gate, const float *up) {
    float activation[PANEL];
    silu_and_mul(gate, up, PANEL, activation);
    enum format format = linear->format == FORMAT_INT8 ? FORMAT_FLOAT : (enum format)linear->format;
    make_row(format, activation, PANEL, output->y + row * output->stride + unit * row_words(PANEL, format) * 4, NULL);
}

static void finish_tile(const struct linear *linear, const struct output *output, const struct panels *panels,
                        const struct rows *x, int64_t first_row, int64_t num_rows, float *sums) {
    for (int64_t row = first_row; row < first_row + num_rows; row++, sums += panels->width * PANEL) {
        for (int64_t p = 0; p < panels->width; p++)
            finish_sums(linear, panels->ids[p], x->scales + row, sums + p * PANEL);
        for (int64_t p = 0; p < panels->num_valid; p++) {
            const float *own = sums + p * PANEL;
            if (output->kind == SILU)
                write_activation(linear, output, row, panels->ids[p], own, own + panels->width / 2 * PANEL);
            else
                write_panel(linear, output, row, panels->ids[p], own);
        }
    }
}

// All rows times a few panels, while those that come next are fetched.
static void run_panels(const struct linear *linear, const struct output *output, const struct panels *panels,
                       const struct rows *x, const uint32_t *const *next_panels, int64_t num_tiles) {
    enum format format = (enum format)linear->format;
    int64_t tile_size = ceil_div(x->num_rows, num_tiles);
    struct tile tile = {
        .row_stride = row_stride(linear->in_features, format),
        .num_words = words_of(linear->in_features, format),
        .prefetch_step = 64 / num_tiles,
    };
    for (int64_t p = 0; p < panels->width; p++) {
        tile.panels[p] = panel_address(linear, panels->ids[p]);
        if (format == FORMAT_INT8)
            tile.corrections[p] = linear->corrections + panels->ids[p] * PANEL;
    }
    _Alignas(64) float sums[MAX_TILE_ROWS * MAX_TILE_PANELS * PANEL];
    for (int64_t first_row = 0, i = 0; first_row < x->num_rows; first_row += tile_size, i++) {
        tile.rows = x->values + first_row * tile.row_stride;
        for (int64_t p = 0; p < panels->width && next_panels[0]; p++)
            tile.prefetch[p] = (const char *)next_panels[p] + i * tile.num_words * tile.prefetch_step;
        multiply_tile(&tile, format, tile_size, sums);
        finish_tile(linear, output, panels, x, first_row, least(tile_size, x->num_rows - first_row), sums);
    }
}

static void run(const struct member *member, const struct linear *linear, const struct rows *x,
                const struct output *output, const struct linear *next) {
    int64_t num_tiles = ceil_div(x->num_rows, tile_rows());
    int64_t width = tile_panels(ceil_div(x->num_rows, num_tiles)), each = units_at_a_time(linear, width);
    struct part part = part_of(member, num_units(linear));
    for (int64_t unit = part.start; unit < part.end; unit += each) {
        struct panels panels = choose_panels(linear, unit, part.end, width);
        const struct linear *owner = unit + each < part.end ? linear : next; // of what is fetched meanwhile
        const uint32_t *next_panels[MAX_TILE_PANELS] = {NULL};
        if (owner) {
            struct part owned = part_of(member, num_units(owner));
            struct panels fetched = choose_panels(owner, owner == linear ? unit + each : owned.start, owned.end, width);
            for (int64_t p = 0; p < width && owned.start < owned.end; p++)
                next_panels[p] = panel_address(owner, fetched.ids[p]);
        }
        run_panels(linear, output, &panels, x, next_panels, num_tiles);
    }
}

void run_linear(const struct member *member, const struct linear *linear, const struct rows *x, float *y,
                int64_t y_stride, bool is_added, const struct linear *next) {
    struct output output = {is_added ? ADD : STORE, (char *)y, y_stride * (int64_t)sizeof(float)};
    run(member, linear, x, &output, next);
}

void run_gate_up(const struct member *member, const struct linear *linear, const struct rows *x, void *y,
                 int64_t y_stride, const struct linear *next) {
    struct output output = {SILU, y, y_stride};
    run(member, linear, x, &output, next);
}
