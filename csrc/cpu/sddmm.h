// dW[r, c] = sum over tokens of dY[m, r] * X[m, c], at the kept blocks only.
#pragma once

#include "spmm.h"

namespace sk {
namespace {

// Tokens are cut at fixed places, whatever the number of threads, and the parts added in order.
constexpr int64_t kPartTokens = 512;
constexpr int64_t kMaxParts = 32;
// The sums of all parts take at most this much memory: many weights have fewer parts.
constexpr int64_t kSumBytes = int64_t{48} << 20;
// But no fewer than these, because rounding errors grow with the length of a part.
constexpr int64_t kMinParts = 4;
// Up to this many tokens no tiles are packed.
constexpr int64_t kFewTokens = 8;
// Rows of dY that are packed at a time.
constexpr int64_t kRowBytes = 64 << 10;
// Vectors of partial sums kept before their lanes are added up.
constexpr int64_t kPartials = 64;

template <class T>
struct SddmmProblem {
    Lists lists;
    Schedule schedule;
    Matrix<const T> grad_output;  // (tokens, lists.rows * out_block)
    Matrix<const T> input;        // (tokens, lists.cols * in_block)
    T* grad_values;               // stored blocks
    int64_t tokens;
    int threads;
};

// Consecutive entries of a panel, and their share of the sums. These lie entry after entry, and in
// each as [group of `order` outputs][feature][output].
template <class Element, class C>
struct Entries {
    const int64_t* starts;  // (count + 1) first features, as in the schedule
    int64_t count;
    const int32_t* local;  // of the first entry
    const Element* panel;  // tile of X
    const Element* rows;   // tile of dY
    C* sums;               // of the first entry
    Prefetch ahead;        // the rows of dY that come next

