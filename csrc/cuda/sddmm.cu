// dW = dY^T X at the kept blocks: a dot product over all tokens for every kept weight.
//
// A block of threads keeps a tile of tokens of a slice of the inputs in shared memory. Eight
// neighbouring threads (a group) own the eight vectors of a tile: each holds its tokens of a row of
// dY in registers and multiplies them with those of eight inputs, then the group adds up the eight
// sums, and each thread has one. Tokens are cut at fixed places into parts, whose sums a second
// kernel adds in order: no atomics, the same bits every time. Unstructured weights in 16 bits have
// a kernel of their own, for the first pass.
#include "hopper.h"
#include "launch.cuh"
#include "sddmm_unstructured.cuh"

namespace sk {
namespace cuda {
namespace {

constexpr int kLogVectors = 3;
constexpr int kVectors = 1 << kLogVectors;
// Outputs whose dY lies in shared memory at a time. Groups take kShared of them at a time.
constexpr int kChunkOutputs = 64;

struct SddmmProblem {
    Lists lists;
    Operand grad_output;
    Operand x;
    float* partial;
    int64_t tokens;
    int64_t part_tokens;  // a multiple of the tile
    int64_t slices;
    int slice_cols;          // block-columns of a slice
    int64_t split_outputs;   // outputs that blockIdx.y counts, a multiple of kChunkOutputs
    bool wide_x, wide_grad;  // load_tile
};

// A part is at least this many tiles, and there are at most this many parts: they cost memory.
constexpr int64_t kPartTiles = 8;
constexpr int64_t kMaxParts = 16;

// Adds up each of eight values over the eight threads of a group; thread i gets the i-th sum.
__device__ float sum_over_group(float (&values)[kVectors], int lane) {
#pragma unroll
    for (int half = kVectors / 2; half > 0; half /= 2) {
        const bool upper = (lane & half) != 0;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = upper ? values[i + half] : values[i];
            const float sent = upper ? values[i] : values[i + half];
            values[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
        }
    }
    return values[0];
}

// The largest count of the groups of a warp, so that all of its threads loop alike.
__device__ int64_t max_over_warp(int64_t count) {
#pragma unroll
    for (int distance = kVectors; distance < kWarp; distance *= 2) {
        const int64_t other = __shfl_xor_sync(kAllLanes, count, distance);
        count = other > count ? other : count;
    }
    return count;
}

template <class T, class Index, int kShared>
__global__ void __launch_bounds__(kThreads, 1) sddmm_kernel(const SddmmProblem p) {
    constexpr int kTileTokens = kTokens<T> * kVectors;
    const int in_block = p.lists.in_block;
    const int out_block = p.lists.out_block;
    SharedMemory shared;
    uint4* const inputs = shared.take<uint4>((p.slice_cols * in_block) << kLogVectors);
    uint4* const grads = shared.take<uint4>(kChunkOutputs << kLogVectors);

    const Index* const columns = static_cast<const Index*>(p.lists.columns);
    const T* const x = static_cast<const T*>(p.x.data);
    const T* const grad_output = static_cast<const T*>(p.grad_output.data);
    const int64_t block_size = int64_t{out_block} * in_block;
    float* const partial = p.partial + blockIdx.x * p.lists.blocks * block_size;
    const int64_t out_features = p.lists.rows * out_block;
    const int64_t units_in_row = out_block / kShared;

    const int vector = threadIdx.x % kVectors;
    const int group = threadIdx.x / kVectors;
    const int groups = blockDim.x / kVectors;
    const int64_t first_output = blockIdx.y * p.split_outputs;
    const int64_t end_output = first_output + p.split_outputs < out_features
                                   ? first_output + p.split_outputs
                                   : out_features;
    const int64_t first_token = blockIdx.x * p.part_tokens;
    const int64_t end_token =
        first_token + p.part_tokens < p.tokens ? first_token + p.part_tokens : p.tokens;

    for (int64_t slice = blockIdx.z; slice < p.slices; slice += gridDim.z) {
        const int64_t first_col = slice * p.slice_cols;
        const int64_t left = p.lists.cols - first_col;
        const int cols = left < p.slice_cols ? static_cast<int>(left) : p.slice_cols;
        for (int64_t token = first_token; token < end_token; token += kTileTokens) {
            __syncthreads();  // nobody reads the tile before any more
            load_tile(inputs, kLogVectors,
                      x + token * p.x.row_stride + first_col * in_block * p.x.col_stride,
                      p.x.row_stride, p.x.col_stride, end_token - token, cols * in_block, p.wide_x);
            for (int64_t chunk = first_output; chunk < end_output; chunk += kChunkOutputs) {
                const int outputs = end_output - chunk < kChunkOutputs
                                        ? static_cast<int>(end_output - chunk)
                                        : kChunkOutputs;
                __syncthreads();  // nobody reads the dY before any more
                load_tile(grads, kLogVectors,
                          grad_output + token * p.grad_output.row_stride +
                              chunk * p.grad_output.col_stride,
                          p.grad_output.row_stride, p.grad_output.col_stride, end_token - token,
                          outputs, p.wide_grad);
                __syncthreads();
                // A warp's groups step together, past the last unit as well: they shuffle.
                for (int base = 0; base * kShared < outputs; base += groups) {
                    const int local = (base + group) * kShared;
                    const bool mine = local < outputs;
                    const int64_t unit = (chunk + local) / kShared;
                    const int64_t row = unit / units_in_row;
                    const int64_t first = (unit - row * units_in_row) * kShared;
                    Range range{0, 0};
                    float grad[kShared][kTokens<T>] = {};
                    if (mine) {
                        range = blocks_in_slice(p.lists.offsets, p.lists.per_row, columns, row,
                                                slice, p.slices, p.slice_cols);
#pragma unroll
                        for (int a = 0; a < kShared; ++a) {
                            unpack(grads[tile_base(local + a, kLogVectors) ^ vector], grad[a], T{});
                        }
                    }
                    const int64_t features = (range.end - range.begin) * in_block;
                    const int64_t steps = max_over_warp(features);
                    for (int64_t at = 0; at < steps; at += kVectors) {
                        // Thread i finds where the i-th of the next eight features lies.
                        const int64_t own = at + vector;
                        const bool valid = own < features;
                        const int64_t block = valid ? range.begin + own / in_block : 0;
                        const int b = valid ? static_cast<int>(own % in_block) : 0;
                        const int feature =
                            valid ? static_cast<int>(columns[block] - first_col) * in_block + b : 0;
                        const unsigned place = tile_base(feature, kLogVectors);
                        float acc[kShared][kVectors] = {};
#pragma unroll
                        for (int i = 0; i < kVectors; ++i) {
                            const unsigned from = __shfl_sync(kAllLanes, place, i, kVectors);
                            float input[kTokens<T>];
                            unpack(inputs[from ^ vector], input, T{});
#pragma unroll
                            for (int a = 0; a < kShared; ++a) {
#pragma unroll
                                for (int t = 0; t < kTokens<T>; ++t) {
                                    acc[a][i] = fmaf(grad[a][t], input[t], acc[a][i]);
                                }
                            }
                        }
#pragma unroll
                        for (int a = 0; a < kShared; ++a) {
                            const float sum = sum_over_group(acc[a], vector);
                            if (!valid) continue;
                            float* const to =
                                partial + block * block_size + (first + a) * in_block + b;
                            *to = token == first_token ? sum : *to + sum;
                        }
                    }
                }
            }
        }
    }
}

// The sum of a part for an unstructured weight, from nothing but what it multiplies.
template <class T>
__device__ float sum_again(const SddmmProblem& p, int64_t part, int64_t weight) {
    const int64_t column = static_cast<const uint16_t*>(p.lists.columns)[weight];
    const T* const x = static_cast<const T*>(p.x.data) + column * p.x.col_stride;
    const T* const grad = static_cast<const T*>(p.grad_output.data) +
                          weight / p.lists.per_row * p.grad_output.col_stride;
    float sum = 0.0f;
    for (int64_t m = part * p.part_tokens; m < (part + 1) * p.part_tokens && m < p.tokens; ++m) {
        sum += to_float(grad[m * p.grad_output.row_stride]) * to_float(x[m * p.x.row_stride]);
    }
    return sum;
}

// The sum of the parts, in order; zero if there is none. Parts of `part_tokens`, if that is not 0,
// may be spoilt where they are not finite.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_parts_kernel(const SddmmProblem p, int64_t parts, int64_t elements, T* out) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements;
         i += step) {
        float sum = 0.0f;
        for (int64_t part = 0; part < parts; ++part) {
            const float of_part = p.partial[part * elements + i];
            const bool spoilt = p.part_tokens > 0 && !(of_part - of_part == 0.0f);
            sum += spoilt ? sum_again<T>(p, part, i) : of_part;
        }
        out[i] = from_float<T>(sum);
    }
}

template <class T, class Index, int kShared>
void launch_products(SddmmProblem p, int64_t parts, int64_t slice_features, const Queue& queue) {
    const std::string what = describe("grad_weight", p.lists, p.tokens);
    constexpr int kTileTokens = kTokens<T> * kVectors;
    constexpr int64_t kGradBytes = 16 * kChunkOutputs * kVectors;
    const int64_t fitting =
        std::min(slice_features, (shared_limit(queue.device) - kGradBytes) / (16 * kVectors));
    const int64_t slice_cols =
        std::min(p.lists.cols, std::max<int64_t>(1, fitting / p.lists.in_block));
    const int64_t bytes = slice_cols * p.lists.in_block * 16 * kVectors + kGradBytes;
    p.slices = ceil_div(p.lists.cols, slice_cols);
    p.slice_cols = static_cast<int>(slice_cols);
    const int64_t features = slice_cols * p.lists.in_block;
    p.wide_x = wide_loads(p.x, p.lists.cols * p.lists.in_block, features, sizeof(T));
    p.wide_grad =
        wide_loads(p.grad_output, p.lists.rows * p.lists.out_block, kChunkOutputs, sizeof(T));
    p.part_tokens = ceil_div(ceil_div(p.tokens, kTileTokens), parts) * kTileTokens;

    const int64_t slice_blocks = std::min<int64_t>(p.slices, 65535);
    const int64_t chunks = ceil_div(p.lists.rows * p.lists.out_block, kChunkOutputs);
    const int64_t wanted = ceil_div(multiprocessors(queue.device), parts * slice_blocks);
    p.split_outputs = ceil_div(chunks, std::min(chunks, wanted)) * kChunkOutputs;
    const dim3 grid(
        static_cast<unsigned>(parts),
        static_cast<unsigned>(ceil_div(p.lists.rows * p.lists.out_block, p.split_outputs)),
        static_cast<unsigned>(slice_blocks));
    launch(what, sddmm_kernel<T, Index, kShared>, grid, kThreads, bytes, queue, p);
}

template <class T, int kShared>
void choose_index(const SddmmProblem& p, int64_t parts, int64_t slice_features,
                  const Queue& queue) {
    if (p.lists.narrow) {
        launch_products<T, uint16_t, kShared>(p, parts, slice_features, queue);
    } else {
        launch_products<T, int32_t, kShared>(p, parts, slice_features, queue);
    }
}

template <class T>
void choose_kernel(const SddmmProblem& p, int64_t parts, int64_t slice_features,
                   const Queue& queue) {
    if constexpr (sizeof(T) == 2) {
        if (is_unstructured(p.lists)) {
            return launch_unstructured<T>({p.lists, p.grad_output, p.x, p.partial, p.tokens}, parts,
                                          slice_features, queue);
        }
    }
    switch (shared_outputs(p.lists.out_block)) {
        case 4:
            return choose_index<T, 4>(p, parts, slice_features, queue);
        case 2:
            return choose_index<T, 2>(p, parts, slice_features, queue);
        default:
            return choose_index<T, 1>(p, parts, slice_features, queue);
    }
}

template <class T>
void run(SddmmProblem p, void* grad_values, int64_t parts, int64_t slice_features, DType dtype,
         bool on_hopper, const Queue& queue) {
    if (on_hopper) {
        sddmm_hopper(dtype, p.lists, p.grad_output, p.x, p.partial, grad_values, parts, p.tokens,
                     queue);
        if (parts == 0) return;
    } else if (parts > 0) {
        choose_kernel<T>(p, parts, slice_features, queue);
        if (sizeof(T) == 2 && is_unstructured(p.lists))
            p.part_tokens = unstructured_part_tokens(p.tokens, parts);
    }
    const int64_t elements = p.lists.blocks * p.lists.out_block * p.lists.in_block;
    const auto grid = static_cast<unsigned>(
        std::min(ceil_div(elements, kThreads), 16 * multiprocessors(queue.device)));
    launch(describe("grad_weight", p.lists, p.tokens) + ", second pass,", add_parts_kernel<T>, grid,
           kThreads, 0, queue, p, parts, elements, static_cast<T*>(grad_values));
}

}  // namespace

