// Causal attention with an optional sink, one head at a time, without a tensor of scores.
//
// A head's keys and values are packed once: transposed, so that a vector holds neighbouring keys,
// and row by row, so that a vector holds neighbouring channels. Its queries then come kQueries at a
// time: their scores against all the keys that they see fit the first-level cache, so each score is
// made, exponentiated and used while it is there. The backward makes the probabilities anew from
// the logarithm of each row's sum. A head belongs to one thread: the same bits for any number.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../scratch.h"
#include "../simd_math.h"

namespace sk {
namespace {

// A user's tensor of heads, neighbouring channels next to each other.
template <class T>
struct Heads {
    T* data;
    int64_t batch_stride, token_stride, head_stride;

    T* row(int64_t batch, int64_t token, int64_t head) const {
        return data + batch * batch_stride + token * token_stride + head * head_stride;
    }
};

struct AttentionShape {
    int64_t batch, queries, keys, heads, channels;  // query i sees keys 0 .. keys - queries + i
};

template <class T>
struct AttentionProblem {
    AttentionShape shape;
    Heads<const T> q, k, v;
    const Compute<T>* sinks;  // (heads) or null
    T* y;                     // (batch, queries, heads, channels)
    Compute<T>* lse;          // (batch, heads, queries) log(sum(exp(score))), or null
    int threads;
};

template <class T>
struct AttentionBackwardProblem {
    AttentionShape shape;
    Heads<const T> q, k, v;
    const Compute<T>* sinks;
    Heads<const T> y, grad_y;
    const Compute<T>* lse;
    Heads<T> grad_q, grad_k, grad_v;
    Compute<T>* grad_sinks;  // (batch, heads) or null
    int threads;
};

// Queries whose scores are held at once.
constexpr int kQueries = 8;
// Of those, the ones whose scores are summed at once, and vectors of keys that they are summed for.
constexpr int kScoreQueries = 4;
constexpr int kScoreVectors = kRegisters / 8;

template <class C>
constexpr int64_t padded_to_vector(int64_t count) {
    return (count + kLanes<C> - 1) / kLanes<C> * kLanes<C>;
}

// A head row by row, the channels padded with zeros.
template <class T, class C = Compute<T>>
void pack_head(const Heads<T>& from, int64_t batch, int64_t head, int64_t tokens, int64_t channels,
               C scale, C* to) {
    const int64_t width = padded_to_vector<C>(channels);
    for (int64_t t = 0; t < tokens; ++t, to += width) {
        const auto* row = from.row(batch, t, head);
        int64_t c = 0;
        for (; c + kLanes<C> <= channels; c += kLanes<C>) store(to + c, load_user(row + c) * scale);
        for (; c < channels; ++c) to[c] = to_compute(row[c]) * scale;
        for (; c < width; ++c) to[c] = C(0);
    }
}

// The reverse; past the caches where a row is whole lines, because nobody reads it soon.
template <class T, class C = Compute<T>>
void unpack_head(const C* from, C scale, int64_t tokens, int64_t channels, const Heads<T>& to,
                 int64_t batch, int64_t head) {
    const int64_t width = padded_to_vector<C>(channels);
    const bool stream = kLineVectors == 1 && sizeof(T) == sizeof(C) && width == channels &&
                        reinterpret_cast<uintptr_t>(to.data) % 64 == 0 &&
                        (to.batch_stride | to.token_stride | to.head_stride) % kLanes<C> == 0;
    for (int64_t t = 0; t < tokens; ++t, from += width) {
        T* const row = to.row(batch, t, head);
        int64_t c = 0;
        for (; c + kLanes<C> <= channels; c += kLanes<C>) {
            const Vec<C> value = load(from + c) * scale;
            stream ? stream_user(row + c, value) : store_user(row + c, value);
        }
        for (; c < channels; ++c) row[c] = from_compute<T>(from[c] * scale);
    }
}

// Asks for what the next head will read, while this one is computed: every token of a head lies in
// another page, which no processor foresees.
template <class T>
class NextHead {
public:
    NextHead(const AttentionShape& s, int64_t head) : batch_((head + 1) / s.heads) {
        head_ = (head + 1) % s.heads;
        exists_ = batch_ < s.batch;
    }
    // Inlined always: GCC leaves out calls of a function that does nothing but this.
    __attribute__((always_inline)) void prefetch(const Heads<const T>& heads, int64_t begin,
                                                 int64_t end, int64_t channel = 0) const {
        if (!exists_) return;
        for (int64_t t = begin; t < end; ++t)
            __builtin_prefetch(heads.row(batch_, t, head_) + channel);
    }

private:
    int64_t batch_, head_;
    bool exists_;
};

// [channel][key] from packed rows; the keys padded with zeros.
template <class C>
void transpose_head(const C* rows, int64_t tokens, int64_t channels, C* to) {
    constexpr int kN = kLanes<C>;
    const int64_t width = padded_to_vector<C>(channels), padded = padded_to_vector<C>(tokens);
    for (int64_t t = 0; t < tokens; t += kN) {
        for (int64_t c = 0; c < width; c += kN) {
            Vec<C> square[kN];
            SK_UNROLL
            for (int i = 0; i < kN; ++i) {
                square[i] = t + i < tokens ? load(rows + (t + i) * width + c) : Vec<C>{};
            }
            transpose<C>(square);
            SK_UNROLL
            for (int i = 0; i < kN; ++i) {
                if (c + i < channels) store(to + (c + i) * padded + t, square[i]);
            }
        }
    }
}

// out[r][t] = sum over c of rows[r][c] * columns[c][t], kVectors vectors of t.
template <class C, int kRows, int kVectors>
inline __attribute__((always_inline)) void products(const C* rows, int64_t width, int64_t channels,
                                                    const C* columns, int64_t padded, C* out,
                                                    int64_t stride) {
    constexpr int kN = kLanes<C>;
    Vec<C> acc[kRows][kVectors] = {};
    for (int64_t c = 0; c < channels; ++c) {
        Vec<C> key[kVectors];
        SK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            key[v] = load(columns + c * padded + v * kN);
        }
        SK_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const Vec<C> query = splat<C>(rows[r * width + c]);
            SK_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                acc[r][v] += query * key[v];
            }
        }
    }
    SK_UNROLL
    for (int r = 0; r < kRows; ++r) {
        SK_UNROLL
        for (int v = 0; v < kVectors; ++v) {
            store(out + r * stride + v * kN, acc[r][v]);
        }
    }
}

