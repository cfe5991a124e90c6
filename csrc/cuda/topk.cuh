// What the kernels of abs_topk and of its derivatives share: rows of magnitudes, compared several
// at once, and numbers that the warps of a block show to each other.
#pragma once

#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace sk {
namespace cuda {

constexpr int kWarps = kThreads / kWarp;

// What is done to all magnitudes in a register at once. A bound is a bit pattern for each of them;
// that of -1 is NaN: all are above.
template <class Pair>
struct PackedPair {
    using Bits = uint16_t;
    using Number = std::conditional_t<std::is_same<Pair, __half2>::value, Half, Bf16>;
    static constexpr uint32_t kMagnitude = 0x7fff7fffu;
    // Two numbers of which 1 is the last bit: their low bytes count from 0 to 127.
    using Count = Pair;
    static __device__ Count zero() {
        return pair(std::is_same<Pair, __half2>::value ? 0x64006400u : 0x43004300u);
    }
    static __device__ int sum(Count count) {
        uint32_t word;
        memcpy(&word, &count, sizeof(word));
        return static_cast<int>(__dp4a(word, 0x00010001u, 0u));
    }
    static __device__ Pair pair(uint32_t word) {
        Pair value;
        memcpy(&value, &word, sizeof(value));
        return value;
    }
    static __device__ uint32_t bound(int pattern) {
        return static_cast<uint32_t>(pattern) * 0x10001u;
    }
    static __device__ Count add_above(Count count, const uint4& vector, uint32_t bound) {
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            count = __hadd2(count, __hgtu2(pair(words[j]), pair(bound)));
        }
        return count;
    }
    static __device__ uint32_t mask_above(uint32_t word, uint32_t bound) {
        return __hgtu2_mask(pair(word), pair(bound));
    }
};
struct PackedFloat {
    using Bits = uint32_t;
    using Number = float;
    static constexpr uint32_t kMagnitude = 0x7fffffffu;
    using Count = int;
    static __device__ uint32_t bound(int pattern) { return static_cast<uint32_t>(pattern); }
    static __device__ bool above(uint32_t word, uint32_t bound) {
        return !(__uint_as_float(word) <= __uint_as_float(bound));
    }
    static __device__ Count add_above(Count count, const uint4& vector, uint32_t bound) {
        return count + above(vector.x, bound) + above(vector.y, bound) + above(vector.z, bound) +
               above(vector.w, bound);
    }
    static __device__ uint32_t mask_above(uint32_t word, uint32_t bound) {
        return above(word, bound) ? ~0u : 0u;
    }
    static __device__ Count zero() { return 0; }
    static __device__ int sum(Count count) { return count; }
};

template <class Bits>
constexpr int kEntries = 16 / static_cast<int>(sizeof(Bits));  // of a vector

// The entries at `first` of a row on; those past its end are zero.
template <class Bits>
__device__ uint4 load_entries(const Bits* row, int64_t stride, int first, int cols, bool wide) {
    if (first >= cols) return {0, 0, 0, 0};
    if (wide) return load_vector(row + first);
    Bits bits[kEntries<Bits>];
#pragma unroll
    for (int e = 0; e < kEntries<Bits>; ++e) {
        bits[e] = first + e < cols ? row[(first + e) * stride] : Bits{0};
    }
    return pack(bits);
}

template <class Bits>
__device__ void store_entries(Bits* row, int first, int cols, bool wide, const uint4& vector) {
    if (first >= cols) return;
    if (wide) return store_vector(row + first, vector);
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int e = 0; e < kEntries<Bits>; ++e) {
        constexpr int kInWord = 4 / static_cast<int>(sizeof(Bits));
        if (first + e >= cols) return;
        row[first + e] = static_cast<Bits>(words[e / kInWord] >> e % kInWord * 16);
    }
}

