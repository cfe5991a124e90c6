// dW[r, c] = sum over tokens of dY[m, r] * X[m, c], at the kept blocks only.
#pragma once

#include "gather.h"

namespace sk {
namespace {

// Tokens are cut at fixed places, whatever the number of threads, and the parts added in order.
constexpr int64_t kTilesPerPart = 8;
constexpr int64_t kMaxParts = 32;
// Up to this many tokens no tiles are packed.
constexpr int64_t kFewTokens = 8;
// Vectors of partial sums kept before their lanes are added up.
constexpr int64_t kPartials = 64;

template <class T>
struct GradWeightProblem {
    Lists lists;
    Schedule schedule;
    Matrix<const T> grad_output;  // (tokens, lists.rows * out_block)
    Matrix<const T> input;        // (tokens, lists.cols * in_block)
    T* grad_values;               // stored blocks
    int64_t tokens;
    int threads;
};

// A tile's share of dW can be computed in three ways, and each is a class: constructed for a tile,
// `multiply` adds the share of consecutive entries of a panel, whose rows of dY `pack` has laid
// out; `finish` ends the tile. Sums lie entry after entry, and in each as [group of `order`
// outputs] [feature][output]. Inner loops are functions of their own, for the sake of their
// registers (see `accumulate`).

// Collects one vector of partial sums for each weight and adds up their lanes, kLanes weights at a
// time.
template <class C>
struct PartialSums {
    C* vectors;  // (kPartials, lanes)
    C* sums;     // where the sum of vectors[0] goes
    int64_t filled = 0;

    void flush() {
        constexpr int kN = kLanes<C>;
        int64_t i = 0;
        for (; i + kN <= filled; i += kN) {
            C* to = sums + i;
            const C* rows = vectors + i * kN;
            store_user(
                to, load_user(to) + sum_each<C>([&](auto row) { return load(rows + row * kN); }));
        }
        for (; i < filled; ++i) {
            C sum = C(0);
            for (int lane = 0; lane < kN; ++lane) sum += vectors[i * kN + lane];
            sums[i] += sum;
        }
        sums += filled;
        filled = 0;
    }
};

template <class C, int kVectors, int kShared>
__attribute__((noinline)) void multiply_rows(const C* rows, const C* panel, const int32_t* local,
                                             int64_t count, PartialSums<C>& partial) {
    constexpr int kN = kLanes<C>;
    constexpr int kTile = kVectors * kN;
    Vec<C> row[kShared][kVectors];
#pragma GCC unroll 4
    for (int a = 0; a < kShared; ++a) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) row[a][v] = load(rows + a * kTile + v * kN);
    }
    while (count > 0) {
        const int64_t now = std::min(count, (kPartials - partial.filled) / kShared);
        C* to = partial.vectors + partial.filled * kN;
        for (int64_t j = 0; j < now; ++j) {
            const C* x = panel + static_cast<int64_t>(local[j]) * kTile;
#pragma GCC unroll 4
            for (int a = 0; a < kShared; ++a) {
                Vec<C> sum = row[a][0] * load(x);
#pragma GCC unroll 8
                for (int v = 1; v < kVectors; ++v) sum += row[a][v] * load(x + v * kN);
                store(to, sum);
                to += kN;
            }
        }
        partial.filled += now * kShared;
        if (partial.filled == kPartials) partial.flush();
        local += now;
        count -= now;
    }
}

// Rows of dY in registers, and a dot product with each of the inputs that they share.
template <class T, int kVectors, int kShared>
class Dots {
    using C = Compute<T>;
    static constexpr int kTile = kVectors * kLanes<C>;
    const GradWeightProblem<T>& problem_;
    PartialSums<C> partial_;

public:
    static constexpr int64_t kScratch = kPartials * kLanes<C>;
    static int64_t order(const Lists&) { return kShared; }
    Dots(const GradWeightProblem<T>& problem, C* sums, C* scratch)
        : problem_(problem), partial_{scratch, sums} {}
    void pack(int64_t first, int64_t tokens, int64_t row, int64_t rows, C* to) const {
        const int64_t size = problem_.lists.out_block;
        pack_tile<T, kVectors>(problem_.grad_output, first, tokens, row * size, rows * size, to);
    }
    void multiply(int64_t e, int64_t entries, const C* panel, const C* rows) {
        const Schedule& schedule = problem_.schedule;
        for (const int64_t end = e + entries; e < end; ++e) {
            const int64_t start = schedule.entry_starts[e];
            const int64_t count = schedule.entry_starts[e + 1] - start;
            for (int64_t a = 0; a < problem_.lists.out_block; a += kShared) {
                multiply_rows<C, kVectors, kShared>(rows, panel, schedule.local + start, count,
                                                    partial_);
                rows += kShared * kTile;
            }
        }
    }
    void finish() { partial_.flush(); }
};

