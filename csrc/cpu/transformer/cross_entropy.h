// Cross-entropy of rows of logits, and its gradient in their memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../scratch.h"
#include "../simd_math.h"

namespace sk {
namespace {

template <class T>
struct CrossEntropyProblem {
    T* logits;  // (rows, cols)
    const int64_t* targets;
    const Compute<T>* table;  // (.., cols) or null
    const int64_t* tokens;    // (rows), a row of the table each
    Compute<T>* losses;       // (rows)
    Compute<T> scale;         // of the gradient; 0: the logits stay as they are
    int64_t rows, cols;
    int threads;
};

// With z = logits + table[token]: losses = log(sum exp(z)) - z[target], and with a scale
// logits = scale * (softmax(z) - onehot(target)). A row belongs to one thread.
template <class T>
void cross_entropy(const CrossEntropyProblem<T>& p) {
    using C = Compute<T>;
    constexpr int64_t kN = kLanes<C>;
    const int64_t padded = (p.cols + kN - 1) / kN * kN, whole = p.cols / kN * kN;
    Arena arena;
    const size_t at = arena.reserve<C>(p.threads * padded);
    arena.allocate();
    const C lowest = -std::numeric_limits<C>::infinity();
#pragma omp parallel num_threads(p.threads)
    {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        C* const z = arena.at<C>(at) + thread * padded;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.rows; ++r) {
            T* const logits = p.logits + r * p.cols;
            const C* const added = p.table ? p.table + p.tokens[r] * p.cols : nullptr;
            Vec<C> most = splat(lowest);
            for (int64_t i = 0; i < padded; i += kN) {
                Vec<C> value = splat(lowest);
                if (i < whole) {
                    value = load_user(logits + i);
                    if (added) value += load_user(added + i);
                } else {
                    for (int64_t j = i; j < p.cols; ++j)
                        value[j - i] = to_compute(logits[j]) + (added ? added[j] : C(0));
                }
                most = value > most ? value : most;
                store(z + i, value);
            }
            const C top = largest_lane<C>(most), at_target = z[p.targets[r]];
            Vec<C> sum = {};
            for (int64_t i = 0; i < padded; i += kN) {
                const Vec<C> e = exp_negative(load(z + i) - top);
                sum += e;
                store(z + i, e);
            }
            const C total = sum_lanes<C>(sum);
            p.losses[r] = std::log(total) + (top - at_target);
            if (p.scale == C(0)) continue;
            const C scale = p.scale / total;
            for (int64_t i = 0; i < whole; i += kN) store_user(logits + i, load(z + i) * scale);
            for (int64_t i = whole; i < p.cols; ++i) logits[i] = from_compute<T>(z[i] * scale);
            const int64_t t = p.targets[r];
            logits[t] = from_compute<T>((z[t] - total) * scale);
        }
    }
}

}  // namespace
}  // namespace sk
