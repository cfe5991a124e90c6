// The matrix instructions of a warp for elements of 16 bits, under PTX's names and with its
// fragments: lane 4 g + t of a warp holds of an operand's 8 x 8 matrices the elements 2 t and
// 2 t + 1 of row g, in one register each.
#pragma once

#include "tile.cuh"

namespace sk {
namespace cuda {

#ifndef SK_EMULATION
// An address of shared memory in one register; bytes can be added to it.
using SharedAddress = uint32_t;
__device__ inline SharedAddress shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void store_shared(SharedAddress to, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
}

// Loads four matrices, whose row r of matrix i lies at the `row` of lane 8 i + r.
__device__ inline void ldmatrix_x4(SharedAddress row, uint32_t (&matrices)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}
// The same, with each of the matrices transposed.
__device__ inline void ldmatrix_x4_trans(SharedAddress row, uint32_t (&matrices)[4]) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(row)
                 : "memory");
}

// Stores four matrices, each transposed: row r of what is stored of matrix i goes to the `row` of
// lane 8 i + r.
__device__ inline void stmatrix_x4_trans(SharedAddress row, const uint32_t (&matrices)[4]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
        "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
        : "memory");
#else
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t pair;
        asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;"
                     : "=r"(pair)
                     : "r"(matrices[i]));
        const SharedAddress to = __shfl_sync(kAllLanes, row, 8 * i + lane / 4) + lane % 4 * 4;
        store_shared(to, pair);
    }
#endif
}

#define SK_MMA(type)                                                                    \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
// d (16 x 8) += a (16 x 16) b (16 x 8). The matrices of a are the upper left, lower left, upper
// right and lower right; those of b, transposed, the upper and the lower; d[0] and d[1] are the
// upper matrix's, d[2] and d[3] the lower's.
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    Bf16) {
    SK_MMA("bf16");
}
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    Half) {
    SK_MMA("f16");
}
#undef SK_MMA
#else
using SharedAddress = const unsigned char*;
inline SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(pointer);
}
inline void store_shared(SharedAddress to, uint32_t value) {
    emulation::check_alignment(to, sizeof(value));
    std::memcpy(const_cast<unsigned char*>(to), &value, sizeof(value));
}
inline void ldmatrix_x4(SharedAddress row, uint32_t (&matrices)[4]) {
    emulation::ldmatrix(row, false, matrices);
}
inline void ldmatrix_x4_trans(SharedAddress row, uint32_t (&matrices)[4]) {
    emulation::ldmatrix(row, true, matrices);
}
inline void stmatrix_x4_trans(SharedAddress row, const uint32_t (&matrices)[4]) {
    emulation::stmatrix(row, true, matrices);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
    emulation::mma_m16n8k16(d, a, b0, b1, [](uint16_t bits) { return to_float(T{bits}); });
}
#endif

// The same value. Since it comes from another lane, the compiler keeps it in a register where it
// would compute it anew at each use.
template <class T>
__device__ T kept(T value) {
    return __shfl_sync(kAllLanes, value, threadIdx.x % kWarp);
}

// What load_tile does with `wide`, by matrices, for a multiple of kMatrixFeatures features of
// tokens that all exist: one load and one store serve 8 tokens of 32 features.
template <int kLogVectors, class T>
__device__ void load_matrices(uint4* tile, const T* first, int64_t row_stride, int features) {
    constexpr int kVectors = 1 << kLogVectors, kAtOnce = kVectors < 2 ? 1 : 2;
    const int lane = threadIdx.x % kWarp;
    const int begin = threadIdx.x / kWarp * kMatrixFeatures;
    const int step = blockDim.x / kWarp * kMatrixFeatures;
    // The features that a lane loads lie side by side; those that a matrix stores, in all banks.
    const T* row = first + lane / 4 * row_stride + begin + lane % 4 * 16;
    const unsigned stored = tile_base(lane % 8 / 2 * 16 + lane / 8 * 2 + lane % 2, kLogVectors);
#pragma unroll 1
    for (int v = 0; v < kVectors; v += kAtOnce, row += kAtOnce * 8 * row_stride) {
        const T* from = row;
#pragma unroll 1
        for (int feature = begin; feature < features; feature += step, from += step) {
            uint4 pairs[kAtOnce][2];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                pairs[i][0] = load_vector(from + i * 8 * row_stride);
                pairs[i][1] = load_vector(from + i * 8 * row_stride + 8);
            }
            const unsigned place = tile_base(feature, kLogVectors) ^ stored ^ v;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const uint4& of = pairs[i][h];
                    const uint32_t matrices[4] = {of.x, of.y, of.z, of.w};
                    const unsigned at = place ^ tile_base(8 * h, kLogVectors) ^ i;
                    stmatrix_x4_trans(shared_address(tile + at), matrices);
                }
            }
        }
    }
}

}  // namespace cuda
}  // namespace sk