    int64_t features() const { return starts[count] - starts[0]; }
};

// A tile's share of dW can be computed in three ways, each a class: `pack_input` and `pack_rows`
// say how X and dY lie in the tile, `multiply` adds the products of some entries. Inner loops are
// functions of their own, for the sake of their registers (see `accumulate`).

// sums[i] += the dot product of row(i) and the feature at x(i), for kLanes weights. row(i, r) is
// the r-th raw vector of the row.
template <class TileOf, class C, class Row, class X>
inline __attribute__((always_inline)) void add_dots(C* sums, const Row& row, const X& x) {
    constexpr int64_t kRawTokens = TileOf::kTokens / TileOf::kRaw;
    const Vec<C> dots = sum_each<C>([&](auto i) __attribute__((always_inline)) {
        const typename TileOf::Element* const from = x(i);
        Vec<C> sum = {};
        SK_UNROLL
        for (int r = 0; r < TileOf::kRaw; ++r) {
            TileOf::add_products(sum, row(i, r), TileOf::load_raw(from + r * kRawTokens));
        }
        return sum;
    });
    store_user(sums, load_user(sums) + dots);
}

// The same for kRows rows of kLanes / kRows weights each.
template <class TileOf, class C, int kRows>
__attribute__((noinline)) void multiply_short_rows(Entries<typename TileOf::Element, C> entries) {
    constexpr int kN = kLanes<C>;
    constexpr int64_t kRawTokens = TileOf::kTokens / TileOf::kRaw;
    for (int64_t e = 0; e < entries.count; e += kRows) {
        entries.ahead.some();
        add_dots<TileOf>(
            entries.sums,
            [&](auto i, auto r) __attribute__((always_inline)) {
                return TileOf::load_raw(entries.rows + i / (kN / kRows) * TileOf::kTokens +
                                        r * kRawTokens);
            },
            [&](auto i) __attribute__((always_inline)) {
                return entries.panel + static_cast<int64_t>(entries.local[i]) * TileOf::kTokens;
            });
        entries.local += kN;
        entries.sums += kN;
        entries.rows += kRows * TileOf::kTokens;
    }
}

// The same for kLanes weights of which each has a row of its own.
template <class TileOf, class C>
__attribute__((noinline)) void add_single_dots(C* sums, const typename TileOf::Element* const* rows,
                                               const typename TileOf::Element* const* x) {
    constexpr int64_t kRawTokens = TileOf::kTokens / TileOf::kRaw;
    add_dots<TileOf>(
        sums,
        [&](auto i, auto r)
            __attribute__((always_inline)) { return TileOf::load_raw(rows[i] + r * kRawTokens); },
        [&](auto i) __attribute__((always_inline)) { return x[i]; });
}

// The same for rows of any length. What of a row is too short for a group waits for the next row.
template <class TileOf, class C>
__attribute__((noinline)) void multiply_rows(Entries<typename TileOf::Element, C> entries,
                                             int64_t out_block) {
    using Element = typename TileOf::Element;
    constexpr int kN = kLanes<C>;
    constexpr int64_t kRawTokens = TileOf::kTokens / TileOf::kRaw;
    const Element* rows = entries.rows;
    const int32_t* local = entries.local;
    C* sums = entries.sums;
    const Element *waiting_x[kN], *waiting_row[kN];
    int waiting = 0;
    for (int64_t e = 0; e < entries.count; ++e) {
        const int64_t count = entries.starts[e + 1] - entries.starts[e];
        for (int64_t a = 0; a < out_block; ++a, rows += TileOf::kTokens) {
            int64_t j = 0;
            const auto wait = [&](int64_t end) __attribute__((always_inline)) {
                for (; j < end; ++j, ++waiting) {
                    waiting_x[waiting] =
                        entries.panel + static_cast<int64_t>(local[j]) * TileOf::kTokens;
                    waiting_row[waiting] = rows;
                }
            };
            if (waiting > 0) {
                wait(std::min<int64_t>(count, kN - waiting));
                if (waiting == kN) {
                    entries.ahead.some();
                    add_single_dots<TileOf>(sums, waiting_row, waiting_x);
                    sums += kN;
                    waiting = 0;
                }
            }
            if (j + kN <= count) {
                typename TileOf::Raw row[TileOf::kRaw];
                SK_UNROLL
                for (int r = 0; r < TileOf::kRaw; ++r) {
                    row[r] = TileOf::load_raw(rows + r * kRawTokens);
                }
                for (; j + kN <= count; j += kN, sums += kN) {
                    entries.ahead.some();
                    add_dots<TileOf>(
                        sums, [&](auto, auto r) __attribute__((always_inline)) { return row[r]; },
                        [&](auto i) __attribute__((always_inline)) {
                            return entries.panel +
                                   static_cast<int64_t>(local[j + i]) * TileOf::kTokens;
                        });
                }
            }
            wait(count);
        }
        local += count;
    }
    if (waiting > 0) {
        for (int i = waiting; i < kN; ++i) {
            waiting_x[i] = waiting_x[0];
            waiting_row[i] = waiting_row[0];
        }
        C last[kN] = {};
        add_single_dots<TileOf>(last, waiting_row, waiting_x);
        for (int i = 0; i < waiting; ++i) sums[i] += last[i];
    }
}

// X and dY packed alike, for dot products along the tokens.
template <class T, int kVectors>
struct TokenTiles {
    using Packing = TokenTiles;
    using C = Compute<T>;
    using TileOf = Tile<T, kVectors>;
    using Element = typename TileOf::Element;
    static constexpr int64_t kTokens = TileOf::kTokens;

    static void pack_input(const Matrix<const T>& x, int64_t first, int64_t tokens, int64_t feature,
                           int64_t features, Element* to) {
        TileOf::pack(x, first, tokens, feature, features, to);
    }
    static void pack_rows(const Matrix<const T>& dy, const Lists& lists, int64_t first,
                          int64_t tokens, int64_t row, int64_t rows, Element* to) {
        TileOf::pack(dy, first, tokens, row * lists.out_block, rows * lists.out_block, to);
    }
};

// Outputs that share nothing: the partial sums of kLanes weights never leave the registers.
template <class T, int kVectors>
struct Rows : TokenTiles<T, kVectors> {
    using typename TokenTiles<T, kVectors>::C;
    using typename TokenTiles<T, kVectors>::TileOf;
    using typename TokenTiles<T, kVectors>::Element;