// Whether rows are long enough for `Groups`: few lanes may be left over.
template <class C>
bool group_rows(const Lists& lists, const Schedule& schedule) {
    constexpr int64_t kN = kLanes<C>;
    const int64_t count = lists.per_row * lists.in_block;
    return lists.out_block == 1 && schedule.panels == 1 && count >= kN &&
           (count % kN == 0 || count >= 4 * kN);
}

// kLanes weights at a time. `starts` are the entries' first features, `local` and `sums` belong to
// the first of them.
template <class C, int kVectors>
__attribute__((noinline)) void multiply_groups(const C* rows, const int64_t* starts,
                                               int64_t entries, const C* panel,
                                               const int32_t* local, C* sums) {
    constexpr int kN = kLanes<C>;
    constexpr int kTile = kVectors * kN;
    for (int64_t e = 0; e < entries; ++e, rows += kTile) {
        Vec<C> row[kVectors];
        unroll<kVectors>([&](auto v)
                             __attribute__((always_inline)) { row[v] = load(rows + v * kN); });
        const auto group = [&](const int32_t* features) __attribute__((always_inline)) {
            return sum_each<C>([&](auto i) __attribute__((always_inline)) {
                const C* x = panel + static_cast<int64_t>(features[i]) * kTile;
                Vec<C> sum = row[0] * load(x);
                unroll<kVectors - 1>([&](auto v) __attribute__((always_inline)) {
                    sum += row[v + 1] * load(x + (v + 1) * kN);
                });
                return sum;
            });
        };
        int64_t left = starts[e + 1] - starts[e];
        for (; left >= kN; left -= kN, local += kN, sums += kN) {
            store_user(sums, load_user(sums) + group(local));
        }
        if (left > 0) {  // the last few, and the first of them again in the lanes left over
            int32_t features[kN];
            for (int64_t i = 0; i < kN; ++i) features[i] = local[i < left ? i : 0];
            C last[kN];
            store_user(last, group(features));
            for (int64_t i = 0; i < left; ++i) sums[i] += last[i];
            local += left;
            sums += left;
        }
    }
}

// The same for rows of many weights that share nothing: the partial sums of kLanes weights never
// leave the registers.
template <class T, int kVectors>
class Groups {
    using C = Compute<T>;
    const GradWeightProblem<T>& problem_;
    C* sums_;

public:
    static constexpr int64_t kScratch = 0;
    static int64_t order(const Lists&) { return 1; }
    Groups(const GradWeightProblem<T>& problem, C* sums, C*) : problem_(problem), sums_(sums) {}
    void pack(int64_t first, int64_t tokens, int64_t row, int64_t rows, C* to) const {
        pack_tile<T, kVectors>(problem_.grad_output, first, tokens, row, rows, to);
    }
    void multiply(int64_t e, int64_t entries, const C* panel, const C* rows) {
        const Schedule& schedule = problem_.schedule;
        const int64_t start = schedule.entry_starts[e];
        multiply_groups<C, kVectors>(rows, schedule.entry_starts + e, entries, panel,
                                     schedule.local + start, sums_ + start);
    }
    void finish() {}
};

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
                unroll<kOutputs>(
                    [&](auto o) __attribute__((always_inline)) { d[o] = load(token + o * kN); });
                unroll<kFeatures>([&](auto i) __attribute__((always_inline)) {
                    const Vec<C> w = splat<C>(x[i][m]);
                    unroll<kOutputs>([&](auto o)
                                         __attribute__((always_inline)) { acc[i][o] += w * d[o]; });
                });
            }
            unroll<kFeatures>([&](auto i) __attribute__((always_inline)) {
                if (j + i >= count) return;
                unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
                    C* to = sums + (j + i) * out_block + a + o * kN;
                    store(to, load(to) + acc[i][o]);
                });
            });
        }
    }
}

