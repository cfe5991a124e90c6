// y keeps the k entries of largest magnitude of each row of x, the others are zero.
//
// A magnitude's bit pattern is an integer that orders like the magnitude, so that the k-th largest
// is found by bisecting integers, a step for each bit at most, whatever the data. A block of
// threads takes a row, whose patterns lie in shared memory where they fit. Among equals the lowest
// index stays; every NaN counts as the same, larger than infinity.
//
// The kernels move bit patterns and compute nothing: bfloat16 and float16 differ in the pattern of
// infinity alone.
#include "launch.cuh"

namespace sk {
namespace cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

struct AbsTopkProblem {
    Operand x;
    void* y;
    int64_t rows, cols, k;
    uint32_t infinity;  // its bit pattern
    int staged;         // entries of a row in shared memory: all, or none
};

template <class Bits>
constexpr Bits kMagnitude = static_cast<Bits>(static_cast<Bits>(~Bits{0}) >> 1);

// Adds up a count over the block. Consecutive calls must alternate between two `counts`, each of
// one int per warp: one barrier is then enough.
__device__ int sum_over_block(int count, int* counts) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
        count += __shfl_xor_sync(kAllLanes, count, distance);
    }
    if (threadIdx.x % kWarp == 0) counts[threadIdx.x / kWarp] = count;
    __syncthreads();
    int sum = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) sum += counts[warp];
    return sum;
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) abs_topk_kernel(const AbsTopkProblem p) {
    SharedMemory shared;
    int* const counts = shared.take<int>(2 * kWarps);
    Bits* const staged = shared.take<Bits>(p.staged);
    const int cols = static_cast<int>(p.cols);
    const int k = static_cast<int>(p.k);
    const Bits nan = static_cast<Bits>(p.infinity + 1);
    const int lane = threadIdx.x % kWarp;
    const int warp = threadIdx.x / kWarp;
    // The counts that the next sum uses. It alternates from row to row as well: who writes counts
    // has passed the barrier of the sum in between, and so has everybody who read them before.
    int turn = 0;

    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const Bits* const x = static_cast<const Bits*>(p.x.data) + row * p.x.row_stride;
        Bits* const y = static_cast<Bits*>(p.y) + row * p.cols;
        const auto key_at = [&](int i) -> Bits {
            const Bits magnitude =
                (p.staged ? staged[i] : x[i * p.x.col_stride]) & kMagnitude<Bits>;
            return magnitude < nan ? magnitude : nan;
        };
        const auto keep = [&](int i, bool kept) {
            y[i] = kept ? (p.staged ? staged[i] : x[i * p.x.col_stride]) : Bits{0};
        };
        if (p.staged) {
            // Each thread reads back what it wrote: no barrier.
            for (int i = threadIdx.x; i < cols; i += blockDim.x) staged[i] = x[i * p.x.col_stride];
        }

        // At least k keys reach `low` (low_count of them), fewer than k reach `high` (high_count).
        uint32_t low = 0, high = static_cast<uint32_t>(nan) + 1;
        int low_count = cols, high_count = 0;
        while (low_count != k && high - low > 1) {
            const uint32_t middle = low + (high - low) / 2;
            int count = 0;
            for (int i = threadIdx.x; i < cols; i += blockDim.x) count += key_at(i) >= middle;
            count = sum_over_block(count, counts + turn * kWarps);
            turn = 1 - turn;
            if (count >= k) {
                low = middle;
                low_count = count;
            } else {
                high = middle;
                high_count = count;
            }
        }

        if (low_count == k) {
            for (int i = threadIdx.x; i < cols; i += blockDim.x) keep(i, key_at(i) >= low);
        } else {
            // More entries equal the threshold than may stay: number them in the order of the row.
            int left = k - high_count;
            for (int begin = 0; begin < cols; begin += blockDim.x) {
                const int i = begin + threadIdx.x;
                const uint32_t key = i < cols ? key_at(i) : 0;
                const bool tie = i < cols && key == low;
                const unsigned ties = __ballot_sync(kAllLanes, tie);
                int* const of_warps = counts + turn * kWarps;
                turn = 1 - turn;
                if (lane == 0) of_warps[warp] = __popc(ties);
                __syncthreads();
                int before = __popc(ties & ((1u << lane) - 1)), all = 0;
                for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w) {
                    before += w < warp ? of_warps[w] : 0;
                    all += of_warps[w];
                }
                if (i < cols) keep(i, key > low || (tie && before < left));
                left -= all;
            }
        }
    }
}