int64_t sddmm_parts(DType dtype, const Lists& lists, int64_t tokens, bool on_hopper) {
    if (tokens == 0) return 0;
    if (on_hopper) return sddmm_hopper_parts(lists, tokens);
    if (dtype != DType::kFloat32 && is_unstructured(lists))
        return unstructured_parts(lists, tokens);
    const int64_t tiles = ceil_div(tokens, (dtype == DType::kFloat32 ? 4 : 8) * kVectors);
    // No part may be empty: nobody would set its sums.
    return ceil_div(tiles, ceil_div(tiles, std::min(kMaxParts, ceil_div(tiles, kPartTiles))));
}

int64_t sddmm_gathers(DType dtype, const Lists& lists) {
    return dtype != DType::kFloat32 && is_unstructured(lists) ? gathers_of(lists) : 0;
}

void deal_rows(const Lists& lists, uint64_t* dealt, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    launch_deal_rows(lists, dealt, queue);
}

void sddmm(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
           float* partial, void* grad_values, int64_t tokens, int64_t slice_features,
           bool on_hopper, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    const int64_t parts = sddmm_parts(dtype, lists, tokens, on_hopper);
    const SddmmProblem p{lists, grad_output, x, partial, tokens, 0, 1, 1, 0, false, false};
    switch (dtype) {
        case DType::kFloat32:
            return run<float>(p, grad_values, parts, slice_features, dtype, on_hopper, queue);
        case DType::kBfloat16:
            return run<Bf16>(p, grad_values, parts, slice_features, dtype, on_hopper, queue);
        case DType::kFloat16:
            return run<Half>(p, grad_values, parts, slice_features, dtype, on_hopper, queue);
    }
}

}  // namespace cuda
}  // namespace sk
