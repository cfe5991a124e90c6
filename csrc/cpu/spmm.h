// spmm: out[m, r] = sum over the kept blocks of row r of W[r, c] * in[m, c] (+ bias). `forward`
// runs it over the rows of a layout, `grad_input` over its columns, or else as in spmm_scatter.h.
#pragma once

#include <type_traits>

#include "dispatch.h"
#include "scratch.h"
#include "tile_bf16.h"

namespace sk {
namespace {

// Outputs that share an index list are computed together, this many at a time.
inline int shared_outputs(int out_block) {
    return out_block % 4 == 0 ? 4 : out_block % 2 == 0 ? 2 : 1;
}

// Outputs that are collected feature-major before they leave: as many as fit here, so that each
// token then gets several neighbouring lines at once.
constexpr int64_t kChunkBytes = 32 << 10;
// Up to this many tokens a row is a dot product per token; beyond, tokens fill vectors.
constexpr int64_t kDotTokens = 1;
// The same for blocks of one weight.
constexpr int64_t kDotTokensUnshared = 2;

// A sum is taken in stretches that are added up at the end, so that its rounding error grows with
// the square root of its length, as in a blocked dense product.
inline int64_t sum_stretch(int64_t count) { return count <= 1024 ? 32 : 128; }

// Block-rows of outputs in a chunk.
template <class C>
int64_t chunk_rows(int64_t out_block, int64_t tile) {
    return std::max<int64_t>(1, kChunkBytes / (tile * int64_t{sizeof(C)} * out_block));
}

// A weight as it is packed: in the type that it is computed in, or as it is.
template <class W, class T>
inline W packed_weight(T value) {
    if constexpr (std::is_same<W, T>::value) {
        return value;
    } else {
        return to_compute(value);
    }
}

// Weights in the order in which the schedule meets them: [entry][output group][feature][output]. If
// kTogether is 2, [entry][output group][pair of features][output][feature], and then the odd one.
// kGroup is the number of outputs in a group, or 0 for all of a block's.
template <int kTogether, int kGroup, class T, class W>
void pack_weights(const Lists& lists, const Schedule& schedule, const T* values, W* packed,
                  int threads) {
    const int64_t group = kGroup ? kGroup : lists.out_block;
    const int64_t entries = schedule.panels * lists.rows;
    const int64_t block_size = int64_t{lists.out_block} * lists.in_block;
    if (block_size == 1) {
        constexpr int64_t kStep = 1024;
        const int64_t weights = schedule.entry_starts[entries];
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t begin = 0; begin < weights; begin += kStep) {
            const int64_t end = std::min(weights, begin + kStep);
            int64_t i = begin;
            if constexpr (std::is_same<T, Compute<T>>::value) {
                for (; i + kLanes<T> <= end; i += kLanes<T>) {
                    store_user(packed + i, load_places(values, schedule.block_ids + i));
                }
            }
            for (; i < end; ++i) packed[i] = packed_weight<W>(values[schedule.block_ids[i]]);
        }
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t start = schedule.entry_starts[e];
        const int64_t count = schedule.entry_starts[e + 1] - start;
        const int64_t together = count / kTogether * kTogether;
        W* to = packed + start * lists.out_block;
        for (int64_t first = 0; first < lists.out_block; first += group, to += count * group) {
            const int32_t* id = schedule.block_ids + start / lists.in_block;
            for (int64_t j = 0; j < count; ++id) {
                const T* block = values + *id * block_size + first * lists.out_stride;
                for (int64_t b = 0; b < lists.in_block; ++b, ++j) {
                    const int64_t step = j < together ? kTogether : 1;
                    W* at = to + j / step * step * group + j % step;
                    for (int64_t a = 0; a < group; ++a) {
                        at[a * step] =
                            packed_weight<W>(block[a * lists.out_stride + b * lists.in_stride]);
                    }
                }
            }
        }
    }
}

// Consecutive entries of a panel: acc[output][vector] += weight[feature][output] *
// tile[local[feature]][vector]. `starts` are the entries' first features, `weights` belongs to the
// first of them. Adds to `out`, or sets it to bias + sum if `bias` is given.
//
// A function of its own, because inlined into its caller the inner loop runs out of registers for
// its pointers and reloads them for every weight.
template <class TileOf, class C, int kVectors, int kShared>
__attribute__((noinline)) void accumulate(const typename TileOf::Element* panel,
                                          const int64_t* starts, int64_t entries, int64_t out_block,
                                          const int32_t* local,
                                          const typename TileOf::Weight* weights, const C* bias,
                                          C* out) {
    constexpr int kN = kLanes<C>;
    constexpr int kTile = kVectors * kN;
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t count = starts[e + 1] - starts[e];
        const int64_t stretch = sum_stretch(count);
        for (int64_t group = 0; group < out_block; group += kShared) {
            int64_t left = count;
            bool add = bias == nullptr;
            do {  // at least once: a row without blocks is its bias
                const int32_t* const end = local + std::min(stretch, left);
                left -= end - local;
                Vec<C> acc[kShared][kVectors] = {};
                if constexpr (TileOf::kTogether == 2) {
                    for (; end - local >= 2; local += 2, weights += 2 * kShared) {
                        TileOf::template multiply_pair<kShared>(acc, panel, local, weights);
                    }
                }
                for (; local != end; ++local, weights += kShared) {
                    TileOf::template multiply<kShared>(acc, panel, local, weights);
                }
                SK_UNROLL
                for (int a = 0; a < kShared; ++a) {
                    SK_UNROLL
                    for (int v = 0; v < kVectors; ++v) {
                        C* to = out + a * kTile + v * kN;
                        store(to, acc[a][v] + (add ? load(to) : splat<C>(bias[a])));
                    }
                }
                add = true;
            } while (left > 0);
            local -= count;
            out += kShared * kTile;
            if (bias) bias += kShared;
        }
        local += count;
    }
}

