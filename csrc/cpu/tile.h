// Token tiles: kVectors vectors of tokens for each feature, packed feature-major so that one kept
// weight meets its tokens in consecutive aligned vectors.
#pragma once

#include <algorithm>

#include "simd.h"

namespace sk {
namespace {

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
        if (source.col_stride == 1 && base + kN <= tokens) {
            for (; f + kN <= features; f += kN) {
                Vec<C> rows[kN];
#pragma GCC unroll 16
                for (int i = 0; i < kN; ++i) rows[i] = load_user(from + i * source.row_stride + f);
                transpose<C>(rows);
#pragma GCC unroll 16
                for (int i = 0; i < kN; ++i) store(tile + (f + i) * kTile + base, rows[i]);
            }
        } else if (source.row_stride == 1 && base + kN <= tokens) {
            for (; f < features; ++f) {
                store(tile + f * kTile + base, load_user(from + f * source.col_stride));
            }
        }
        const int64_t here = std::clamp<int64_t>(tokens - base, 0, kN);
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
                unroll<kLineVectors>([&](auto l) __attribute__((always_inline)) {
                    unroll<kN>([&](auto i) __attribute__((always_inline)) {
                        rows[l][i] = load(tile + (f + l * kN + i) * kTile + base);
                    });
                    transpose<C>(rows[l]);
                });
                unroll<kN>([&](auto i) __attribute__((always_inline)) {
                    unroll<kLineVectors>([&](auto l) __attribute__((always_inline)) {
                        T* target = to + i * width + f + l * kN;
                        if (stream)
                            stream_user(target, rows[l][i]);
                        else
                            store_user(target, rows[l][i]);
                    });
                });
            }
        }
        for (; f < features; ++f) {
            for (int64_t i = 0; i < here; ++i) {
                to[i * width + f] = from_compute<T>(tile[f * kTile + base + i]);
            }
        }
    }
}

inline Words rounded_high(Vec<float> value) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words is_nan = reinterpret_cast<Words>((bits & 0x7fffffffu) > 0x7f800000u);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (rounded & ~is_nan) | ((bits | 0x400000u) & is_nan);
}

// bfloat16 leaves in pairs of features, so that a token's store is a whole vector.
template <int kVectors>
void unpack_bf16_tile(const float* tile, Bf16* out, int64_t width, int64_t first_token,
                      int64_t tokens, int64_t first_feature, int64_t features, bool stream) {
    constexpr int kN = kLanes<float>;
    constexpr int64_t kTile = kVectors * kN;
    const int64_t paired = features / (2 * kN) * (2 * kN);
    for (int group = 0; group < kVectors; ++group) {
        const int64_t base = group * kN;
        if (base + kN > tokens) {
            if (base < tokens) {
                for (int64_t f = 0; f < features; ++f) {
                    for (int64_t i = base; i < tokens; ++i) {
                        out[(first_token + i) * width + first_feature + f] =
                            from_compute<Bf16>(tile[f * kTile + i]);
                    }
                }
            }
            return;
        }
        Bf16* to = out + (first_token + base) * width + first_feature;
        for (int64_t f = 0; f < paired; f += 2 * kN) {
            Vec<float> rows[kN];
            unroll<kN>([&](auto i) __attribute__((always_inline)) {
                const float* pair = tile + (f + 2 * i) * kTile + base;
                const Words low = rounded_high(load(pair)), high = rounded_high(load(pair + kTile));
                rows[i] = reinterpret_cast<Vec<float>>((low >> 16) | (high & 0xffff0000u));
            });
            transpose<float>(rows);
            unroll<kN>([&](auto i) __attribute__((always_inline)) {
                float* target = reinterpret_cast<float*>(to + i * width + f);
                if (stream)
                    stream_user(target, rows[i]);
                else
                    store_user(target, rows[i]);
            });
        }
        for (int64_t f = paired; f < features; ++f) {
            for (int64_t i = 0; i < kN; ++i) {
                to[i * width + f] = from_compute<Bf16>(tile[f * kTile + base + i]);
            }
        }
    }
}

