// One kernel for all products of square blocks: D (wide x narrow) = sum over K of A B, where A (the
// wide operand) has 256 rows in each block of threads and B (the narrow one) as many columns as a
// block of weights has outputs or inputs.
//
// Two blocks of threads are a cluster: each loads A for itself, and half of B for both (multicast),
// so that a step of 64 along K costs the second-level cache (256 + side / 2) x 128 bytes for
// 256 x side x 64 multiply-adds. A block has a warp that loads (of its first warpgroup, which gives
// its registers away) and two warpgroups that multiply. Between them are four stages with two
// mbarriers each: `full` counts the bytes that arrive, `empty` the warps of both blocks that have
// read the stage. Clusters stay and take job after job, so the loads of a job begin while the one
// before is being multiplied and stored.
//
// A Product, a HopperProduct, says what a job is:
//     jobs                         how many
//     job_at(number, rank)         with the members `steps` and `bytes` (of A and B, in a step)
//     load(job, step, rank, at)    starts the loads of a step
//     store(job, warpgroup, d, staging), and finish() when all are stored
#pragma once

#include "hopper.cuh"
#include "launch.cuh"

namespace sk {
namespace cuda {

constexpr int kClusterBlocks = 2, kStages = 4, kConsumers = 2;
constexpr int kHopperThreads = (1 + kConsumers) * kWarpgroup;
// Rows of A in a block of threads, in tiles of 64 (the rows of a wgmma), and what a step has of K.
constexpr int kWide = 256, kTileRows = 64, kDepth = 64, kTiles = kWide / kTileRows;
// Rows of shared memory are 128 bytes, 64 elements; MN-major operands of blocks of 32 have 64.
constexpr int kRowBytes = 128, kTileBytes = kTileRows * kRowBytes;
template <int kSide>
constexpr int kRowBytesOf = kSide == 32 ? 64 : kRowBytes;
// Rows of half of an MN-major B (see load_half).
template <int kSide>
constexpr int kHalfRows = kSide == 128 ? kDepth : kDepth / 2;

// Of elements T and blocks of so many rows and columns, and whether an operand is MN-major.
template <class T, int kBlockSide, bool kMajorA, bool kMajorB>
struct HopperProduct {
    using Element = T;
    static constexpr int kSide = kBlockSide;
    static constexpr bool kTransposedA = kMajorA, kTransposedB = kMajorB;
};

// For other targets the kernel is empty, and it can have no more than a warp: on_hopper asks.
#if defined(SK_SM_90A) || !defined(__CUDA_ARCH__)
#define SK_HOPPER_BOUNDS __launch_bounds__(kHopperThreads, 1)
#else
#define SK_HOPPER_BOUNDS __launch_bounds__(32, 1)
#endif

// Bytes of shared memory, from an address that is a multiple of the atoms of the swizzle.
template <int kSide>
struct Shared {
    static constexpr int kAtomBytes = 1024;
    static constexpr int kNarrowAt = kTiles * kTileBytes;
    static constexpr int kStageBytes = kNarrowAt + kSide * kRowBytes;
    static constexpr int kStagingBytes = kTileRows * kSide * 2;  // of a warpgroup
    static constexpr int kStagingAt = kStages * kStageBytes;
    static constexpr int kBarriersAt = kStagingAt + kConsumers * kStagingBytes;
    static constexpr int kBytes = kAtomBytes + kBarriersAt + kStages * 2 * 8;
};

// Where a stage lies.
struct Place {
    uint32_t wide, narrow, full, empty;
};

// Goes from stage to stage; the parity is that of the phase of the stage's barriers.
template <int kSide>
struct Stages {
    uint32_t memory;
    int stage = 0;
    unsigned parity = 0;

