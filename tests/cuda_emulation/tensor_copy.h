// cp.async.bulk.tensor of 2-D boxes, and the maps that describe tensors to it. A copy ends at a
// random time: until then what it writes is NaN. See emulation.h.
#pragma once

#include "mbarrier.h"

// What cuTensorMapEncodeTiled writes is opaque; here it is this. Names and numbers are cuda.h's.
struct alignas(64) CUtensorMap {
    unsigned char* address;
    uint64_t cols, rows, row_bytes;
    uint32_t box_cols, box_rows;
    uint64_t magic;
    uint64_t padding[8];
};
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType {
    CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6,
    CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_NONE = 0,
    CU_TENSOR_MAP_SWIZZLE_64B = 2,
    CU_TENSOR_MAP_SWIZZLE_128B = 3
};
enum CUtensorMapL2promotion {
    CU_TENSOR_MAP_L2_PROMOTION_NONE = 0,
    CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3
};
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

namespace emulation {

constexpr uint64_t kMapMagic = 0x7ab1e0fb0c5;

}  // namespace emulation

// Matrices of 16-bit elements, boxes of rows of 128 or 64 bytes with the swizzle of as many;
// refuses what the driver refuses.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* address, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* steps, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
    const auto is_multiple = [](uint64_t number, uint64_t of) { return number % of == 0; };
    const bool right = rank == 2 && is_multiple(reinterpret_cast<uintptr_t>(map), 64) &&
                       is_multiple(reinterpret_cast<uintptr_t>(address), 16) && sizes[0] > 0 &&
                       sizes[1] > 0 && sizes[0] <= 1ull << 32 && sizes[1] <= 1ull << 32 &&
                       is_multiple(strides[0], 16) && strides[0] < 1ull << 40 &&
                       strides[0] >= 2 * sizes[0] && box[1] > 0 && box[1] <= 256 && steps[0] == 1 &&
                       steps[1] == 1 &&
                       ((box[0] == 64 && swizzle == CU_TENSOR_MAP_SWIZZLE_128B) ||
                        (box[0] == 32 && swizzle == CU_TENSOR_MAP_SWIZZLE_64B));
    if (!right) return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<unsigned char*>(address),
            sizes[0],
            sizes[1],
            strides[0],
            box[0],
            box[1],
            emulation::kMapMagic,
            {}};
    return CUDA_SUCCESS;
}