    static int64_t order(const Lists&) { return 1; }
    static void multiply(const Lists& lists, const Entries<Element, C>& entries) {
        constexpr int kN = kLanes<C>;
        const auto rows_of = [&](int64_t count) {  // whether the entries are groups of such rows
            return lists.out_block == 1 && entries.count * count == entries.features() &&
                   !lists.offsets && lists.per_row * lists.in_block == count &&
                   entries.count % (kN / count) == 0;
        };
        if (rows_of(kN / 2)) return multiply_short_rows<TileOf, C, 2>(entries);
        if constexpr (kN >= 4) {
            if (rows_of(kN / 4)) return multiply_short_rows<TileOf, C, 4>(entries);
        }
        multiply_rows<TileOf>(entries, lists.out_block);
    }
};

template <class TileOf, class C, int kShared>
__attribute__((noinline)) void multiply_shared_rows(Entries<typename TileOf::Element, C> entries,
                                                    int64_t out_block) {
    constexpr int kN = kLanes<C>;
    constexpr int64_t kRawTokens = TileOf::kTokens / TileOf::kRaw;
    alignas(64) C partial[kPartials * kN];  // a vector for each of the next weights
    int64_t filled = 0;
    C* sums = entries.sums;
    const auto flush = [&] {
        int64_t i = 0;
        for (; i + kN <= filled; i += kN, sums += kN) {
            const C* from = partial + i * kN;
            store_user(sums, load_user(sums) +
                                 sum_each<C>([&](auto row) { return load(from + row * kN); }));
        }
        for (; i < filled; ++i, ++sums) {
            for (int lane = 0; lane < kN; ++lane) *sums += partial[i * kN + lane];
        }
        filled = 0;
    };
    for (int64_t e = 0; e < entries.count; ++e) {
        const int64_t count = entries.starts[e + 1] - entries.starts[e];
        for (int64_t group = 0; group < out_block; group += kShared) {
            typename TileOf::Raw row[kShared][TileOf::kRaw];
            SK_UNROLL
            for (int a = 0; a < kShared; ++a) {
                SK_UNROLL
                for (int r = 0; r < TileOf::kRaw; ++r) {
                    row[a][r] =
                        TileOf::load_raw(entries.rows + a * TileOf::kTokens + r * kRawTokens);
                }
            }
            entries.rows += kShared * TileOf::kTokens;
            for (int64_t j = 0; j < count;) {
                const int64_t end = std::min(count, j + (kPartials - filled) / kShared);
                C* to = partial + filled * kN;
                filled += (end - j) * kShared;
                for (; j < end; ++j) {
                    const auto* x =
                        entries.panel + static_cast<int64_t>(entries.local[j]) * TileOf::kTokens;
                    SK_UNROLL
                    for (int a = 0; a < kShared; ++a) {
                        Vec<C> sum = {};
                        SK_UNROLL
                        for (int r = 0; r < TileOf::kRaw; ++r) {
                            TileOf::add_products(sum, row[a][r],
                                                 TileOf::load_raw(x + r * kRawTokens));
                        }
                        store(to, sum);
                        to += kN;
                    }
                }
                if (filled == kPartials) flush();
            }
        }
        entries.local += count;
    }
    flush();
}

// kShared outputs that share their inputs: the rows of all of them stay in registers.
template <class T, int kVectors, int kShared>
struct SharedRows : TokenTiles<T, kVectors> {
    using typename TokenTiles<T, kVectors>::C;
    using typename TokenTiles<T, kVectors>::Element;

