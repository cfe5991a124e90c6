// The threads of blocks as fibers, and the order in which they have their turns; see emulation.h.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <typeindex>
#include <typeinfo>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

constexpr unsigned kWarpLanes = 32;

// Where a fiber or the scheduler goes on.
struct Context {
    ucontext_t start;
    jmp_buf place;
    bool started = true;
};
// A swapcontext whose system calls are made at the start of a fiber only.
inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)  // it follows swapcontext
    swapcontext(&from.start, &to.start);
#else
    if (_setjmp(from.place)) return;
    if (to.started) _longjmp(to.place, 1);
    to.started = true;
    setcontext(&to.start);
#endif
}

// A thread of a block that is running.
struct Fiber {
    dim3 index;
    unsigned rank;
    Context context;
    std::unique_ptr<char[]> stack;
    size_t pieces = 0;  // of shared memory taken
    enum { kRuns, kAtBarrier, kAtWarp, kUntil, kDone } state = kRuns;
    std::function<bool()> ready;  // what it waits for, in kUntil
    std::string awaited;
    bool warp_turn = false;
    unsigned char exchange[2][32] = {};  // what it shows to its warp, in alternating turns
};

struct Block {
    dim3 index, size, grid;
    std::function<void()> kernel;
    size_t shared_bytes = 0;
    std::vector<std::pair<std::unique_ptr<unsigned char[]>, size_t>> pieces;
    std::vector<Fiber> fibers;
    Fiber* current = nullptr;
    Context scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    std::string error;

    bool ended() const {
        return std::all_of(fibers.begin(), fibers.end(),
                           [](const Fiber& fiber) { return fiber.state == Fiber::kDone; });
    }
};

// Work that goes on beside the threads, and ends after that many turns of warps, or when no thread
// can go on without it.
struct Later {
    unsigned turns;
    bool outlives;  // it may end after the threads have
    std::function<void()> complete;
};

// The blocks that run at the same time and reach each other's shared memory: a cluster. What the
// emulation of an instruction remembers is its `state`.
struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    std::mt19937_64 random;
    std::vector<Later> later;
    std::map<std::type_index, std::shared_ptr<void>> states;

    template <class State>
    State& state() {
        std::shared_ptr<void>& held = states[typeid(State)];
        if (!held) held = std::make_shared<State>();
        return *static_cast<State*>(held.get());
    }
    // A delay that is short, or as long as can be: both find mistakes.
    unsigned delay() {
        const auto kind = random() % 4;
        return kind == 0 ? 0 : kind == 1 ? 1u << 30 : static_cast<unsigned>(random() % 24);
    }
    void complete(size_t i) {
        const std::function<void()> work = std::move(later[i].complete);
        later.erase(later.begin() + static_cast<std::ptrdiff_t>(i));
        work();
    }
    void turn_passes() {
        for (size_t i = later.size(); i-- > 0;) {
            if (later[i].turns-- == 0) complete(i);
        }
    }
};

inline Cluster*& cluster() {
    static Cluster* running = nullptr;
    return running;
}
inline Block*& block() {
    static Block* running = nullptr;
    return running;
}

constexpr size_t kStackBytes = 64 << 10;

// Switches tell AddressSanitizer which stack it is on.
inline void to_scheduler(bool for_good = false) {
    Block& b = *block();
    Fiber& fiber = *b.current;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, b.scheduler_stack,
                                   b.scheduler_stack_size);
#endif
    (void)for_good;
    switch_context(fiber.context, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
}

inline void fiber_main() {
    Block& b = *block();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
    try {
        b.kernel();
    } catch (const std::exception& error) {
        b.error = error.what();
    }
    b.current->state = Fiber::kDone;
    to_scheduler(true);
}

