// y keeps the k entries of largest magnitude of each row of x, the others are zero.
//
// The magnitude's bit pattern is an integer that orders like the magnitude, so the k-th largest is found by
// bisecting over integers: each step counts, in the first-level cache, how many keys reach the middle. That
// takes at most as many steps as a key has bits, whatever the data, and stops as soon as exactly k reach it.
#pragma once

#include <algorithm>
#include <limits>

#include "scratch.h"
#include "simd.h"

namespace sk {
namespace {

template <class T>
struct KeyTraits;
template <>
struct KeyTraits<float> {
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
    using Key = int32_t;
    typedef Key Keys __attribute__((vector_size(kVectorBytes)));
    static Key bits(Bf16 value) { return value.bits; }
    static constexpr Key kInfinity = 0x7f80;
};
template <>
struct KeyTraits<double> {
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
    using Key = typename KeyTraits<T>::Key;
    constexpr int64_t kStep = 4 * kVectorBytes / static_cast<int64_t>(sizeof(Key));
    const int64_t padded = (cols + kStep - 1) / kStep * kStep;
    Arena arena;
    const size_t keys_at = arena.reserve<Key>(threads * padded);
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
            // At least k keys reach `low`, fewer than k reach `high`.
            Key low = 0;
            ++high;
            bool exact = k == cols;
            while (!exact && high - low > 1) {
                const Key middle = low + (high - low) / 2;
                const int64_t count = count_reaching<T>(keys, padded, middle);
                if (count >= k) low = middle;
                else high = middle;
                exact = count == k;
            }
            if (exact) high = low;  // all that reach `low`
            int64_t kept = 0;
            for (int64_t i = 0; i < cols; ++i) {
                out[i] = keys[i] >= high ? from[i] : T{};
                kept += keys[i] >= high;
            }
            for (int64_t i = 0; kept < k; ++i) {  // ties: lowest index first
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
