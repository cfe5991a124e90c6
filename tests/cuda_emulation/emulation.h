// Runs CUDA kernels on the CPU: as much of CUDA as csrc/cuda/ uses, for g++ or clang++.
//
// The blocks of a launch run one after the other, those of a cluster together. The threads of a
// block are fibers: one runs until it comes to a barrier or a warp operation, then the next has its
// turn. Nothing happens at the same time, so a result depends on the order of the fibers alone -
// and must not depend on it: the tests run every kernel in several orders (SK_EMULATION_ORDER), in
// which a missing barrier shows as a result that is wrong or different. Shared memory is as large
// as it was asked for, each piece an allocation of its own that begins as NaN, so that
// AddressSanitizer sees a step outside. What goes on beside the threads (copies of boxes, wgmma)
// ends at a random time: a missing wait shows as NaN or as an old number. SK_EMULATION_SEED draws
// these times.
#pragma once

#include "fibers.h"
#include "matrix.h"
#include "numbers.h"
#include "runtime.h"
#include "wgmma.h"

#define threadIdx (emulation::block()->current->index)
#define blockIdx (emulation::block()->index)
#define blockDim (emulation::block()->size)
#define gridDim (emulation::block()->grid)
inline void __syncthreads() { emulation::wait(emulation::Fiber::kAtBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    const unsigned lane = emulation::block()->current->rank % emulation::kWarpLanes;
    return emulation::exchange(mask, value)[lane ^ static_cast<unsigned>(distance)];
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = emulation::block()->current->rank % emulation::kWarpLanes;
    const unsigned w = static_cast<unsigned>(width);
    return emulation::exchange(mask, value)[lane / w * w + static_cast<unsigned>(source) % w];
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    const auto all = emulation::exchange(mask, static_cast<int>(value));
    unsigned bits = 0;
    for (unsigned lane = 0; lane < emulation::kWarpLanes; ++lane) {
        bits |= static_cast<unsigned>(all[lane] != 0) << lane;
    }
    return bits;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const unsigned lane = emulation::block()->current->rank % emulation::kWarpLanes;
    const unsigned from = lane - static_cast<unsigned>(distance);
    return emulation::exchange(mask, value)[from < lane ? from : lane];
}
inline int __reduce_add_sync(unsigned mask, int value) {
    const auto all = emulation::exchange(mask, value);
    return std::accumulate(all.begin(), all.end(), 0);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    const auto all = emulation::exchange(mask, value);
    return *std::min_element(all.begin(), all.end());
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const auto all = emulation::exchange(mask, value);
    return *std::max_element(all.begin(), all.end());
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
    return c;
}

template <class T>
void __stcs(T* to, T value) {
    emulation::check_alignment(to, sizeof(T));
    *to = value;
}

// What a call throws, or that it ran.
template <class Run>
const char* message_of(Run run) {
    static std::string message;
    message = "it ran";
    try {
        run();
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}
