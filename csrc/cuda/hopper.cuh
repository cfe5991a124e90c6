// The instructions of compute capability 9.0 under their PTX names, each with the section of the
// PTX ISA that documents it. Shared memory is addressed by the 32 bits of the shared window.
#pragma once

#include "tile.cuh"

#ifndef SK_EMULATION
#include <cuda.h>
#endif

// Whether this pass of the compiler makes code for sm_90a; for other targets the kernels are empty.
#if defined(SK_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SK_SM_90A 1
#endif

namespace sk {
namespace cuda {

constexpr int kWarpgroup = 128;

// "Matrix Descriptor Format" and "Strides" (wgmma): rows of 128 (64) bytes in the swizzle of as
// many, eight of them (an atom) in a piece. K-major, a row has 64 (32) elements along K, and atoms
// follow along M or N. MN-major, a row has so many along M or N, atoms follow along K, and the next
// elements along M or N lie `leading` bytes further.
template <int kRowBytes>
__device__ inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading) {
    static_assert(kRowBytes == 64 || kRowBytes == 128, "the swizzles that the kernels use");
    constexpr uint64_t kAtom = 8 * kRowBytes >> 4, kSwizzle = kRowBytes == 128 ? 1 : 2;
    return ((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | kAtom << 32 |
           kSwizzle << 62;
}

#ifndef SK_EMULATION
#ifdef SK_SM_90A
__device__ inline uint32_t window_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// "mbarrier.init", and the fence that shows it to the cluster ("membar, fence").
__device__ inline void mbarrier_init(uint32_t barrier, unsigned arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// "mbarrier.arrive" after "mbarrier.expect_tx": an arrival that announces bytes.
__device__ inline void mbarrier_arrive_expect(uint32_t barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}
// "mapa", "mbarrier.arrive": an arrival at the barrier at this place of a block of the cluster. It
// orders no writes of this thread: release at the scope of the cluster would cost a MEMBAR.GPU.
__device__ inline void mbarrier_arrive_at(uint32_t barrier, unsigned rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}
// "mbarrier.arrive" at a barrier of this block, so many times.
__device__ inline void mbarrier_arrive_for(uint32_t barrier, unsigned arrivals) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}
// "mbarrier.try_wait": until the phase of this parity has ended.
__device__ inline void mbarrier_wait(uint32_t barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// What the matrix instructions of mma.cuh take for an address.
__device__ inline uint32_t shared_at(uint32_t address) { return address; }

// "barrier.cluster": all threads of the cluster.
__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// "bar, barrier": the threads of a warpgroup.
__device__ inline void warpgroup_barrier(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kWarpgroup) : "memory");
}

// "cp.async.bulk.tensor": the box at (row, col) goes to shared memory, and its bytes are completed
// on a barrier; with a mask, to the same place of each block of the cluster that it names, and on
// the barrier there.
__device__ inline void load_box(const CUtensorMap* map, uint32_t to, int col, int row,
                                uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(col), "r"(row), "r"(barrier)
        : "memory");
}
__device__ inline void load_box(const CUtensorMap* map, uint32_t to, int col, int row,
                                uint32_t barrier, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(col), "r"(row), "r"(barrier), "h"(mask)
        : "memory");
}
// The same from shared memory; what is outside of the tensor is not stored. Threads show what they
// wrote by a fence ("membar, fence": proxies), and a thread's stores are awaited in groups
// ("cp.async.bulk.wait_group").
__device__ inline void store_box(const CUtensorMap* map, uint32_t from, int col, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
        "r"(col), "r"(row), "r"(from)
        : "memory");
}
__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ inline void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ inline void fence_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// "stmatrix": row r of matrix i goes to the `row` of lane 8 i + r.
__device__ inline void stmatrix_x4(uint32_t row, const uint32_t (&matrices)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
                 "r"(matrices[0]), "r"(matrices[1]), "r"(matrices[2]), "r"(matrices[3])
                 : "memory");
}

