// The transpose of spmm over the same lists: out[m, c] = sum over the rows r that keep c of
// W[r, c] * in[m, r] (+ bias). `grad_input` runs it for blocks that are several outputs tall and
// few inputs wide, because the inputs of a block-row then share the rows of dY that they meet,
// where over the columns nothing would be shared.
#pragma once

#include "spmm.h"

namespace sk {
namespace {

// Inputs of a block-row that are computed together.
constexpr int kScatterInputs = 4;

// How the rows of dY that a block-row's inputs share lie in a tile, [output][token], and what they
// are multiplied with. kTogether neighbouring outputs make one row.
template <class T, int kVectors>
struct SharedOutputs {
    using C = Compute<T>;
    using Element = C;
    using Weight = C;
    using Raw = Vec<C>;
    static constexpr int kTogether = 1;

    static void pack(const Matrix<const T>& dy, int64_t first, int64_t tokens, int64_t output,
                     int64_t outputs, Element* to) {
        pack_tile<T, kVectors>(dy, first, tokens, output, outputs, to);
    }
    static Raw load_raw(const Element* from) { return load(from); }
    static Raw splat_weight(const Weight* weight) { return splat<C>(*weight); }
    static void add_product(Vec<C>& sum, Raw a, Raw b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
// An element is a token's pair of outputs.
template <int kVectors>
struct SharedOutputs<Bf16, kVectors> {
    using Element = float;
    using Weight = Bf16;
    using Raw = Words;
    static constexpr int kTogether = 2;

    static void pack(const Matrix<const Bf16>& dy, int64_t first, int64_t tokens, int64_t output,
                     int64_t outputs, Element* to) {
        const Bf16* from = dy.data + output * dy.col_stride;
        if (dy.col_stride == 1 && dy.row_stride % 2 == 0 &&
            reinterpret_cast<uintptr_t>(from) % sizeof(Element) == 0) {
            const Matrix<const float> pairs{reinterpret_cast<const float*>(from), dy.row_stride / 2,
                                            1};
            pack_tile<float, kVectors>(pairs, first, tokens, 0, outputs / 2, to);
            return;
        }
        constexpr int64_t kTile = kVectors * kLanes<float>;
        for (int64_t pair = 0; pair < outputs / 2; ++pair) {
            for (int64_t m = 0; m < kTile; ++m) {
                Bf16 both[2] = {};
                if (m < tokens) {
                    const Bf16* at = from + (first + m) * dy.row_stride + 2 * pair * dy.col_stride;
                    both[0] = at[0];
                    both[1] = at[dy.col_stride];
                }
                std::memcpy(to + pair * kTile + m, both, sizeof(both));
            }
        }
    }
    static Raw load_raw(const Element* from) { return reinterpret_cast<Words>(load(from)); }
    static Raw splat_weight(const Weight* weight) {
        uint32_t pair;
        std::memcpy(&pair, weight, sizeof(pair));
        return pair - Words{};
    }
    static void add_product(Vec<float>& sum, Raw a, Raw b) { add_pair_products(sum, a, b); }
};
#endif

// Adds a block-row to the tile of sums: out[local[j]] += sum over a of weight[j][a] * rows[a].
// `scratch` takes what the last inputs computed together have too many.
template <class Outputs, class C, int kVectors>
__attribute__((noinline)) void scatter_row(const typename Outputs::Element* rows, int64_t out_block,
                                           const int32_t* local, int64_t count,
                                           const typename Outputs::Weight* weights, C* out,
                                           C* scratch) {
    using Raw = typename Outputs::Raw;
    constexpr int kN = kLanes<C>;
    constexpr int kTile = kVectors * kN;
    constexpr int kTogether = Outputs::kTogether;
    const int64_t stretch = sum_stretch(out_block);
    for (int64_t j = 0; j < count; j += kScatterInputs) {
        C* to[kScatterInputs];
        const typename Outputs::Weight* w[kScatterInputs];
        SK_UNROLL
        for (int i = 0; i < kScatterInputs; ++i) {
            const bool inside = j + i < count;
            to[i] = inside ? out + static_cast<int64_t>(local[j + i]) * kTile : scratch;
            w[i] = weights + (inside ? j + i : j) * out_block;
        }
        for (int64_t begin = 0; begin < out_block; begin += stretch) {
            const int64_t end = std::min(begin + stretch, out_block);
            Vec<C> acc[kScatterInputs][kVectors] = {};
            for (int64_t a = begin; a < end; a += kTogether) {
                Raw d[kVectors];
                SK_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    d[v] = Outputs::load_raw(rows + a / kTogether * kTile + v * kN);
                }
                SK_UNROLL
                for (int i = 0; i < kScatterInputs; ++i) {
                    const Raw weight = Outputs::splat_weight(w[i] + a);
                    SK_UNROLL
                    for (int v = 0; v < kVectors; ++v) {
                        Outputs::add_product(acc[i][v], d[v], weight);
                    }
                }
            }
            SK_UNROLL
            for (int i = 0; i < kScatterInputs; ++i) {
                SK_UNROLL
                for (int v = 0; v < kVectors; ++v) {
                    store(to[i] + v * kN, load(to[i] + v * kN) + acc[i][v]);
                }
            }
        }
    }
}

// `lists` and `schedule` are those of the layout itself; `in` has a column for each of its outputs,
// `out` and `bias` for each of its inputs.
template <class T, int kVectors>
void scatter_tiles(const SpmmProblem<T>& problem) {
    using C = Compute<T>;
    using Outputs = SharedOutputs<T, kVectors>;
    using E = typename Outputs::Element;
    using W = typename Outputs::Weight;
    constexpr int64_t kTile = kVectors * kLanes<C>;
    constexpr int64_t kTogether = Outputs::kTogether;
    const Lists& lists = problem.lists;
    const Schedule& schedule = problem.schedule;
    const int64_t size = lists.out_block;
    const int64_t features = lists.cols * lists.in_block;
    const int64_t blocks = schedule.entry_starts[schedule.panels * lists.rows];
    const int64_t tiles = (problem.tokens + kTile - 1) / kTile;
    const bool one_panel = schedule.panels == 1;
    const int64_t chunk = std::min(chunk_rows<C>(size, kTile), lists.rows);
    const bool in_place = std::is_same<T, W>::value && one_panel && lists.in_block == 1;
    const bool stream =
        kLineVectors == 1 && problem.tokens * features * int64_t{sizeof(T)} >= kStreamBytes &&
        features * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(problem.out) % 64 == 0;
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, tiles));

