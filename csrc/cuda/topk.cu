// y keeps the k entries of largest magnitude of each row of x, the others are zero.
//
// A magnitude's bit pattern is an integer that orders like the magnitude: the k-th largest is found
// by search over integers, a counting pass for each step. A block of threads takes row after row,
// and each search begins where that of the row before ended: similar rows need few steps. A warp
// owns neighbouring entries of the row, in registers where they fit, and compares those of a
// register at once. Among equals the lowest index stays; every NaN counts as the same, larger than
// infinity: "above" is a comparison that is true for NaN, and exact for every other pattern.
#include <cstring>
#include <type_traits>

#include "launch.cuh"

namespace sk {
namespace cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;
// Vectors of 16 bytes that a thread holds of a row.
constexpr int kHeldVectors = 8;
// Warps that a multiprocessor holds of a kernel of at most 64 registers.
constexpr int kResidentWarps = 32;

struct AbsTopkProblem {
    Operand x;
    void* y;
    int64_t rows, cols, k;
    int infinity;  // its bit pattern
    int reach;     // the distance of bit patterns by which the search leaves the last threshold
    int vectors;   // of a thread
    bool wide;     // rows of x and y can be moved 16 bytes at a time
};

// What is done to all magnitudes in a register at once. A bound is a bit pattern for each of them;
// that of -1 is NaN: all are above.
template <class Pair>
struct PackedPair {
    using Bits = uint16_t;
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
__device__ inline uint4 operator~(const uint4& a) { return {~a.x, ~a.y, ~a.z, ~a.w}; }

// All bits of the entries whose magnitude is above a bound.
template <class Packed>
__device__ uint4 mask_above(const uint4& vector, int bound) {
    const uint4 magnitudes = vector & Packed::kMagnitude;
    const uint32_t packed = Packed::bound(bound);
    return {Packed::mask_above(magnitudes.x, packed), Packed::mask_above(magnitudes.y, packed),
            Packed::mask_above(magnitudes.z, packed), Packed::mask_above(magnitudes.w, packed)};
}

// Of the bits that are set in the vectors of a warp, keeps those of the first `stay` entries, and
// counts `stay` down.
template <class Bits>
__device__ void keep_first(uint4& vector, int& stay) {
    constexpr int kBits = 8 * static_cast<int>(sizeof(Bits));
    uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    int own = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) own += __popc(words[j]) / kBits;
    int upto = own;  // those of this lane and of the lanes before it
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const int before = __shfl_up_sync(kAllLanes, upto, distance);
        if (static_cast<int>(threadIdx.x % kWarp) >= distance) upto += before;
    }
    int left = stay - (upto - own);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int shift = 0; shift < 32; shift += kBits) {
            const uint32_t entry = (~0u >> (32 - kBits)) << shift;
            if (words[j] & entry && left-- <= 0) words[j] &= ~entry;
        }
    }
    vector = pack(words);
    stay -= __shfl_sync(kAllLanes, upto, kWarp - 1);
}

