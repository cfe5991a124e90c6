// The gather's transpose over the same lists: out[m, c] = sum over the rows r that keep c of
// W[r, c] * in[m, r] (+ bias). `grad_input` runs it for blocks that are several outputs tall and
// few inputs wide, because the inputs of a block-row then share the rows of dY that they meet,
// where over the transposed lists nothing would be shared.
#pragma once

#include "gather.h"

namespace sk {
namespace {

// Inputs of a block-row that are computed together.
constexpr int kScatterInputs = 4;

// Adds a block-row to the tile of sums: out[local[j]] += sum over a of weight[j][a] * rows[a].
// `scratch` takes what the last inputs computed together have too many.
template <class C, int kVectors>
__attribute__((noinline)) void scatter_row(const C* rows, int64_t out_block, const int32_t* local,
                                           int64_t count, const C* weights, C* out, C* scratch) {
    constexpr int kN = kLanes<C>;
    constexpr int kTile = kVectors * kN;
    const int64_t stretch = sum_stretch(out_block);
    for (int64_t j = 0; j < count; j += kScatterInputs) {
        C* to[kScatterInputs];
        const C* w[kScatterInputs];
        unroll<kScatterInputs>([&](auto i) __attribute__((always_inline)) {
            const bool inside = j + i < count;
            to[i] = inside ? out + static_cast<int64_t>(local[j + i]) * kTile : scratch;
            w[i] = weights + (inside ? j + i : j) * out_block;
        });
        for (int64_t begin = 0; begin < out_block; begin += stretch) {
            const int64_t end = std::min(begin + stretch, out_block);
            Vec<C> acc[kScatterInputs][kVectors] = {};
            for (int64_t a = begin; a < end; ++a) {
                Vec<C> d[kVectors];
                unroll<kVectors>([&](auto v) __attribute__((always_inline)) {
                    d[v] = load(rows + a * kTile + v * kN);
                });
                unroll<kScatterInputs>([&](auto i) __attribute__((always_inline)) {
                    const Vec<C> weight = splat<C>(w[i][a]);
                    unroll<kVectors>(
                        [&](auto v) __attribute__((always_inline)) { acc[i][v] += weight * d[v]; });
                });
            }
            unroll<kScatterInputs>([&](auto i) __attribute__((always_inline)) {
                unroll<kVectors>([&](auto v) __attribute__((always_inline)) {
                    store(to[i] + v * kN, load(to[i] + v * kN) + acc[i][v]);
                });
            });
        }
    }
}

// `lists` and `schedule` are those of the layout itself; `in` has a column for each of its outputs,
// `out` and `bias` for each of its inputs.
template <class T, int kVectors>
void scatter_tiles(const GatherProblem<T>& problem) {
    using C = Compute<T>;
    constexpr int64_t kTile = kVectors * kLanes<C>;
    const Lists& lists = problem.lists;
    const Schedule& schedule = problem.schedule;
    const int64_t size = lists.out_block;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t blocks = schedule.entry_starts[schedule.panels * lists.rows];
    const int64_t tiles = (problem.tokens + kTile - 1) / kTile;
    const bool one_panel = schedule.panels == 1;
    const int64_t chunk = std::min(chunk_rows<C>(size, kTile), lists.rows);
    const bool in_place = std::is_same<T, C>::value && one_panel && lists.in_block == 1;
    const bool stream =
        kLineVectors == 1 && problem.tokens * features * int64_t{sizeof(T)} >= kStreamBytes &&
        features * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(problem.out) % 64 == 0;
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, tiles));