namespace emulation {

// The swizzle of 128 bytes: the address's bits 7 to 9 turn its bits 4 to 6; of 64: 7, 8 turn 4, 5.
inline uint32_t swizzled(uint32_t address, uint32_t row_bytes = 128) {
    return address ^ (address >> 7 & (row_bytes / 16 - 1)) << 4;
}

// For each 16 bytes of a box their place in the window of `b`, the bytes of the tensor, or null
// outside of it, and how many of them are inside.
template <class Use>
void for_each_piece(Block& b, const CUtensorMap& map, uint32_t window, int32_t col, int32_t row,
                    Use use) {
    if (map.magic != kMapMagic) throw std::runtime_error("emulation: this is no tensor map");
    if (window % 128) throw std::runtime_error("emulation: a box not aligned to 128 bytes");
    const uint32_t box_row_bytes = 2 * map.box_cols;
    for (uint32_t r = 0; r < map.box_rows; ++r) {
        for (uint32_t piece = 0; piece < box_row_bytes / 16; ++piece) {
            const int64_t at_row = int64_t{row} + r, at_col = int64_t{col} + piece * 8;
            int64_t inside = 0;
            if (at_row >= 0 && at_row < static_cast<int64_t>(map.rows) && at_col >= 0) {
                inside = std::clamp<int64_t>(static_cast<int64_t>(map.cols) - at_col, 0, 8);
            }
            const auto offset = at_row * static_cast<int64_t>(map.row_bytes) + at_col * 2;
            unsigned char* const place =
                at_window(b, swizzled(window + r * box_row_bytes + piece * 16, box_row_bytes), 16);
            use(place, inside ? map.address + offset : nullptr, static_cast<size_t>(inside) * 2);
        }
    }
}

inline unsigned box_bytes(const CUtensorMap& map) { return map.box_rows * map.box_cols * 2; }

// Loads a box to the same place of each block of the mask, and completes its bytes on the barrier
// at the same place of each.
inline void load_box(const CUtensorMap* map, uint32_t to, int32_t col, int32_t row,
                     uint32_t barrier, unsigned mask) {
    Cluster& c = *cluster();
    if (mask == 0 || mask >> c.blocks.size()) {
        throw std::runtime_error("emulation: a mask of blocks that the cluster does not have");
    }
    for (unsigned rank = 0; rank < c.blocks.size(); ++rank) {
        if (!(mask >> rank & 1)) continue;
        Block& b = *c.blocks[rank];
        for_each_piece(b, *map, to, col, row,
                       [](unsigned char* place, const unsigned char*, size_t) {
                           std::memset(place, 0xff, 16);
                       });
        const CUtensorMap copy = *map;
        c.later.push_back(
            {c.delay(), false, [&b, copy, to, col, row, barrier] {
                 if (b.ended())
                     throw std::runtime_error("emulation: a box for a block that has ended");
                 for_each_piece(b, copy, to, col, row,
                                [](unsigned char* place, const unsigned char* from, size_t inside) {
                                    std::memset(place, 0, 16);
                                    if (inside) std::memcpy(place, from, inside);
                                });
                 mbarrier_complete(b, barrier, box_bytes(copy));
             }});
    }
}

// What threads wrote to shared memory and have not yet shown to asynchronous copies by
// fence.proxy.async.
struct Unfenced {
    std::map<const Fiber*, std::set<const unsigned char*>> rows;
};
inline void wrote_shared(const unsigned char* row) {
    cluster()->state<Unfenced>().rows[block()->current].insert(row);
}
inline void fence_proxy() { cluster()->state<Unfenced>().rows.erase(block()->current); }

// The stores of a thread, by groups: how many have not yet read shared memory.
struct BulkGroups {
    std::map<const Fiber*, std::vector<std::shared_ptr<int>>> of;
};
inline void store_box(const CUtensorMap* map, uint32_t from, int32_t col, int32_t row) {
    Cluster& c = *cluster();
    Block& b = *block();
    for_each_piece(b, *map, from, col, row,
                   [&c](const unsigned char* place, unsigned char*, size_t) {
                       for (const auto& [fiber, rows] : c.state<Unfenced>().rows) {
                           if (rows.count(place)) {
                               throw std::runtime_error(
                                   "emulation: a store of what was written before no fence");
                           }
                       }
                   });
    auto& groups = c.state<BulkGroups>().of[b.current];
    if (groups.empty()) groups.push_back(std::make_shared<int>(0));
    const std::shared_ptr<int> unread = groups.back();
    ++*unread;
    const CUtensorMap copy = *map;
    c.later.push_back(
        {c.delay(), true, [&c, &b, copy, from, col, row, unread] {
             std::vector<unsigned char> bytes;
             for_each_piece(b, copy, from, col, row,
                            [&bytes](const unsigned char* place, unsigned char*, size_t) {
                                bytes.insert(bytes.end(), place, place + 16);
                            });
             --*unread;
             c.later.push_back(
                 {c.delay(), true, [&b, copy, from, col, row, bytes] {
                      size_t at = 0;
                      for_each_piece(b, copy, from, col, row,
                                     [&](const unsigned char*, unsigned char* to, size_t inside) {
                                         if (inside) std::memcpy(to, &bytes[at], inside);
                                         at += 16;
                                     });
                  }});
         }});
}
inline void store_commit() {
    cluster()->state<BulkGroups>().of[block()->current].push_back(std::make_shared<int>(0));
}
// cp.async.bulk.wait_group.read 0: of the groups that were committed.
inline void store_wait_read() {
    const auto groups = cluster()->state<BulkGroups>().of[block()->current];
    wait_until("its stores", [groups] {
        for (size_t i = 0; i + 1 < groups.size(); ++i) {
            if (*groups[i] != 0) return false;
        }
        return true;
    });
}

}  // namespace emulation
