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

namespace detail {
template <class V, class I, size_t kBase, size_t... Lane>
inline __attribute__((always_inline)) V zip(V a, V b, std::index_sequence<Lane...>) {
    constexpr size_t kN = sizeof...(Lane);
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, (kBase * kN / 2 + Lane / 2 + (Lane % 2) * kN)...);
#else
    return __builtin_shuffle(a, b, I{(kBase * kN / 2 + Lane / 2 + (Lane % 2) * kN)...});
#endif
}
}  // namespace detail

// a0 b0 a1 b1 ... of the lower halves; of the upper halves.
template <class T>
inline __attribute__((always_inline)) Vec<T> zip_low(Vec<T> a, Vec<T> b) {
    return detail::zip<Vec<T>, typename VecTraits<T>::Index, 0>(
        a, b, std::make_index_sequence<kLanes<T>>{});
}
template <class T>
inline __attribute__((always_inline)) Vec<T> zip_high(Vec<T> a, Vec<T> b) {
    return detail::zip<Vec<T>, typename VecTraits<T>::Index, 1>(
        a, b, std::make_index_sequence<kLanes<T>>{});
}

// Loops over a compile-time range, so that arrays of vectors stay in registers.
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

constexpr int log2_of(int value) { return value <= 1 ? 0 : 1 + log2_of(value / 2); }

// Transposes kLanes vectors of kLanes lanes in place: log2(lanes) rounds of perfect shuffles.
template <class T>
inline __attribute__((always_inline)) void transpose(Vec<T> (&rows)[kLanes<T>]) {
    constexpr int kN = kLanes<T>;
    unroll<log2_of(kN)>([&](auto) __attribute__((always_inline)) {
        Vec<T> next[kN];
        unroll<kN / 2>([&](auto i) __attribute__((always_inline)) {
            next[2 * i] = zip_low<T>(rows[i], rows[i + kN / 2]);
            next[2 * i + 1] = zip_high<T>(rows[i], rows[i + kN / 2]);
        });
        unroll<kN>([&](auto i) __attribute__((always_inline)) { rows[i] = next[i]; });
    });
}

constexpr int bit_reverse(int value, int size) {
    int out = 0;
    for (int bit = 1; bit < size; bit *= 2) {
        out = out * 2 + (value & 1);
        value /= 2;
    }
    return out;
}

// Lane i of the result is the sum of the lanes of rows(i). Adding the two halves of a zip sums
// pairs and interleaves the vectors, so log2(lanes) rounds do all sums at once, in bit-reversed
// order.
template <class T, class Rows>
inline __attribute__((always_inline)) Vec<T> sum_each(const Rows& rows) {
    constexpr int kN = kLanes<T>;
    Vec<T> part[kN];
    unroll<kN>([&](auto i) __attribute__((always_inline)) {
        part[i] = rows(std::integral_constant<int, bit_reverse(i, kN)>{});
    });
    unroll<log2_of(kN)>([&](auto round) __attribute__((always_inline)) {
        constexpr int kLeft = kN >> (round + 1);
        unroll<kLeft>([&](auto i) __attribute__((always_inline)) {
            part[i] = zip_low<T>(part[2 * i], part[2 * i + 1]) +
                      zip_high<T>(part[2 * i], part[2 * i + 1]);
        });
    });
    return part[0];
}

}  // namespace
}  // namespace sk
