// y keeps the k entries of largest magnitude of each row of x, the others are zero.
//
// The magnitude's bit pattern is an integer that orders like the magnitude, so the k-th largest is
// found by searching integers, 16 bits at a time from the top (a radix select): a row's leading
// digits are few enough bytes for the first-level cache, where a step of the search counts how many
// reach a middle. The few entries that share the threshold's digit are sorted, or go on to the next
// digit. The number of steps is bounded by a key's bits, whatever the data.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "kept.h"
#include "scratch.h"

namespace sk {
namespace {

template <class T>
struct KeyTraits;
template <>
struct KeyTraits<Bf16> {
    using Bits = uint16_t;
    static constexpr Bits kInfinity = 0x7f80;
};
template <>
struct KeyTraits<float> {
    using Bits = uint32_t;
    static constexpr Bits kInfinity = 0x7f800000;
};
template <>
struct KeyTraits<double> {
    using Bits = uint64_t;
    static constexpr Bits kInfinity = 0x7ff0000000000000;
};
template <class T>
using Bits = typename KeyTraits<T>::Bits;

template <class T>
inline Bits<T> bits_of(T value) {
    Bits<T> out;
    std::memcpy(&out, &value, sizeof(out));
    return out;
}

// Without the sign.
template <class T>
constexpr Bits<T> kMagnitude = std::numeric_limits<Bits<T>>::max() >> 1;
template <class T>
constexpr int kKeyBits = 8 * static_cast<int>(sizeof(T));

// A digit of a key, stored so that it orders as int16 does.
using Digit = int16_t;
typedef Digit Digits __attribute__((vector_size(kVectorBytes)));
constexpr int64_t kDigitStep = 4 * kVectorBytes / static_cast<int64_t>(sizeof(Digit));
// Padding: not above any digit, and what reaches the lowest digit is never counted.
constexpr Digit kNoDigit = std::numeric_limits<Digit>::min();

inline int64_t padded_digits(int64_t count) {
    return (count + kDigitStep - 1) / kDigitStep * kDigitStep;
}

inline int64_t count_reaching(const Digit* digits, int64_t padded, Digit threshold) {
#if defined(__AVX512BW__)
    const __m512i least = _mm512_set1_epi16(threshold);
    int64_t count[4] = {};
    for (int64_t i = 0; i < padded; i += kDigitStep) {
        SK_UNROLL
        for (int u = 0; u < 4; ++u) {
            const __m512i chunk = _mm512_loadu_si512(digits + i + u * kDigitStep / 4);
            count[u] += __builtin_popcount(_mm512_cmpge_epi16_mask(chunk, least));
        }
    }
    return (count[0] + count[1]) + (count[2] + count[3]);
#else
    // A lane must not count further than it can, all four vectors together.
    constexpr int64_t kAtOnce = std::numeric_limits<Digit>::max() / 4 * kDigitStep;
    int64_t sum = 0;
    for (int64_t begin = 0; begin < padded; begin += kAtOnce) {
        const int64_t end = std::min(padded, begin + kAtOnce);
        Digits count[4] = {};
        for (int64_t i = begin; i < end; i += kDigitStep) {
            SK_UNROLL
            for (int u = 0; u < 4; ++u) {
                Digits chunk;
                std::memcpy(&chunk, digits + i + u * kDigitStep / 4, sizeof(chunk));
                count[u] -= chunk >= threshold;
            }
        }
        const Digits all = (count[0] + count[1]) + (count[2] + count[3]);
        int lanes = 0;
        for (int lane = 0; lane < kDigitStep / 4; ++lane) lanes += all[lane];
        sum += lanes;
    }
    return sum;
#endif
}

// At least k digits reach `low` (low_count of them), fewer than k reach `high` (high_count).
struct Bracket {
    int low, high;
    int64_t low_count, high_count;

