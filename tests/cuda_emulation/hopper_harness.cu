// Small kernels for the tests of the emulation itself (tests/test_cuda_hopper.py), each with the
// mistakes that it must find.
#include "hopper_pipeline.cuh"

#define SK_EXPORT extern "C" __attribute__((visibility("default")))

namespace sk {
namespace cuda {
namespace {

constexpr int kSpace = 64 << 10;

__device__ uint32_t aligned_memory(SharedMemory& shared, int bytes) {
    return (window_address(shared.take<unsigned char>(bytes + 1024)) + 1023) & ~1023u;
}

struct WgmmaProblem {
    const unsigned char* memory;  // kSpace bytes
    float* sums;                  // (128, columns / 2): of each thread
    uint64_t a, b;                // descriptors whose addresses count from the memory
    int columns;
    bool transposed_a, transposed_b, accumulate, half, fenced;
    int waits;  // groups that may be pending when the sums are read
};

__global__ void wgmma_kernel(const WgmmaProblem p) {
    SharedMemory shared;
    const uint32_t memory = aligned_memory(shared, kSpace);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSpace; i += 16) {
            std::memcpy(emulation::at_window(*emulation::block(), memory + i, 16), p.memory + i,
                        16);
        }
    }
    __syncthreads();
    float d[128];
    float* const sums = p.sums + threadIdx.x * p.columns / 2;
    std::copy(sums, sums + p.columns / 2, d);
    const auto bf16 = [](uint16_t bits) { return to_float(Bf16{bits}); };
    const auto half = [](uint16_t bits) { return to_float(Half{bits}); };
    if (p.fenced) wgmma_fence();
    emulation::wgmma(d, p.a + (memory >> 4), p.b + (memory >> 4), p.columns, p.transposed_a,
                     p.transposed_b, p.accumulate, p.half ? +half : +bf16);
    wgmma_commit();
    emulation::wgmma_wait(p.waits);
    std::copy(d, d + p.columns / 2, sums);
    wgmma_wait<0>();
}

enum Mistake {
    kNone,
    kNoWaitForFull,
    kNoWaitForEmpty,
    kTooManyBytes,
    kTooFewBytes,
    kNoInit,
    kArrivesTwice,
    kWrongParity,
    kEndsEarly,
    kWrongMask,
    kTooManyArrivals,
};

// Boxes of 512 bytes: each of two blocks loads every second one for both, to one of two stages; a
// warp of each copies what arrives to `out` (blocks, rounds, 1024 bytes). The loading thread
// arrives `more` times for others.
__global__ void ring_kernel(const __grid_constant__ CUtensorMap map, int box_rows, int col, int row,
                            int rounds, int more, int mistake, unsigned char* out) {
    SharedMemory shared;
    const uint32_t memory = aligned_memory(shared, 2 * 1024 + 32), barriers = memory + 2 * 1024;
    const unsigned rank = blockIdx.x % 2;
    const auto full = [&](int n) { return barriers + n % 2 * 16; };
    const auto empty = [&](int n) { return barriers + n % 2 * 16 + 8; };
    if (threadIdx.x == 0 && mistake != kNoInit) {
        for (int i = 0; i < 2; ++i) mbarrier_init(full(i), 1), mbarrier_init(empty(i), 2 + more);
        mbarrier_init_fence();
    }
    cluster_barrier();
    if (threadIdx.x == 0) {
        for (int n = 0; n < rounds; ++n) {
            if (mistake != kNoWaitForEmpty) mbarrier_wait(empty(n), (n / 2 & 1) ^ 1);
            const int wrong = mistake == kTooManyBytes ? 16 : mistake == kTooFewBytes ? -16 : 0;
            mbarrier_arrive_expect(full(n), 1024 + wrong);
            if (more) mbarrier_arrive_for(empty(n), more + (mistake == kTooManyArrivals ? 3 : 0));
            load_box(&map, memory + n % 2 * 1024 + rank * 512, col, row + box_rows * (2 * n + rank),
                     full(n), mistake == kWrongMask ? 5 : 3);
        }
    } else if (threadIdx.x >= kWarp) {
        for (int n = 0; n < rounds; ++n) {
            const unsigned parity = (n / 2 & 1) ^ (mistake == kWrongParity);
            if (mistake != kNoWaitForFull) mbarrier_wait(full(n), parity);
            const int at = threadIdx.x % kWarp * 32;
            std::memcpy(out + (rank * rounds + n) * 1024 + at,
                        emulation::at_window(*emulation::block(), memory + n % 2 * 1024 + at, 32),
                        32);
            __syncwarp();
            if (threadIdx.x % kWarp < 2) {
                mbarrier_arrive_at(empty(n), threadIdx.x % kWarp);
                if (mistake == kArrivesTwice) mbarrier_arrive_at(empty(n), threadIdx.x % kWarp);
            }
        }
    }
    if (mistake != kEndsEarly) cluster_barrier();
}

// A warp stores boxes of 8 rows from one place: element e of lane l's register r in round n is
// 1024 n + 32 r + l (+ 0.5 in `upper`).
__global__ void store_kernel(const __grid_constant__ CUtensorMap map, int col, int row, int rounds,
                             bool fences, bool waits) {
    SharedMemory shared;
    const uint32_t memory = aligned_memory(shared, 1024);
    const unsigned lane = threadIdx.x % kWarp, r = lane % 8;
    for (int n = 0; n < rounds; ++n) {
        if (lane == 0 && waits) store_wait_read();
        __syncwarp();
        for (unsigned i = 0; i < 8; i += 4) {
            uint32_t matrices[4];
            for (unsigned j = 0; j < 4; ++j) {
                const uint32_t number = 1024 * n + 32 * (i + j) + lane;
                matrices[j] = number << 16 | number;
            }
            stmatrix_x4(memory + r * 128 + ((i + lane / 8) ^ r) * 16, matrices);
        }
        if (fences) fence_proxy();
        __syncwarp();
        if (lane == 0) {
            store_box(&map, memory, col, row + 8 * n);
            store_commit();
        }
    }
}

// A warpgroup whose last warp issues another instruction, or which misses a barrier.
__global__ void disagree_kernel(bool barrier) {
    SharedMemory shared;
    const uint32_t memory = aligned_memory(shared, kSpace);
    const bool other = threadIdx.x / kWarp == 3;
    if (barrier) {
        if (!other) warpgroup_barrier(1);
        return;
    }
    float d[32] = {};
    const uint64_t a = matrix_descriptor<kRowBytes>(memory + (other ? 1024 : 0), 8192);
    wgmma_fence();
    wgmma<false, false>(d, a, matrix_descriptor<kRowBytes>(memory + 32768, 8192), Bf16{});
    wgmma_commit();
    wgmma_wait<0>();
}

}  // namespace
}  // namespace cuda
}  // namespace sk