// The same for `keys` keys, padded to a vector, and kQueries rows.
template <class C>
__attribute__((noinline)) void all_products(const C* rows, int64_t width, int64_t channels,
                                            const C* columns, int64_t padded, int64_t keys, C* out,
                                            int64_t stride) {
    constexpr int kN = kLanes<C>;
    int64_t t = 0;
    for (; t + kScoreVectors * kN <= padded_to_vector<C>(keys); t += kScoreVectors * kN) {
        for (int r = 0; r < kQueries; r += kScoreQueries) {
            products<C, kScoreQueries, kScoreVectors>(rows + r * width, width, channels,
                                                      columns + t, padded, out + r * stride + t,
                                                      stride);
        }
    }
    for (; t < keys; t += kN) {
        products<C, kQueries, 1>(rows, width, channels, columns + t, padded, out + t, stride);
    }
}

// out[r][c] = sum over t of weights[r][t] * rows[t][c], one vector of c for kQueries rows.
template <class C>
__attribute__((noinline)) void mix_rows(const C* weights, int64_t stride, const C* rows,
                                        int64_t width, int64_t count, Vec<C> (&out)[kQueries]) {
    Vec<C> acc[kQueries] = {};
    for (int64_t t = 0; t < count; ++t) {
        const Vec<C> row = load(rows + t * width);
        SK_UNROLL
        for (int r = 0; r < kQueries; ++r) {
            acc[r] += splat<C>(weights[r * stride + t]) * row;
        }
    }
    SK_UNROLL
    for (int r = 0; r < kQueries; ++r) {
        out[r] = acc[r];
    }
}

