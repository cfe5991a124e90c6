// What the kernels share on the device: element types, tiles of tokens in shared memory.
//
// Kernels and launchers are ordinary C++ but for launch_kernel and SharedMemory, so that the tests
// compile the same source for the CPU (SK_EMULATION) and run it under sanitizers.
#pragma once

#ifdef SK_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

// Threads of a block: with a tile that fills most of a multiprocessor's shared memory, one block is
// all that it can hold.
#ifndef SK_THREADS
#define SK_THREADS 512
#endif

namespace sk {
namespace cuda {

constexpr int kThreads = SK_THREADS;
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef SK_EMULATION
// Hands out the dynamic shared memory of the block piece by piece, each aligned to 16 bytes.
class SharedMemory {
public:
    __device__ SharedMemory() {
        extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];
        next_ = dynamic_shared_memory;
    }
    template <class T>
    __device__ T* take(int count) {
        T* piece = reinterpret_cast<T*>(next_);
        next_ += (count * sizeof(T) + 15) / 16 * 16;
        return piece;
    }

private:
    unsigned char* next_;
};
#endif

struct Bf16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bf16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ inline float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounded to the nearest, ties to even.
template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
    return value;
}
template <>
__device__ inline Bf16 from_float<Bf16>(float value) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Half from_float<Half>(float value) {
    return {__half_as_ushort(__float2half_rn(value))};
}

// Two numbers, rounded, the first in the lower half.
#ifndef SK_EMULATION
__device__ inline uint32_t pack_pair(float low, float high, Bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ inline uint32_t pack_pair(float low, float high, Half) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
#else
template <class T>
uint32_t pack_pair(float low, float high, T) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
#endif

// Tokens in a vector of 16 bytes, what a thread reads from shared memory at once.
template <class T>
constexpr int kTokens = 16 / static_cast<int>(sizeof(T));

// load_matrices (mma.cuh) loads multiples of that many features.
constexpr int kMatrixFeatures = 64;

// The tokens of a vector, widened.
__device__ inline void unpack(const uint4& vector, float (&out)[4], float) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(words[i]);
}
template <class T>
__device__ void unpack(const uint4& vector, float (&out)[8], T) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = to_float(T{static_cast<uint16_t>(words[i])});
        out[2 * i + 1] = to_float(T{static_cast<uint16_t>(words[i] >> 16)});
    }
}

// 16 bytes at an address that is a multiple of 16.
__device__ inline uint4 load_vector(const void* from) {
#ifdef SK_EMULATION
    emulation::check_alignment(from, sizeof(uint4));
#endif
    return *static_cast<const uint4*>(from);
}
__device__ inline void store_vector(void* to, const uint4& vector) {
#ifdef SK_EMULATION
    emulation::check_alignment(to, sizeof(uint4));
#endif
    *static_cast<uint4*>(to) = vector;
}

__device__ inline uint4 pack(const uint32_t (&bits)[4]) {
    return {bits[0], bits[1], bits[2], bits[3]};
}
__device__ inline uint4 pack(const uint16_t (&bits)[8]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        words[i] = bits[2 * i] | static_cast<uint32_t>(bits[2 * i + 1]) << 16;
    }
    return pack(words);
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<2> {
    using Type = uint16_t;
};
template <>
struct BitsOf<4> {
    using Type = uint32_t;
};

// A tile is feature-major: each feature owns 1 << log_vectors (1 to 8) neighbouring vectors, and
// its vector v lies at tile_base ^ v. The higher bits of a place turn the lowest three, which name
// the banks: whoever reads all vectors of a feature meets every bank once, and so does whoever
// writes one vector of eight features that are neighbours, or that begin neighbouring 16 bytes.
__host__ __device__ inline unsigned tile_base(unsigned feature, int log_vectors) {
    const unsigned place = feature << log_vectors;
    return place ^ ((place >> 3 ^ place >> 6) & 7u);
}

// Vectors that a tile of that many features needs: they are turned within groups of eight.
__host__ __device__ inline int tile_vectors(int features, int log_vectors) {
    return ((features << log_vectors) + 7) & ~7;
}