// Blocks of whole vectors of outputs: an outer product for each token, with nothing to add up
// across lanes.
template <class T, int kVectors>
class Outer {
    using C = Compute<T>;
    static constexpr int kTile = kVectors * kLanes<C>;
    const GradWeightProblem<T>& problem_;
    C* sums_;

public:
    static constexpr int64_t kScratch = 0;
    static int64_t order(const Lists& lists) { return lists.out_block; }
    Outer(const GradWeightProblem<T>& problem, C* sums, C*) : problem_(problem), sums_(sums) {}
    // [block-row][token][output]
    void pack(int64_t first, int64_t tokens, int64_t row, int64_t rows, C* to) const {
        const Matrix<const T>& dy = problem_.grad_output;
        const int64_t size = problem_.lists.out_block;
        for (int64_t m = 0; m < kTile; ++m) {
            const T* from = dy.data + (first + m) * dy.row_stride + row * size * dy.col_stride;
            for (int64_t r = 0; r < rows; ++r) {
                C* block = to + (r * kTile + m) * size;
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
    void multiply(int64_t e, int64_t entries, const C* panel, const C* rows) {
        constexpr int kN = kLanes<C>;
        const Schedule& schedule = problem_.schedule;
        const int64_t size = problem_.lists.out_block;
        for (const int64_t end = e + entries; e < end; ++e, rows += size * kTile) {
            const int64_t start = schedule.entry_starts[e];
            const int64_t count = schedule.entry_starts[e + 1] - start;
            if (size % (2 * kN) == 0) {
                multiply_block_row<C, kTile, 4, 2>(rows, size, panel, schedule.local + start, count,
                                                   sums_ + start * size);
            } else {
                multiply_block_row<C, kTile, 8, 1>(rows, size, panel, schedule.local + start, count,
                                                   sums_ + start * size);
            }
        }
    }
    void finish() {}
};

template <class T, int kVectors, class Kernel>
void grad_weight_tiles(const GradWeightProblem<T>& problem) {
    using C = Compute<T>;
    constexpr int64_t kTile = kVectors * kLanes<C>;
    const Lists& lists = problem.lists;
    const Schedule& schedule = problem.schedule;
    const int64_t outputs = lists.rows * lists.out_block;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t entries = schedule.panels * lists.rows;
    const int64_t weights = schedule.entry_starts[entries] * lists.out_block;
    const int64_t tiles = (problem.tokens + kTile - 1) / kTile;
    const int64_t parts = std::clamp<int64_t>(tiles / kTilesPerPart, 1, kMaxParts);
    const bool one_panel = schedule.panels == 1;
    const int64_t chunk = chunk_rows<C>(lists.out_block, kTile);
    const int64_t packed_rows = one_panel ? chunk * lists.out_block : outputs;
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, parts));

    Arena arena;
    const size_t sums_at = arena.reserve<C>(parts * weights);
    const size_t tile_at = arena.reserve<C>(threads * features * kTile);
    const size_t rows_at = arena.reserve<C>(threads * packed_rows * kTile);
    const size_t scratch_at = arena.reserve<C>(threads * Kernel::kScratch);
    arena.allocate();
    C* sums = arena.at<C>(sums_at);

#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* tile = arena.at<C>(tile_at) + thread * features * kTile;
        C* rows = arena.at<C>(rows_at) + thread * packed_rows * kTile;
        C* scratch = arena.at<C>(scratch_at) + thread * Kernel::kScratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; ++part) {
            C* part_sums = sums + part * weights;
            std::fill(part_sums, part_sums + weights, C(0));
            for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
                const int64_t first = t * kTile;
                const int64_t tokens = std::min(kTile, problem.tokens - first);
                pack_tile<T, kVectors>(problem.input, first, tokens, 0, features, tile);
                Kernel kernel(problem, part_sums, scratch);
                if (one_panel) {
                    for (int64_t r = 0; r < lists.rows; r += chunk) {
                        const int64_t end = std::min(lists.rows, r + chunk);
                        kernel.pack(first, tokens, r, end - r, rows);
                        kernel.multiply(r, end - r, tile, rows);
                    }
                } else {
                    kernel.pack(first, tokens, 0, lists.rows, rows);
                    for (int64_t p = 0; p < schedule.panels; ++p) {
                        const C* panel = tile + p * schedule.panel_features * kTile;
                        for (int64_t e = p * lists.rows; e < (p + 1) * lists.rows; ++e) {
                            const int64_t row = schedule.entry_rows[e];
                            if (row < 0) break;
                            kernel.multiply(e, 1, panel, rows + row * lists.out_block * kTile);
                        }
                    }
                }
                kernel.finish();
            }
        }
    }

    const int64_t block_size = int64_t{lists.out_block} * lists.in_block;
    const int64_t order = Kernel::order(lists);
