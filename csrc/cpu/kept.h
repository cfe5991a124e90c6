// Rows of which most entries are zero, packed: a bit for each entry that is not, and those entries
// in order. A row has whole words of bits, and room for as many entries as any row may have.
#pragma once

#include <algorithm>
#include <limits>

#include "scratch.h"
#include "simd.h"

namespace sk {
namespace {

constexpr int64_t kWordBits = 64;
inline int64_t words_of(int64_t cols) { return (cols + kWordBits - 1) / kWordBits; }

// A number's bits as an integer that orders as magnitudes do, once the sign is gone.
template <class C>
using SignedBits = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;

// A bit for each lane whose magnitude's bits reach `least`: if that is 1, for all that are not
// zero. (Integers are compared, so that no mode of the processor takes the smallest for zero.)
template <class C>
inline __attribute__((always_inline)) uint32_t reaching_lanes(Vec<C> value, SignedBits<C> least) {
    using I = typename VecTraits<C>::Index;
    const I size = reinterpret_cast<I>(value) & std::numeric_limits<SignedBits<C>>::max();
#if defined(__AVX512F__)
    return _mm512_cmpge_epi32_mask(reinterpret_cast<__m512i>(size), _mm512_set1_epi32(least));
#elif defined(__AVX2__)
    return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(size >= least)));
#else
    uint32_t lanes = 0;
    for (int i = 0; i < kLanes<C>; ++i) lanes |= static_cast<uint32_t>(size[i] >= least) << i;
    return lanes;
#endif
}

// The value where `lanes` has a bit, elsewhere 0.
template <class C>
inline __attribute__((always_inline)) Vec<C> where_lanes(Vec<C> value, uint32_t lanes) {
#if defined(__AVX512F__)
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(lanes), value);
#else
    using I = typename VecTraits<C>::Index;
    using Lane = SignedBits<C>;
    I bit;
    unroll<kLanes<C>>([&](auto i) __attribute__((always_inline)) { bit[i.value] = Lane{1} << i; });
    const I off = (bit & static_cast<Lane>(lanes)) == 0;
    return reinterpret_cast<Vec<C>>(reinterpret_cast<I>(value) & ~off);
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// A byte of 0xff for each bit.
inline uint64_t bytes_of(uint32_t lanes) { return _pdep_u64(lanes, 0x0101010101010101ull) * 0xff; }
constexpr uint64_t kPlaces = 0x0706050403020100ull;
inline __m256 permute(Vec<float> value, uint64_t places) {
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(places));
    return _mm256_permutevar8x32_ps(value, _mm256_cvtepu8_epi32(bytes));
}
#endif

// The lanes that have a bit, in front.
template <class C>
inline __attribute__((always_inline)) Vec<C> compress(Vec<C> value, uint32_t lanes) {
#if defined(__AVX512F__)
    return _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), value);
#elif defined(__AVX2__)
    return permute(value, _pext_u64(kPlaces, bytes_of(lanes)));
#else
    Vec<C> out = {};
    for (int i = 0, n = 0; i < kLanes<C>; ++i) {
        if (lanes >> i & 1) out[n++] = value[i];
    }
    return out;
#endif
}

// The reverse: the first lanes to where there is a bit, elsewhere 0.
template <class C>
inline __attribute__((always_inline)) Vec<C> expand(Vec<C> value, uint32_t lanes) {
#if defined(__AVX512F__)
    return _mm512_maskz_expand_ps(static_cast<__mmask16>(lanes), value);
#elif defined(__AVX2__)
    return where_lanes<C>(permute(value, _pdep_u64(kPlaces, bytes_of(lanes))), lanes);
#else
    Vec<C> out = {};
    for (int i = 0, n = 0; i < kLanes<C>; ++i) {
        if (lanes >> i & 1) out[i] = value[n++];
    }
    return out;
#endif
}

// The first `count` lanes from and to a row. Functions of their own, for the sake of the loops that
// need them at their ends.
template <class T, class C = Compute<T>>
__attribute__((noinline)) Vec<C> load_first(const T* row, int64_t stride, int64_t count) {
    Vec<C> out = {};
    for (int lane = 0; lane < std::min<int64_t>(count, kLanes<C>); ++lane)
        out[lane] = to_compute(row[lane * stride]);
    return out;
}
template <class T, class C = Compute<T>>
__attribute__((noinline)) void store_first(T* row, int64_t count, Vec<C> value) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, float>::value) {
        const uint32_t lanes = (uint32_t{1} << std::clamp<int64_t>(count, 0, kLanes<C>)) - 1;
        return _mm512_mask_storeu_ps(row, static_cast<__mmask16>(lanes), value);
    }
#endif
    for (int lane = 0; lane < std::min<int64_t>(count, kLanes<C>); ++lane)
        row[lane] = from_compute<T>(value[lane]);
}

