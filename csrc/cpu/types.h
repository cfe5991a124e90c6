// Plain types shared by the kernels, the dispatch table and the bindings.
#pragma once

#include <cstdint>

namespace sk {

struct Bf16 {
    uint16_t bits;
};

// A user's 2-D tensor: element (m, f) is at data[m * row_stride + f * col_stride].
template <class T>
struct Matrix {
    T* data;
    int64_t row_stride;
    int64_t col_stride;
};

// The lists of one side of a layout: for each output block-row its input blocks.
// A fan-in layout has uniform lists (offsets null: row r holds blocks r * per_row ..); the
// transposed lists have offsets. `blocks` null means that block i of the list is block i of the
// values.
struct Lists {
    int64_t rows;                 // output block-rows
    int64_t cols;                 // input block-columns
    int64_t per_row;              // blocks in each row, when offsets is null
    const int64_t* offsets;       // (rows + 1) or null
    const int32_t* columns;       // (blocks) input block-column of each block
    const int32_t* source_rows;   // (blocks) or null: stored block-row of each block ...
    const int32_t* source_slots;  // ... and its slot there: block id = row * source_per_row + slot
    int64_t source_per_row;
    int32_t out_block;   // outputs of a block, in the direction of this product
    int32_t in_block;    // inputs of a block
    int64_t out_stride;  // distance in the stored block between neighbouring outputs ...
    int64_t in_stride;   // ... and neighbouring inputs

    int64_t begin(int64_t row) const { return offsets ? offsets[row] : row * per_row; }
    int64_t end(int64_t row) const { return offsets ? offsets[row + 1] : (row + 1) * per_row; }
    int64_t blocks() const { return end(rows - 1); }
    int64_t block_id(int64_t i) const {
        return source_rows ? source_rows[i] * source_per_row + source_slots[i] : i;
    }
};

// The order in which a token tile walks the lists: inputs are cut into panels small enough for a
// cache, and each panel has an entry for each block-row, with its features inside the panel.
struct Schedule {
    int64_t panels;
    int64_t panel_features;       // inputs in a panel (the last may hold fewer)
    const int64_t* entry_starts;  // (panels * rows + 1) first feature of each entry in `local`
    const int32_t* local;         // (blocks * in_block) feature within its panel
    const int32_t* block_ids;     // (blocks) stored block of each in_block features
};

}  // namespace sk
