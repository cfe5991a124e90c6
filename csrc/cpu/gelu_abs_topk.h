// y = abs_topk(gelu(x)) without the tensor in between, and its derivative.
#pragma once

#include "abs_topk.h"
#include "simd_math.h"

namespace sk {
namespace {

template <class T>
struct GeluOfRow {
    const T* operator()(const T* row, int64_t col_stride, int64_t cols, T* buffer) const {
        using C = Compute<T>;
        row = AsItIs<T>{}(row, col_stride, cols, buffer);
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

}  // namespace
}  // namespace sk