// Shows each lane of a warp the number of a warp of the block, its own at the lane of its place.
class Warps {
public:
    // `numbers` is for two of each warp that a block may have: 2 * kWarp.
    __device__ explicit Warps(int* numbers) : of_lane_(numbers + threadIdx.x % kWarp) {
        const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
        mine_ = lane == warp;
        if (warp == 0) numbers[lane] = numbers[lane + kWarp] = 0;  // for warps that do not exist
        __syncthreads();
    }
    // 0 in lanes beyond the warps.
    __device__ int share(int number) {
        if (mine_) *of_lane_ = number;
        __syncthreads();
        number = *of_lane_;
        of_lane_ += turn_;  // so that the next numbers need no barrier before them
        turn_ = -turn_;
        return number;
    }

private:
    int* of_lane_;
    int turn_ = kWarp;
    bool mine_;
};

__device__ inline uint4 operator&(const uint4& a, const uint4& b) {
    return {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w};
}
__device__ inline uint4 operator&(const uint4& a, uint32_t b) { return a & uint4{b, b, b, b}; }
__device__ inline uint4 operator|(const uint4& a, const uint4& b) {
    return {a.x | b.x, a.y | b.y, a.z | b.z, a.w | b.w};
}
__device__ inline uint4 operator^(const uint4& a, const uint4& b) {
    return {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
}
__device__ inline uint4 operator~(const uint4& a) { return {~a.x, ~a.y, ~a.z, ~a.w}; }

// All bits of the entries whose magnitude is above a bound.
template <class Packed>
__device__ uint4 mask_above(const uint4& vector, int bound) {
    const uint4 magnitudes = vector & Packed::kMagnitude;
    const uint32_t packed = Packed::bound(bound);
    return {Packed::mask_above(magnitudes.x, packed), Packed::mask_above(magnitudes.y, packed),
            Packed::mask_above(magnitudes.z, packed), Packed::mask_above(magnitudes.w, packed)};
}

// Numbers of a vector, and back, rounded.
template <class T>
__device__ uint4 pack_numbers(const float (&numbers)[8], T) {
    return {pack_pair(numbers[0], numbers[1], T{}), pack_pair(numbers[2], numbers[3], T{}),
            pack_pair(numbers[4], numbers[5], T{}), pack_pair(numbers[6], numbers[7], T{})};
}
__device__ inline uint4 pack_numbers(const float (&numbers)[4], float) {
    return {__float_as_uint(numbers[0]), __float_as_uint(numbers[1]), __float_as_uint(numbers[2]),
            __float_as_uint(numbers[3])};
}

// The sum over the block's threads, in a fixed order; all of them get it.
__device__ inline float sum_lanes(float number) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        number += __shfl_xor_sync(kAllLanes, number, distance);
    }
    return number;
}
__device__ inline float sum_threads(float number, Warps& warps) {
    const int bits = static_cast<int>(__float_as_uint(sum_lanes(number)));
    return sum_lanes(__uint_as_float(static_cast<uint32_t>(warps.share(bits))));
}

// 1 / x and 2^x to a few units in the last place; denormal results are 0.
#ifndef SK_EMULATION
__device__ inline float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ inline float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
#else
inline float reciprocal(float x) { return 1.0f / x; }
inline float power_of_two(float x) { return std::exp2(x); }
#endif

// P(X <= x) of the standard normal distribution, and exp(-x^2 / 2). As on the CPU: erf by
// Abramowitz and Stegun 7.1.26, to 1.5e-7.
struct Normal {
    float below, bell;
    __device__ explicit Normal(float x) {
        const float t = reciprocal(fmaf(fabsf(x), 0.3275911f * 0.707106781f, 1.0f));
        bell = power_of_two(x * x * (-0.5f * 1.44269504f));
        float p = fmaf(0.5f * 1.061405429f, t, 0.5f * -1.453152027f);
        p = fmaf(p, t, 0.5f * 1.421413741f);
        p = fmaf(p, t, 0.5f * -0.284496736f);
        p = fmaf(p, t, 0.5f * 0.254829592f);
        const float tail = p * t * bell;
        below = x < 0.0f ? tail : 1.0f - tail;
    }
};

inline std::string describe(const char* name, int64_t rows, int64_t cols) {
    return std::string("the kernel of ") + name + " (" + std::to_string(rows) + " rows of " +
           std::to_string(cols) + ")";
}

}  // namespace cuda
}  // namespace sk