// Column j of kCount tokens of kCount features each: the tokens of feature j.
__device__ inline uint4 column(const uint4 (&rows)[4], int j) {
    uint32_t words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const uint32_t of_row[4] = {rows[t].x, rows[t].y, rows[t].z, rows[t].w};
        words[t] = of_row[j];
    }
    return pack(words);
}
__device__ inline uint4 column(const uint4 (&rows)[8], int j) {
    uint32_t words[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        const uint32_t lower[4] = {rows[2 * t].x, rows[2 * t].y, rows[2 * t].z, rows[2 * t].w};
        const uint32_t upper[4] = {rows[2 * t + 1].x, rows[2 * t + 1].y, rows[2 * t + 1].z,
                                   rows[2 * t + 1].w};
        const uint32_t a = lower[j / 2], b = upper[j / 2];
        words[t] = j % 2 ? a >> 16 | (b & 0xffff0000u) : (a & 0xffffu) | b << 16;
    }
    return pack(words);
}

// Fills a tile with `features` features of the tokens at `first` (element (0, 0) of the tile) on;
// from `tokens` on they are zero. `wide` promises that 16 bytes can be read at a time: features lie
// side by side, their number, the rows' distance and `first` are multiples of 16 bytes. All threads
// of the block call it; barriers are the caller's.
template <class T>
__device__ void load_tile(uint4* tile, int log_vectors, const T* first, int64_t row_stride,
                          int64_t col_stride, int64_t tokens, int features, bool wide) {
    using Bits = typename BitsOf<sizeof(T)>::Type;
    const Bits* const source = reinterpret_cast<const Bits*>(first);
    // Neighbouring threads take neighbouring features, which usually are neighbours in memory.
    if (wide) {
        const int pieces = features / kTokens<T>;
        const unsigned count = static_cast<unsigned>(pieces) << log_vectors;
        for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
            const int vector = static_cast<int>(i / pieces);
            const int feature = (static_cast<int>(i) - vector * pieces) * kTokens<T>;
            const Bits* from = source + vector * kTokens<T> * row_stride + feature;
            uint4 rows[kTokens<T>];
#pragma unroll
            for (int t = 0; t < kTokens<T>; ++t, from += row_stride) {
                rows[t] = vector * kTokens<T> + t < tokens ? load_vector(from) : uint4{0, 0, 0, 0};
            }
#pragma unroll
            for (int j = 0; j < kTokens<T>; ++j) {
                tile[tile_base(feature + j, log_vectors) ^ vector] = column(rows, j);
            }
        }
        return;
    }
    const unsigned count = static_cast<unsigned>(features) << log_vectors;
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
        const int vector = static_cast<int>(i / features);
        const int feature = static_cast<int>(i) - vector * features;
        const Bits* from = source + vector * kTokens<T> * row_stride + feature * col_stride;
        Bits bits[kTokens<T>];
#pragma unroll
        for (int t = 0; t < kTokens<T>; ++t, from += row_stride) {
            bits[t] = vector * kTokens<T> + t < tokens ? *from : Bits{0};
        }
        tile[tile_base(feature, log_vectors) ^ vector] = pack(bits);
    }
}

// First position in [begin, end) of an ascending list whose column is not below `bound`, or end.
template <class Index>
__device__ int64_t lower_bound(const Index* columns, int64_t begin, int64_t end, int64_t bound) {
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (static_cast<int64_t>(columns[middle]) < bound) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// The blocks [begin, end) of a row that lie in a slice of `slice_cols` block-columns.
struct Range {
    int64_t begin, end;
};
template <class Index>
__device__ Range blocks_in_slice(const int64_t* offsets, int64_t per_row, const Index* columns,
                                 int64_t row, int64_t slice, int64_t slices, int64_t slice_cols) {
    int64_t begin = offsets ? offsets[row] : row * per_row;
    int64_t end = offsets ? offsets[row + 1] : begin + per_row;
    if (slices > 1) {
        begin = lower_bound(columns, begin, end, slice * slice_cols);
        end = lower_bound(columns, begin, end, (slice + 1) * slice_cols);
    }
    return {begin, end};
}

}  // namespace cuda
}  // namespace sk