template <class T>
struct SpmmProblem {
    Lists lists;
    Schedule schedule;
    Matrix<const T> in;
    const T* values;
    const T* bias;  // (lists.rows * out_block) or null
    T* out;         // (tokens, lists.rows * out_block), contiguous
    int64_t tokens;
    int threads;
};

// The weights in the order of the schedule: the stored values, if they lie so, or packed into `to`.
template <int kTogether, int kGroup, class W, class T>
const W* weights_of(const SpmmProblem<T>& problem, bool in_place, W* to) {
    if (in_place) return reinterpret_cast<const W*>(problem.values);
    pack_weights<kTogether, kGroup>(problem.lists, problem.schedule, problem.values, to,
                                    problem.threads);
    return to;
}

template <class T>
void copy_bias(const T* bias, int64_t count, Compute<T>* to) {
    for (int64_t n = 0; n < count; ++n) to[n] = bias ? to_compute(bias[n]) : Compute<T>(0);
}

// The two steps of the product that depend on how many outputs share an index list.
template <class T, int kVectors>
struct SharedSteps {
    using TileOf = Tile<T, kVectors>;
    using W = typename TileOf::Weight;
    decltype(&weights_of<TileOf::kTogether, 1, W, T>) weights_of;
    decltype(&accumulate<TileOf, Compute<T>, kVectors, 1>) accumulate;
};
template <class T, int kVectors, int kShared>
constexpr SharedSteps<T, kVectors> kSharedSteps = {
    weights_of<Tile<T, kVectors>::kTogether, kShared, typename Tile<T, kVectors>::Weight, T>,
    accumulate<Tile<T, kVectors>, Compute<T>, kVectors, kShared>};