// What a tile of inputs to a gather holds: bfloat16 stays narrow, since the second-level cache is
// what limits an unstructured gather. A lane then holds token i below token i + kLanes of its
// vector pair, so that a shift and a mask widen it to two vectors in token order.
template <class T, int kVectors>
struct GatherTile {
    using Element = T;
    static void pack(const Matrix<const T>& source, int64_t first_token, int64_t tokens,
                     int64_t features, Element* tile) {
        pack_tile<T, kVectors>(source, first_token, tokens, 0, features, tile);
    }
    static void unpack(const Compute<T>* tile, T* out, int64_t width, int64_t first_token,
                       int64_t tokens, int64_t first_feature, int64_t features, bool stream) {
        unpack_tile<T, kVectors>(tile, out, width, first_token, tokens, first_feature, features,
                                 stream);
    }
    static inline __attribute__((always_inline)) void load_row(const Element* row,
                                                               Vec<T> (&x)[kVectors]) {
        unroll<kVectors>([&](auto v)
                             __attribute__((always_inline)) { x[v] = load(row + v * kLanes<T>); });
    }
};

template <int kVectors>
struct GatherTile<Bf16, kVectors> {
    static_assert(kVectors % 2 == 0, "bfloat16 tokens are packed in pairs of vectors");
    using Element = Bf16;
    static constexpr int kN = kLanes<float>;
    static constexpr int64_t kTile = kVectors * kN;

    static Words as_words(Vec<float> v) { return reinterpret_cast<Words>(v); }

    static void pack(const Matrix<const Bf16>& source, int64_t first_token, int64_t tokens,
                     int64_t features, Element* tile) {
        for (int pair = 0; pair < kVectors / 2; ++pair) {
            const int64_t base = pair * 2 * kN;
            const Bf16* from = source.data + (first_token + base) * source.row_stride;
            int64_t f = 0;
            if (source.col_stride == 1 && base + 2 * kN <= tokens) {
                for (; f + 2 * kN <= features; f += 2 * kN) {
                    // A 32-bit lane is two neighbouring features of one token.
                    Vec<float> low[kN], high[kN];
                    unroll<kN>([&](auto i) __attribute__((always_inline)) {
                        low[i] = load_user(
                            reinterpret_cast<const float*>(from + i * source.row_stride + f));
                        high[i] = load_user(reinterpret_cast<const float*>(
                            from + (i + kN) * source.row_stride + f));
                    });
                    transpose<float>(low);
                    transpose<float>(high);
                    unroll<kN>([&](auto i) __attribute__((always_inline)) {
                        const Words a = as_words(low[i]), b = as_words(high[i]);
                        Bf16* to = tile + (f + 2 * i) * kTile + base;
                        store(reinterpret_cast<float*>(to),
                              reinterpret_cast<Vec<float>>((a & 0xffffu) | (b << 16)));
                        store(reinterpret_cast<float*>(to + kTile),
                              reinterpret_cast<Vec<float>>((a >> 16) | (b & 0xffff0000u)));
                    });
                }
            }
            for (; f < features; ++f) {
                Bf16* to = tile + f * kTile + base;
                for (int64_t i = 0; i < 2 * kN; ++i) {
                    to[2 * (i % kN) + i / kN] =
                        base + i < tokens ? from[i * source.row_stride + f * source.col_stride]
                                          : Bf16{0};
                }
            }
        }
    }
    static void unpack(const float* tile, Bf16* out, int64_t width, int64_t first_token,
                       int64_t tokens, int64_t first_feature, int64_t features, bool stream) {
        unpack_bf16_tile<kVectors>(tile, out, width, first_token, tokens, first_feature, features,
                                   stream);
    }
    static inline __attribute__((always_inline)) void load_row(const Element* row,
                                                               Vec<float> (&x)[kVectors]) {
        unroll<kVectors / 2>([&](auto pair) __attribute__((always_inline)) {
            const Words both = as_words(load(reinterpret_cast<const float*>(row + pair * 2 * kN)));
            x[2 * pair] = reinterpret_cast<Vec<float>>(both << 16);
            x[2 * pair + 1] = reinterpret_cast<Vec<float>>(both & 0xffff0000u);
        });
    }
};

// Asks for a share of the next tile's input while this tile computes.
template <class T>
inline void prefetch_lines(const Matrix<const T>& source, int64_t first_token, int64_t features,
                           int64_t begin, int64_t end) {
    constexpr int64_t kPerLine = 64 / static_cast<int64_t>(sizeof(T));
    const int64_t row_lines = (features + kPerLine - 1) / kPerLine;
    int64_t token = begin / row_lines, line = begin % row_lines;
    for (int64_t i = begin; i < end; ++i) {
        __builtin_prefetch(
            source.data + (first_token + token) * source.row_stride + line * kPerLine, 0, 2);
        if (++line == row_lines) {
            line = 0;
            ++token;
        }
    }
}

}  // namespace
}  // namespace sk
