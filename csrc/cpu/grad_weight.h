// dW[r, c] = sum over tokens of dY[m, r] * X[m, c], at the kept blocks only.
#pragma once

#include "gather.h"

namespace sk {
namespace {

// Tokens are cut at fixed places, whatever the number of threads, and the parts added in order.
constexpr int64_t kTilesPerPart = 8;
constexpr int64_t kMaxParts = 32;
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
            store_user(to, load_user(to) + sum_each<C>(vectors + i * kN));
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

// A function of its own for the sake of its registers, like `accumulate`.
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

template <class T, int kVectors, int kShared>
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
    const size_t partial_at = arena.reserve<C>(threads * kPartials * kLanes<C>);
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
        C* vectors = arena.at<C>(partial_at) + thread * kPartials * kLanes<C>;
#pragma omp for schedule(dynamic, 1)
        for (int64_t part = 0; part < parts; ++part) {
            C* part_sums = sums + part * weights;
            std::fill(part_sums, part_sums + weights, C(0));
            for (int64_t t = tiles * part / parts; t < tiles * (part + 1) / parts; ++t) {
                const int64_t first = t * kTile;
                const int64_t tokens = std::min(kTile, problem.tokens - first);
                pack_tile<T, kVectors>(problem.input, first, tokens, 0, features, tile);
                PartialSums<C> partial{vectors, part_sums};
                const auto entry = [&](int64_t e, const C* panel, const C* from) {
                    const int64_t start = schedule.entry_starts[e];
                    const int64_t count = schedule.entry_starts[e + 1] - start;
                    for (int64_t a = 0; a < lists.out_block; a += kShared) {
                        multiply_rows<C, kVectors, kShared>(from + a * kTile, panel,
                                                            schedule.local + start, count, partial);
                    }
                };
                if (one_panel) {
                    for (int64_t r = 0; r < lists.rows; r += chunk) {
                        const int64_t end = std::min(lists.rows, r + chunk);
                        pack_tile<T, kVectors>(problem.grad_output, first, tokens,
                                               r * lists.out_block, (end - r) * lists.out_block,
                                               rows);
                        for (int64_t e = r; e < end; ++e) {
                            entry(e, tile, rows + (e - r) * lists.out_block * kTile);
                        }
                    }
                } else {
                    pack_tile<T, kVectors>(problem.grad_output, first, tokens, 0, outputs, rows);
                    for (int64_t p = 0; p < schedule.panels; ++p) {
                        const C* panel = tile + p * schedule.panel_features * kTile;
                        for (int64_t e = p * lists.rows; e < (p + 1) * lists.rows; ++e) {
                            const int64_t row = schedule.entry_rows[e];
                            if (row < 0) break;
                            entry(e, panel, rows + row * lists.out_block * kTile);
                        }
                    }
                }
                partial.flush();
            }
        }
    }

    const int64_t block_size = int64_t{lists.out_block} * lists.in_block;
#pragma omp parallel for num_threads(problem.threads) schedule(static)
    for (int64_t e = 0; e < entries; ++e) {
        const int64_t start = schedule.entry_starts[e];
        const int64_t count = schedule.entry_starts[e + 1] - start;
        int64_t at = start * lists.out_block;
        for (int64_t group = 0; group < lists.out_block; group += kShared) {
            const int32_t* id = schedule.block_ids + start / lists.in_block;
            for (int64_t j = 0; j < count; j += lists.in_block, ++id) {
                T* block = problem.grad_values + *id * block_size + group * lists.out_stride;
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    for (int64_t a = 0; a < kShared; ++a, ++at) {
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

// A few tokens: the gradient is an outer product of a few rows, one pass over the values.
template <class T>
void grad_weight_outer(const GradWeightProblem<T>& problem) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const Matrix<const T>& dy = problem.grad_output;
    const Matrix<const T>& x = problem.input;
    const int64_t block_size = int64_t{lists.out_block} * lists.in_block;
#pragma omp parallel for num_threads(problem.threads) schedule(static)
    for (int64_t r = 0; r < lists.rows; ++r) {
        for (int64_t i = lists.begin(r); i < lists.end(r); ++i) {
            T* block = problem.grad_values + i * block_size;
            for (int64_t a = 0; a < lists.out_block; ++a) {
                for (int64_t b = 0; b < lists.in_block; ++b) {
                    const int64_t n = r * lists.out_block + a;
                    const int64_t k = static_cast<int64_t>(lists.columns[i]) * lists.in_block + b;
                    C sum = C(0);
                    for (int64_t m = 0; m < problem.tokens; ++m) {
                        sum += to_compute(dy.data[m * dy.row_stride + n * dy.col_stride]) *
                               to_compute(x.data[m * x.row_stride + k * x.col_stride]);
                    }
                    block[a * lists.out_stride + b * lists.in_stride] = from_compute<T>(sum);
                }
            }
        }
    }
}

template <class T, int kVectors>
void grad_weight_shared(const GradWeightProblem<T>& problem) {
    switch (shared_outputs(problem.lists.out_block)) {
        case 4:
            return grad_weight_tiles<T, kVectors, 4>(problem);
        case 2:
            return grad_weight_tiles<T, kVectors, 2>(problem);
        default:
            return grad_weight_tiles<T, kVectors, 1>(problem);
    }
}

template <class T>
void grad_weight(const GradWeightProblem<T>& problem) {
    if (problem.tokens <= kDotTokens) return grad_weight_outer(problem);
    const int64_t features = problem.lists.cols * problem.lists.in_block;
    // One row of dY in 8 vectors halves the work of adding up lanes; several rows would not fit the
    // registers.
    if (shared_outputs(problem.lists.out_block) == 1 && features * 8 * kVectorBytes <= kTileBytes) {
        return grad_weight_tiles<T, 8, 1>(problem);
    }
    if (features * 4 * kVectorBytes <= kTileBytes) return grad_weight_shared<T, 4>(problem);
    return grad_weight_shared<T, 2>(problem);
}

}  // namespace
}  // namespace sk
