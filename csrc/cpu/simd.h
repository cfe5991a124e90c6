// One vector type for every instruction set: GCC/Clang vector extensions at the native width.
//
// Everything here and in the kernel headers lives in an anonymous namespace, because each isa_*.cpp
// compiles the same text with other flags: with external linkage the linker would keep one copy,
// and the baseline path could end up running AVX-512 code.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "types.h"

namespace sk {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
    typedef float Vec __attribute__((vector_size(kVectorBytes)));
    typedef int32_t Index __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecTraits<double> {
    typedef double Vec __attribute__((vector_size(kVectorBytes)));
    typedef int64_t Index __attribute__((vector_size(kVectorBytes)));
};

// Vector registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
// Vectors in a cache line.
constexpr int kLineVectors = 64 / kVectorBytes;

template <class T>
using Vec = typename VecTraits<T>::Vec;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// The type a storage type is computed in.
template <class T>
struct ComputeOf {
    using Type = T;
};
template <>
struct ComputeOf<Bf16> {
    using Type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::Type;

inline float to_compute(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
}
inline float to_compute(float value) { return value; }
inline double to_compute(double value) { return value; }

template <class T>
inline T from_compute(Compute<T> value) {
    return value;
}
// Round to nearest even; a NaN stays a (quiet) NaN.
template <>
inline Bf16 from_compute<Bf16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return Bf16{static_cast<uint16_t>((bits >> 16) | 0x40u)};
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return Bf16{static_cast<uint16_t>(bits >> 16)};
}

template <class T>
inline Vec<T> splat(T value) {
    return value - Vec<T>{};  // folds to a broadcast; 0 + value would not, because of -0
}

// Aligned access, for the packed tiles.
template <class T>
inline Vec<T> load(const T* from) {
    return *reinterpret_cast<const Vec<T>*>(from);
}
template <class T>
inline void store(T* to, Vec<T> value) {
    *reinterpret_cast<Vec<T>*>(to) = value;
}

// Unaligned access to user memory, converting from and to the storage type.
template <class T>
inline Vec<T> load_user(const T* from) {
    Vec<T> out;
    std::memcpy(&out, from, sizeof(out));
    return out;
}
template <class T>
inline void store_user(T* to, Vec<T> value) {
    std::memcpy(to, &value, sizeof(value));
}

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

inline Vec<float> load_user(const Bf16* from) {
    HalfWords bits;
    std::memcpy(&bits, from, sizeof(bits));
    const Words wide = __builtin_convertvector(bits, Words) << 16;
    Vec<float> out;
    std::memcpy(&out, &wide, sizeof(out));
    return out;
}
inline void store_user(Bf16* to, Vec<float> value) {
    Words bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words quiet_nan = (bits >> 16) | 0x40u;
    const Words is_nan = reinterpret_cast<Words>((bits & 0x7fffffffu) > 0x7f800000u);
    const Words chosen = (rounded & ~is_nan) | (quiet_nan & is_nan);
    const HalfWords half = __builtin_convertvector(chosen, HalfWords);
    std::memcpy(to, &half, sizeof(half));
}

// The same for values that are exact in the storage type.
template <class T>
inline void store_exact(T* to, Vec<T> value) {
    store_user(to, value);
}
inline void store_exact(Bf16* to, Vec<float> value) {
    Words bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const HalfWords half = __builtin_convertvector(bits >> 16, HalfWords);
    std::memcpy(to, &half, sizeof(half));
}

// Outputs larger than this are stored past the caches; those that leave in pieces of many rows at
// once only where a vector is a whole line.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Store past the caches: a line that is written whole need not be read first.
template <class T>
inline void stream_user(T* to, Vec<T> value) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<__m512i>(value));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(value));
#else
    store_user(to, value);
#endif
}
inline void stream_user(Bf16* to, Vec<float> value) { store_user(to, value); }
// Orders what was streamed before what comes next: at the end of a thread's work.
inline void stream_fence() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// Whether any bit of a vector is set.
template <class V>
inline bool any(V value) {
    typedef long long Wide __attribute__((vector_size(kVectorBytes)));
    const Wide bits = reinterpret_cast<Wide>(value);
#if defined(__AVX512F__)
    return _mm512_test_epi64_mask(reinterpret_cast<__m512i>(bits), reinterpret_cast<__m512i>(bits));
#elif defined(__AVX2__)
    return !_mm256_testz_si256(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(bits));
#else
    return (bits[0] | bits[1]) != 0;
#endif
}