    void cut(int middle, int64_t count, int64_t k) {
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

inline Digit largest(const Digit* digits, int64_t padded) {
    Digits most = Digits{} + kNoDigit;
    for (int64_t i = 0; i < padded; i += kDigitStep / 4) {
        Digits chunk;
        std::memcpy(&chunk, digits + i, sizeof(chunk));
        most = chunk > most ? chunk : most;
    }
    Digit lanes[kDigitStep / 4];
    std::memcpy(lanes, &most, sizeof(lanes));
    return *std::max_element(lanes, lanes + kDigitStep / 4);
}

// Finds the digit of the k-th largest of `count` digits, padded to a whole step, from `lowest` to
// `highest`. The closer it is to `guess`, the sooner: rows of a matrix are often alike.
inline Bracket search(const Digit* digits, int64_t count, int64_t k, int lowest, int highest,
                      int guess) {
    const int64_t padded = padded_digits(count);
    Bracket bracket{lowest, highest + 1, count, 0};
    const auto cut = [&](int middle) {
        middle = std::clamp(middle, bracket.low + 1, bracket.high - 1);
        bracket.cut(middle, count_reaching(digits, padded, static_cast<Digit>(middle)), k);
    };
    // Away from the guess in strides that double, until the digit is between two of them.
    for (int stride = 4; !bracket.done(k); stride *= 2) {
        const bool is_above = bracket.low > lowest, is_below = bracket.high <= highest;
        if (is_above && is_below) break;
        cut(is_above ? bracket.low + stride : is_below ? bracket.high - stride : guess);
    }
    // In between the digits are spread evenly enough to aim; every third step halves, so that no
    // data can make this long.
    for (int step = 1; !bracket.done(k); ++step) {
        const double aim = step % 3 == 0
                               ? 0.5
                               : static_cast<double>(bracket.low_count - k) /
                                     static_cast<double>(bracket.low_count - bracket.high_count);
        cut(bracket.low + static_cast<int>(std::lround(aim * (bracket.high - bracket.low))));
    }
    return bracket;
}

// The places of the digits that equal `chosen`, in order; returns how many.
inline int64_t find_equal(const Digit* digits, int64_t count, Digit chosen, int32_t* places) {
    constexpr int64_t kN = kDigitStep / 4;
    int64_t found = 0;
    for (int64_t begin = 0; begin < count; begin += kN) {
        Digits chunk;
        std::memcpy(&chunk, digits + begin, sizeof(chunk));
        if (any(chunk == chosen)) {
            for (int64_t i = begin; i < std::min(begin + kN, count); ++i) {
                places[found] = static_cast<int32_t>(i);
                found += digits[i] == chosen;
            }
        }
    }
    return found;
}

// What of a row stays: keys from `high` on, and of those from `low` on the first `ties`.
template <class T>
struct Threshold {
    Bits<T> low, high;
    int64_t ties;
};

// Working memory of a thread, for rows of `cols`.
template <class T>
struct TopkBuffers {
    Digit* digits;
    int* guess;       // the leading digit of the last threshold
    int32_t* places;  // where the candidates are
    T* row;           // the row as it is selected from, if that is not the user's
    T* ordered;       // a copy of the row with one NaN
};

// Puts the leading digits, and after them padding, into `buffers`; returns the largest.
template <class T>
Digit leading_digits(const T* row, int64_t cols, const TopkBuffers<T>& buffers) {
    const int64_t padded = padded_digits(cols);
    for (int64_t i = 0; i < cols; ++i) {
        buffers.digits[i] =
            static_cast<Digit>((bits_of(row[i]) & kMagnitude<T>) >> (kKeyBits<T> - 16));
    }
    std::fill(buffers.digits + cols, buffers.digits + padded, kNoDigit);
    return largest(buffers.digits, padded);
}

// So few candidates are sorted.
constexpr int64_t kFew = 16;

// The threshold that `left` of the candidates reach.
template <class T>
Threshold<T> threshold_of_few(const T* row, int64_t candidates, int64_t left,
                              const int32_t* places) {
    Bits<T> sorted[kFew];
    for (int64_t i = 0; i < candidates; ++i) {
        const Bits<T> key = bits_of(row[places[i]]) & kMagnitude<T>;
        int64_t at = i;
        for (; at > 0 && sorted[at - 1] < key; --at) sorted[at] = sorted[at - 1];
        sorted[at] = key;
    }
    const Bits<T> low = sorted[left - 1];
    if (left == candidates || sorted[left] < low) return {low, low, 0};
    const auto equal = std::find(sorted, sorted + left, low);
    return {low, static_cast<Bits<T>>(low + 1), sorted + left - equal};
}

// The threshold of a row whose leading digits are in `buffers`.
template <class T>
Threshold<T> find_threshold(const T* row, int64_t cols, int64_t k, Digit highest,
                            const TopkBuffers<T>& buffers) {
    Digit* const digits = buffers.digits;
    int shift = kKeyBits<T> - 16;
    int64_t left = k;  // to be kept among the candidates, which share the prefix
    int64_t candidates = cols;
    Bracket bracket = search(digits, cols, k, 0, highest, *buffers.guess);
    *buffers.guess = bracket.low;
    auto prefix = static_cast<Bits<T>>(bracket.low);
    while (bracket.low_count != left && shift > 0) {
        left -= bracket.high_count;
        const auto chosen = static_cast<Digit>(bracket.low);
        if (shift == kKeyBits<T> - 16) {
            candidates = find_equal(digits, cols, chosen, buffers.places);
        } else {
            int64_t kept = 0;
            for (int64_t i = 0; i < candidates; ++i) {
                buffers.places[kept] = buffers.places[i];
                kept += digits[i] == chosen;
            }
            candidates = kept;
        }
        if (candidates <= kFew) return threshold_of_few(row, candidates, left, buffers.places);
        // Digits of all 16 bits: turned so that they order as signed ones.
        shift -= 16;
        constexpr int kTurn = 0x8000;
        for (int64_t i = 0; i < candidates; ++i) {
            const auto digit = static_cast<uint16_t>(bits_of(row[buffers.places[i]]) >> shift);
            digits[i] = static_cast<Digit>(digit - kTurn);
        }
        std::fill(digits + candidates, digits + padded_digits(candidates), kNoDigit);
        bracket = search(digits, candidates, left, kNoDigit, std::numeric_limits<Digit>::max(), 0);
        prefix = static_cast<Bits<T>>((uint64_t{prefix} << 16) |
                                      static_cast<uint64_t>(bracket.low + kTurn));
    }
    const auto low = static_cast<Bits<T>>(prefix << shift);
    if (bracket.low_count == left) return {low, low, 0};
    return {low, static_cast<Bits<T>>(low + 1), left - bracket.high_count};
}

// to[i] = values[i] where the key reaches the threshold, else 0; past the caches if `stream`.
template <class T>
void keep_reaching(const T* keys, const T* values, Bits<T> threshold, int64_t count, T* to,
                   bool stream) {
    typedef Bits<T> Lanes __attribute__((vector_size(kVectorBytes)));
    typedef std::make_signed_t<Bits<T>> Signed __attribute__((vector_size(kVectorBytes)));
    constexpr int64_t kN = kVectorBytes / static_cast<int64_t>(sizeof(T));
    // Keys have no sign bit, so signed comparisons, which every target has, order them.
    const auto least = static_cast<std::make_signed_t<Bits<T>>>(threshold);
    const auto keep = [&](int64_t i) __attribute__((always_inline)) {
        Lanes key, value;
        std::memcpy(&key, keys + i, sizeof(key));
        std::memcpy(&value, values + i, sizeof(value));
        const Signed reaches = reinterpret_cast<Signed>(key & kMagnitude<T>) >= least;
        return reinterpret_cast<Vec<float>>(value & reinterpret_cast<Lanes>(reaches));
    };
    int64_t i = 0;
    if (stream && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
        for (; i + kN <= count; i += kN) stream_user(reinterpret_cast<float*>(to + i), keep(i));
    } else {
        for (; i + kN <= count; i += kN) store_user(reinterpret_cast<float*>(to + i), keep(i));
    }
    for (; i < count; ++i) {
        const Bits<T> key = bits_of(keys[i]) & kMagnitude<T>;
        const Bits<T> bits = key >= threshold ? bits_of(values[i]) : Bits<T>{0};
        std::memcpy(to + i, &bits, sizeof(bits));
    }
}

// Returns what of the row is kept and not zero.
template <class T>
Kept<T> abs_topk_row(const T* row, T* to, int64_t cols, int64_t k, bool stream,
                     const TopkBuffers<T>& buffers) {
    if (k == cols) {
        keep_reaching(row, row, Bits<T>{0}, cols, to, stream);
        return {{row, 0, 1}};
    }
    const T* keys = row;
    Digit highest = leading_digits(row, cols, buffers);
    if (highest >= static_cast<Digit>(KeyTraits<T>::kInfinity >> (kKeyBits<T> - 16))) {
        // There may be NaNs: one key for all of them, above infinity, as torch.topk orders them.
        for (int64_t i = 0; i < cols; ++i) {
            const auto key =
                std::min<Bits<T>>(bits_of(row[i]) & kMagnitude<T>, KeyTraits<T>::kInfinity + 1);
            std::memcpy(buffers.ordered + i, &key, sizeof(key));
        }
        keys = buffers.ordered;
        highest = leading_digits(keys, cols, buffers);
    }
    const Threshold<T> threshold = find_threshold(keys, cols, k, highest, buffers);
    int64_t split = 0;  // ties stay before here: lowest index first
    for (int64_t found = 0; found < threshold.ties; ++split) {
        found += (bits_of(keys[split]) & kMagnitude<T>) == threshold.low;
    }
    keep_reaching(keys, row, threshold.low, split, to, stream);
    keep_reaching(keys + split, row + split, threshold.high, cols - split, to + split, stream);
    if (keys != row) return {{to, 0, 1}};
    // In the type that is computed in, a number's bits begin with its own.
    const auto wide = [](Bits<T> least) {
        constexpr int kShift = 8 * static_cast<int>(sizeof(Compute<T>) - sizeof(T));
        return static_cast<SignedBits<Compute<T>>>(std::max<Bits<T>>(least, 1)) << kShift;
    };
    return {{row, 0, 1}, wide(threshold.low), wide(threshold.high), split};
}

// What a row is before it is selected from: itself, or a copy in `buffer` if it is strided.
template <class T>
struct AsItIs {
    static constexpr bool kPacksInput = false;
    const T* operator()(int64_t, const T* row, int64_t col_stride, int64_t cols, T* buffer) const {
        if (col_stride == 1) return row;
        for (int64_t i = 0; i < cols; ++i) buffer[i] = row[i * col_stride];
        return buffer;
    }
};

// Where the result is also packed to, with room for all or none of a row's entries; or nowhere.
template <class T>
struct PackedRows {
    uint64_t* bits;
    T* values;
    int64_t room;
};

// y, and with `packed` the bits of what is not zero there and its entries, or if
// Prepare::kPacksInput those of x.
template <class T, class Prepare = AsItIs<T>>
void abs_topk(const Matrix<const T>& x, T* y, const PackedRows<T>& packed, int64_t rows,
              int64_t cols, int64_t k, int threads, const Prepare& prepare = {}) {
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows)));
    const int64_t padded = padded_digits(cols);
    Arena arena;
    const size_t digits_at = arena.reserve<Digit>(threads * padded);
    const size_t places_at = arena.reserve<int32_t>(threads * padded);
    const size_t row_at = arena.reserve<T>(threads * padded);
    const size_t ordered_at = arena.reserve<T>(threads * padded);
    arena.allocate();
    const bool stream = rows * cols * int64_t{sizeof(T)} >= kStreamBytes;
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        const int64_t mine = thread * padded;
        int guess = 0;
        const TopkBuffers<T> buffers{arena.at<Digit>(digits_at) + mine, &guess,
                                     arena.at<int32_t>(places_at) + mine,
                                     arena.at<T>(row_at) + mine, arena.at<T>(ordered_at) + mine};
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const T* const given = x.data + r * x.row_stride;
            const T* row = prepare(r, given, x.col_stride, cols, buffers.row);
            T* const to = y + r * cols;
            const Kept<T> kept = abs_topk_row(row, to, cols, k, stream, buffers);
            if (!packed.bits) continue;
            Matrix<const T> values{row, 0, 1};
            if (Prepare::kPacksInput) values = {given, 0, x.col_stride};
            pack_row<T>(kept, values, cols, packed.bits + r * words_of(cols),
                        packed.values + r * packed.room, packed.room);
        }
        stream_fence();
    }
}

}  // namespace
}  // namespace sk
