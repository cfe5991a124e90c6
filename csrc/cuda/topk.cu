// y keeps the k entries of largest magnitude of each row of x, the others are zero.
//
// A magnitude's bit pattern is an integer that orders like the magnitude: the k-th largest is found
// by search over integers, a counting pass for each step. A block of threads takes row after row,
// and each search begins where that of the row before ended: similar rows need few steps. A warp
// owns neighbouring entries of the row, in registers where they fit, and compares those of a
// register at once. Among equals the lowest index stays; every NaN counts as the same, larger than
// infinity: "above" is a comparison that is true for NaN, and exact for every other pattern.
//
// Where GELU or RMSNorm comes before, a thread holds the magnitudes of what it makes of its
// entries; signs follow from x. Where it does not hold them it writes them to y and continues
// there: it alone reads and writes these.
#include "topk.cuh"

namespace sk {
namespace cuda {
namespace {

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
    Before before;
};

// What a row becomes before its entries are chosen, and the signs of that.
struct Unchanged {
    // Vectors of 16 bytes that a thread holds of a row.
    static constexpr int kHeldVectors = 8;
    template <class Packed, int kCount>
    __device__ static void apply(const AbsTopkProblem&, int, bool, float, float (&)[kCount]) {}
    template <class Packed>
    __device__ static uint4 signs(const AbsTopkProblem&, int, bool, const uint4& x) {
        return x & ~Packed::kMagnitude;
    }
};
struct Gelu : Unchanged {
    template <class Packed, int kCount>
    __device__ static void apply(const AbsTopkProblem&, int, bool, float,
                                 float (&numbers)[kCount]) {
#pragma unroll
        for (float& number : numbers) number *= Normal(number).below;
    }
};
struct Norm {
    static constexpr int kHeldVectors = 4;  // as many as there are registers for
    template <class Packed>
    __device__ static uint4 weights(const AbsTopkProblem& p, int first, bool wide) {
        using Bits = typename Packed::Bits;
        const auto cols = static_cast<int>(p.cols);
        return load_entries(static_cast<const Bits*>(p.before.weight), 1, first, cols, wide);
    }
    template <class Packed, int kCount>
    __device__ static void apply(const AbsTopkProblem& p, int first, bool wide, float scale,
                                 float (&numbers)[kCount]) {
        float factors[kCount];
        unpack(weights<Packed>(p, first, wide), factors, typename Packed::Number{});
#pragma unroll
        for (int e = 0; e < kCount; ++e) numbers[e] = numbers[e] * scale * factors[e];
    }
    template <class Packed>
    __device__ static uint4 signs(const AbsTopkProblem& p, int first, bool wide, const uint4& x) {
        return (x ^ weights<Packed>(p, first, wide)) & ~Packed::kMagnitude;
    }
};

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
template <class Packed, bool kHeld, class Change>
__global__ void __launch_bounds__(kThreads, 2) abs_topk_kernel(const AbsTopkProblem p) {
    using Bits = typename Packed::Bits;
    using Number = typename Packed::Number;
    constexpr int kHeldVectors = Change::kHeldVectors;
    constexpr bool kChanges = !std::is_same<Change, Unchanged>::value;
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
        const auto at = [&](int i) { return first + i * kStride; };
        const auto load_x = [&](int i) {
            return load_entries(x, p.x.col_stride, at(i), cols, wide);
        };
        float scale = 0.0f;
        const auto change = [&](int i, const uint4& vector) {
            if (!kChanges || at(i) >= cols) return vector;
            float numbers[kEntries<Bits>];
            unpack(vector, numbers, Number{});
            Change::template apply<Packed>(p, at(i), wide, scale, numbers);
            return pack_numbers(numbers, Number{});
        };
        uint4 held[kHeldVectors];
        if constexpr (std::is_same<Change, Norm>::value) {
            // The same sum whether the row is held or not.
            const int summed = kHeld || vectors < kHeldVectors ? kHeldVectors : vectors;
            float sum = 0.0f, numbers[kEntries<Bits>];
#pragma unroll(kUnrolled)
            for (int i = 0; i < summed; ++i) {
                const int summand = (warp * summed + i) * kStride + lane * kEntries<Bits>;
                const uint4 vector = load_entries(x, p.x.col_stride, summand, cols, wide);
                unpack(vector, numbers, Number{});
#pragma unroll
                for (const float number : numbers) sum = fmaf(number, number, sum);
                if (kHeld) held[i] = vector;
            }
            const float mean = __fdividef(sum_threads(sum, warps), static_cast<float>(cols));
            scale = rsqrtf(mean + p.before.eps);
            if (threadIdx.x == 0) p.before.scales[row] = scale;
        }
        if constexpr (kHeld) {
            const bool is_loaded = std::is_same<Change, Norm>::value;
#pragma unroll
            for (int i = 0; i < kHeldVectors; ++i) {
                held[i] = change(i, is_loaded ? held[i] : load_x(i)) & Packed::kMagnitude;
            }
        } else if constexpr (kChanges) {
            for (int i = 0; i < vectors; ++i) {
                store_entries(y, at(i), cols, wide, change(i, load_x(i)));
            }
        }
        // A vector of what the row became.
        const auto load = [&](int i) {
            return kChanges ? load_entries(y, 1, at(i), cols, wide) : load_x(i);
        };

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
            const uint4 vector = kChanges && kHeld ? held[i] | Change::template signs<Packed>(
                                                                   p, at(i), wide, load_x(i))
                                                   : load(i);  // from a cache
            const uint4 kept = all_ties ? mask_above<Packed>(vector, low) : mask_above_high(vector);
            store_entries(y, at(i), cols, wide, vector & kept);
        }
        // The vectors in which some stay are stored once more.
        for (int i = 0; !all_ties && stay > 0; ++i) {
            const uint4 vector = change(i, load_x(i)), kept = mask_above_high(vector);
            uint4 tied = mask_above<Packed>(vector, low) & ~kept;
            keep_first<Bits>(tied, stay);
            store_entries(y, at(i), cols, wide, vector & (kept | tied));
        }
    }
}