// The vector at entry i of a row of `cols`; past the end 0.
template <class T, class C = Compute<T>>
inline __attribute__((always_inline)) Vec<C> load_part(const T* row, int64_t stride, int64_t i,
                                                       int64_t cols) {
    if (__builtin_expect(stride == 1 && i + kLanes<C> <= cols, 1)) return load_user(row + i);
    return load_first(row + i * stride, stride, cols - i);
}
// kExact: values that T holds exactly.
template <bool kExact, class T, class C = Compute<T>>
inline __attribute__((always_inline)) void store_part(T* row, int64_t i, int64_t cols, Vec<C> value,
                                                      bool stream) {
    if (__builtin_expect(i + kLanes<C> > cols, 0)) {
        store_first(row + i, cols - i, value);
    } else if (stream) {
        stream_user(row + i, value);
    } else if (kExact) {
        store_exact(row + i, value);
    } else {
        store_user(row + i, value);
    }
}
template <class C>
inline uint32_t lanes_at(const uint64_t* bits, int64_t i) {
    constexpr uint64_t kAll = (uint64_t{1} << kLanes<C>)-1;
    return static_cast<uint32_t>(bits[i / kWordBits] >> (i % kWordBits) & kAll);
}

// Whether rows of a large contiguous result may be stored past the caches.
template <class T>
inline bool streams(const T* out, int64_t rows, int64_t cols) {
    return sizeof(T) >= sizeof(float) && rows * cols * int64_t{sizeof(T)} >= kStreamBytes &&
           reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 && cols % kLanes<Compute<T>> == 0;
}

// What of a row is kept: entries whose magnitude's bits reach `high`, of those before `split` also
// those that reach `low`, in the type that is computed in.
template <class T>
struct Kept {
    Matrix<const T> row;
    SignedBits<Compute<T>> low = 1, high = 1;  // as they are: all that is not zero
    int64_t split = 0;
};

// The bits of what is kept, and what `values` has there, at most `room` numbers.
template <class T>
void pack_row(const Kept<T>& kept, const Matrix<const T>& values, int64_t cols, uint64_t* bits,
              T* packed, int64_t room) {
    using C = Compute<T>;
    int64_t count = 0;
    for (int64_t begin = 0; begin < cols; begin += kWordBits, ++bits) {
        uint64_t word = 0;
        for (int64_t i = begin; i < std::min(begin + kWordBits, cols); i += kLanes<C>) {
            const Vec<C> entry = load_part(kept.row.data, kept.row.col_stride, i, cols);
            uint32_t lanes = reaching_lanes<C>(entry, kept.high);
            if (i < kept.split) {
                const int64_t before = std::min<int64_t>(kept.split - i, kLanes<C>);
                lanes |= reaching_lanes<C>(entry, kept.low) & ((uint32_t{1} << before) - 1);
            }
            word |= uint64_t{lanes} << (i - begin);
            if (room == 0) continue;
            const Vec<C> chosen = load_part(values.data, values.col_stride, i, cols);
            store_part<true>(packed, count, room, compress<C>(chosen, lanes), false);
            count += __builtin_popcount(lanes);
        }
        *bits = word;
    }
}

// The reverse: calls use(i, value, lanes) for each vector of the row. `values` are padded to more
// vectors than the row has.
template <class C, class Use>
inline void expand_row(const uint64_t* bits, const C* values, int64_t cols, const Use& use) {
    for (int64_t i = 0; i < cols; i += kLanes<C>) {
        const uint32_t lanes = lanes_at<C>(bits, i);
        use(i, expand<C>(load_user(values), lanes), lanes);
        values += __builtin_popcount(lanes);
    }
}

// Runs body(row, buffer) for all rows, the buffer of a thread as large as `expand_row` wants it.
template <class C, class Body>
void for_rows(int64_t rows, int64_t cols, int threads, const Body& body) {
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows)));
    const int64_t each = (cols / kLanes<C> + 2) * kLanes<C>;
    Arena arena;
    const size_t at = arena.reserve<C>(threads * each);
    arena.allocate();
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* const buffer = arena.at<C>(at) + thread * each;
        std::fill(buffer, buffer + each, C(0));
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) body(r, buffer);
        stream_fence();
    }
}

// See pack_row; rows are `words_of(cols)` and `room` apart.
template <class T>
void pack(const Matrix<const T>& y, const Matrix<const T>& x, uint64_t* bits, T* packed,
          int64_t rows, int64_t cols, int64_t room, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        pack_row<T>({{y.data + r * y.row_stride, 0, y.col_stride}},
                    {x.data + r * x.row_stride, 0, x.col_stride}, cols, bits + r * words_of(cols),
                    packed + r * room, room);
    }
}

// buffer = map(values) of a row.
template <class T, class C, class Map>
inline void map_packed(const T* values, int64_t count, C* buffer, const Map& map) {
    for (int64_t i = 0; i < count; i += kLanes<C>)
        store_user(buffer + i, map(load_part(values, 1, i, count)));
}

// dx = dy where there is a bit, elsewhere 0; dx is contiguous.
template <class T>
void abs_topk_backward(const Matrix<const T>& dy, const uint64_t* bits, T* dx, int64_t rows,
                       int64_t cols, int threads) {
    using C = Compute<T>;
    const bool stream = streams(dx, rows, cols);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const T* const from = dy.data + r * dy.row_stride;
            const uint64_t* const row_bits = bits + r * words_of(cols);
            for (int64_t i = 0; i < cols; i += kLanes<C>) {
                const Vec<C> grad = load_part(from, dy.col_stride, i, cols);
                store_part<true>(dx + r * cols, i, cols,
                                 where_lanes<C>(grad, lanes_at<C>(row_bits, i)), stream);
            }
        }
        stream_fence();
    }
}

}  // namespace
}  // namespace sk