    static int64_t order(const Lists&) { return kShared; }
    static void multiply(const Lists& lists, const Entries<Element, C>& entries) {
        multiply_shared_rows<Tile<T, kVectors>, C, kShared>(entries, lists.out_block);
    }
};
template <class T, int kVectors>
using PairedRows = SharedRows<T, kVectors, 2>;
template <class T, int kVectors>
using FourRows = SharedRows<T, kVectors, 4>;

// sums[feature][output] += sum over tokens of x[feature][token] * row[token][output], for kFeatures
// inputs and kOutputs vectors of outputs at a time.
template <class C, int kTile, int kFeatures, int kOutputs>
__attribute__((noinline)) void multiply_block_row(const C* row, int64_t out_block, const C* panel,
                                                  const int32_t* local, int64_t count, C* sums) {
    constexpr int kN = kLanes<C>;
    for (int64_t j = 0; j < count; j += kFeatures) {
        const C* x[kFeatures];
        for (int i = 0; i < kFeatures; ++i) {  // past the end, the last input again
            x[i] = panel + static_cast<int64_t>(local[std::min(j + i, count - 1)]) * kTile;
        }
        for (int64_t a = 0; a < out_block; a += kOutputs * kN) {
            Vec<C> acc[kFeatures][kOutputs] = {};
            const C* token = row + a;
            for (int m = 0; m < kTile; ++m, token += out_block) {
                Vec<C> d[kOutputs];
                SK_UNROLL
                for (int o = 0; o < kOutputs; ++o) {
                    d[o] = load(token + o * kN);
                }
                SK_UNROLL
                for (int i = 0; i < kFeatures; ++i) {
                    const Vec<C> w = splat<C>(x[i][m]);
                    SK_UNROLL
                    for (int o = 0; o < kOutputs; ++o) {
                        acc[i][o] += w * d[o];
                    }
                }
            }
            SK_UNROLL
            for (int i = 0; i < kFeatures; ++i) {
                if (j + i >= count) continue;
                SK_UNROLL
                for (int o = 0; o < kOutputs; ++o) {
                    C* to = sums + (j + i) * out_block + a + o * kN;
                    store(to, load(to) + acc[i][o]);
                }
            }
        }
    }
}

// Blocks of whole vectors of outputs: an outer product for each token, with nothing to add up
// across lanes.
template <class T, int kVectors>
struct Outer {
    using Packing = Outer;
    using C = Compute<T>;
    using Element = C;
    static constexpr int64_t kTokens = kVectors * kLanes<C>;

