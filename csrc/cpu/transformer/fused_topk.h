// AbsTopK of GELU or of RMSNorm, without the tensor in between, and the derivatives.
#pragma once

#include "../simd_math.h"
#include "../topk.h"

namespace sk {
namespace {

template <class T>
struct GeluOfRow {
    const T* operator()(int64_t r, const T* row, int64_t col_stride, int64_t cols,
                        T* buffer) const {
        using C = Compute<T>;
        row = AsItIs<T>{}(r, row, col_stride, cols, buffer);
        int64_t i = 0;
        for (; i + kLanes<C> <= cols; i += kLanes<C>)
            store_user(buffer + i, gelu<C>(load_user(row + i)).value);
        for (; i < cols; ++i)
            buffer[i] = from_compute<T>(gelu<C>(splat<C>(to_compute(row[i]))).value[0]);
        return buffer;
    }
};

// `value` where `kept` is not zero (its magnitude's bits, so that no mode of the processor takes
// the smallest for zero), elsewhere 0.
template <class C>
inline __attribute__((always_inline)) Vec<C> where_kept(Vec<C> value, Vec<C> kept) {
    using I = typename VecTraits<C>::Index;
    const I zero = (reinterpret_cast<I>(kept) << 1) == 0;
    return reinterpret_cast<Vec<C>>(reinterpret_cast<I>(value) & ~zero);
}

// dx = dy gelu'(x) where y is not zero, elsewhere 0; dx is contiguous.
template <class T>
void gelu_abs_topk_backward(const Matrix<const T>& dy, const Matrix<const T>& y,
                            const Matrix<const T>& x, T* dx, int64_t rows, int64_t cols,
                            int threads) {
    using C = Compute<T>;
    const bool stream = rows * cols * int64_t{sizeof(T)} >= kStreamBytes &&
                        reinterpret_cast<uintptr_t>(dx) % kVectorBytes == 0 &&
                        cols % kLanes<C> == 0;
    const bool whole = dy.col_stride == 1 && y.col_stride == 1 && x.col_stride == 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const T* from = dy.data + r * dy.row_stride;
            const T* kept = y.data + r * y.row_stride;
            const T* at = x.data + r * x.row_stride;
            T* to = dx + r * cols;
            int64_t i = 0;
            for (; whole && i + kLanes<C> <= cols; i += kLanes<C>) {
                const Vec<C> slope = gelu<C>(load_user(at + i)).derivative;
                const Vec<C> grad = where_kept<C>(slope * load_user(from + i), load_user(kept + i));
                stream ? stream_user(to + i, grad) : store_user(to + i, grad);
            }
            for (; i < cols; ++i) {
                const C slope = gelu<C>(splat<C>(to_compute(at[i * x.col_stride]))).derivative[0];
                const bool zero = (bits_of(kept[i * y.col_stride]) & kMagnitude<T>) == 0;
                const C grad = zero ? C(0) : slope * to_compute(from[i * dy.col_stride]);
                to[i] = from_compute<T>(grad);
            }
        }
        stream_fence();
    }
}

// x / sqrt(mean(x^2) + eps) * weight, and 1 / sqrt(..) of each row into `scales`.
template <class T>
struct NormOfRow {
    using C = Compute<T>;
    const T* weight;
    C eps;
    C* scales;

    const T* operator()(int64_t r, const T* row, int64_t col_stride, int64_t cols,
                        T* buffer) const {
        row = AsItIs<T>{}(r, row, col_stride, cols, buffer);
        constexpr int64_t kN = kLanes<C>;
        Vec<C> sums[2] = {};
        int64_t i = 0;
        for (; i + 2 * kN <= cols; i += 2 * kN) {
            SK_UNROLL
            for (int u = 0; u < 2; ++u) {
                const Vec<C> x = load_user(row + i + u * kN);
                sums[u] += x * x;
            }
        }
        C sum = sum_lanes<C>(sums[0] + sums[1]);
        for (; i < cols; ++i) sum += to_compute(row[i]) * to_compute(row[i]);
        const C scale = C(1) / std::sqrt(sum / static_cast<C>(cols) + eps);
        scales[r] = scale;
        for (i = 0; i + kN <= cols; i += kN)
            store_user(buffer + i, load_user(row + i) * scale * load_user(weight + i));
        for (; i < cols; ++i)
            buffer[i] = from_compute<T>(to_compute(row[i]) * scale * to_compute(weight[i]));
        return buffer;
    }
};

