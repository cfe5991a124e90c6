// wgmma.mma_async.m64nNk16 of 16-bit operands in shared memory, sums in fp32. A warp's part of an
// instruction takes place at a random time between its issue and the wait for its group, in order;
// until then the sums are as they were. See emulation.h.
#pragma once

#include "tensor_copy.h"

namespace emulation {

// An operand in shared memory: "Matrix Descriptor Format" and "Strides" of the PTX ISA.
struct Descriptor {
    uint32_t start, leading, stride, row_bytes;
    bool transposed;

    Descriptor(uint64_t bits, bool transposed_) : transposed(transposed_) {
        const auto field = [bits](int at) {
            return static_cast<uint32_t>(bits >> at & 0x3fff) << 4;
        };
        start = field(0), leading = field(16), stride = field(32);
        constexpr uint64_t kSwizzle128 = 1, kSwizzle64 = 2;
        const uint64_t swizzle = bits >> 62;
        if ((swizzle != kSwizzle128 && swizzle != kSwizzle64) || (bits >> 49 & 7) != 0) {
            throw std::runtime_error(
                "emulation: only descriptors with the swizzle of 128 or 64 bytes and base offset "
                "0");
        }
        row_bytes = swizzle == kSwizzle128 ? 128 : 64;
        const uint64_t unused = 3ull << 14 | 3ull << 30 | 7ull << 46 | 0x3ffull << 52;
        if (bits & unused) throw std::runtime_error("emulation: wrong bits in a descriptor");
    }

    // Where element k of the row `mn` of A, or of the column `mn` of B, lies. Eight rows of 128
    // (64) bytes are an atom. K-major: a row has 64 (32) k, and atoms follow each other in `stride`
    // along mn. MN-major: a row has so many mn; atoms follow in `stride` along k, in `leading`
    // along mn.
    uint32_t address(unsigned mn, unsigned k) const {
        const uint32_t of_row = row_bytes / 2;
        const uint32_t offset = transposed ? mn / of_row * leading + mn % of_row * 2 +
                                                 k / 8 * stride + k % 8 * row_bytes
                                           : mn / 8 * stride + mn % 8 * row_bytes + k * 2;
        return swizzled(start + offset, row_bytes);
    }
};

constexpr unsigned kWgmmaDepth = 16, kWarpRows = 16;

struct Wgmma {
    uint64_t a, b;
    bool transposed_a, transposed_b, accumulate;
    unsigned columns;
    std::array<float*, kWarpLanes> sums;
    float (*number)(uint16_t);