struct AbsTopkBackwardProblem {
    Operand grad_output;
    Operand y;
    void* grad_input;
    int64_t rows, cols;
};

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    abs_topk_backward_kernel(const AbsTopkBackwardProblem p) {
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const Bits* const grad_output =
            static_cast<const Bits*>(p.grad_output.data) + row * p.grad_output.row_stride;
        const Bits* const y = static_cast<const Bits*>(p.y.data) + row * p.y.row_stride;
        Bits* const grad_input = static_cast<Bits*>(p.grad_input) + row * p.cols;
        const int cols = static_cast<int>(p.cols);
        for (int i = threadIdx.x; i < cols; i += blockDim.x) {
            const bool kept = (y[i * p.y.col_stride] & kMagnitude<Bits>) != 0;
            // Where nothing was kept the gradient is not even read.
            grad_input[i] = kept ? grad_output[i * p.grad_output.col_stride] : Bits{0};
        }
    }
}

// A row of few entries gets few threads.
unsigned threads_for(int64_t cols) {
    const int64_t wanted = ceil_div(ceil_div(cols, 8), kWarp) * kWarp;
    return static_cast<unsigned>(std::min<int64_t>(kThreads, wanted));
}

// Several times as many blocks as run at once: a block takes row after row.
unsigned blocks_for(int64_t rows, int device) {
    return static_cast<unsigned>(std::min(rows, 64 * multiprocessors(device)));
}

uint32_t infinity_of(DType dtype) {
    return dtype == DType::kFloat32 ? 0x7f800000u : dtype == DType::kBfloat16 ? 0x7f80u : 0x7c00u;
}

std::string describe(const char* name, int64_t rows, int64_t cols) {
    return std::string("the kernel of ") + name + " (" + std::to_string(rows) + " rows of " +
           std::to_string(cols) + ")";
}

template <class Bits>
void launch_abs_topk(AbsTopkProblem p, int64_t staged_bytes, const Queue& queue) {
    const std::string what = describe("abs_topk", p.rows, p.cols);
    const auto bytes = [&](int64_t entries) {
        return 4 * 2 * kWarps + ceil_div(entries * static_cast<int64_t>(sizeof(Bits)), 16) * 16;
    };
    const bool fits = p.cols * static_cast<int64_t>(sizeof(Bits)) <= staged_bytes &&
                      bytes(p.cols) <= shared_limit(queue.device);
    p.staged = fits ? static_cast<int>(p.cols) : 0;
    launch(what, abs_topk_kernel<Bits>, blocks_for(p.rows, queue.device), threads_for(p.cols),
           bytes(p.staged), queue, p);
}

}  // namespace

void abs_topk(DType dtype, const Operand& x, void* y, int64_t rows, int64_t cols, int64_t k,
              int64_t staged_bytes, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    const AbsTopkProblem p{x, y, rows, cols, k, infinity_of(dtype), 0};
    if (dtype == DType::kFloat32) {
        launch_abs_topk<uint32_t>(p, staged_bytes, queue);
    } else {
        launch_abs_topk<uint16_t>(p, staged_bytes, queue);
    }
}

void abs_topk_backward(DType dtype, const Operand& grad_output, const Operand& y, void* grad_input,
                       int64_t rows, int64_t cols, const Queue& queue) {
    if (rows == 0 || cols == 0) return;
    const DeviceGuard guard(queue.device);
    const AbsTopkBackwardProblem p{grad_output, y, grad_input, rows, cols};
    const std::string what = describe("abs_topk_backward", rows, cols);
    const unsigned blocks = blocks_for(rows, queue.device), threads = threads_for(cols);
    if (dtype == DType::kFloat32) {
        launch(what, abs_topk_backward_kernel<uint32_t>, blocks, threads, 0, queue, p);
    } else {
        launch(what, abs_topk_backward_kernel<uint16_t>, blocks, threads, 0, queue, p);
    }
}

}  // namespace cuda
}  // namespace sk
