// Builds a Schedule from lists: once for each of a layout's two sides, in plain scalar code.
#pragma once

#include "types.h"

namespace sk {

// Arrays as in Schedule, sized (panels * rows), (panels * rows + 1), (blocks * in_block), (blocks).
// With one panel the entries are the rows in ascending order. With several, the rows of each panel
// come longest first, so that the inner loop's trip count hardly ever surprises the branch
// predictor.
void build_schedule(const Lists& lists, int64_t panel_features, int32_t* entry_rows,
                    int64_t* entry_starts, int32_t* local, int32_t* block_ids);

}  // namespace sk