// sums[t][c] += sum over r of weights[r][t] * rows[r][c], one vector of c.
template <class C>
__attribute__((noinline)) void add_outer(const C* weights, int64_t stride, const C* rows,
                                         int64_t width, int64_t count, C* sums) {
    Vec<C> row[kQueries];
    SK_UNROLL
    for (int r = 0; r < kQueries; ++r) {
        row[r] = load(rows + r * width);
    }
    for (int64_t t = 0; t < count; ++t) {
        Vec<C> even = load(sums + t * width), odd = {};
        SK_UNROLL
        for (int i = 0; i < kQueries / 2; ++i) {
            even += splat<C>(weights[2 * i * stride + t]) * row[2 * i];
            odd += splat<C>(weights[(2 * i + 1) * stride + t]) * row[2 * i + 1];
        }
        store(sums + t * width, even + odd);
    }
}

// Of kRows vectors: `each` gives the result of kLanes of them at a time, `to` gets all in order.
template <class C, int kRows, class Each>
inline __attribute__((always_inline)) void lanes_of_each(const Vec<C> (&rows)[kRows], C* to,
                                                         const Each& each) {
    unroll<(kRows + kLanes<C> - 1) / kLanes<C>>([&](auto group) __attribute__((always_inline)) {
        store(to + group * kLanes<C>, each([&](auto i) __attribute__((always_inline)) {
                  return rows[(group * kLanes<C> + i) % kRows];
              }));
    });
}

// kRows rows of scores, of which row r has `first + r` (`until` at most), to
// exp(score - largest), zero from there to `until`. Gives each row's sum, the sink's share
// included, and its largest score. The rows are reduced together: one alone would wait for itself.
template <class C, int kRows>
struct Exponentials {
    static constexpr int kPadded = std::max(kRows, static_cast<int>(kLanes<C>));
    alignas(kVectorBytes) C sums[kPadded], largest[kPadded];

    Exponentials(C* scores, int64_t stride, int64_t first, int64_t until, const C* sink) {
        constexpr int kN = kLanes<C>;
        const Vec<C> lowest = splat(-std::numeric_limits<C>::infinity());
        Vec<C> rows[kRows];
        for (int r = 0; r < kRows; ++r) {
            const int64_t count = std::min(first + r, until), whole = count / kN * kN;
            const C* const row = scores + r * stride;
            Vec<C> most = sink ? splat(*sink) : lowest;
            for (int64_t t = 0; t < whole; t += kN) {
                const Vec<C> score = load(row + t);
                most = score > most ? score : most;
            }
            if (whole < count) {
                const auto missing = first_lanes<C>(splat(C(1)), count - whole) == C(0);
                const Vec<C> score = missing ? lowest : load(row + whole);
                most = score > most ? score : most;
            }
            rows[r] = most;
        }
        lanes_of_each<C, kRows>(rows, largest, [](const auto& of) { return largest_each<C>(of); });
        for (int r = 0; r < kRows; ++r) {
            const int64_t count = std::min(first + r, until), whole = count / kN * kN;
            C* const row = scores + r * stride;
            Vec<C> sum = {};
            int64_t t = 0;
            for (; t < whole; t += kN) {
                const Vec<C> e = exp_negative(load(row + t) - largest[r]);
                sum += e;
                store(row + t, e);
            }
            for (; t < until; t += kN) {
                const Vec<C> e =
                    first_lanes<C>(exp_negative(load(row + t) - largest[r]), count - t);
                sum += e;
                store(row + t, e);
            }
            rows[r] = sum;
        }
        lanes_of_each<C, kRows>(rows, sums, [](const auto& of) { return sum_each<C>(of); });
        for (int r = 0; sink && r < kPadded; r += kN)
            store(sums + r, load(sums + r) + exp_negative(*sink - load(largest + r)));
    }
};

// One packed head: y (queries, width), and the logarithms if `lse`. `prefetch(begin, end)` is told
// of the tokens as they are reached.
template <class C, class Prefetch>
void attend_head(const AttentionShape& s, const C* q, const C* turned, const C* v, const C* sink,
                 C* scores, int64_t stride, C* y, C* lse, const Prefetch& prefetch) {
    constexpr int kN = kLanes<C>;
    const int64_t width = padded_to_vector<C>(s.channels), padded = padded_to_vector<C>(s.keys);
    for (int64_t first = 0; first < s.queries; first += kQueries) {
        const int64_t count = std::min<int64_t>(kQueries, s.queries - first);
        const int64_t seen = s.keys - s.queries + first;  // before the first query's own
        const int64_t until = seen + count;
        prefetch(first, first + count);
        all_products(q + first * width, width, s.channels, turned, padded, until, scores, stride);
        const Exponentials<C, kQueries> rows(scores, stride, seen + 1, until, sink);
        for (int64_t r = 0; lse && r < count; ++r)
            lse[first + r] = rows.largest[r] + std::log(rows.sums[r]);
        for (int64_t c = 0; c < s.channels; c += kN) {
            Vec<C> sums[kQueries];
            mix_rows(scores, stride, v + c, width, until, sums);
            for (int64_t r = 0; r < kQueries; ++r)
                store(y + (first + r) * width + c, sums[r] / rows.sums[r]);
        }
    }
}