// Shuffles stay inside pieces of 16 bytes, or move such pieces whole: others cost several times as
// much.
template <class T>
constexpr int kPiece = 16 / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPieces = kLanes<T> / kPiece<T>;

namespace detail {
// Element kPlace::at(i) of a and b, one after the other, in place i.
template <class T, class Place, size_t... I>
inline __attribute__((always_inline)) Vec<T> shuffle(Vec<T> a, Vec<T> b,
                                                     std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Place::at(static_cast<int>(I))...);
#else
    return __builtin_shuffle(a, b, typename VecTraits<T>::Index{Place::at(static_cast<int>(I))...});
#endif
}
template <class T, int kUnit, bool kUpper>
struct Zip {
    static constexpr int at(int i) {
        const int piece = i / kPiece<T> * kPiece<T>, unit = i % kPiece<T> / kUnit;
        return piece + (kUpper ? kPiece<T> / 2 : 0) + unit / 2 * kUnit + i % kUnit +
               unit % 2 * kLanes<T>;
    }
};
template <class T, bool kOdd>
struct Pieces {
    static constexpr int at(int i) {
        const int piece = 2 * (i / kPiece<T>)+(kOdd ? 1 : 0);
        return piece % kPieces<T> * kPiece<T> + i % kPiece<T> + piece / kPieces<T> * kLanes<T>;
    }
};
}  // namespace detail

// In each piece, units of kUnit elements of a and b in turn: of their lower halves, or upper ones.
template <class T, int kUnit, bool kUpper>
inline __attribute__((always_inline)) Vec<T> zip(Vec<T> a, Vec<T> b) {
    return detail::shuffle<T, detail::Zip<T, kUnit, kUpper>>(a, b,
                                                             std::make_index_sequence<kLanes<T>>{});
}
// The even pieces of a, and then of b; or the odd ones.
template <class T, bool kOdd>
inline __attribute__((always_inline)) Vec<T> alternate_pieces(Vec<T> a, Vec<T> b) {
    return detail::shuffle<T, detail::Pieces<T, kOdd>>(a, b, std::make_index_sequence<kLanes<T>>{});
}

// Before a loop of a few rounds, a number that the compiler knows: unrolled, so that arrays of
// vectors stay in registers.
#if defined(__clang__)
#define SK_UNROLL _Pragma("unroll")
#else
#define SK_UNROLL _Pragma("GCC unroll 32")
#endif

// The same where the body needs the round as a constant. It takes the compiler much longer.
template <class F, int... I>
inline __attribute__((always_inline)) void unrolled(const F& body,
                                                    std::integer_sequence<int, I...>) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int kCount, class F>
inline __attribute__((always_inline)) void unroll(const F& body) {
    unrolled(body, std::make_integer_sequence<int, kCount>{});
}

// from[places[i]] in lane i. (With a mask of all lanes, because GCC 12 warns of the undefined
// vector that the plain intrinsics start from.)
template <class T>
inline __attribute__((always_inline)) Vec<T> load_places(const T* from, const int32_t* places) {
    Vec<T> out = {};
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        const __m512i index = _mm512_loadu_si512(places);
        out = _mm512_mask_i32gather_ps(out, 0xffff, index, from, 4);
    } else {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
        out = _mm512_mask_i32gather_pd(out, 0xff, index, from, 8);
    }
#elif defined(__AVX2__)
    const __m256i all = _mm256_set1_epi32(-1);
    if constexpr (sizeof(T) == 4) {
        const __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places));
        out = _mm256_mask_i32gather_ps(out, from, index, reinterpret_cast<__m256>(all), 4);
    } else {
        const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(places));
        out = _mm256_mask_i32gather_pd(out, from, index, reinterpret_cast<__m256d>(all), 8);
    }
#else
    unroll<kLanes<T>>([&](auto i)
                          __attribute__((always_inline)) { out[i.value] = from[places[i]]; });
#endif
    return out;
}

// The first `count` lanes, the others 0.
template <class T>
inline __attribute__((always_inline)) Vec<T> first_lanes(Vec<T> value, int64_t count) {
    using I = typename VecTraits<T>::Index;
    using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    I lanes;
    unroll<kLanes<T>>([&](auto i) __attribute__((always_inline)) { lanes[i.value] = i; });
    const I keep = lanes < static_cast<Lane>(count);
    return reinterpret_cast<Vec<T>>(reinterpret_cast<I>(value) & keep);
}