// The steps are pointers, so that this is compiled once for each tile.
template <class T, int kVectors>
__attribute__((noinline)) void spmm_tiles(const SpmmProblem<T>& problem,
                                          const SharedSteps<T, kVectors>& steps) {
    using C = Compute<T>;
    using TileOf = Tile<T, kVectors>;
    using E = typename TileOf::Element;
    using W = typename TileOf::Weight;
    constexpr int64_t kTile = TileOf::kTokens;
    const Lists& lists = problem.lists;
    const Schedule& schedule = problem.schedule;
    const int64_t size = lists.out_block;
    const int64_t outputs = lists.rows * size;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t weight_count = schedule.entry_starts[schedule.panels * lists.rows] * size;
    const int64_t tiles = (problem.tokens + kTile - 1) / kTile;
    const bool one_panel = schedule.panels == 1;
    const int64_t tile_features = std::min(schedule.panel_features, features);
    // Outputs leave in chunks as soon as they are complete: after the last panel.
    const int64_t chunk = chunk_rows<C>(size, kTile);
    const int64_t out_rows = one_panel ? chunk * size : outputs;
    const bool in_place = std::is_same<T, W>::value && one_panel && !lists.source_rows && size == 1;
    const bool stream = kLineVectors == 1 &&
                        problem.tokens * outputs * int64_t{sizeof(T)} >= kStreamBytes &&
                        outputs * sizeof(T) % 64 == 0 && chunk * size * sizeof(T) % 64 == 0 &&
                        reinterpret_cast<uintptr_t>(problem.out) % 64 == 0;
    // With more threads than tiles, the rows of a tile are shared out as well.
    const int64_t chunks = (lists.rows + chunk - 1) / chunk;
    const int64_t shares =
        std::clamp<int64_t>((problem.threads + tiles - 1) / tiles, 1, std::max<int64_t>(1, chunks));
    const int64_t share_rows = (chunks + shares - 1) / shares * chunk;
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, tiles * shares));

    Arena arena;
    const size_t weights_at = arena.reserve<W>(in_place ? 0 : weight_count);
    const size_t bias_at = arena.reserve<C>(outputs);
    const size_t tile_at = arena.reserve<E>(threads * tile_features * kTile);
    const size_t out_at = arena.reserve<C>(threads * out_rows * kTile);
    arena.allocate();
    const W* weights = steps.weights_of(problem, in_place, arena.at<W>(weights_at));
    C* bias = arena.at<C>(bias_at);
    copy_bias(problem.bias, outputs, bias);

#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        E* tile = arena.at<E>(tile_at) + thread * tile_features * kTile;
        C* out = arena.at<C>(out_at) + thread * out_rows * kTile;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < tiles * shares; ++item) {
            const int64_t first = item / shares * kTile;
            const int64_t tokens = std::min(kTile, problem.tokens - first);
            const int64_t begin = item % shares * share_rows;
            const int64_t end = std::min(lists.rows, begin + share_rows);
            for (int64_t p = 0; p < schedule.panels && begin < end; ++p) {
                const int64_t feature = p * schedule.panel_features;
                TileOf::pack(problem.in, first, tokens, feature,
                             std::min(tile_features, features - feature), tile);
                for (int64_t r = begin; r < end; r += chunk) {
                    const int64_t rows = std::min(end - r, chunk);
                    const int64_t* starts = schedule.entry_starts + p * lists.rows + r;
                    C* to = one_panel ? out : out + r * size * kTile;
                    steps.accumulate(tile, starts, rows, size, schedule.local + *starts,
                                     weights + *starts * size, p == 0 ? bias + r * size : nullptr,
                                     to);
                    if (p + 1 == schedule.panels) {
                        TileOf::unpack(to, problem.out, outputs, first, tokens, r * size,
                                       rows * size, stream);
                    }
                }
            }
        }
        stream_fence();
    }
}

// The weights of lists whose blocks are single weights, and what they meet.
template <class T>
struct WeightLists {
    using C = Compute<T>;
    const Lists& lists;
    const T* values;
    const C* in;

