// The derivatives of abs_topk, and of GELU and RMSNorm with it: nothing passes where y is zero.
#include "topk.cuh"

namespace sk {
namespace cuda {
namespace {

struct BackwardProblem {
    Operand grad_output, y, x;  // x is null for abs_topk alone
    void* grad_input;
    int64_t rows, cols;
    bool wide;  // rows can be moved 16 bytes at a time
};

// Calls `make(first, grads, kept)` for the vectors of a row that a thread has: dY, and all bits
// where y is not zero.
template <class Packed, class Make>
__device__ void for_vectors(const BackwardProblem& p, int64_t row, Make make) {
    using Bits = typename Packed::Bits;
    const Operand &dy = p.grad_output, &y = p.y;
    const Bits* const grad_output = static_cast<const Bits*>(dy.data) + row * dy.row_stride;
    const Bits* const results = static_cast<const Bits*>(y.data) + row * y.row_stride;
    const int cols = static_cast<int>(p.cols);
    for (int first = threadIdx.x * kEntries<Bits>; first < cols;
         first += blockDim.x * kEntries<Bits>) {
        const uint4 grads = load_entries(grad_output, dy.col_stride, first, cols, p.wide);
        const uint4 kept = load_entries(results, y.col_stride, first, cols, p.wide);
        make(first, grads, mask_above<Packed>(kept, 0));
    }
}

template <class Packed, bool kGelu>
__global__ void __launch_bounds__(kThreads, 2) abs_topk_backward_kernel(const BackwardProblem p) {
    using Bits = typename Packed::Bits;
    using T = typename Packed::Number;
    const int cols = static_cast<int>(p.cols);
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const Bits* const x = static_cast<const Bits*>(p.x.data) + row * p.x.row_stride;
        Bits* const grad_input = static_cast<Bits*>(p.grad_input) + row * p.cols;
        for_vectors<Packed>(p, row, [&](int first, uint4 grads, const uint4& kept) {
            if constexpr (kGelu) {
                float slopes[kEntries<Bits>], numbers[kEntries<Bits>];
                unpack(load_entries(x, p.x.col_stride, first, cols, p.wide), numbers, T{});
#pragma unroll
                for (int e = 0; e < kEntries<Bits>; ++e) {
                    const Normal normal(numbers[e]);
                    slopes[e] = fmaf(numbers[e] * 0.398942280f, normal.bell, normal.below);
                }
                unpack(grads, numbers, T{});
#pragma unroll
                for (int e = 0; e < kEntries<Bits>; ++e) {
                    numbers[e] *= slopes[e];
                }
                grads = pack_numbers(numbers, T{});
            }
            store_entries(grad_input, first, cols, p.wide, grads & kept);
        });
    }
}

// ---- RMSNorm. With h = dY where y is not zero, elsewhere 0, g = h weight and n = x scale:
// dX = scale (g - n mean(g n)), dweight = sum over the rows of h n.

struct NormBackwardProblem {
    BackwardProblem rows_of;
    const void* weight;
    const float* scales;
    float* partial;  // (parts, padded): of each part of the rows its sums of h n
    int64_t part_rows;
    int vectors;     // of a row: entry e of vector v is number e * vectors + v of the sums
    bool in_shared;  // the sums of a part lie in shared memory, and are copied at its end
};

// A block of threads takes the rows of a part. A thread always has the same columns, whose sums no
// other touches.
template <class Packed>
__global__ void __launch_bounds__(kThreads, 2) norm_backward_kernel(const NormBackwardProblem p) {
    using Bits = typename Packed::Bits;
    using T = typename Packed::Number;
    constexpr int kCount = kEntries<Bits>;
    const BackwardProblem& rows_of = p.rows_of;
    const int cols = static_cast<int>(rows_of.cols);
    SharedMemory shared;
    Warps warps(shared.take<int>(2 * kWarp));
    float* const part = p.partial + static_cast<int64_t>(blockIdx.x) * p.vectors * kCount;
    float* const sums = p.in_shared ? shared.take<float>(p.vectors * kCount) : part;
    for (int v = threadIdx.x; v < p.vectors; v += blockDim.x) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) sums[e * p.vectors + v] = 0.0f;
    }
    const int64_t begin = blockIdx.x * p.part_rows;
    const int64_t end = begin + p.part_rows < rows_of.rows ? begin + p.part_rows : rows_of.rows;
    for (int64_t row = begin; row < end; ++row) {
        const Bits* const x = static_cast<const Bits*>(rows_of.x.data) + row * rows_of.x.row_stride;
        Bits* const grad_input = static_cast<Bits*>(rows_of.grad_input) + row * cols;
        const float scale = p.scales[row];
        float h[kCount], n[kCount], weights[kCount];
        const auto load = [&](int first, const uint4& grads) {
            unpack(grads, h, T{});
            unpack(load_entries(x, rows_of.x.col_stride, first, cols, rows_of.wide), n, T{});
            unpack(load_entries(static_cast<const Bits*>(p.weight), 1, first, cols, rows_of.wide),
                   weights, T{});
#pragma unroll
            for (int e = 0; e < kCount; ++e) n[e] *= scale;
        };
        float product = 0.0f;
        for_vectors<Packed>(rows_of, row, [&](int first, const uint4& grads, const uint4& kept) {
            load(first, grads & kept);
#pragma unroll
            for (int e = 0; e < kCount; ++e) {
                const float hn = h[e] * n[e];
                product = fmaf(hn, weights[e], product);
                sums[e * p.vectors + first / kCount] += hn;
            }
        });
        const float mean = __fdividef(sum_threads(product, warps), static_cast<float>(cols));
        for_vectors<Packed>(
            rows_of, row, [&](int first, const uint4& grads, const uint4& kept) {  // from a cache
                load(first, grads & kept);
#pragma unroll
                for (int e = 0; e < kCount; ++e) h[e] = (h[e] * weights[e] - n[e] * mean) * scale;
                store_entries(grad_input, first, cols, rows_of.wide, pack_numbers(h, T{}));
            });
    }
    if (!p.in_shared) return;
    for (int v = threadIdx.x; v < p.vectors; v += blockDim.x) {
#pragma unroll
        for (int e = 0; e < kCount; ++e) part[e * p.vectors + v] = sums[e * p.vectors + v];
    }
}