// "setmaxnreg": registers of a thread from here on; all warps of a warpgroup execute it.
template <int kRegisters>
__device__ void raise_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void lower_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// No instruction: the compiler, which knows nothing of sums in flight, moves no use of them past.
template <int kSums>
__device__ void keep_order(float (&d)[kSums]) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// "wgmma.mma_async": d (64 x kColumns) += a (64 x 16) b (16 x kColumns), both in shared memory,
// transposed where they are MN-major. Lane 4 g + t of the warpgroup's warp w has of the rows
// 16 w + g and 16 w + g + 8 the columns 8 i + 2 t and 8 i + 2 t + 1: d[4 i] to d[4 i + 3].
#define SK_D8(i)                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SK_WGMMA_32(type)                                                                        \
    asm volatile(                                                                                \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                              \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, 1, " \
        "1, 1, %18, %19;"                                                                        \
        : SK_D8(0), SK_D8(8)                                                                     \
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB))
#define SK_WGMMA_64(type)                                                                         \
    asm volatile(                                                                                 \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                               \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, 1, 1, 1, "   \
        "%34, %35;"                                                                               \
        : SK_D8(0), SK_D8(8), SK_D8(16), SK_D8(24)                                                \
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB))
#define SK_WGMMA_128(type)                                                                        \
    asm volatile(                                                                                 \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
        "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "   \
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "   \
        "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1, %66, %67;"    \
        : SK_D8(0), SK_D8(8), SK_D8(16), SK_D8(24), SK_D8(32), SK_D8(40), SK_D8(48), SK_D8(56)    \
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB))
template <bool kTransposedA, bool kTransposedB>
__device__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, Bf16) {
    SK_WGMMA_32("bf16");
}
template <bool kTransposedA, bool kTransposedB>
__device__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, Half) {
    SK_WGMMA_32("f16");
}
template <bool kTransposedA, bool kTransposedB>
__device__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, Bf16) {
    SK_WGMMA_64("bf16");
}
template <bool kTransposedA, bool kTransposedB>
__device__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, Half) {
    SK_WGMMA_64("f16");
}
template <bool kTransposedA, bool kTransposedB>
__device__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, Bf16) {
    SK_WGMMA_128("bf16");
}
template <bool kTransposedA, bool kTransposedB>
__device__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, Half) {
    SK_WGMMA_128("f16");
}
#undef SK_WGMMA_128
#undef SK_WGMMA_64
#undef SK_WGMMA_32
#undef SK_D8
#endif
#else
using emulation::cluster_barrier;
using emulation::fence_proxy;
using emulation::mbarrier_arrive_expect;
using emulation::mbarrier_init;
using emulation::mbarrier_wait;
using emulation::store_box;
using emulation::store_commit;
using emulation::store_wait_read;
using emulation::wgmma_commit;
using emulation::wgmma_fence;
using emulation::window_address;
inline void mbarrier_init_fence() {}
inline const unsigned char* shared_at(uint32_t address) {
    return emulation::at_window(*emulation::block(), address, 16);
}
inline void mbarrier_arrive_for(uint32_t barrier, unsigned arrivals) {
    emulation::mbarrier_arrive(barrier, arrivals);
}
inline void mbarrier_arrive_at(uint32_t barrier, unsigned rank) {
    emulation::mbarrier_arrive(emulation::mapa(barrier, rank));
}
inline void warpgroup_barrier(int id) {
    emulation::named_barrier(static_cast<unsigned>(id), kWarpgroup);
}
inline void load_box(const CUtensorMap* map, uint32_t to, int col, int row, uint32_t barrier,
                     uint16_t mask) {
    emulation::load_box(map, to, col, row, barrier, mask);
}
inline void load_box(const CUtensorMap* map, uint32_t to, int col, int row, uint32_t barrier) {
    const unsigned rank = emulation::rank_in_cluster(*emulation::block());
    emulation::load_box(map, to, col, row, barrier, 1u << rank);
}
inline void stmatrix_x4(uint32_t row, const uint32_t (&matrices)[4]) {
    const unsigned char* const place = emulation::at_window(*emulation::block(), row, 16);
    emulation::stmatrix(place, false, matrices);
    emulation::wrote_shared(place);
}
template <int kRegisters>
void raise_registers() {
    __syncwarp();
}
template <int kRegisters>
void lower_registers() {
    __syncwarp();
}
template <int kPending>
void wgmma_wait() {
    emulation::wgmma_wait(kPending);
}
template <int kSums>
void keep_order(float (&)[kSums]) {}
template <bool kTransposedA, bool kTransposedB, int kSums, class T>
void wgmma(float (&d)[kSums], uint64_t a, uint64_t b, T) {
    emulation::wgmma(d, a, b, 2 * kSums, kTransposedA, kTransposedB, true,
                     [](uint16_t bits) { return to_float(T{bits}); });
}
#endif

}  // namespace cuda
}  // namespace sk