    static int64_t order(const Lists& lists) { return lists.out_block; }
    static void pack_input(const Matrix<const T>& x, int64_t first, int64_t tokens, int64_t feature,
                           int64_t features, C* to) {
        pack_tile<T, kVectors>(x, first, tokens, feature, features, to);
    }
    // [block-row][token][output]
    static void pack_rows(const Matrix<const T>& dy, const Lists& lists, int64_t first,
                          int64_t tokens, int64_t row, int64_t rows, C* to) {
        const int64_t size = lists.out_block;
        for (int64_t m = 0; m < kTokens; ++m) {
            const T* from = dy.data + (first + m) * dy.row_stride + row * size * dy.col_stride;
            for (int64_t r = 0; r < rows; ++r) {
                C* block = to + (r * kTokens + m) * size;
                for (int64_t a = 0; a < size; a += kLanes<C>) {
                    if (m >= tokens) {
                        store(block + a, Vec<C>{});
                    } else if (dy.col_stride == 1) {
                        store(block + a, load_user(from + r * size + a));
                    } else {
                        for (int64_t i = a; i < a + kLanes<C>; ++i) {
                            block[i] = to_compute(from[(r * size + i) * dy.col_stride]);
                        }
                    }
                }
            }
        }
    }
    static void multiply(const Lists& lists, const Entries<C, C>& given) {
        constexpr int kN = kLanes<C>;
        Entries<C, C> entries = given;
        const int64_t size = lists.out_block;
        for (int64_t e = 0; e < entries.count; ++e) {
            const int64_t count = entries.starts[e + 1] - entries.starts[e];
            if (size % (2 * kN) == 0) {
                multiply_block_row<C, kTokens, 4, 2>(entries.rows, size, entries.panel,
                                                     entries.local, count, entries.sums);
            } else {
                multiply_block_row<C, kTokens, 16, 1>(entries.rows, size, entries.panel,
                                                      entries.local, count, entries.sums);
            }
            entries.rows += size * kTokens;
            entries.local += count;
            entries.sums += count * size;
        }
    }
};

// Adds up the parts' sums, which lie as in Entries, and stores them in the order of the values.
template <class T>
void finish_sums(const SddmmProblem<T>& problem, int64_t order, Compute<T>* sums, int64_t parts) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    constexpr int64_t kStep = 1024;
    const Lists& lists = problem.lists;
    const Schedule& schedule = problem.schedule;
    const int64_t size = lists.out_block, block_size = size * lists.in_block;
    const int64_t entries = schedule.panels * lists.rows;
    const int64_t weights = schedule.entry_starts[entries] * size;
    const bool in_order = schedule.panels == 1 && !lists.source_rows &&
                          (size == 1 || (order == size && lists.in_block == 1));
    if (in_order || parts > 1) {
#pragma omp parallel for num_threads(problem.threads) schedule(static)
        for (int64_t begin = 0; begin < weights; begin += kStep) {
            const int64_t end = std::min(weights, begin + kStep);
            int64_t i = begin;
            for (; i + kN <= end; i += kN) {
                Vec<C> sum = load_user(sums + i);
                for (int64_t p = 1; p < parts; ++p) sum += load_user(sums + p * weights + i);
                if (in_order)
                    store_user(problem.grad_values + i, sum);
                else
                    store_user(sums + i, sum);
            }
            for (; i < end; ++i) {
                for (int64_t p = 1; p < parts; ++p) sums[i] += sums[p * weights + i];
                if (in_order) problem.grad_values[i] = from_compute<T>(sums[i]);
            }
        }
    }
    if (in_order) return;
#pragma omp parallel for num_threads(problem.threads) schedule(static)
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t start = schedule.entry_starts[e];
        const int64_t count = schedule.entry_starts[e + 1] - start;
        const C* from = sums + start * size;
        for (int64_t group = 0; group < size; group += order) {
            const int32_t* id = schedule.block_ids + start / lists.in_block;
            for (int64_t j = 0; j < count; j += lists.in_block, ++id) {
                T* block = problem.grad_values + *id * block_size + group * lists.out_stride;
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    for (int64_t a = 0; a < order; ++a) {
                        block[a * lists.out_stride + b * lists.in_stride] =
                            from_compute<T>(*from++);
                    }
                }
            }
        }
    }
}

// `order` and `multiply` are those of a way that packs by `Packing`: a pointer, so that this is
// compiled once for each packing.
template <class T, class Packing, class E = typename Packing::Element>
__attribute__((noinline)) void sddmm_tiles(const SddmmProblem<T>& problem, int64_t order,
                                           void (*multiply)(const Lists&,
                                                            const Entries<E, Compute<T>>&)) {
    using C = Compute<T>;
    constexpr int64_t kTile = Packing::kTokens;
    const Lists& lists = problem.lists;
    const Schedule& schedule = problem.schedule;
    const int64_t size = lists.out_block;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t entries = schedule.panels * lists.rows;
    const int64_t weights = schedule.entry_starts[entries] * size;
    const int64_t tiles = (problem.tokens + kTile - 1) / kTile;
    const int64_t affordable = std::clamp<int64_t>(
        kSumBytes / std::max<int64_t>(1, weights * int64_t{sizeof(C)}), kMinParts, kMaxParts);
    const int64_t parts = std::clamp<int64_t>(problem.tokens / kPartTokens, 1, affordable);
    const int64_t chunk = std::max<int64_t>(1, kRowBytes / (kTile * int64_t{sizeof(E)} * size));
    const int64_t chunks = (lists.rows + chunk - 1) / chunk;
    // With more threads than parts, the rows of a part are shared out as well.
    const int64_t shares = std::clamp<int64_t>((problem.threads + parts - 1) / parts, 1, chunks);
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, parts * shares));
    const int64_t share_rows = (chunks + shares - 1) / shares * chunk;
    // Several panels meet the same rows of dY, which are then kept.
    const int64_t packed_rows = (schedule.panels == 1 ? chunk : share_rows) * size;
    const int64_t tile_features = std::min(schedule.panel_features, features);

    Arena arena;
    const size_t sums_at = arena.reserve<C>(parts * weights);
    const size_t tile_at = arena.reserve<E>(threads * tile_features * kTile);
    const size_t rows_at = arena.reserve<E>(threads * packed_rows * kTile);
    arena.allocate();
    C* sums = arena.at<C>(sums_at);

