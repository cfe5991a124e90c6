// What limits the block-sparse products on a GPU: how fast all multiprocessors together read what
// lies in the second-level cache. benchmarks/gpu/steps.py compiles it for the GPU at hand.
#include <cuda_runtime.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace {

constexpr int kThreads = 512, kBlocksPerMultiprocessor = 2, kRounds = 64, kRuns = 10;
constexpr int kUnroll = 8;  // loads in flight in each thread

// Every round reads all of `data`; a block begins at another place in each, so that the first-level
// cache, which __ldcg passes by, could not help either.
__global__ void __launch_bounds__(kThreads)
    read_kernel(const uint4* data, unsigned count, unsigned* out) {
    const unsigned stride = gridDim.x * kThreads;
    const unsigned thread = blockIdx.x * kThreads + threadIdx.x;
    unsigned sum = 0;
    for (unsigned round = 0; round < kRounds; ++round) {
        const unsigned first = (thread + round * 37 * kThreads) % stride;
        for (unsigned i = first; i + (kUnroll - 1) * stride < count; i += kUnroll * stride) {
            uint4 loaded[kUnroll];
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) loaded[j] = __ldcg(data + i + j * stride);
#pragma unroll
            for (int j = 0; j < kUnroll; ++j) {
                sum += loaded[j].x ^ loaded[j].y ^ loaded[j].z ^ loaded[j].w;
            }
        }
    }
    if (sum == 1) *out = sum;  // never: the data is zero
}

double fail(cudaError_t error) { return -static_cast<double>(error); }

}  // namespace

// The best of some runs in GB/s over a buffer of about `bytes`, or minus the number of an error.
extern "C" double l2_read_gbs(size_t bytes) {
    int device = 0, multiprocessors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    const auto blocks = static_cast<unsigned>(multiprocessors * kBlocksPerMultiprocessor);
    const size_t round = size_t{blocks} * kThreads * kUnroll;  // what all threads load at once
    const size_t count = std::max<size_t>(1, bytes / sizeof(uint4) / round) * round;
    uint4* data = nullptr;
    unsigned* out = nullptr;
    if (cudaError_t error = cudaMalloc(&data, count * sizeof(uint4))) return fail(error);
    if (cudaError_t error = cudaMalloc(&out, sizeof(unsigned))) return fail(error);
    cudaMemset(data, 0, count * sizeof(uint4));
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    float best_ms = 1e30f;
    for (int run = 0; run < kRuns; ++run) {
        cudaEventRecord(start);
        read_kernel<<<blocks, kThreads>>>(data, static_cast<unsigned>(count), out);
        cudaEventRecord(end);
        if (cudaError_t error = cudaEventSynchronize(end)) return fail(error);
        float ms = 0;
        cudaEventElapsedTime(&ms, start, end);
        best_ms = std::min(best_ms, ms);
    }
    cudaEventDestroy(start);
    cudaEventDestroy(end);
    cudaFree(data);
    cudaFree(out);
    return static_cast<double>(count) * sizeof(uint4) * kRounds / best_ms * 1e-6;
}