    C product(int64_t at) const {
        return to_compute(values[lists.block_id(at)]) * in[lists.columns[at]];
    }
    // Of kLanes weights.
    inline __attribute__((always_inline)) Vec<C> products(int64_t at) const {
        Vec<C> weights = {};
        if (!lists.source_rows) {
            weights = load_user(values + at);
        } else {
            int32_t ids[kLanes<C>];
            for (int lane = 0; lane < kLanes<C>; ++lane) {
                ids[lane] = static_cast<int32_t>(lists.block_id(at + lane));
            }
            if constexpr (std::is_same<T, C>::value) {
                weights = load_places(values, ids);
            } else {
                for (int lane = 0; lane < kLanes<C>; ++lane) {
                    weights[lane] = to_compute(values[ids[lane]]);
                }
            }
        }
        return weights * load_places(in, lists.columns + at);
    }
};

// out[r] = bias[r] + sum over row r's weights of weight * in[column].
template <class T>
__attribute__((noinline)) void dot_rows(const WeightLists<T>& weights, int64_t first, int64_t last,
                                        const T* bias, T* out) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    const Lists& lists = weights.lists;
    const int64_t count = lists.end(lists.rows - 1);
    const auto row = [&](int64_t r) __attribute__((always_inline)) {
        Vec<C> sum = {};
        int64_t at = lists.begin(r);
        const int64_t end = lists.end(r);
        for (; at + kN <= end; at += kN) sum += weights.products(at);
        if (at < end) {
            if (at + kN <= count) {  // the next row's, and then not counted
                return sum + first_lanes<C>(weights.products(at), end - at);
            }
            for (int lane = 0; at < end; ++at, ++lane) {
                sum[lane] += weights.product(at);
            }
        }
        return sum;
    };
    const bool halves = !lists.offsets && 2 * lists.per_row == kN;
    for (int64_t r = first; r < last; r += kN) {
        Vec<C> sums;
        if (halves && r + kN <= last) {  // a vector holds two rows
            Vec<C> pairs[kN / 2];
            SK_UNROLL
            for (int i = 0; i < kN / 2; ++i) {
                pairs[i] = weights.products((r + 2 * i) * lists.per_row);
            }
            sums = sum_each<C>([&](auto i) __attribute__((always_inline)) {
                const Vec<C> lower = first_lanes<C>(pairs[i / 2], kN / 2);
                return i % 2 == 0 ? lower : without<C>(pairs[i / 2], lower);
            });
        } else {  // past the end, the last row again, so that every sum is taken in the same order
            Vec<C> each[kN];
            for (int i = 0; i < kN; ++i) each[i] = row(std::min(r + i, last - 1));
            sums = sum_each<C>([&](auto i) __attribute__((always_inline)) { return each[i]; });
        }
        if (r + kN <= last) {
            if (bias) sums += load_user(bias + r);
            store_user(out + r, sums);
        } else {
            for (int64_t i = 0; r + i < last; ++i) {
                const C b = bias ? to_compute(bias[r + i]) : C(0);
                out[r + i] = from_compute<T>(sums[i] + b);
            }
        }
    }
}

// The tokens as rows of `features` in the type that they are computed in.
template <class T>
void copy_tokens(const Matrix<const T>& source, int64_t tokens, int64_t features, Compute<T>* to) {
    for (int64_t m = 0; m < tokens; ++m) {
        const T* from = source.data + m * source.row_stride;
        for (int64_t f = 0; f < features; ++f) {
            to[m * features + f] = to_compute(from[f * source.col_stride]);
        }
    }
}

// Calls `run(first, last)` for each thread's share of `count`. One thread does without OpenMP,
// whose barrier wakes the threads that do not exist by a call of the system.
template <class Run>
void share(int64_t count, int threads, const Run& run) {
    if (threads == 1) return run(int64_t{0}, count);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int thread = 0; thread < threads; ++thread) {
        run(count * thread / threads, count * (thread + 1) / threads);
    }
}

