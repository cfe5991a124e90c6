#include "schedule.h"

#include <algorithm>
#include <vector>

namespace sk {

int64_t panel_features(const Lists& lists) {
    constexpr int64_t kMost = 2048;  // a tile of so many fits the cache
    const int64_t features = lists.cols * lists.in_block;
    const int64_t size =
        std::min(features, std::max<int64_t>(1, kMost / lists.in_block) * lists.in_block);
    const int64_t panels = (features + size - 1) / size;
    return 4 * panels * lists.rows <= lists.blocks() ? size : features;
}

void build_schedule(const Lists& lists, int64_t panel_features, int64_t* entry_starts,
                    int32_t* local, int32_t* block_ids) {
    const int64_t features = lists.cols * lists.in_block;
    const int64_t panels = (features + panel_features - 1) / panel_features;
    std::vector<int64_t> next(lists.rows);  // first block of each row that is not yet placed
    for (int64_t r = 0; r < lists.rows; ++r) next[r] = lists.begin(r);
    int64_t at = 0;  // blocks placed so far
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel_begin = p * panel_features;
        for (int64_t r = 0; r < lists.rows; ++r) {
            entry_starts[p * lists.rows + r] = at * lists.in_block;
            for (int64_t& block = next[r]; block < lists.end(r); ++block, ++at) {
                const int64_t feature =
                    static_cast<int64_t>(lists.columns[block]) * lists.in_block - panel_begin;
                if (feature >= panel_features) break;
                block_ids[at] = static_cast<int32_t>(lists.block_id(block));
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    local[at * lists.in_block + b] = static_cast<int32_t>(feature + b);
                }
            }
        }
    }
    entry_starts[panels * lists.rows] = at * lists.in_block;
}

}  // namespace sk
