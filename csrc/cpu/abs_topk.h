// y keeps the k entries of largest magnitude of each row of x, the others are zero.
//
// The magnitude's bit pattern is an integer that orders like the magnitude, so the k-th largest is
// found by bisecting over integers: each step counts, in the first-level cache, how many keys reach
// the middle. That takes a number of steps bounded by a key's bits, whatever the data, and stops as
// soon as exactly k reach it.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "scratch.h"
#include "simd.h"

namespace sk {
namespace {

template <class T>
struct KeyTraits;
template <>
struct KeyTraits<float> {
    using Bits = uint32_t;
    using Key = int32_t;
    typedef Key Keys __attribute__((vector_size(kVectorBytes)));
    static Key bits(float value) {
        Key out;
        std::memcpy(&out, &value, sizeof(out));
        return out;
    }
    static constexpr Key kInfinity = 0x7f800000;
};
template <>
struct KeyTraits<Bf16> {
    using Bits = uint16_t;
    using Key = int32_t;
    typedef Key Keys __attribute__((vector_size(kVectorBytes)));
    static Key bits(Bf16 value) { return value.bits; }
    static constexpr Key kInfinity = 0x7f80;
};
template <>
struct KeyTraits<double> {
    using Bits = uint64_t;
    using Key = int64_t;
    typedef Key Keys __attribute__((vector_size(kVectorBytes)));
    static Key bits(double value) {
        Key out;
        std::memcpy(&out, &value, sizeof(out));
        return out;
    }
    static constexpr Key kInfinity = 0x7ff0000000000000;
};

// Clears the sign; all NaNs become one key above infinity, as torch.topk orders them.
template <class T>
inline typename KeyTraits<T>::Key magnitude_key(T value) {
    using Key = typename KeyTraits<T>::Key;
    constexpr Key kAll = sizeof(T) == 2 ? Key{0x7fff} : std::numeric_limits<Key>::max();
    return std::min<Key>(KeyTraits<T>::bits(value) & kAll, KeyTraits<T>::kInfinity + 1);
}

template <class T>
inline int64_t count_reaching(const typename KeyTraits<T>::Key* keys, int64_t padded,
                              typename KeyTraits<T>::Key threshold) {
    using Key = typename KeyTraits<T>::Key;
    using Keys = typename KeyTraits<T>::Keys;
    constexpr int kN = kVectorBytes / static_cast<int>(sizeof(Key));
    Keys count[4] = {};
    for (int64_t i = 0; i < padded; i += 4 * kN) {
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u) {
            const Keys chunk = *reinterpret_cast<const Keys*>(keys + i + u * kN);
            count[u] -= chunk >= threshold;
        }
    }
    const Keys all = (count[0] + count[1]) + (count[2] + count[3]);
    int64_t sum = 0;
    for (int lane = 0; lane < kN; ++lane) sum += all[lane];
    return sum;
}

// At least k keys reach `low` (low_count of them), fewer than k reach `high` (high_count).
template <class Key>
struct Bracket {
    Key low, high;
    int64_t low_count, high_count;

