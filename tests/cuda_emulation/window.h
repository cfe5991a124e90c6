// Shared memory by the 32-bit addresses of PTX's shared window, also that of the other blocks of a
// cluster; barriers of some of a block's threads, and of a cluster. See emulation.h.
#pragma once

#include "fibers.h"

namespace emulation {

// A block's own window begins here (a multiple of 16 and of nothing more); `mapa` turns an address
// into one of the window of the block of that rank, which lies above.
constexpr uint32_t kWindowBegin = 0x410, kWindowBytes = 1u << 24;

inline unsigned rank_in_cluster(const Block& b) {
    for (unsigned rank = 0; rank < cluster()->blocks.size(); ++rank) {
        if (cluster()->blocks[rank].get() == &b) return rank;
    }
    throw std::logic_error("emulation: a block of another cluster");
}

inline uint32_t window_address(const void* pointer) {
    uint32_t begin = kWindowBegin;
    const auto* const byte = static_cast<const unsigned char*>(pointer);
    for (const auto& [piece, bytes] : block()->pieces) {
        if (byte >= piece.get() && byte < piece.get() + bytes) {
            return begin + static_cast<uint32_t>(byte - piece.get());
        }
        begin += static_cast<uint32_t>((bytes + 15) / 16 * 16);
    }
    throw std::runtime_error("emulation: the address of something outside shared memory");
}

// Where `bytes` at an address lie: of the block `b`, or of the one that mapa named.
inline unsigned char* at_window(Block& b, uint32_t address, size_t bytes) {
    Block* owner = &b;
    if (address >= kWindowBytes) {
        owner = cluster()->blocks.at(address / kWindowBytes - 1).get();
        if (owner->ended()) {
            throw std::runtime_error("emulation: shared memory of a block that has ended");
        }
    }
    uint32_t offset = address % kWindowBytes - kWindowBegin;
    for (const auto& [piece, piece_bytes] : owner->pieces) {
        if (offset < piece_bytes) {
            if (offset + bytes > piece_bytes) break;
            return piece.get() + offset;
        }
        offset -= static_cast<uint32_t>((piece_bytes + 15) / 16 * 16);
    }
    throw std::runtime_error("emulation: an address outside shared memory");
}

inline uint32_t mapa(uint32_t address, unsigned rank) {
    if (address >= kWindowBytes) throw std::runtime_error("emulation: mapa of a mapped address");
    return (rank + 1) * kWindowBytes + address;
}

// bar.sync with an id and a number of threads.
struct NamedBarriers {
    struct Barrier {
        unsigned arrived = 0;
        uint64_t phase = 0;
    };
    std::map<std::pair<const Block*, unsigned>, Barrier> of;
};
inline void named_barrier(unsigned id, unsigned threads) {
    if (id > 15 || threads % kWarpLanes) {
        throw std::runtime_error("emulation: barriers are 0 to 15, of whole warps");
    }
    NamedBarriers::Barrier& barrier = cluster()->state<NamedBarriers>().of[{block(), id}];
    const uint64_t phase = barrier.phase;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.phase;
    }
    wait_until("barrier " + std::to_string(id),
               [&barrier, phase] { return barrier.phase != phase; });
}

// barrier.cluster: arrive and wait.
struct ClusterBarrier {
    size_t arrived = 0;
    uint64_t phase = 0;
};
inline void cluster_barrier() {
    ClusterBarrier& barrier = cluster()->state<ClusterBarrier>();
    const uint64_t phase = barrier.phase;
    if (++barrier.arrived == cluster()->blocks.size() * block()->fibers.size()) {
        barrier.arrived = 0;
        ++barrier.phase;
    }
    wait_until("the cluster's barrier", [&barrier, phase] { return barrier.phase != phase; });
}

}  // namespace emulation