// The sums of 32 columns to a block of threads; a warp adds those of some parts.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_norm_parts_kernel(const float* partial, int64_t parts, int vectors, int count, int cols,
                          T* grad_weight) {
    SharedMemory shared;
    float* const of_warps = shared.take<float>(kThreads);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, padded = vectors * count;
    const int at = static_cast<int>(blockIdx.x) * kWarp + lane;
    float sum = 0.0f;
    if (at < padded) {
        for (int64_t part = warp; part < parts; part += kWarps) sum += partial[part * padded + at];
    }
    of_warps[threadIdx.x] = sum;
    __syncthreads();
    const int column = at % vectors * count + at / vectors;
    if (warp > 0 || at >= padded || column >= cols) return;
    for (int other = 1; other < kWarps; ++other) sum += of_warps[other * kWarp + lane];
    grad_weight[column] = from_float<T>(sum);
}

// The threads of a block for a row: few for a row of few entries.
template <class Bits>
unsigned threads_of(int64_t cols) {
    const int64_t warps = ceil_div(cols, kWarp * kEntries<Bits>);
    return static_cast<unsigned>(std::min<int64_t>(kWarps, warps) * kWarp);
}

template <class Bits>
bool is_wide(const BackwardProblem& p) {
    constexpr auto kBytes = static_cast<int>(sizeof(Bits));
    const auto wide = [&](const Operand& rows) {
        return !rows.data || wide_loads(rows, p.cols, p.cols, kBytes);
    };
    return wide(p.grad_output) && wide(p.y) && wide(p.x) &&
           reinterpret_cast<uintptr_t>(p.grad_input) % 16 == 0;
}