inline void run(Fiber& fiber) {
    Block& b = *block();
    b.current = &fiber;
    fiber.state = Fiber::kRuns;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
    switch_context(b.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void wait(decltype(Fiber::state) state) {
    block()->current->state = state;
    to_scheduler();
}

// Waits until `ready`; `awaited` says for what, where nothing will ever make it so.
inline void wait_until(std::string awaited, std::function<bool()> ready) {
    Fiber& self = *block()->current;
    if (ready()) return;
    self.awaited = std::move(awaited);
    self.ready = std::move(ready);
    wait(Fiber::kUntil);
}

// The orders in which the fibers of a block have their turns.
inline std::vector<unsigned> order_of(unsigned count, uint64_t launch) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    const char* named = std::getenv("SK_EMULATION_ORDER");
    const std::string name = named ? named : "forward";
    if (name == "reversed") {
        std::reverse(order.begin(), order.end());
    } else if (name == "shuffled") {
        std::shuffle(order.begin(), order.end(), std::mt19937_64(launch));
    } else if (name != "forward") {
        throw std::runtime_error("SK_EMULATION_ORDER must be forward, reversed or shuffled");
    }
    return order;
}

inline void start(Block& b) {
    const unsigned threads = static_cast<unsigned>(b.fibers.size());
    for (unsigned rank = 0; rank < threads; ++rank) {
        Fiber& fiber = b.fibers[rank];
        fiber.rank = rank;
        fiber.index = dim3(rank);
        fiber.pieces = 0;
        fiber.state = Fiber::kRuns;
        fiber.warp_turn = false;
        if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
        ucontext_t& start = fiber.context.start;
        getcontext(&start);
        start.uc_stack.ss_sp = fiber.stack.get();
        start.uc_stack.ss_size = kStackBytes;
        start.uc_link = nullptr;
        makecontext(&start, fiber_main, 0);
        fiber.context.started = false;
    }
}

// Runs a warp as far as it gets on its own, so that one that no barrier holds back overtakes the
// others by as much as it can. Whether it got anywhere.
inline bool run_warp(Block& b, const std::vector<unsigned>& lanes) {
    block() = &b;
    bool moved = false;
    const auto state_is = [&b](int state) {
        return [&b, state](unsigned rank) { return b.fibers[rank].state == state; };
    };
    for (const unsigned rank : lanes) {
        Fiber& fiber = b.fibers[rank];
        if (fiber.state == Fiber::kUntil && fiber.ready()) fiber.state = Fiber::kRuns;
    }
    while (std::any_of(lanes.begin(), lanes.end(), state_is(Fiber::kRuns))) {
        for (const unsigned rank : lanes) {
            if (b.fibers[rank].state != Fiber::kRuns) continue;
            run(b.fibers[rank]);
            moved = true;
            if (!b.error.empty()) throw std::runtime_error(b.error);
        }
        // The warp goes on when all of its lanes have come to the operation.
        if (std::all_of(lanes.begin(), lanes.end(), state_is(Fiber::kAtWarp))) {
            for (const unsigned rank : lanes) b.fibers[rank].state = Fiber::kRuns;
        }
    }
    return moved;
}

// Says for what the threads of a cluster wait, none of which can go on.
inline std::string standstill(const Cluster& c) {
    std::map<std::string, unsigned> waiting;
    unsigned at_barrier = 0, at_warp = 0, done = 0;
    for (const auto& b : c.blocks) {
        for (const Fiber& fiber : b->fibers) {
            at_barrier += fiber.state == Fiber::kAtBarrier;
            at_warp += fiber.state == Fiber::kAtWarp;
            done += fiber.state == Fiber::kDone;
            if (fiber.state == Fiber::kUntil) ++waiting[fiber.awaited];
        }
    }
    std::string sentence =
        "emulation: threads wait at different barriers: " + std::to_string(at_barrier) +
        " at the block's, " + std::to_string(at_warp) + " at their warp's, ";
    for (const auto& [awaited, count] : waiting) {
        sentence += std::to_string(count) + " for " + awaited + ", ";
    }
    return sentence + std::to_string(done) + " have ended";
}

// Runs the blocks of a cluster to their ends, warp by warp, and within a warp in the same order.
// Throws if their threads wait for each other.
inline void run_cluster(Cluster& c, const std::vector<unsigned>& order) {
    const unsigned threads = static_cast<unsigned>(c.blocks[0]->fibers.size());
    std::vector<std::vector<unsigned>> warps((threads + kWarpLanes - 1) / kWarpLanes);
    std::vector<unsigned> warp_order;
    for (const unsigned rank : order) {
        std::vector<unsigned>& warp = warps[rank / kWarpLanes];
        if (warp.empty()) warp_order.push_back(rank / kWarpLanes);
        warp.push_back(rank);
    }
    std::vector<Block*> blocks;
    for (const auto& b : c.blocks) blocks.push_back(b.get());
    if (order[0] % 2) std::reverse(blocks.begin(), blocks.end());
    for (Block* const b : blocks) start(*b);
    const auto ended = [](const Block* b) { return b->ended(); };
    while (!std::all_of(blocks.begin(), blocks.end(), ended)) {
        bool moved = false;
        for (Block* const b : blocks) {
            for (const unsigned warp : warp_order) {
                moved |= run_warp(*b, warps[warp]);
                c.turn_passes();
            }
            const auto waits = [](const Fiber& f) { return f.state == Fiber::kAtBarrier; };
            if (std::all_of(b->fibers.begin(), b->fibers.end(), waits)) {
                for (Fiber& fiber : b->fibers) fiber.state = Fiber::kRuns;
                moved = true;
            }
        }
        if (moved) continue;
        const auto is_ready = [](const Fiber& f) { return f.state == Fiber::kUntil && f.ready(); };
        for (Block* const b : blocks) {
            block() = b;
            moved |= std::any_of(b->fibers.begin(), b->fibers.end(), is_ready);
        }
        if (moved) continue;
        if (c.later.empty()) {
            if (std::all_of(blocks.begin(), blocks.end(), ended)) return;
            throw std::runtime_error(standstill(c));
        }
        c.complete(c.random() % c.later.size());
    }
    while (!c.later.empty()) {
        const size_t i = c.random() % c.later.size();
        if (!c.later[i].outlives) {
            throw std::runtime_error("emulation: a kernel ended before what it had started did");
        }
        c.complete(i);
    }
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, unsigned cluster_size,
                   std::function<void()> kernel) {
    static uint64_t launches = 0;
    if (size.x % kWarpLanes) throw std::runtime_error("emulation: blocks are whole warps");
    const char* const seed = std::getenv("SK_EMULATION_SEED");
    Cluster running;
    for (unsigned rank = 0; rank < cluster_size; ++rank) {
        running.blocks.emplace_back(new Block);
        Block& b = *running.blocks.back();
        b.size = size;
        b.grid = grid;
        b.kernel = kernel;
        b.shared_bytes = shared_bytes;
        b.fibers.resize(size.x);
    }
    cluster() = &running;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; x += cluster_size) {
                for (unsigned rank = 0; rank < cluster_size; ++rank) {
                    running.blocks[rank]->index = dim3(x + rank, y, z);
                    running.blocks[rank]->pieces.clear();
                }
                running.later.clear();
                running.states.clear();
                ++launches;
                running.random.seed(seed ? std::strtoull(seed, nullptr, 10) : launches);
                run_cluster(running, order_of(size.x, seed ? running.random() : launches));
            }
        }
    }
    cluster() = nullptr;
    block() = nullptr;
}

// CUDA refuses an access whose address is no multiple of its size.
inline void check_alignment(const void* address, size_t size) {
    if (reinterpret_cast<uintptr_t>(address) % size) {
        throw std::runtime_error("emulation: an address that is no multiple of " +
                                 std::to_string(size));
    }
}

// All lanes of the warp show a value and see those of the others.
template <class T>
std::array<T, kWarpLanes> exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(Fiber::exchange[0]), "at most 32 bytes");
    if (mask != 0xffffffffu) throw std::runtime_error("emulation: needs the mask of all lanes");
    Fiber& self = *block()->current;
    const bool turn = self.warp_turn;
    self.warp_turn = !turn;
    std::memcpy(self.exchange[turn], &value, sizeof(T));
    wait(Fiber::kAtWarp);
    std::array<T, kWarpLanes> all;
    const unsigned first = self.rank / kWarpLanes * kWarpLanes;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        std::memcpy(&all[lane], block()->fibers[first + lane].exchange[turn], sizeof(T));
    }
    return all;
}

}  // namespace emulation