    Arena arena;
    const size_t weights_at = arena.reserve<W>(in_place ? 0 : blocks * size);
    const size_t bias_at = arena.reserve<C>(features);
    const size_t rows_at = arena.reserve<E>(threads * chunk * size / kTogether * kTile);
    const size_t out_at = arena.reserve<C>(threads * (features + 1) * kTile);
    arena.allocate();
    const W* weights = weights_of<1, 0>(problem, in_place, arena.at<W>(weights_at));
    C* bias = arena.at<C>(bias_at);
    copy_bias(problem.bias, features, bias);

#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        E* rows = arena.at<E>(rows_at) + thread * chunk * size / kTogether * kTile;
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
                Outputs::pack(problem.in, first, tokens, begin * size, (end - begin) * size, rows);
                for (int64_t p = 0; p < schedule.panels; ++p) {
                    for (int64_t i = begin; i < end; ++i) {
                        const int64_t e = p * lists.rows + i;
                        const int64_t start = schedule.entry_starts[e];
                        scatter_row<Outputs, C, kVectors>(
                            rows + (i - begin) * size / kTogether * kTile, size,
                            schedule.local + start, schedule.entry_starts[e + 1] - start,
                            weights + start * size, out + p * schedule.panel_features * kTile,
                            scratch);
                    }
                }
            }
            Tile<T, kVectors>::unpack(out, problem.out, features, first, tokens, 0, features,
                                      stream);
        }
        stream_fence();
    }
}

// Adds one token's products to `out`: blocks of one weight.
template <class T>
void scatter_weights(const SpmmProblem<T>& problem, int64_t m, Compute<T>* out) {
    const Lists& lists = problem.lists;
    const T* in = problem.in.data + m * problem.in.row_stride;
    for (int64_t r = 0; r < lists.rows; ++r) {
        const Compute<T> x = to_compute(in[r * problem.in.col_stride]);
        const int64_t end = lists.end(r);
        for (int64_t i = lists.begin(r); i < end; ++i) {
            out[lists.columns[i]] += to_compute(problem.values[i]) * x;
        }
    }
}

// The same for other blocks; `row` is working memory for the outputs' values.
template <class T>
void scatter_blocks(const SpmmProblem<T>& problem, int64_t m, Compute<T>* row, Compute<T>* out) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const int64_t size = lists.out_block, width = lists.in_block;
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
                    sum += to_compute(block[a * lists.out_stride + b * lists.in_stride]) * row[a];
                }
                to[b] += sum;
            }
        }
    }
}

// A few tokens: no tile, and one pass over the values for each token.
template <class T>
void scatter_dots(const SpmmProblem<T>& problem) {
    using C = Compute<T>;
    const Lists& lists = problem.lists;
    const int64_t size = lists.out_block, width = lists.in_block;
    const int64_t features = lists.cols * width;
    Arena arena;
    const size_t out_at = arena.reserve<C>(problem.tokens * features);
    const size_t row_at = arena.reserve<C>(problem.tokens * size);
    arena.allocate();
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, problem.tokens));
    share(problem.tokens, threads, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; ++m) {
            C* out = arena.at<C>(out_at) + m * features;
            C* row = arena.at<C>(row_at) + m * size;
            copy_bias(problem.bias, features, out);
            if (size * width == 1) {
                scatter_weights(problem, m, out);
            } else {
                scatter_blocks(problem, m, row, out);
            }
            for (int64_t f = 0; f < features; ++f) {
                problem.out[m * features + f] = from_compute<T>(out[f]);
            }
        }
    });
}

template <class T>
void spmm_scatter(const SpmmProblem<T>& problem) {
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