    __device__ Place at(int number) const {
        const uint32_t wide = memory + number * Shared<kSide>::kStageBytes;
        const uint32_t barriers = memory + Shared<kSide>::kBarriersAt + number * 16;
        return {wide, wide + Shared<kSide>::kNarrowAt, barriers, barriers + 8};
    }
    __device__ Place now() const { return at(stage); }
    __device__ Place before() const { return at(stage == 0 ? kStages - 1 : stage - 1); }
    __device__ void advance() {
        if (++stage < kStages) return;
        stage = 0;
        parity ^= 1;
    }
};

#ifdef SK_SM_90A
constexpr uint16_t kAllBlocks = (1 << kClusterBlocks) - 1;

// Loads half of B, which is MN-major, for both blocks of the cluster: (row, col) is the first of
// its 64 rows, along K, and of its columns. Of 128 columns a half has 64, of fewer all, but half of
// the rows.
template <int kSide>
__device__ void load_half(const CUtensorMap* map, const Place& place, int col, int row,
                          unsigned rank) {
    constexpr bool kSplitsColumns = kSide == 128;
    load_box(map, place.narrow + rank * (kSide / 2 * kRowBytes),
             col + (kSplitsColumns ? rank * 64 : 0),
             row + (kSplitsColumns ? 0 : rank * kHalfRows<kSide>), place.full, kAllBlocks);
}

// One thread: waits until both blocks have read what lay in a stage before, and loads.
template <class Product>
__device__ void load_jobs(const Product& p, Stages<Product::kSide> stages, unsigned rank) {
    for (int number = blockIdx.x / kClusterBlocks; number < p.jobs;
         number += gridDim.x / kClusterBlocks) {
        const auto job = p.job_at(number, rank);
        for (int step = 0; step < job.steps; ++step, stages.advance()) {
            const Place place = stages.now();
            mbarrier_wait(place.empty, stages.parity ^ 1);
            mbarrier_arrive_expect(place.full, job.bytes);
            p.load(job, step, rank, place);
        }
    }
}

// A warp says to both blocks of the cluster that it has read a stage.
__device__ inline void release(const Place& place) {
    const unsigned lane = threadIdx.x % kWarp;
    if (lane < kClusterBlocks) mbarrier_arrive_at(place.empty, lane);
}

// A warpgroup: of the tiles of A those of its number and two further.
template <class Product>
__device__ void multiply_jobs(const Product& p, Stages<Product::kSide> stages, unsigned rank,
                              int warpgroup, uint32_t staging) {
    constexpr int kSide = Product::kSide, kOwn = kTiles / kConsumers, kWgmmaDepth = 16;
    constexpr int kBytes = kRowBytesOf<kSide>;
    // From one wgmma to the next along K; K-major operands lie in one atom of 64 elements.
    constexpr uint32_t kStepA = kWgmmaDepth * (Product::kTransposedA ? kBytes : 2);
    constexpr uint32_t kStepB = kWgmmaDepth * (Product::kTransposedB ? kBytes : 2);
    for (int number = blockIdx.x / kClusterBlocks; number < p.jobs;
         number += gridDim.x / kClusterBlocks) {
        const auto job = p.job_at(number, rank);
        float d[kOwn][kSide / 2];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
            for (int j = 0; j < kSide / 2; ++j) d[i][j] = 0.0f;
            keep_order(d[i]);
        }
        for (int step = 0; step < job.steps; ++step, stages.advance()) {
            const Place place = stages.now();
            mbarrier_wait(place.full, stages.parity);
            constexpr uint32_t kLeading = kDepth * kBytes;
            const uint64_t a =
                matrix_descriptor<kBytes>(place.wide + warpgroup * kTileBytes, kLeading);
            const uint64_t b = matrix_descriptor<kBytes>(place.narrow, kLeading);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / kWgmmaDepth; ++k) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    const uint32_t tile = i * kConsumers * kTileBytes;
                    wgmma<Product::kTransposedA, Product::kTransposedB>(
                        d[i], a + ((tile + k * kStepA) >> 4), b + (k * kStepB >> 4),
                        typename Product::Element{});
                }
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (step > 0) release(stages.before());
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < kOwn; ++i) keep_order(d[i]);
        if (job.steps > 0) release(stages.before());
        p.store(job, warpgroup, d, staging);
    }
    p.finish();
}
#endif

template <class Product>
__global__ void SK_HOPPER_BOUNDS hopper_kernel(const __grid_constant__ Product p) {
#ifdef SK_SM_90A
    using Memory = Shared<Product::kSide>;
    SharedMemory shared;
    const uint32_t begin = window_address(shared.take<unsigned char>(Memory::kBytes));
    const uint32_t memory = (begin + Memory::kAtomBytes - 1) & ~(Memory::kAtomBytes - 1u);
    const Stages<Product::kSide> stages{memory};
    const unsigned rank = blockIdx.x % kClusterBlocks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            mbarrier_init(stages.at(i).full, 1);
            mbarrier_init(stages.at(i).empty, kClusterBlocks * kConsumers * kWarpgroup / kWarp);
        }
        mbarrier_init_fence();
    }
    cluster_barrier();
    // The same in all lanes of a warp, which the compiler cannot see from threadIdx.
    const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 0) {
        lower_registers<40>();
        if (threadIdx.x == 0) load_jobs(p, stages, rank);
    } else {
        raise_registers<232>();
        const int consumer = warpgroup - 1;
        multiply_jobs(p, stages, rank, consumer,
                      memory + Memory::kStagingAt + consumer * Memory::kStagingBytes);
    }
    cluster_barrier();  // nobody reaches into the memory of a block that has ended
#endif
}

// A tensor map of a matrix of 16-bit elements, rows `row_bytes` apart, for boxes of 64 columns or
// 32, which lie in the swizzle of as many bytes as their rows have. It is written in place: the
// driver wants 64-byte alignment, which GCC does not give to what a function returns.
void make_map(CUtensorMap* map, const std::string& what, DType dtype, const void* data,
              int64_t rows, int64_t cols, int64_t row_bytes, int box_rows, int box_cols = 64);

// Clusters that stay and take job after job.
template <class Product>
void launch_hopper(const std::string& what, void (*kernel)(Product), const Product& p,
                   int64_t shared_bytes, const Queue& queue) {
    const int64_t clusters = std::min<int64_t>(
        p.jobs, std::max<int64_t>(1, multiprocessors(queue.device) / kClusterBlocks));
    launch_clusters(what, kernel, static_cast<unsigned>(clusters * kClusterBlocks), kClusterBlocks,
                    kHopperThreads, shared_bytes, queue, p);
}

}  // namespace cuda
}  // namespace sk