// The lanes that `part` does not have: `value` without those bits.
template <class T>
inline __attribute__((always_inline)) Vec<T> without(Vec<T> value, Vec<T> part) {
    using I = typename VecTraits<T>::Index;
    return reinterpret_cast<Vec<T>>(reinterpret_cast<I>(value) ^ reinterpret_cast<I>(part));
}

constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

// Transposes kLanes vectors in place: first inside the pieces, then the pieces.
template <class T>
inline __attribute__((always_inline)) void transpose(Vec<T> (&rows)[kLanes<T>]) {
    constexpr int kN = kLanes<T>, kSize = kPiece<T>;
    unroll<kPieces<T>>([&](auto piece) __attribute__((always_inline)) {
        Vec<T>* const r = rows + piece * kSize;
        const Vec<T> a = zip<T, 1, false>(r[0], r[1]), b = zip<T, 1, true>(r[0], r[1]);
        if constexpr (kSize == 2) {
            r[0] = a;
            r[1] = b;
        } else {
            const Vec<T> c = zip<T, 1, false>(r[2], r[3]), d = zip<T, 1, true>(r[2], r[3]);
            r[0] = zip<T, 2, false>(a, c);
            r[1] = zip<T, 2, true>(a, c);
            r[2] = zip<T, 2, false>(b, d);
            r[3] = zip<T, 2, true>(b, d);
        }
    });
    unroll<log2_of(kPieces<T>)>([&](auto) __attribute__((always_inline)) {
        Vec<T> next[kN];
        unroll<kN / 2>([&](auto i) __attribute__((always_inline)) {
            constexpr int kPair = i / kSize * 2 * kSize + i % kSize;
            next[i] = alternate_pieces<T, false>(rows[kPair], rows[kPair + kSize]);
            next[i + kN / 2] = alternate_pieces<T, true>(rows[kPair], rows[kPair + kSize]);
        });
        unroll<kN>([&](auto i) __attribute__((always_inline)) { rows[i] = next[i]; });
    });
}

// Lane i of the result is `fold` over the lanes of rows(i): of the two halves of a zip it folds
// neighbours and interleaves the vectors.
template <class T, class Rows, class Fold>
inline __attribute__((always_inline)) Vec<T> fold_each(const Rows& rows, const Fold& fold) {
    constexpr int kSize = kPiece<T>;
    Vec<T> part[kPieces<T>];
    unroll<kPieces<T>>([&](auto piece) __attribute__((always_inline)) {
        const auto fold_pair = [&](auto i) __attribute__((always_inline)) {
            const Vec<T> a = rows(std::integral_constant<int, piece * kSize + i>{});
            const Vec<T> b = rows(std::integral_constant<int, piece * kSize + i + 1>{});
            return fold(zip<T, 1, false>(a, b), zip<T, 1, true>(a, b));
        };
        part[piece] = fold_pair(std::integral_constant<int, 0>{});
        if constexpr (kSize == 4) {
            const Vec<T> other = fold_pair(std::integral_constant<int, 2>{});
            part[piece] =
                fold(zip<T, 2, false>(part[piece], other), zip<T, 2, true>(part[piece], other));
        }
    });
    unroll<log2_of(kPieces<T>)>([&](auto round) __attribute__((always_inline)) {
        unroll<(kPieces<T> >> (round + 1))>([&](auto i) __attribute__((always_inline)) {
            const Vec<T> a = part[2 * i], b = part[2 * i + 1];
            part[i] = fold(alternate_pieces<T, false>(a, b), alternate_pieces<T, true>(a, b));
        });
    });
    return part[0];
}

// Lane i of the result is the sum of the lanes of rows(i).
template <class T, class Rows>
inline __attribute__((always_inline)) Vec<T> sum_each(const Rows& rows) {
    return fold_each<T>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}

// Lane i of the result is the largest lane of rows(i); none may be NaN.
template <class T, class Rows>
inline __attribute__((always_inline)) Vec<T> largest_each(const Rows& rows) {
    return fold_each<T>(rows, [](Vec<T> a, Vec<T> b) { return a > b ? a : b; });
}

}  // namespace
}  // namespace sk