template <class Packed>
void launch_backward(BackwardProblem p, const Queue& queue) {
    using Bits = typename Packed::Bits;
    p.wide = is_wide<Bits>(p);
    launch(
        describe(p.x.data ? "gelu_abs_topk_backward" : "abs_topk_backward", p.rows, p.cols),
        p.x.data ? abs_topk_backward_kernel<Packed, true> : abs_topk_backward_kernel<Packed, false>,
        static_cast<unsigned>(std::min(p.rows, 64 * multiprocessors(queue.device))),
        threads_of<Bits>(p.cols), 0, queue, p);
}

// As many parts as keep an H200 busy, whatever the GPU: the same sums on all.
constexpr int64_t kNormParts = 4 * 132;
int64_t part_rows(int64_t rows) { return ceil_div(rows, std::min(rows, kNormParts)); }

template <class Packed>
void launch_norm_backward(NormBackwardProblem p, void* grad_weight, const Queue& queue) {
    using Bits = typename Packed::Bits;
    using T = typename Packed::Number;
    BackwardProblem& rows_of = p.rows_of;
    rows_of.wide = is_wide<Bits>(rows_of) && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
    p.part_rows = part_rows(rows_of.rows);
    p.vectors = static_cast<int>(ceil_div(rows_of.cols, kEntries<Bits>));
    const int64_t padded = int64_t{p.vectors} * kEntries<Bits>, sums = 4 * padded;
    const int64_t parts = ceil_div(rows_of.rows, p.part_rows), shared = 4 * 2 * kWarp;
    p.in_shared = shared + sums <= shared_limit(queue.device);
    const std::string what = describe("norm_abs_topk_backward", rows_of.rows, rows_of.cols);
    launch(what, norm_backward_kernel<Packed>, static_cast<unsigned>(parts),
           threads_of<Bits>(rows_of.cols), shared + (p.in_shared ? sums : 0), queue, p);
    launch(what + ", second pass,", add_norm_parts_kernel<T>,
           static_cast<unsigned>(ceil_div(padded, kWarp)), kThreads, 4 * kThreads, queue, p.partial,
           parts, p.vectors, kEntries<Bits>, static_cast<int>(rows_of.cols),
           static_cast<T*>(grad_weight));
}

// Calls `run` with the magnitudes of a dtype.
template <class Run>
void with_magnitudes(DType dtype, Run run) {
    switch (dtype) {
        case DType::kFloat32:
            return run(PackedFloat{});
        case DType::kBfloat16:
            return run(PackedPair<__nv_bfloat162>{});
        case DType::kFloat16:
            return run(PackedPair<__half2>{});
    }
}

}  // namespace

void abs_topk_backward(DType dtype, const Operand& grad_output, const Operand& y, const Operand& x,
                       void* grad_input, int64_t rows, int64_t cols, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    const BackwardProblem p{grad_output, y, x, grad_input, rows, cols, false};
    with_magnitudes(dtype, [&](auto packed) { launch_backward<decltype(packed)>(p, queue); });
}

int64_t norm_partial(int64_t rows, int64_t cols) {
    return rows == 0 ? 0 : ceil_div(rows, part_rows(rows)) * (ceil_div(cols, 8) * 8);
}

void norm_abs_topk_backward(DType dtype, const Operand& grad_output, const Operand& y,
                            const Operand& x, const void* weight, const float* scales,
                            float* partial, void* grad_input, void* grad_weight, int64_t rows,
                            int64_t cols, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    const NormBackwardProblem p{
        {grad_output, y, x, grad_input, rows, cols, false}, weight, scales, partial, 0, 0, false};
    with_magnitudes(
        dtype, [&](auto packed) { launch_norm_backward<decltype(packed)>(p, grad_weight, queue); });
}

}  // namespace cuda
}  // namespace sk