// A head's only query, straight from the user's keys and values, whose rows are whole vectors.
template <class T, class C = Compute<T>>
C attend_one(const AttentionProblem<T>& problem, int64_t number, C* scores, C* y) {
    constexpr int kN = kLanes<C>;
    const AttentionShape& s = problem.shape;
    const int64_t batch = number / s.heads, head = number % s.heads;
    const NextHead<T> next(s, number);
    const C scale = C(1) / std::sqrt(static_cast<C>(s.channels));
    const T* const q = problem.q.row(batch, 0, head);
    for (int64_t t = 0; t < s.keys; t += kN) {
        const T* rows[kN];  // past the end, the last one again
        for (int i = 0; i < kN; ++i)
            rows[i] = problem.k.row(batch, std::min(t + i, s.keys - 1), head);
        Vec<C> sums = {};
        for (int64_t c = 0; c < s.channels; c += kN) {
            next.prefetch(problem.k, t, std::min(t + kN, s.keys), c);
            const Vec<C> query = load_user(q + c) * scale;
            sums += sum_each<C>([&](auto i) __attribute__((always_inline)) {
                return load_user(rows[i] + c) * query;
            });
        }
        store(scores + t, sums);
    }
    const C* const sink = problem.sinks ? problem.sinks + head : nullptr;
    const Exponentials<C, 1> row(scores, 0, s.keys, s.keys, sink);
    for (int64_t c = 0; c < s.channels; c += kN) {
        Vec<C> acc[4] = {};
        int64_t t = 0;
        for (; t + 4 <= s.keys; t += 4) {
            next.prefetch(problem.v, t, t + 4, c);
            SK_UNROLL
            for (int i = 0; i < 4; ++i) {
                acc[i] += load_user(problem.v.row(batch, t + i, head) + c) * scores[t + i];
            }
        }
        for (; t < s.keys; ++t) acc[0] += load_user(problem.v.row(batch, t, head) + c) * scores[t];
        store(y + c, ((acc[0] + acc[1]) + (acc[2] + acc[3])) / row.sums[0]);
    }
    return row.largest[0] + std::log(row.sums[0]);
}

template <class T>
void attention_of_one(const AttentionProblem<T>& problem, int threads) {
    using C = Compute<T>;
    const AttentionShape& s = problem.shape;
    const int64_t all = s.batch * s.heads, padded = padded_to_vector<C>(s.keys);
    const int64_t each = padded + s.channels;
    Arena arena;
    const size_t at = arena.reserve<C>(threads * each);
    arena.allocate();
    const Heads<T> out{problem.y, s.heads * s.channels, 0, s.channels};
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* const scores = arena.at<C>(at) + thread * each;
        C* const y = scores + padded;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < all; ++n) {
            const C lse = attend_one(problem, n, scores, y);
            if (problem.lse) problem.lse[n] = lse;
            unpack_head(y, C(1), 1, s.channels, out, n / s.heads, n % s.heads);
        }
        stream_fence();
    }
}