template <class T>
struct NormAbsTopkBackward {
    Matrix<const T> dy, y, x;  // neighbouring columns next to each other
    const T* weight;
    const Compute<T>* scales;
    T* dx;
    T* dweight;
    int64_t rows, cols;
    int threads;
};

// With h = dy where y is not zero, elsewhere 0, g = h weight and n = x scale:
// dx = scale (g - n mean(g n)), dweight = sum over the rows of h n. The rows are cut at places that
// do not depend on the threads.
template <class T>
void norm_abs_topk_backward(const NormAbsTopkBackward<T>& p) {
    using C = Compute<T>;
    constexpr int64_t kN = kLanes<C>, kParts = 64;
    const int64_t padded = (p.cols + kN - 1) / kN * kN;
    const int64_t part = (p.rows + kParts - 1) / kParts;
    Arena arena;
    const size_t sums_at = arena.reserve<C>(kParts * padded);
    arena.allocate();
    C* const all_sums = arena.at<C>(sums_at);
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t k = 0; k < kParts; ++k) {
        C* const sums = all_sums + k * padded;
        std::fill(sums, sums + padded, C(0));
        for (int64_t r = k * part; r < std::min(p.rows, (k + 1) * part); ++r) {
            const T* const from = p.dy.data + r * p.dy.row_stride;
            const T* const kept = p.y.data + r * p.y.row_stride;
            const T* const x = p.x.data + r * p.x.row_stride;
            T* const to = p.dx + r * p.cols;
            const C scale = p.scales[r];
            const auto one = [&](int64_t i) {
                const bool zero = (bits_of(kept[i]) & kMagnitude<T>) == 0;
                return zero ? C(0) : to_compute(from[i]);
            };
            Vec<C> product = {};
            int64_t i = 0;
            for (; i + kN <= p.cols; i += kN) {
                const Vec<C> h = where_kept<C>(load_user(from + i), load_user(kept + i));
                const Vec<C> hn = h * (load_user(x + i) * scale);
                product += hn * load_user(p.weight + i);
                store(sums + i, load(sums + i) + hn);
            }
            C mean = sum_lanes<C>(product);
            for (; i < p.cols; ++i) {
                const C hn = one(i) * (to_compute(x[i]) * scale);
                mean += hn * to_compute(p.weight[i]);
                sums[i] += hn;
            }
            mean /= static_cast<C>(p.cols);
            for (i = 0; i + kN <= p.cols; i += kN) {
                const Vec<C> h = where_kept<C>(load_user(from + i), load_user(kept + i));
                const Vec<C> n = load_user(x + i) * scale;
                store_user(to + i, (h * load_user(p.weight + i) - n * mean) * scale);
            }
            for (; i < p.cols; ++i) {
                const C n = to_compute(x[i]) * scale;
                to[i] = from_compute<T>((one(i) * to_compute(p.weight[i]) - n * mean) * scale);
            }
        }
    }
    constexpr int64_t kCols = 256;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t first = 0; first < p.cols; first += kCols) {
        const int64_t last = std::min(p.cols, first + kCols);
        for (int64_t i = first; i < last; i += kN) {
            Vec<C> sum = {};
            for (int64_t k = 0; k < kParts; ++k) sum += load(all_sums + k * padded + i);
            store(all_sums + i, sum);
        }
        for (int64_t i = first; i < last; ++i) p.dweight[i] = from_compute<T>(all_sums[i]);
    }
}

}  // namespace
}  // namespace sk