    Arena arena;
    const size_t weights_at = arena.reserve<C>(in_place ? 0 : blocks * size);
    const size_t bias_at = arena.reserve<C>(features);
    const size_t rows_at = arena.reserve<C>(threads * chunk * size * kTile);
    const size_t out_at = arena.reserve<C>(threads * (features + 1) * kTile);
    arena.allocate();
    const C* weights = weights_of<1>(problem, in_place, lists.out_block, arena.at<C>(weights_at));
    C* bias = arena.at<C>(bias_at);
    copy_bias(problem.bias, features, bias);

#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* rows = arena.at<C>(rows_at) + thread * chunk * size * kTile;
        C* out = arena.at<C>(out_at) + thread * (features + 1) * kTile;
        C* scratch = out + features * kTile;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = t * kTile;
            const int64_t tokens = std::min(kTile, problem.tokens - first);
            for (int64_t f = 0; f < features; ++f) {
                for (int v = 0; v < kVectors; ++v) {
                    store(out + f * kTile + v * kLanes<C>, splat<C>(bias[f]));
                }
            }
            for (int64_t begin = 0; begin < lists.rows; begin += chunk) {
                const int64_t end = std::min(begin + chunk, lists.rows);
                pack_tile<T, kVectors>(problem.in, first, tokens, begin * size,
                                       (end - begin) * size, rows);
                for (int64_t p = 0; p < schedule.panels; ++p) {
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t e = p * lists.rows + i;
                        const int64_t start = schedule.entry_starts[e];
                        scatter_row<C, kVectors>(
                            rows + (i - begin) * size * kTile, size, schedule.local + start,
                            schedule.entry_starts[e + 1] - start, weights + start * size,
                            out + p * schedule.panel_features * kTile, scratch);
                    }
                }
            }
            Tile<T, kVectors>::unpack(out, problem.out, features, first, tokens, 0, features,
                                      stream);
        }
        stream_fence();
    }
}

// A few tokens: no tile, and one pass over the values for each token.
template <class T>
void scatter_dots(const GatherProblem<T>& problem) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const int64_t size = lists.out_block, width = lists.in_block;
    const int64_t features = lists.cols * width;
    Arena arena;
    const size_t out_at = arena.reserve<C>(problem.tokens * features);
    const size_t row_at = arena.reserve<C>(problem.tokens * size);
    arena.allocate();
#pragma omp parallel for num_threads(problem.threads) schedule(static)
    for (int64_t m = 0; m < problem.tokens; ++m) {
        C* out = arena.at<C>(out_at) + m * features;
        C* row = arena.at<C>(row_at) + m * size;
        copy_bias(problem.bias, features, out);
        for (int64_t r = 0; r < lists.rows; ++r) {
            for (int64_t a = 0; a < size; ++a) {
                row[a] = to_compute(problem.in.data[m * problem.in.row_stride +
                                                    (r * size + a) * problem.in.col_stride]);
            }
            for (int64_t i = lists.begin(r); i < lists.end(r); ++i) {
                const T* block = problem.values + i * size * width;
                C* to = out + lists.columns[i] * width;
                for (int64_t b = 0; b < width; ++b) {
                    C sum = C(0);
                    for (int64_t a = 0; a < size; ++a) {
                        sum +=
                            to_compute(block[a * lists.out_stride + b * lists.in_stride]) * row[a];
                    }
                    to[b] += sum;
                }
            }
        }
        for (int64_t f = 0; f < features; ++f) {
            problem.out[m * features + f] = from_compute<T>(out[f]);
        }
    }
}

template <class T>
void scatter(const GatherProblem<T>& problem) {
    if (problem.tokens == 0) return;
    if (problem.tokens <= kDotTokens) return scatter_dots(problem);
    // As wide as the sums fit the registers, if every thread still gets a tile.
    constexpr int kWide = kScatterInputs * 4 < kRegisters ? 4 : 2;
    const int64_t tile = kWide * kLanes<Compute<T>>;
    if (kWide == 4 && problem.tokens > tile / 2 * (2 * problem.threads - 1)) {
        return scatter_tiles<T, kWide>(problem);
    }
    return scatter_tiles<T, 2>(problem);
}

}  // namespace
}  // namespace sk