template <class T>
void attention(const AttentionProblem<T>& problem) {
    using C = Compute<T>;
    const AttentionShape& s = problem.shape;
    const int64_t all = s.batch * s.heads;
    if (all * s.queries == 0) return;
    if (s.queries == 1 && s.channels % kLanes<C> == 0)
        return attention_of_one(problem, static_cast<int>(std::min<int64_t>(problem.threads, all)));
    const int64_t width = padded_to_vector<C>(s.channels), padded = padded_to_vector<C>(s.keys);
    const int64_t queries = (s.queries + kQueries - 1) / kQueries * kQueries;
    const C scale = C(1) / std::sqrt(static_cast<C>(s.channels));
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, all));
    const int64_t stride = padded + kLanes<C>;  // rows of scores are apart by no power of two
    // Rows of q, y, k and v; keys transposed; scores.
    const int64_t each =
        (2 * queries + 2 * padded) * width + s.channels * padded + kQueries * stride;
    Arena arena;
    const size_t at = arena.reserve<C>(threads * each);
    arena.allocate();
    const Heads<T> out{problem.y, s.queries * s.heads * s.channels, s.heads * s.channels,
                       s.channels};
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* const q = arena.at<C>(at) + thread * each;
        C* const y = q + queries * width;
        C* const k = y + queries * width;
        C* const v = k + padded * width;
        C* const turned = v + padded * width;
        C* const scores = turned + s.channels * padded;
        std::fill(q + s.queries * width, q + queries * width, C(0));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < all; ++n) {
            const int64_t batch = n / s.heads, head = n % s.heads;
            pack_head(problem.q, batch, head, s.queries, s.channels, scale, q);
            pack_head(problem.k, batch, head, s.keys, s.channels, C(1), k);
            pack_head(problem.v, batch, head, s.keys, s.channels, C(1), v);
            transpose_head(k, s.keys, s.channels, turned);
            const NextHead<T> next(s, n);
            attend_head<C>(s, q, turned, v, problem.sinks ? problem.sinks + head : nullptr, scores,
                           stride, y, problem.lse ? problem.lse + n * s.queries : nullptr,
                           [&](int64_t begin, int64_t end) {
                               next.prefetch(problem.q, begin, end);
                               next.prefetch(problem.k, begin, end);
                               next.prefetch(problem.v, begin, end);
                           });
            unpack_head(y, C(1), s.queries, s.channels, out, batch, head);
        }
        stream_fence();
    }
}

// One packed head; `grad_q` has y in it at first. Returns the gradient of the sink, if there is
// one.
template <class C, class Prefetch>
C attend_head_backward(const AttentionShape& s, const C* q, const C* grad_y, const C* k,
                       const C* turned_k, const C* turned_v, const C* sink, const C* lse, C* p,
                       C* grad_p, int64_t stride, C* share, C* grad_q, C* grad_k, C* grad_v,
                       const Prefetch& prefetch) {
    constexpr int kN = kLanes<C>;
    const int64_t width = padded_to_vector<C>(s.channels), padded = padded_to_vector<C>(s.keys);
    C grad_sink = C(0);
    for (int64_t t = 0; t < s.queries; t += kN) {  // rowsum(dY * Y)
        const auto product = [&](auto i) __attribute__((always_inline)) {
            const int64_t at = std::min(t + i, s.queries - 1) * width;
            Vec<C> sum = {};
            for (int64_t c = 0; c < width; c += kN)
                sum += load(grad_q + at + c) * load(grad_y + at + c);
            return sum;
        };
        store(share + t, sum_each<C>(product));
    }
    for (int64_t t = 0; sink && t < s.queries; ++t)
        grad_sink -= std::exp(*sink - lse[t]) * share[t];
    std::fill(grad_k, grad_k + padded * width, C(0));
    std::fill(grad_v, grad_v + padded * width, C(0));
    for (int64_t first = 0; first < s.queries; first += kQueries) {
        const int64_t mine = std::min<int64_t>(kQueries, s.queries - first);
        const int64_t seen = s.keys - s.queries + first;
        const int64_t until = seen + mine;
        prefetch(first, first + mine);
        all_products(q + first * width, width, s.channels, turned_k, padded, until, p, stride);
        all_products(grad_y + first * width, width, s.channels, turned_v, padded, until, grad_p,
                     stride);
        for (int64_t r = 0; r < kQueries; ++r) {
            const bool exists = r < mine;
            const int64_t count = exists ? seen + r + 1 : 0;
            const C total = exists ? lse[first + r] : C(0);
            const C minus = exists ? share[first + r] : C(0);
            C* const p_row = p + r * stride;
            C* const grad_row = grad_p + r * stride;
            int64_t t = 0;
            for (; t + kN <= count; t += kN) {
                const Vec<C> e = exp_negative(load(p_row + t) - total);
                store(p_row + t, e);
                store(grad_row + t, e * (load(grad_row + t) - minus));
            }
            for (; t < until; t += kN) {
                const Vec<C> e = exp_negative(load(p_row + t) - total);
                store(p_row + t, first_lanes<C>(e, count - t));
                store(grad_row + t, first_lanes<C>(e * (load(grad_row + t) - minus), count - t));
            }
        }
        for (int64_t c = 0; c < s.channels; c += kN) {
            Vec<C> sums[kQueries];
            mix_rows(grad_p, stride, k + c, width, until, sums);
            for (int64_t r = 0; r < kQueries; ++r) store(grad_q + (first + r) * width + c, sums[r]);
            add_outer(grad_p, stride, q + first * width + c, width, until, grad_k + c);
            add_outer(p, stride, grad_y + first * width + c, width, until, grad_v + c);
        }
    }
    return grad_sink;
}

