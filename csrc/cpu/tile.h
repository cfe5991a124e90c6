// Token tiles: kVectors vectors of tokens for each feature, packed feature-major so that one kept
// weight meets its tokens in consecutive aligned vectors.
#pragma once

#include <algorithm>

#include "simd.h"

namespace sk {
namespace {

// tile[f][token] = source[first_token + token][first_feature + f]; tokens past the end read as zero.
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

// The inverse, into a contiguous output of `width` columns. `stream`: past the caches.
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
            for (; f + kN <= features; f += kN) {
                Vec<C> rows[kN];
#pragma GCC unroll 16
                for (int i = 0; i < kN; ++i) rows[i] = load(tile + (f + i) * kTile + base);
                transpose<C>(rows);
                if (stream) {
#pragma GCC unroll 16
                    for (int i = 0; i < kN; ++i) stream_user(to + i * width + f, rows[i]);
                } else {
#pragma GCC unroll 16
                    for (int i = 0; i < kN; ++i) store_user(to + i * width + f, rows[i]);
                }
            }
        }
        for (; f < features; ++f) {
            for (int64_t i = 0; i < here; ++i) {
                to[i * width + f] = from_compute<T>(tile[(f)*kTile + base + i]);
            }
        }
    }
}

}  // namespace
}  // namespace sk
