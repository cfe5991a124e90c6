// Kernels with mistakes, and matrix instructions one by one: what test_cuda_emulation.py runs.
#include "launch.cuh"
#include "mma.cuh"

namespace sk {
namespace cuda {

// Each thread writes its place and reads its neighbour's, without a barrier where `barrier` is not.
__global__ void neighbour(float* out, bool barrier, int reach) {
    SharedMemory shared;
    float* const places = shared.take<float>(static_cast<int>(blockDim.x));
    places[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (barrier) __syncthreads();
    out[threadIdx.x] = places[(threadIdx.x + 1) % blockDim.x + reach];
}

// Every thread reads what one wrote, then that one writes again.
__global__ void overtake(float* out, bool barrier) {
    SharedMemory shared;
    float* const place = shared.take<float>(1);
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == blockDim.x / 2) *place = static_cast<float>(i);
        __syncthreads();
        out[i * blockDim.x + threadIdx.x] = *place;
        if (barrier) __syncthreads();
    }
}

// Half of the threads come to a barrier, the others end.
__global__ void diverge() {
    if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

__global__ void nothing() {}
__global__ void nothing_unasked() {}
__global__ void vector(const char* from) { load_vector(from); }

// 32 rows of 8 elements, as fragments of four matrices and of the same transposed; the first are
// stored, transposed.
__global__ void matrices(const uint4* from, uint32_t* out, uint4* stored) {
    SharedMemory shared;
    uint4* const rows = shared.take<uint4>(32);
    rows[threadIdx.x] = from[threadIdx.x];
    __syncthreads();
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(shared_address(rows + threadIdx.x), plain);
    ldmatrix_x4_trans(shared_address(rows + threadIdx.x), transposed);
    for (int i = 0; i < 4; ++i) {
        out[threadIdx.x * 8 + i] = plain[i];
        out[threadIdx.x * 8 + 4 + i] = transposed[i];
    }
    stmatrix_x4_trans(shared_address(rows + threadIdx.x), plain);
    stored[threadIdx.x] = rows[threadIdx.x];
}

template <class T>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d) {
    const int lane = threadIdx.x;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = d[lane * 4 + i];
    const uint32_t left[4] = {a[lane * 4], a[lane * 4 + 1], a[lane * 4 + 2], a[lane * 4 + 3]};
    mma_m16n8k16(sums, left, b[lane * 2], b[lane * 2 + 1], T{});
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

template <class Pair>
void compare(const Pair* pairs, Pair bound, int count, uint32_t* masks, Pair* sums) {
    for (int i = 0; i < count; ++i) {
        masks[i] = __hgtu2_mask(pairs[i], bound);
        sums[i] = __hadd2(__hgtu2(pairs[i], bound), pairs[i]);
    }
}

}  // namespace cuda
}  // namespace sk

#define SK_EXPORT extern "C" __attribute__((visibility("default")))
using namespace sk::cuda;

SK_EXPORT void run_neighbour(float* out, bool barrier, int reach) {
    launch("neighbour", neighbour, 1, kThreads, 4 * kThreads, Queue{}, out, barrier, reach);
}
SK_EXPORT void run_overtake(float* out, bool barrier) {
    launch("overtake", overtake, 1, kThreads, 16, Queue{}, out, barrier);
}
SK_EXPORT void run_matrices(const uint4* from, uint32_t* out, uint4* stored) {
    launch("matrices", matrices, 1, 32, 512, Queue{}, from, out, stored);
}
SK_EXPORT void run_product(bool half, const uint32_t* a, const uint32_t* b, float* d) {
    launch("product", half ? product<Half> : product<Bf16>, 1, 32, 0, Queue{}, a, b, d);
}
SK_EXPORT void run_compare(bool half, const void* pairs, const void* bound, int count,
                           uint32_t* masks, void* sums) {
    const auto run = [=](auto* first) {
        using Pair = std::remove_pointer_t<decltype(first)>;
        compare(static_cast<const Pair*>(pairs), *static_cast<const Pair*>(bound), count, masks,
                static_cast<Pair*>(sums));
    };
    half ? run(static_cast<__half2*>(nullptr)) : run(static_cast<__nv_bfloat162*>(nullptr));
}
SK_EXPORT const char* run_diverge() {
    return message_of([] { launch("diverge", diverge, 1, kThreads, 0, Queue{}); });
}
SK_EXPORT const char* run_sizes(unsigned x, unsigned y, unsigned z, unsigned threads,
                                int shared_bytes) {
    return message_of(
        [=] { launch("nothing", nothing, dim3(x, y, z), threads, shared_bytes, Queue{}); });
}
SK_EXPORT const char* run_unasked(int shared_bytes) {
    return message_of([=] {
        check(launch_kernel(nothing_unasked, 1, 1, kThreads, shared_bytes, nullptr), "unasked");
    });
}
SK_EXPORT const char* run_vector(const char* from) {
    return message_of([=] { launch("vector", vector, 1, 32, 0, Queue{}, from); });
}