    void cut(Key middle, int64_t count, int64_t k) {
        if (count >= k) {
            low = middle;
            low_count = count;
        } else {
            high = middle;
            high_count = count;
        }
    }
    bool done(int64_t k) const { return low_count == k || high - low == 1; }
};

template <class T, class Key>
void bisect(const Key* keys, int64_t padded, int64_t k, Bracket<Key>& bracket) {
    while (!bracket.done(k)) {
        const Key middle = bracket.low + (bracket.high - bracket.low) / 2;
        bracket.cut(middle, count_reaching<T>(keys, padded, middle), k);
    }
}

// Of long rows, one step of keys in this many is sampled for a first bracket.
constexpr int64_t kSampleEvery = 16;
constexpr int64_t kSampledCols = 2048;

template <class T, class Key>
void narrow(const Key* keys, Key* sample, int64_t padded, int64_t cols, int64_t k,
            Bracket<Key>& bracket) {
    constexpr int64_t kStep = 4 * kVectorBytes / static_cast<int64_t>(sizeof(Key));
    if (cols >= kSampledCols) {
        int64_t sampled = 0;
        for (int64_t i = 0; i + kStep <= cols; i += kSampleEvery * kStep) {
            std::copy(keys + i, keys + i + kStep, sample + sampled);
            sampled += kStep;
        }
        // Three standard deviations of the sample's rank to either side.
        const double share = static_cast<double>(k) / static_cast<double>(cols);
        const auto margin = static_cast<int64_t>(
            3.0 * std::sqrt(static_cast<double>(sampled) * share * (1.0 - share)) + 1.0);
        const auto rank = static_cast<int64_t>(share * static_cast<double>(sampled));
        for (const int64_t near : {rank - margin, rank + margin}) {
            if (near < 1 || near >= sampled) continue;
            Bracket<Key> guess{0, bracket.high, sampled, 0};
            bisect<T>(sample, sampled, near, guess);
            if (guess.low > bracket.low && guess.low < bracket.high && !bracket.done(k)) {
                bracket.cut(guess.low, count_reaching<T>(keys, padded, guess.low), k);
            }
        }
        // Inside the bracket the keys are spread evenly enough to aim; every third step halves, so
        // that no data can make this long.
        for (int step = 1; !bracket.done(k); ++step) {
            const double aim =
                step % 3 == 0 ? 0.5
                              : static_cast<double>(bracket.low_count - k) /
                                    static_cast<double>(bracket.low_count - bracket.high_count);
            const Key width = bracket.high - bracket.low;
            const auto ahead = static_cast<Key>(aim * static_cast<double>(width));
            const Key middle = bracket.low + std::clamp<Key>(ahead, 1, width - 1);
            bracket.cut(middle, count_reaching<T>(keys, padded, middle), k);
        }
    }
    bisect<T>(keys, padded, k, bracket);
}

// Copies past the caches where the target allows it.
template <class T>
inline void store_row(const T* row, T* to, int64_t cols) {
    constexpr int64_t kPerVector = kVectorBytes / static_cast<int64_t>(sizeof(T));
    int64_t i = 0;
    if (reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
        const float* from = reinterpret_cast<const float*>(row);
        float* target = reinterpret_cast<float*>(to);
        for (; i + kPerVector <= cols; i += kPerVector) {
            stream_user(target, load(from));
            from += kLanes<float>;
            target += kLanes<float>;
        }
    }
    std::copy(row + i, row + cols, to + i);
}

template <class T>
void abs_topk(const T* x, int64_t row_stride, int64_t col_stride, T* y, int64_t rows, int64_t cols,
              int64_t k, int threads) {
    using Bits = typename KeyTraits<T>::Bits;
    using Key = typename KeyTraits<T>::Key;
    constexpr int64_t kStep = 4 * kVectorBytes / static_cast<int64_t>(sizeof(Key));
    const int64_t padded = (cols + kStep - 1) / kStep * kStep;
    Arena arena;
    const size_t keys_at = arena.reserve<Key>(threads * padded);
    const size_t sample_at = arena.reserve<Key>(threads * padded);
    const size_t in_at = arena.reserve<T>(threads * padded);
    const size_t out_at = arena.reserve<T>(threads * padded);
    arena.allocate();
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        Key* keys = arena.at<Key>(keys_at) + thread * padded;
        Key* sample = arena.at<Key>(sample_at) + thread * padded;
        T* in = arena.at<T>(in_at) + thread * padded;
        T* out = arena.at<T>(out_at) + thread * padded;
        std::fill(keys + cols, keys + padded, Key{-1});  // never reaches a threshold
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = x + row * row_stride;
            if (col_stride != 1) {
                for (int64_t i = 0; i < cols; ++i) in[i] = from[i * col_stride];
                from = in;
            }
            Key high = 0;  // the largest key
            for (int64_t i = 0; i < cols; ++i) {
                keys[i] = magnitude_key(from[i]);
                high = std::max(high, keys[i]);
            }
            Bracket<Key> bracket{0, high + 1, cols, 0};
            if (k < cols) narrow<T>(keys, sample, padded, cols, k, bracket);
            // Exactly k reach `low`, or fewer do reach `high` and ties at `low` fill up.
            const Key low = bracket.low;
            high = bracket.low_count == k ? low : bracket.high;
            for (int64_t i = 0; i < cols; ++i) {
                // Without a branch, and as bits, so that it becomes vector code for every type.
                const auto mask = static_cast<Bits>(-static_cast<Bits>(keys[i] >= high));
                Bits bits;
                std::memcpy(&bits, from + i, sizeof(bits));
                bits &= mask;
                std::memcpy(out + i, &bits, sizeof(bits));
            }
            const int64_t kept_high = bracket.low_count == k ? k : bracket.high_count;
            for (int64_t i = 0, kept = kept_high; kept < k; ++i) {  // ties: lowest index first
                if (keys[i] == low) {
                    out[i] = from[i];
                    ++kept;
                }
            }
            store_row(out, y + row * cols, cols);
        }
#if defined(__AVX512F__)
        _mm_sfence();
#endif
    }
}

}  // namespace
}  // namespace sk