// kHeld: all magnitudes of a row stay in registers, and it can be moved 16 bytes at a time.
template <class Packed, bool kHeld>
__global__ void __launch_bounds__(kThreads, 2) abs_topk_kernel(const AbsTopkProblem p) {
    using Bits = typename Packed::Bits;
    constexpr int kStride =
        kWarp * kEntries<Bits>;  // entries from a vector of a thread to its next
    [[maybe_unused]] constexpr int kUnrolled = kHeld ? kHeldVectors : 1;  // in pragmas
    SharedMemory shared;
    Warps warps(shared.take<int>(2 * kWarp));
    const int k = static_cast<int>(p.k), cols = static_cast<int>(p.cols);
    const int vectors = kHeld ? kHeldVectors : p.vectors;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int first = warp * vectors * kStride + lane * kEntries<Bits>;
    const bool wide = kHeld || p.wide;
    int guess = p.infinity / 2;

    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const Bits* const x = static_cast<const Bits*>(p.x.data) + row * p.x.row_stride;
        Bits* const y = static_cast<Bits*>(p.y) + row * p.cols;
        const auto load = [&](int i) {
            return load_entries(x, p.x.col_stride, first + i * kStride, cols, wide);
        };
        uint4 held[kHeldVectors];
        if (kHeld) {
#pragma unroll
            for (int i = 0; i < kHeldVectors; ++i) held[i] = load(i) & Packed::kMagnitude;
        }

        // At least k magnitudes are above `low`, `warp_low` of them in this warp; fewer are above
        // `high`. The zeros past the row's end are above -1 alone, behind all entries.
        int low = -1, warp_low = vectors * kStride;
        int high = p.infinity + 1, warp_high = 0;
        int bound = guess, reach = p.reach;
        bool searching = k < cols;
        while (searching) {
            typename Packed::Count above = Packed::zero();
            int count = 0;
#pragma unroll(kUnrolled)
            for (int i = 0; i < vectors; ++i) {
                const uint4 vector = kHeld ? held[i] : load(i) & Packed::kMagnitude;
                above = Packed::add_above(above, vector, Packed::bound(bound));
                if (kHeld) continue;
                count += Packed::sum(above);
                above = Packed::zero();
            }
            count = __reduce_add_sync(kAllLanes, count + Packed::sum(above));
            const int all = __reduce_add_sync(kAllLanes, warps.share(count));
            const bool enough = all >= k;
            if (enough) {
                low = bound;
                warp_low = count;
            } else {
                high = bound;
                warp_high = count;
            }
            // Farther and farther from the guess, until the threshold is enclosed; then halves.
            const int half = static_cast<int>(static_cast<unsigned>(high - low) / 2);
            const int step = reach < half ? reach : half;
            reach = 2 * step;
            bound -= step;
            if (enough) bound += reach;
            searching = all != k && step > 0;
        }
        guess = low > 0 ? low : 0;

        // What is above `high` stays, and of the ties, which are above `low` only, the first: in
        // this warp all of them, none, or some.
        const int ties = warp_low - warp_high;
        const int high_of_lane = warps.share(warp_high), ties_of_lane = warps.share(ties);
        const int before = high_of_lane + (lane < warp ? ties_of_lane : 0);
        int stay = k - __reduce_add_sync(kAllLanes, before);
        const bool all_ties = stay >= ties;
        const auto mask_above_high = [&](const uint4& vector) {
            return high > p.infinity ? uint4{0, 0, 0, 0} : mask_above<Packed>(vector, high);
        };
#pragma unroll(kUnrolled)
        for (int i = 0; i < vectors; ++i) {
            const uint4 vector = load(i);  // from a cache
            const uint4 kept = all_ties ? mask_above<Packed>(vector, low) : mask_above_high(vector);
            store_entries(y, first + i * kStride, cols, wide, vector & kept);
        }
        // The vectors in which some stay are stored once more.
        for (int i = 0; !all_ties && stay > 0; ++i) {
            const uint4 vector = load(i), kept = mask_above_high(vector);
            uint4 tied = mask_above<Packed>(vector, low) & ~kept;
            keep_first<Bits>(tied, stay);
            store_entries(y, first + i * kStride, cols, wide, vector & (kept | tied));
        }
    }
}

struct AbsTopkBackwardProblem {
    Operand grad_output;
    Operand y;
    void* grad_input;
    int64_t rows, cols;
    bool wide;  // as for AbsTopkProblem
};

template <class Packed>
__global__ void __launch_bounds__(kThreads)
    abs_topk_backward_kernel(const AbsTopkBackwardProblem p) {
    using Bits = typename Packed::Bits;
    constexpr int kInVector = kEntries<Bits>;
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const Bits* const grad_output =
            static_cast<const Bits*>(p.grad_output.data) + row * p.grad_output.row_stride;
        const Bits* const y = static_cast<const Bits*>(p.y.data) + row * p.y.row_stride;
        Bits* const grad_input = static_cast<Bits*>(p.grad_input) + row * p.cols;
        const int cols = static_cast<int>(p.cols);
        for (int first = threadIdx.x * kInVector; first < cols; first += blockDim.x * kInVector) {
            const uint4 grads =
                load_entries(grad_output, p.grad_output.col_stride, first, cols, p.wide);
            const uint4 kept = load_entries(y, p.y.col_stride, first, cols, p.wide);
            store_entries(grad_input, first, cols, p.wide, grads & mask_above<Packed>(kept, 0));
        }
    }
}

