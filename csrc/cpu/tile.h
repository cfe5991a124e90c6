// Token tiles: kVectors vectors of tokens for each feature, packed feature-major so that one kept
// weight meets its tokens in consecutive aligned vectors. tile_bf16.h has those of bfloat16.
#pragma once

#include <algorithm>

#include "simd.h"

namespace sk {
namespace {

// How far from the square at feature f that is which will be packed a little later: so many rows
// are read at once that the processor's own prefetchers lose track.
template <class T>
inline int64_t later(int64_t f, int64_t features, int64_t next_rows) {
    constexpr int64_t kAhead = 1024 / sizeof(T);
    return f + kAhead < features ? kAhead : next_rows + kAhead - features;
}

// Into the second-level cache: in the first, rows that are a power of two apart evict each other.
// (May lie past the end: a prefetch cannot fault.)
template <class T>
inline void prefetch(const T* from, int64_t ahead) {
    __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) +
                                                     static_cast<uintptr_t>(ahead) * sizeof(T)),
                       0, 2);
}

// A square of some tokens' rows, with zeros for those that do not exist, so that the last tokens
// are packed like all others.
template <class T, int kSize>
struct PaddedRows {
    alignas(64) T data[kSize][kSize] = {};

    void copy(const T* from, int64_t stride, int64_t rows) {
        for (int64_t i = 0; i < rows; ++i) std::memcpy(data[i], from + i * stride, sizeof(data[i]));
    }
};

// As many tokens as features, kLanes; asks for what is `ahead`.
template <class T, int64_t kTile>
inline __attribute__((always_inline)) void pack_square(const T* from, int64_t stride, int64_t ahead,
                                                       Compute<T>* to) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    Vec<C> rows[kN];
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) {
        rows[i] = load_user(from + i * stride);
        prefetch(from + i * stride, ahead);
    }
    transpose<C>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) store(to + i * kTile, rows[i]);
}

// tile[f][token] = source[first_token + token][first_feature + f]; tokens past the end read as
// zero.
template <class T, int kVectors>
void pack_tile(const Matrix<const T>& source, int64_t first_token, int64_t tokens,
               int64_t first_feature, int64_t features, Compute<T>* tile) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    constexpr int64_t kTile = kVectors * kN;
    for (int group = 0; group < kVectors; ++group) {
        const int64_t base = group * kN;
        const T* from = source.data + (first_token + base) * source.row_stride +
                        first_feature * source.col_stride;
        int64_t f = 0;
        const int64_t here = std::clamp<int64_t>(tokens - base, 0, kN);
        if (source.col_stride == 1 && here == kN) {
            for (; f + kN <= features; f += kN) {
                pack_square<T, kTile>(from + f, source.row_stride,
                                      later<T>(f, features, kN * source.row_stride),
                                      tile + f * kTile + base);
            }
        } else if (source.col_stride == 1) {
            PaddedRows<T, kN> rows;
            for (; f + kN <= features; f += kN) {
                rows.copy(from + f, source.row_stride, here);
                pack_square<T, kTile>(rows.data[0], kN, 0, tile + f * kTile + base);
            }
        } else if (source.row_stride == 1 && here == kN) {
            for (; f < features; ++f) {
                store(tile + f * kTile + base, load_user(from + f * source.col_stride));
            }
        }
        for (; f < features; ++f) {
            C* to = tile + f * kTile + base;
            for (int64_t i = 0; i < here; ++i) {
                to[i] = to_compute(from[i * source.row_stride + f * source.col_stride]);
            }
            for (int64_t i = here; i < kN; ++i) to[i] = C(0);
        }
    }
}