#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        E* tile = arena.at<E>(tile_at) + thread * tile_features * kTile;
        E* packed = arena.at<E>(rows_at) + thread * packed_rows * kTile;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < parts * shares; ++item) {
            const int64_t part = item / shares;
            const int64_t begin = item % shares * share_rows;
            const int64_t end = std::min(lists.rows, begin + share_rows);
            C* part_sums = sums + part * weights;
            for (int64_t p = 0; p < schedule.panels && begin < end; ++p) {
                const int64_t* starts = schedule.entry_starts + p * lists.rows;
                std::fill(part_sums + starts[begin] * size, part_sums + starts[end] * size, C(0));
            }
            const int64_t last_tile = begin < end ? tiles * (part + 1) / parts : 0;
            for (int64_t t = tiles * part / parts; t < last_tile; ++t) {
                const int64_t first = t * kTile;
                const int64_t tokens = std::min(kTile, problem.tokens - first);
                for (int64_t p = 0; p < schedule.panels; ++p) {
                    const int64_t feature = p * schedule.panel_features;
                    Packing::pack_input(problem.input, first, tokens, feature,
                                        std::min(tile_features, features - feature), tile);
                    for (int64_t r = begin; r < end; r += chunk) {
                        const int64_t count = std::min(end - r, chunk);
                        const int64_t next = std::min(end - r - count, chunk);
                        E* rows = packed + (schedule.panels == 1 ? 0 : (r - begin) * size * kTile);
                        if (p == 0) {
                            Packing::pack_rows(problem.grad_output, lists, first, tokens, r, count,
                                               rows);
                        }
                        const int64_t* starts = schedule.entry_starts + p * lists.rows + r;
                        Entries<E, C> now{starts, count, schedule.local + *starts,
                                          tile,   rows,  part_sums + *starts * size,
                                          {}};
                        if (p == 0) {
                            now.ahead =
                                Prefetch(problem.grad_output, first, tokens, (r + count) * size,
                                         next * size, now.features() * size / kLanes<C>);
                        }
                        multiply(lists, now);
                    }
                }
            }
        }
    }

    finish_sums(problem, order, sums, parts);
}

// to[i] = sum over tokens of dy[token] * x[token][columns[i]], for a row of `count` weights.
template <class T>
__attribute__((noinline)) void outer_row(const Compute<T>* dy, int64_t dy_stride,
                                         const Compute<T>* x, int64_t x_stride, int64_t tokens,
                                         const int32_t* columns, int64_t count, T* to) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    int64_t i = 0;
    for (; i + kN <= count; i += kN) {
        Vec<C> sum = {};
        for (int64_t m = 0; m < tokens; ++m) {
            sum += splat<C>(dy[m * dy_stride]) * load_places(x + m * x_stride, columns + i);
        }
        store_user(to + i, sum);
    }
    for (; i < count; ++i) {
        C sum = C(0);
        for (int64_t m = 0; m < tokens; ++m)
            sum += dy[m * dy_stride] * x[m * x_stride + columns[i]];
        to[i] = from_compute<T>(sum);
    }
}

