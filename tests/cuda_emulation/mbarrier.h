// mbarriers: phases, arrivals and transactions, as "Parallel Synchronization and Communication
// Instructions: mbarrier" of the PTX ISA has them. See emulation.h.
#pragma once

#include "window.h"

namespace emulation {

// A phase ends when no arrival and no byte is pending; the next one expects as many arrivals.
struct Mbarrier {
    unsigned expected = 0, pending = 0;
    int64_t bytes = 0;  // what was announced and has not come; less than 0 if it came before
    bool parity = false;

    void settle() {
        constexpr int64_t kMostBytes = (1 << 20) - 1;
        if (bytes > kMostBytes || bytes < -kMostBytes) {
            throw std::runtime_error("emulation: an mbarrier counts at most 2^20 - 1 bytes");
        }
        if (pending != 0 || bytes != 0) return;
        parity = !parity;
        pending = expected;
    }
};
struct Mbarriers {
    std::map<const unsigned char*, Mbarrier> of;
};

inline Mbarrier& mbarrier_at(Block& b, uint32_t address) {
    auto& all = cluster()->state<Mbarriers>().of;
    const auto found = all.find(at_window(b, address, 8));
    if (found == all.end()) throw std::runtime_error("emulation: an mbarrier before its init");
    return found->second;
}

inline void mbarrier_init(uint32_t address, unsigned count) {
    unsigned char* const place = at_window(*block(), address, 8);
    check_alignment(place, 8);
    if (count == 0 || count >= 1u << 20) {
        throw std::runtime_error("emulation: an mbarrier of no arrivals, or of 2^20");
    }
    cluster()->state<Mbarriers>().of[place] = {count, count, 0, false};
}

inline void mbarrier_arrive(uint32_t address, unsigned arrivals = 1) {
    Mbarrier& barrier = mbarrier_at(*block(), address);
    if (arrivals == 0) throw std::runtime_error("emulation: no arrival at an mbarrier");
    if (barrier.pending < arrivals) {
        throw std::runtime_error("emulation: more arrivals at an mbarrier than a phase has");
    }
    barrier.pending -= arrivals;
    barrier.settle();
}

inline void mbarrier_arrive_expect(uint32_t address, unsigned bytes) {
    mbarrier_at(*block(), address).bytes += bytes;
    mbarrier_arrive(address);
}

// complete_tx, by an asynchronous copy to the shared memory of `b`.
inline void mbarrier_complete(Block& b, uint32_t address, unsigned bytes) {
    Mbarrier& barrier = mbarrier_at(b, address);
    barrier.bytes -= bytes;
    barrier.settle();
}

// try_wait.parity until it is true: the phase of this parity has ended, so that the current one has
// the other.
inline void mbarrier_wait(uint32_t address, unsigned parity) {
    const Mbarrier& barrier = mbarrier_at(*block(), address);
    if (parity > 1) throw std::runtime_error("emulation: a parity is 0 or 1");
    wait_until("an mbarrier", [&barrier, parity] { return barrier.parity != (parity == 1); });
}

}  // namespace emulation