#pragma omp parallel for num_threads(problem.threads) schedule(static)
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t start = schedule.entry_starts[e];
        const int64_t count = schedule.entry_starts[e + 1] - start;
        int64_t at = start * lists.out_block;
        for (int64_t group = 0; group < lists.out_block; group += order) {
            const int32_t* id = schedule.block_ids + start / lists.in_block;
            for (int64_t j = 0; j < count; j += lists.in_block, ++id) {
                T* block = problem.grad_values + *id * block_size + group * lists.out_stride;
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    for (int64_t a = 0; a < order; ++a, ++at) {
                        C sum = sums[at];
                        for (int64_t part = 1; part < parts; ++part) {
                            sum += sums[part * weights + at];
                        }
                        block[a * lists.out_stride + b * lists.in_stride] = from_compute<T>(sum);
                    }
                }
            }
        }
    }
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
void grad_weight_few(const GradWeightProblem<T>& problem) {
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

template <class T, int kVectors>
void grad_weight_dots(const GradWeightProblem<T>& problem) {
    switch (shared_outputs(problem.lists.out_block)) {
        case 4: {  // as wide as 4 rows fit the registers
            constexpr int kFit = 4 * kVectors < kRegisters ? kVectors : 2;
            return grad_weight_tiles<T, kFit, Dots<T, kFit, 4>>(problem);
        }
        case 2:
            return grad_weight_tiles<T, kVectors, Dots<T, kVectors, 2>>(problem);
        default:
            return grad_weight_tiles<T, kVectors, Dots<T, kVectors, 1>>(problem);
    }
}

template <class T>
void grad_weight(const GradWeightProblem<T>& problem) {
    using C = Compute<T>;
    constexpr int kN = kLanes<C>;
    const Lists& lists = problem.lists;
    if (problem.tokens <= kFewTokens) return grad_weight_few(problem);
    const int64_t features = lists.cols * lists.in_block;
    const auto fits = [&](int vectors) { return features * vectors * kVectorBytes <= kTileBytes; };
    if (lists.out_block % kN == 0) {
        if (fits(4)) return grad_weight_tiles<T, 4, Outer<T, 4>>(problem);
        return grad_weight_tiles<T, 2, Outer<T, 2>>(problem);
    }
    if (group_rows<C>(lists, problem.schedule)) {
        // A vector for each weight of the group and those of the row, if the registers hold both.
        constexpr int kVectors = 8 + kN < kRegisters ? 8 : 4;
        if (fits(kVectors)) return grad_weight_tiles<T, kVectors, Groups<T, kVectors>>(problem);
        if (fits(4)) return grad_weight_tiles<T, 4, Groups<T, 4>>(problem);
        return grad_weight_tiles<T, 2, Groups<T, 2>>(problem);
    }
    // Eight vectors of one row halve the work of adding up lanes; several rows would not fit.
    if (shared_outputs(lists.out_block) == 1 && fits(8)) {
        return grad_weight_tiles<T, 8, Dots<T, 8, 1>>(problem);
    }
    if (fits(4)) return grad_weight_dots<T, 4>(problem);
    return grad_weight_dots<T, 2>(problem);
}

}  // namespace
}  // namespace sk
