#include "schedule.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace sk {

void build_schedule(const Lists& lists, int64_t panel_features, int32_t* entry_rows,
                    int64_t* entry_starts, int32_t* local, int32_t* block_ids) {
    const int64_t features = lists.cols * lists.in_block;
    const int64_t panels = (features + panel_features - 1) / panel_features;
    std::vector<int64_t> next(lists.rows);  // first block of each row that is not yet placed
    std::vector<int64_t> last(lists.rows);
    for (int64_t r = 0; r < lists.rows; ++r) next[r] = lists.begin(r);
    std::vector<int32_t> order(lists.rows);
    int64_t at = 0;  // blocks placed so far
    for (int64_t p = 0; p < panels; ++p) {
        const int64_t panel_begin = p * panel_features;
        for (int64_t r = 0; r < lists.rows; ++r) {
            last[r] = next[r];
            while (last[r] < lists.end(r) &&
                   static_cast<int64_t>(lists.columns[last[r]]) * lists.in_block <
                       panel_begin + panel_features) {
                ++last[r];
            }
        }
        std::iota(order.begin(), order.end(), 0);
        if (panels > 1) {
            std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
                return last[a] - next[a] > last[b] - next[b];
            });
        }
        for (int64_t i = 0; i < lists.rows; ++i) {
            const int32_t row = order[i];
            const int64_t entry = p * lists.rows + i;
            entry_starts[entry] = at * lists.in_block;
            entry_rows[entry] = panels == 1 || last[row] > next[row] ? row : -1;
            for (int64_t block = next[row]; block < last[row]; ++block, ++at) {
                block_ids[at] = static_cast<int32_t>(lists.block_id(block));
                const int64_t feature =
                    static_cast<int64_t>(lists.columns[block]) * lists.in_block - panel_begin;
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    local[at * lists.in_block + b] = static_cast<int32_t>(feature + b);
                }
            }
            next[row] = last[row];
        }
    }
    entry_starts[panels * lists.rows] = at * lists.in_block;
}

}  // namespace sk