// A few tokens: the gradient is an outer product of a few rows, one pass over the values.
template <class T>
void sddmm_few(const SddmmProblem<T>& problem) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const int64_t outputs = lists.rows * lists.out_block;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t block_size = int64_t{lists.out_block} * lists.in_block;
    Arena arena;
    const size_t dy_at = arena.reserve<C>(problem.tokens * outputs);
    const size_t x_at = arena.reserve<C>(problem.tokens * features);
    arena.allocate();
    C* dy = arena.at<C>(dy_at);
    C* x = arena.at<C>(x_at);
    copy_tokens(problem.grad_output, problem.tokens, outputs, dy);
    copy_tokens(problem.input, problem.tokens, features, x);
#pragma omp parallel for num_threads(problem.threads) schedule(static)
    for (int64_t r = 0; r < lists.rows; ++r) {
        const int64_t begin = lists.begin(r), end = lists.end(r);
        if (block_size == 1) {
            outer_row<T>(dy + r, outputs, x, features, problem.tokens, lists.columns + begin,
                         end - begin, problem.grad_values + begin);
            continue;
        }
        for (int64_t i = begin; i < end; ++i) {
            T* block = problem.grad_values + i * block_size;
            for (int64_t a = 0; a < lists.out_block; ++a) {
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    const int64_t n = r * lists.out_block + a;
                    const int64_t k = static_cast<int64_t>(lists.columns[i]) * lists.in_block + b;
                    C sum = C(0);
                    for (int64_t m = 0; m < problem.tokens; ++m) {
                        sum += dy[m * outputs + n] * x[m * features + k];
                    }
                    block[a * lists.out_stride + b * lists.in_stride] = from_compute<T>(sum);
                }
            }
        }
    }
}

// The widest tile, of kVectors vectors or fewer, that fits its cache and is not mostly padding.
template <template <class, int> class Kernel, int kVectors, class T>
void sddmm_fitting(const SddmmProblem<T>& problem) {
    using K = Kernel<T, kVectors>;
    if constexpr (kVectors > 2 && !std::is_same<T, double>::value) {
        const int64_t features =
            std::min(problem.schedule.panel_features, problem.lists.cols * problem.lists.in_block);
        const int64_t bytes = features * K::kTokens * int64_t{sizeof(typename K::Element)};
        if (bytes > tile_bytes() || 2 * problem.tokens <= K::kTokens) {
            return sddmm_fitting<Kernel, kVectors / 2>(problem);
        }
    }
    sddmm_tiles<T, typename K::Packing>(problem, K::order(problem.lists), K::multiply);
}

template <class T>
void sddmm(const SddmmProblem<T>& problem) {
    constexpr int kN = kLanes<Compute<T>>;
    // bfloat16 holds two vectors of tokens in one.
    constexpr int kNarrow = std::is_same<T, Compute<T>>::value ? 1 : 2;
    if (problem.tokens <= kFewTokens) return sddmm_few(problem);
    // Where pairs of tokens are multiplied at once, dot products are faster than outer products.
    constexpr bool kPairs = kNarrow == 2 && kMultipliesBf16;
    if (!kPairs && problem.lists.out_block % kN == 0) return sddmm_fitting<Outer, 4>(problem);
    switch (shared_outputs(problem.lists.out_block)) {
        case 4:  // as wide as the rows of 4 outputs fit the registers
            return sddmm_fitting<FourRows, (16 < kRegisters ? 4 : 2) * kNarrow>(problem);
        case 2:
            return sddmm_fitting<PairedRows, 4 * kNarrow>(problem);
        default:  // beside a row, a vector for each weight of a group
            return sddmm_fitting<Rows, (8 + kN < kRegisters ? 8 : 4) * kNarrow>(problem);
    }
}

}  // namespace
}  // namespace sk
