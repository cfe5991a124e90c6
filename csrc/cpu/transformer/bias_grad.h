// out[c] = sum over the tokens m of in[m, c]: the gradient of a bias.
#pragma once

#include <algorithm>

#include "../scratch.h"
#include "../simd.h"

namespace sk {
namespace {

// The tokens are cut at places that do not depend on the threads; each part is added up in rows of
// sums that stay in the first-level cache.
template <class T>
void bias_grad(const T* in, int64_t row_stride, T* out, int64_t tokens, int64_t cols, int threads) {
    using C = Compute<T>;
    constexpr int64_t kN = kLanes<C>, kRows = 128;
    constexpr int kAtOnce = 8;
    const int64_t padded = (cols + kN - 1) / kN * kN;
    // Parts of some kRows tokens, a power of two of them.
    int64_t parts = 32;
    while (parts < 1024 && parts * kRows < tokens) parts *= 2;
    const int64_t part = (tokens + parts - 1) / parts;
    Arena arena;
    const size_t at = arena.reserve<C>(parts * padded);
    arena.allocate();
    C* const all_sums = arena.at<C>(at);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t k = 0; k < parts; ++k) {
        C* const sums = all_sums + k * padded;
        std::fill(sums, sums + padded, C(0));
        const int64_t end = std::min(tokens, (k + 1) * part);
        for (int64_t m = k * part; m < end; m += kAtOnce) {
            const int64_t count = std::min<int64_t>(kAtOnce, end - m);
            const T* const row = in + m * row_stride;
            int64_t c = 0;
            for (; count == kAtOnce && c + kN <= cols; c += kN) {
                Vec<C> tree[kAtOnce];
                SK_UNROLL
                for (int i = 0; i < kAtOnce; ++i) {
                    tree[i] = load_user(row + i * row_stride + c);
                }
                SK_UNROLL
                for (int i = 0; i < 4; ++i) {
                    tree[i] += tree[i + 4];
                }
                store(sums + c, load(sums + c) + ((tree[0] + tree[2]) + (tree[1] + tree[3])));
            }
            for (int64_t i = 0; i < count; ++i) {
                for (int64_t f = c; f < cols; ++f) sums[f] += to_compute(row[i * row_stride + f]);
            }
        }
    }
    constexpr int64_t kCols = 256;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t first = 0; first < cols; first += kCols) {
        const int64_t last = std::min(cols, first + kCols);
        for (int64_t apart = 1; apart < parts; apart *= 2) {  // neighbours, then pairs of them, ..
            for (int64_t k = 0; k < parts; k += 2 * apart) {
                C* const sums = all_sums + k * padded;
                for (int64_t c = first; c < last; c += kN)
                    store(sums + c, load(sums + c) + load(sums + apart * padded + c));
            }
        }
        for (int64_t c = first; c < last; ++c) out[c] = from_compute<T>(all_sums[c]);
    }
}

}  // namespace
}  // namespace sk