template <class Packed, class Change>
void launch_changed(const char* name, AbsTopkProblem p, int64_t held_bytes, const Queue& queue) {
    using Bits = typename Packed::Bits;
    constexpr int kHeldVectors = Change::kHeldVectors;
    constexpr int64_t kInVectors = kWarp * kEntries<Bits>;  // of a warp
    constexpr auto kBytes = static_cast<int>(sizeof(Bits));
    p.wide = wide_loads(p.x, p.cols, p.cols, kBytes) &&
             reinterpret_cast<uintptr_t>(p.y) % 16 == 0 &&
             reinterpret_cast<uintptr_t>(p.before.weight) % 16 == 0;
    const int64_t warps = std::min<int64_t>(kWarps, ceil_div(p.cols, kHeldVectors * kInVectors));
    p.vectors = static_cast<int>(ceil_div(p.cols, warps * kInVectors));
    const bool held = p.wide && p.vectors <= kHeldVectors && p.cols * kBytes <= held_bytes;
    const int64_t resident = multiprocessors(queue.device) * (kResidentWarps / warps);
    launch(describe(name, p.rows, p.cols),
           held ? abs_topk_kernel<Packed, true, Change> : abs_topk_kernel<Packed, false, Change>,
           static_cast<unsigned>(std::min(p.rows, resident)), static_cast<unsigned>(warps * kWarp),
           4 * 2 * kWarp, queue, p);
}

template <class Packed>
void launch_abs_topk(const AbsTopkProblem& p, int64_t held_bytes, const Queue& queue) {
    switch (p.before.kind) {
        case Before::kNothing:
            return launch_changed<Packed, Unchanged>("abs_topk", p, held_bytes, queue);
        case Before::kGelu:
            return launch_changed<Packed, Gelu>("gelu_abs_topk", p, held_bytes, queue);
        case Before::kNorm:
            return launch_changed<Packed, Norm>("norm_abs_topk", p, held_bytes, queue);
    }
}

}  // namespace

void abs_topk(DType dtype, const Before& before, const Operand& x, void* y, int64_t rows,
              int64_t cols, int64_t k, int64_t held_bytes, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    // A search leaves the last threshold by a 128th of its magnitude.
    const auto problem = [&](int infinity, int reach) {
        return AbsTopkProblem{x, y, rows, cols, k, infinity, reach, 1, false, before};
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

}  // namespace cuda
}  // namespace sk