using namespace sk::cuda;

SK_EXPORT const char* run_wgmma(const WgmmaProblem* p) {
    return message_of(
        [=] { launch("wgmma", wgmma_kernel, 1, kWarpgroup, kSpace + 1024, Queue{}, *p); });
}
SK_EXPORT const char* run_ring(const void* data, int64_t rows, int64_t cols, int64_t row_elements,
                               int box_cols, int col, int row, int rounds, int more, int mistake,
                               unsigned char* out) {
    return message_of([=] {
        CUtensorMap map;
        const int box_rows = 256 / box_cols;
        make_map(&map, "a test", DType::kBfloat16, data, rows, cols, 2 * row_elements, box_rows,
                 box_cols);
        launch_clusters("ring", ring_kernel, 2, 2, 64, 4096, Queue{}, map, box_rows, col, row,
                        rounds, more, mistake, out);
    });
}
SK_EXPORT const char* run_store(void* data, int64_t rows, int64_t cols, int64_t row_elements,
                                int col, int row, int rounds, bool fences, bool waits) {
    return message_of([=] {
        CUtensorMap map;
        make_map(&map, "a test", DType::kBfloat16, data, rows, cols, 2 * row_elements, 8);
        launch("store", store_kernel, 1, kWarp, 2048, Queue{}, map, col, row, rounds, fences,
               waits);
    });
}
SK_EXPORT const char* run_disagree(bool barrier) {
    return message_of([=] {
        launch("disagree", disagree_kernel, 1, kWarpgroup, kSpace + 1024, Queue{}, barrier);
    });
}
