// Builds a Schedule from lists: once for each of a layout's two sides, in plain scalar code.
#pragma once

#include "types.h"

namespace sk {

// Inputs in a panel, a multiple of the block. There is one panel if each of several would have less
// than 4 blocks of a row: else the schedule would be larger than the blocks.
int64_t panel_features(const Lists& lists);

// Arrays as in Schedule, sized (panels * rows + 1), (blocks * in_block), (blocks).
void build_schedule(const Lists& lists, int64_t panel_features, int64_t* entry_starts,
                    int32_t* local, int32_t* block_ids);

}  // namespace sk