// Rows first to last of the outputs, for all tokens, whose inputs are `in`.
template <class T>
void dot_blocks(const SpmmProblem<T>& problem, const Compute<T>* in, int64_t first, int64_t last) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const int64_t outputs = lists.rows * lists.out_block;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t block_size = int64_t{lists.out_block} * lists.in_block;
    for (int64_t r = first; r < last; ++r) {
        const int64_t begin = lists.begin(r), end = lists.end(r);
        for (int64_t a = 0; a < lists.out_block; ++a) {
            const int64_t n = r * lists.out_block + a;
            for (int64_t m = 0; m < problem.tokens; ++m) {
                const C* x = in + m * features;
                C sum[4] = {problem.bias ? to_compute(problem.bias[n]) : C(0)};
                for (int64_t i = begin; i < end; ++i) {
                    const T* w =
                        problem.values + lists.block_id(i) * block_size + a * lists.out_stride;
                    const C* xb = x + static_cast<int64_t>(lists.columns[i]) * lists.in_block;
                    for (int64_t b = 0; b < lists.in_block; ++b) {
                        sum[b & 3] += to_compute(w[b * lists.in_stride]) * xb[b];
                    }
                }
                problem.out[m * outputs + n] =
                    from_compute<T>((sum[0] + sum[1]) + (sum[2] + sum[3]));
            }
        }
    }
}

// A few tokens: a dot product for each output, no tile.
template <class T>
void spmm_dots(const SpmmProblem<T>& problem) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const int64_t features = lists.cols * lists.in_block;
    Arena arena;
    const size_t in_at = arena.reserve<C>(problem.tokens * features);
    arena.allocate();
    C* in = arena.at<C>(in_at);
    copy_tokens(problem.in, problem.tokens, features, in);
    share(lists.rows, problem.threads, [&](int64_t first, int64_t last) {
        if (lists.out_block * lists.in_block > 1) return dot_blocks(problem, in, first, last);
        for (int64_t m = 0; m < problem.tokens; ++m) {
            dot_rows<T>({lists, problem.values, in + m * features}, first, last, problem.bias,
                        problem.out + m * lists.rows);
        }
    });
}

// The widest tile, of kVectors vectors or fewer, that fits its cache and still gives every thread
// one. Each token's sum is the same in all of them. float64 is there to check gradients: one tile.
template <class T, int kVectors, int kShared>
void spmm_fitting(const SpmmProblem<T>& problem) {
    constexpr int kNarrowest = std::is_same<T, Bf16>::value ? 2 : 1;
    if constexpr (kVectors > kNarrowest && !std::is_same<T, double>::value) {
        using TileOf = Tile<T, kVectors>;
        const int64_t features =
            std::min(problem.schedule.panel_features, problem.lists.cols * problem.lists.in_block);
        const int64_t bytes =
            features * TileOf::kTokens * int64_t{sizeof(typename TileOf::Element)};
        if (bytes > tile_bytes() ||
            problem.tokens <= TileOf::kTokens / 2 * (2 * problem.threads - 1)) {
            return spmm_fitting<T, kVectors / 2, kShared>(problem);
        }
    }
    spmm_tiles<T, kVectors>(problem, kSharedSteps<T, kVectors, kShared>);
}

template <class T>
void spmm(const SpmmProblem<T>& problem) {
    if (problem.tokens == 0) return;
    const Lists& lists = problem.lists;
    const bool unshared = lists.out_block * lists.in_block == 1;
    if (problem.tokens <= (unshared ? kDotTokensUnshared : kDotTokens)) return spmm_dots(problem);
    // As wide as the sums fit the registers.
    constexpr bool kMany = kRegisters > 16;
    switch (shared_outputs(lists.out_block)) {
        case 4:
            return spmm_fitting<T, (kMany ? 4 : 2), 4>(problem);
        case 2:
            return spmm_fitting<T, 4, 2>(problem);
        default:
            return spmm_fitting<T, (kMany ? 8 : 4), 1>(problem);
    }
}

}  // namespace
}  // namespace sk
