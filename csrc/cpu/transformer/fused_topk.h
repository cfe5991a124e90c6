// AbsTopK of GELU or of RMSNorm, without the tensor in between, and the derivatives.
#pragma once

#include "../simd_math.h"
#include "../topk.h"

namespace sk {
namespace {

template <class T>
struct GeluOfRow {
    static constexpr bool kPacksInput = true;
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

// Packed rows as they were, or GELU of them.
template <class T>
void unpack(const uint64_t* bits, const T* packed, int64_t room, bool of_gelu, T* y, int64_t rows,
            int64_t cols, int threads) {
    using C = Compute<T>;
    const bool stream = streams(y, rows, cols);
    for_rows<C>(rows, cols, threads, [&](int64_t r, C* buffer) {
        const T* const values = packed + r * room;
        const int64_t count = std::min(room, cols);
        const auto expand_to = [&](auto is_exact) {
            expand_row(bits + r * words_of(cols), buffer, cols,
                       [&](int64_t i, Vec<C> value, uint32_t) {
                           store_part<is_exact.value>(y + r * cols, i, cols, value, stream);
                       });
        };
        if (of_gelu) {
            map_packed(values, count, buffer, [](Vec<C> x) { return gelu<C>(x).value; });
            expand_to(std::false_type{});
        } else {
            map_packed(values, count, buffer, [](Vec<C> x) { return x; });
            expand_to(std::true_type{});
        }
    });
}

// dx = dy gelu'(x) where there is a bit, elsewhere 0; dx is contiguous.
template <class T>
void gelu_abs_topk_backward(const Matrix<const T>& dy, const uint64_t* bits, const T* packed,
                            int64_t room, T* dx, int64_t rows, int64_t cols, int threads) {
    using C = Compute<T>;
    const bool stream = streams(dx, rows, cols);
    for_rows<C>(rows, cols, threads, [&](int64_t r, C* slopes) {
        map_packed(packed + r * room, std::min(room, cols), slopes,
                   [](Vec<C> x) { return gelu<C>(x).derivative; });
        const T* const from = dy.data + r * dy.row_stride;
        expand_row(
            bits + r * words_of(cols), slopes, cols, [&](int64_t i, Vec<C> slope, uint32_t lanes) {
                const Vec<C> grad = slope * load_part(from, dy.col_stride, i, cols);
                store_part<false>(dx + r * cols, i, cols, where_lanes<C>(grad, lanes), stream);
            });
    });
}

// x / sqrt(mean(x^2) + eps) * weight, and 1 / sqrt(..) of each row into `scales`.
template <class T>
struct NormOfRow {
    static constexpr bool kPacksInput = false;
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
    Matrix<const T> dy, x;  // neighbouring columns next to each other
    const uint64_t* bits;
    const T* weight;
    const Compute<T>* scales;
    T* dx;
    T* dweight;
    int64_t rows, cols;
    int threads;
};

// With h = dy where there is a bit, elsewhere 0, g = h weight and n = x scale:
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
            const uint64_t* const bits = p.bits + r * words_of(p.cols);
            const T* const x = p.x.data + r * p.x.row_stride;
            T* const to = p.dx + r * p.cols;
            const C scale = p.scales[r];
            const auto one = [&](int64_t i) {
                return bits[i / kWordBits] >> (i % kWordBits) & 1 ? to_compute(from[i]) : C(0);
            };
            Vec<C> product = {};
            int64_t i = 0;
            for (; i + kN <= p.cols; i += kN) {
                const Vec<C> h = where_lanes<C>(load_user(from + i), lanes_at<C>(bits, i));
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
                const Vec<C> h = where_lanes<C>(load_user(from + i), lanes_at<C>(bits, i));
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