template <class T>
void attention_backward(const AttentionBackwardProblem<T>& problem) {
    using C = Compute<T>;
    const AttentionShape& s = problem.shape;
    const int64_t all = s.batch * s.heads;
    if (all * s.queries == 0) return;
    const int64_t width = padded_to_vector<C>(s.channels), padded = padded_to_vector<C>(s.keys);
    const int64_t queries = (s.queries + kQueries - 1) / kQueries * kQueries;
    const C scale = C(1) / std::sqrt(static_cast<C>(s.channels));
    const int threads = static_cast<int>(std::min<int64_t>(problem.threads, all));
    const int64_t stride = padded + kLanes<C>;
    // Rows of q, dY, dQ, k, v, dK and dV; keys and values transposed; scores and their gradients.
    const int64_t each = (3 * queries + 4 * padded) * width + 2 * s.channels * padded +
                         2 * kQueries * stride + padded_to_vector<C>(queries);
    Arena arena;
    const size_t at = arena.reserve<C>(threads * each);
    arena.allocate();
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* const q = arena.at<C>(at) + thread * each;
        C* const grad_y = q + queries * width;
        C* const grad_q = grad_y + queries * width;
        C* const k = grad_q + queries * width;
        C* const v = k + padded * width;
        C* const grad_k = v + padded * width;
        C* const grad_v = grad_k + padded * width;
        C* const turned_k = grad_v + padded * width;
        C* const turned_v = turned_k + s.channels * padded;
        C* const p = turned_v + s.channels * padded;
        C* const grad_p = p + kQueries * stride;
        C* const share = grad_p + kQueries * stride;
        std::fill(q + s.queries * width, q + queries * width, C(0));
        std::fill(grad_y + s.queries * width, grad_y + queries * width, C(0));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < all; ++n) {
            const int64_t batch = n / s.heads, head = n % s.heads;
            pack_head(problem.q, batch, head, s.queries, s.channels, scale, q);
            pack_head(problem.y, batch, head, s.queries, s.channels, C(1), grad_q);
            pack_head(problem.grad_y, batch, head, s.queries, s.channels, C(1), grad_y);
            pack_head(problem.k, batch, head, s.keys, s.channels, C(1), k);
            pack_head(problem.v, batch, head, s.keys, s.channels, C(1), v);
            transpose_head(k, s.keys, s.channels, turned_k);
            transpose_head(v, s.keys, s.channels, turned_v);
            const NextHead<T> next(s, n);
            const C grad_sink = attend_head_backward<C>(
                s, q, grad_y, k, turned_k, turned_v, problem.sinks ? problem.sinks + head : nullptr,
                problem.lse + n * s.queries, p, grad_p, stride, share, grad_q, grad_k, grad_v,
                [&](int64_t begin, int64_t end) {
                    next.prefetch(problem.q, begin, end);
                    next.prefetch(problem.k, begin, end);
                    next.prefetch(problem.v, begin, end);
                    next.prefetch(problem.y, begin, end);
                    next.prefetch(problem.grad_y, begin, end);
                });
            if (problem.sinks) problem.grad_sinks[n] = grad_sink;
            unpack_head(grad_q, scale, s.queries, s.channels, problem.grad_q, batch, head);
            unpack_head(grad_k, C(1), s.keys, s.channels, problem.grad_k, batch, head);
            unpack_head(grad_v, C(1), s.keys, s.channels, problem.grad_v, batch, head);
        }
        stream_fence();
    }
}

}  // namespace
}  // namespace sk