std::string describe(const char* name, int64_t rows, int64_t cols) {
    return std::string("the kernel of ") + name + " (" + std::to_string(rows) + " rows of " +
           std::to_string(cols) + ")";
}

template <class Packed>
void launch_abs_topk(AbsTopkProblem p, int64_t held_bytes, const Queue& queue) {
    using Bits = typename Packed::Bits;
    constexpr int64_t kInVectors = kWarp * kEntries<Bits>;  // of a warp
    constexpr auto kBytes = static_cast<int>(sizeof(Bits));
    p.wide = wide_loads(p.x, p.cols, p.cols, kBytes) && reinterpret_cast<uintptr_t>(p.y) % 16 == 0;
    const int64_t warps = std::min<int64_t>(kWarps, ceil_div(p.cols, kHeldVectors * kInVectors));
    p.vectors = static_cast<int>(ceil_div(p.cols, warps * kInVectors));
    const bool held = p.wide && p.vectors <= kHeldVectors && p.cols * kBytes <= held_bytes;
    const int64_t resident = multiprocessors(queue.device) * (kResidentWarps / warps);
    launch(describe("abs_topk", p.rows, p.cols),
           held ? abs_topk_kernel<Packed, true> : abs_topk_kernel<Packed, false>,
           static_cast<unsigned>(std::min(p.rows, resident)), static_cast<unsigned>(warps * kWarp),
           4 * 2 * kWarp, queue, p);
}

template <class Packed>
void launch_backward(AbsTopkBackwardProblem p, const Queue& queue) {
    using Bits = typename Packed::Bits;
    constexpr auto kBytes = static_cast<int>(sizeof(Bits));
    p.wide = wide_loads(p.grad_output, p.cols, p.cols, kBytes) &&
             wide_loads(p.y, p.cols, p.cols, kBytes) &&
             reinterpret_cast<uintptr_t>(p.grad_input) % 16 == 0;
    // A row of few entries gets few threads; a block takes row after row.
    const int64_t warps = ceil_div(p.cols, kWarp * kEntries<Bits>);
    launch(describe("abs_topk_backward", p.rows, p.cols), abs_topk_backward_kernel<Packed>,
           static_cast<unsigned>(std::min(p.rows, 64 * multiprocessors(queue.device))),
           static_cast<unsigned>(std::min<int64_t>(kWarps, warps) * kWarp), 0, queue, p);
}

}  // namespace

void abs_topk(DType dtype, const Operand& x, void* y, int64_t rows, int64_t cols, int64_t k,
              int64_t held_bytes, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    // A search leaves the last threshold by a 128th of its magnitude.
    const auto problem = [&](int infinity, int reach) {
        return AbsTopkProblem{x, y, rows, cols, k, infinity, reach, 1, false};
    };
    switch (dtype) {
        case DType::kFloat32:
            return launch_abs_topk<PackedFloat>(problem(0x7f800000, 1 << 16), held_bytes, queue);
        case DType::kBfloat16:
            return launch_abs_topk<PackedPair<__nv_bfloat162>>(problem(0x7f80, 1), held_bytes,
                                                               queue);
        case DType::kFloat16:
            return launch_abs_topk<PackedPair<__half2>>(problem(0x7c00, 8), held_bytes, queue);
    }
}

void abs_topk_backward(DType dtype, const Operand& grad_output, const Operand& y, void* grad_input,
                       int64_t rows, int64_t cols, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    const AbsTopkBackwardProblem p{grad_output, y, grad_input, rows, cols, false};
    switch (dtype) {
        case DType::kFloat32:
            return launch_backward<PackedFloat>(p, queue);
        case DType::kBfloat16:
            return launch_backward<PackedPair<__nv_bfloat162>>(p, queue);
        case DType::kFloat16:
            return launch_backward<PackedPair<__half2>>(p, queue);
    }
}

}  // namespace cuda
}  // namespace sk