// The inverse, into a contiguous output of `width` columns, a cache line of a token at a time.
// `stream`: past the caches.
template <class T, int kVectors>
void unpack_tile(const Compute<T>* tile, T* out, int64_t width, int64_t first_token, int64_t tokens,
                 int64_t first_feature, int64_t features, bool stream) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    constexpr int64_t kTile = kVectors * kN;
    for (int group = 0; group < kVectors; ++group) {
        const int64_t base = group * kN;
        const int64_t here = std::clamp<int64_t>(tokens - base, 0, kN);
        if (here == 0) return;
        T* to = out + (first_token + base) * width + first_feature;
        int64_t f = 0;
        if (here == kN) {
            for (; f + kLineVectors * kN <= features; f += kLineVectors * kN) {
                Vec<C> rows[kLineVectors][kN];
                SK_UNROLL
                for (int l = 0; l < kLineVectors; ++l) {
                    SK_UNROLL
                    for (int i = 0; i < kN; ++i) {
                        rows[l][i] = load(tile + (f + l * kN + i) * kTile + base);
                    }
                    transpose<C>(rows[l]);
                }
                SK_UNROLL
                for (int i = 0; i < kN; ++i) {
                    SK_UNROLL
                    for (int l = 0; l < kLineVectors; ++l) {
                        T* target = to + i * width + f + l * kN;
                        if (stream)
                            stream_user(target, rows[l][i]);
                        else
                            store_user(target, rows[l][i]);
                    }
                }
            }
        }
        for (; f < features; ++f) {
            for (int64_t i = 0; i < here; ++i) {
                to[i * width + f] = from_compute<T>(tile[f * kTile + base + i]);
            }
        }
    }
}

// A tile as the kernels see it. `Element` is how activations lie in it and `Weight` how weights are
// packed beside it; `Raw` is a vector of elements, of which a feature has kRaw.
template <class T, int kVectors>
struct Tile {
    using Element = T;
    using Weight = T;
    using Raw = Vec<T>;
    static constexpr int kRaw = kVectors;
    static constexpr int64_t kTokens = kVectors * kLanes<T>;
    // Weights of this many neighbouring features are packed together.
    static constexpr int kTogether = 1;

    static void pack(const Matrix<const T>& source, int64_t first_token, int64_t tokens,
                     int64_t first_feature, int64_t features, Element* tile) {
        pack_tile<T, kVectors>(source, first_token, tokens, first_feature, features, tile);
    }
    static void unpack(const T* tile, T* out, int64_t width, int64_t first_token, int64_t tokens,
                       int64_t first_feature, int64_t features, bool stream) {
        unpack_tile<T, kVectors>(tile, out, width, first_token, tokens, first_feature, features,
                                 stream);
    }
    static Raw load_raw(const Element* from) { return load(from); }
    // sum += the tokens' products of two features.
    static inline __attribute__((always_inline)) void add_products(Vec<T>& sum, Raw a, Raw b) {
        sum += a * b;
    }
    // acc[output] += weights[output] * panel[*local]
    template <int kShared>
    static inline __attribute__((always_inline)) void multiply(Vec<T> (&acc)[kShared][kVectors],
                                                               const Element* panel,
                                                               const int32_t* local,
                                                               const Weight* weights) {
        const Element* const from = panel + static_cast<int64_t>(*local) * kTokens;
        Vec<T> x[kVectors];
        SK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            x[v] = load(from + v * kLanes<T>);
        }
        SK_UNROLL
        for (int a = 0; a < kShared; ++a) {
            const Vec<T> w = splat<T>(weights[a]);
            SK_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                acc[a][v] += w * x[v];
            }
        }
    }
};

// Asks for the lines of a piece of a matrix, a few at a time, while something else is computed.
class Prefetch {
    const char* row_ = nullptr;
    int64_t stride_ = 0, row_lines_ = 0, line_ = 0;
    int64_t left_ = 0, share_ = 0;

public:
    Prefetch() = default;
    // `times` calls of `some` ask for everything.
    template <class T>
    Prefetch(const Matrix<const T>& source, int64_t first_token, int64_t tokens,
             int64_t first_feature, int64_t features, int64_t times) {
        if (source.col_stride != 1 || times <= 0) return;
        row_ = reinterpret_cast<const char*>(source.data + first_token * source.row_stride +
                                             first_feature);
        stride_ = source.row_stride * static_cast<int64_t>(sizeof(T));
        row_lines_ = (features * static_cast<int64_t>(sizeof(T)) + 63) / 64;
        left_ = row_lines_ * tokens;
        share_ = (left_ + times - 1) / times;
    }
    inline __attribute__((always_inline)) void some() {
        const int64_t count = std::min(share_, left_);
        left_ -= count;
        for (int64_t i = 0; i < count; ++i) {
            __builtin_prefetch(row_ + line_ * 64);
            if (++line_ == row_lines_) {
                line_ = 0;
                row_ += stride_;
            }
        }
    }
};

}  // namespace
}  // namespace sk