    bool same_instruction(const Wgmma& other) const {
        return a == other.a && b == other.b && transposed_a == other.transposed_a &&
               transposed_b == other.transposed_b && accumulate == other.accumulate &&
               columns == other.columns;
    }
};

// The instructions of a warp that have not taken place, by groups; the last is not committed.
struct WarpQueue {
    std::deque<std::vector<Wgmma>> groups{1};
    bool fenced = false;
    std::vector<Wgmma> history;  // what it issued, until its warpgroup has been compared
};
struct WarpQueues {
    std::map<std::pair<Block*, unsigned>, WarpQueue> of;
    WarpQueue& own() { return of[{block(), block()->current->rank / kWarpLanes}]; }
};

inline std::vector<float> operand(Block& b, const Descriptor& d, unsigned first, unsigned count,
                                  float (*number)(uint16_t)) {
    std::vector<float> all;
    all.reserve(count * kWgmmaDepth);
    for (unsigned mn = first; mn < first + count; ++mn) {
        for (unsigned k = 0; k < kWgmmaDepth; ++k) {
            uint16_t bits;
            std::memcpy(&bits, at_window(b, d.address(mn, k), 2), 2);
            all.push_back(number(bits));
        }
    }
    return all;
}

// A warp's 16 rows of the product. Lane 4 g + t has of rows g and g + 8 the columns 8 i + 2 t and
// 8 i + 2 t + 1: sums 4 i to 4 i + 3.
inline void take_place(Block& b, unsigned warp, const Wgmma& w) {
    const unsigned first = warp % 4 * kWarpRows;
    const auto left = operand(b, {w.a, w.transposed_a}, first, kWarpRows, w.number);
    const auto right = operand(b, {w.b, w.transposed_b}, 0, w.columns, w.number);
    for (unsigned row = 0; row < kWarpRows; ++row) {
        for (unsigned column = 0; column < w.columns; ++column) {
            float* const sums = w.sums[row % 8 * 4 + column % 8 / 2];
            float& to = sums[column / 8 * 4 + row / 8 * 2 + column % 2];
            float sum = w.accumulate ? to : 0.0f;
            for (unsigned k = 0; k < kWgmmaDepth; ++k) {
                sum += left[row * kWgmmaDepth + k] * right[column * kWgmmaDepth + k];
            }
            to = sum;
        }
    }
}

// The first `groups` groups of a warp take place.
inline void take_place(Block& b, unsigned warp, WarpQueue& queue, size_t groups) {
    for (size_t i = 0; i < groups; ++i) {
        for (const Wgmma& w : queue.groups[i]) take_place(b, warp, w);
        queue.groups[i].clear();
    }
}

inline void wgmma_fence() {
    exchange(0xffffffffu, 0);
    cluster()->state<WarpQueues>().own().fenced = true;
}

inline void wgmma(float* sums, uint64_t a, uint64_t b, unsigned columns, bool transposed_a,
                  bool transposed_b, bool accumulate, float (*number)(uint16_t)) {
    struct Shown {
        float* sums;
        uint64_t a, b;
    };
    const auto all = exchange(0xffffffffu, Shown{sums, a, b});
    if (block()->current->rank % kWarpLanes) return;
    Wgmma w{a, b, transposed_a, transposed_b, accumulate, columns, {}, number};
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        if (all[lane].a != a || all[lane].b != b) {
            throw std::runtime_error("emulation: lanes with different descriptors");
        }
        w.sums[lane] = all[lane].sums;
    }
    Cluster& c = *cluster();
    WarpQueue& queue = c.state<WarpQueues>().own();
    if (!queue.fenced) throw std::runtime_error("emulation: wgmma before wgmma.fence");
    queue.groups.back().push_back(w);
    queue.history.push_back(w);
    if (c.random() % 4 == 0) {
        take_place(*block(), block()->current->rank / kWarpLanes, queue, queue.groups.size());
    }
}

inline void wgmma_commit() {
    exchange(0xffffffffu, 0);
    if (block()->current->rank % kWarpLanes == 0) {
        cluster()->state<WarpQueues>().own().groups.emplace_back();
    }
}

// The four warps of a warpgroup must have issued the same.
inline void compare_warps(WarpQueues& queues, unsigned warp) {
    WarpQueue* members[4];
    size_t shortest = SIZE_MAX;
    for (unsigned i = 0; i < 4; ++i) {
        members[i] = &queues.of[{block(), warp / 4 * 4 + i}];
        shortest = std::min(shortest, members[i]->history.size());
    }
    for (WarpQueue* member : members) {
        for (size_t i = 0; i < shortest; ++i) {
            if (!member->history[i].same_instruction(members[0]->history[i])) {
                throw std::runtime_error("emulation: warps of a warpgroup with different wgmma");
            }
        }
    }
    for (WarpQueue* member : members) {
        auto& history = member->history;
        history.erase(history.begin(), history.begin() + static_cast<std::ptrdiff_t>(shortest));
    }
}

// wgmma.wait_group: at most `pending` committed groups of the warp are left.
inline void wgmma_wait(size_t pending) {
    exchange(0xffffffffu, 0);
    const unsigned warp = block()->current->rank / kWarpLanes;
    if (block()->current->rank % kWarpLanes == 0) {
        WarpQueues& queues = cluster()->state<WarpQueues>();
        WarpQueue& queue = queues.own();
        const size_t committed = queue.groups.size() - 1;
        const size_t done = committed > pending ? committed - pending : 0;
        take_place(*block(), warp, queue, done);
        queue.groups.erase(queue.groups.begin(),
                           queue.groups.begin() + static_cast<std::ptrdiff_t>(done));
        queue.fenced = false;  // what is in registers may be used now
        compare_warps(queues, warp);
    }
    exchange(0xffffffffu, 0);
}

}  // namespace emulation
