// dW of unstructured weights in 16 bits, by matrix instructions.
//
// A block of threads keeps all inputs of 16 tokens in shared memory, feature-major, and the dY of
// its outputs, token-major. A job is 8 neighbouring outputs and up to 16 slots of each, that is
// inputs that they keep. It gathers their rows of the tile, 16 at a time (a gather), multiplies
// these with the dY of the outputs that read them, and with zeros for the other outputs: so that
// all gathers of a job add to the same 16 x 8 sums, one for each slot and output. A warp keeps
// the sums of its jobs in registers over all tokens of a part, which no other block shares. Inputs
// beyond shared memory are cut into slices: a block sees one, and others' inputs as zeros.
//
// Shared memory reads the 8 rows of a matrix at once if they lie in different banks: the rows of a
// gather are dealt to its two matrices by banks, once for each layout (deal_rows_kernel).
//
// Where x is not finite, its products with those zeros spoil the same slot of all outputs of a job:
// the second pass computes sums that are not finite once more.
#pragma once

#include "launch.cuh"
#include "mma.cuh"

namespace sk {
namespace cuda {

constexpr int kJobOutputs = 8;
constexpr int kGathered = 16;   // rows of a gather, and slots of a job at most
constexpr int kMmaTokens = 16;  // of a tile

struct UnstructuredProblem {
    Lists lists;
    Operand grad_output;
    Operand x;
    float* partial;
    int64_t tokens;
    int64_t part_tokens = 0;    // a multiple of the tile
    int64_t split_outputs = 0;  // outputs of a block
    int64_t output_splits = 0;  // blocks that share the outputs for the same slots
    int64_t slot_splits = 0;
    int slice_cols = 0;                      // inputs of a slice
    bool wide_x = false, wide_grad = false;  // load_matrices; 16 bytes can be read at a time
};

// How the products of a layout are cut.
struct Jobs {
    int gathers;      // of a job: 2, 4 or 8
    int of_warp;      // as many as there are registers for, an even number
    int64_t outputs;  // of a block
    int64_t output_splits, slot_splits;
};
__host__ __device__ constexpr int jobs_of_warp(int gathers) {
    return gathers == 2 ? 12 : gathers == 4 ? 8 : 6;
}
inline Jobs jobs_of(const Lists& lists) {
    Jobs jobs{};
    jobs.gathers = 2;
    while (jobs.gathers < 8 && lists.per_row > 2 * jobs.gathers) jobs.gathers *= 2;
    jobs.of_warp = jobs_of_warp(jobs.gathers);
    jobs.outputs = int64_t{kThreads / kWarp} * jobs.of_warp * kJobOutputs;
    jobs.output_splits = ceil_div(lists.rows, jobs.outputs);
    jobs.slot_splits = ceil_div(lists.per_row, kGathered);
    return jobs;
}

// Gathers of all jobs, by their outputs, slots, and number in the job.
inline int64_t gathers_of(const Lists& lists) {
    const Jobs jobs = jobs_of(lists);
    return ceil_div(lists.rows, kJobOutputs) * jobs.slot_splits * jobs.gathers;
}
__device__ inline int64_t gather_of(int64_t job, int64_t slot_splits, int64_t slot_split,
                                    int gathers, int number) {
    return (job * slot_splits + slot_split) * gathers + number;
}

// Row i of a gather, in four bits of `dealt`, is its output i / slots and its slot i % slots.
__device__ inline int dealt_row(uint64_t dealt, int row) { return dealt >> 4 * row & 15u; }

// A thread deals the 16 rows of a gather: those of a bank to both matrices in turn, of an odd
// number one more to the matrix that has fewer, and the rows that do not exist to what is left.
__global__ void __launch_bounds__(kThreads)
    deal_rows_kernel(const Lists lists, int gathers, int64_t slot_splits, int64_t count,
                     uint64_t* dealt) {
    const int slots = 2 * gathers, none = 8;  // banks of 16 bytes
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
         i += step) {
        const int64_t job = i / gathers / slot_splits, slot = i / gathers % slot_splits * kGathered;
        const int64_t output = job * kJobOutputs + i % gathers * (kGathered / slots);
        uint64_t banks = 0;  // of each row, in four bits
        for (int row = 0; row < kGathered; ++row) {
            const int64_t of = output + row / slots, at = slot + row % slots;
            const bool there = of < lists.rows && at < lists.per_row;
            const int column = there ? lists.wide_columns[of * lists.per_row + at] : 0;
            const uint64_t bank = there ? tile_base(column, 1) % 8 : none;
            banks |= bank << 4 * row;
        }
        uint64_t order = 0;
        int left = 0, right = 0;  // rows of the two matrices
        for (uint64_t bank = 0; bank <= none; ++bank) {
            bool to_left = left <= right;
            for (int row = 0; row < kGathered; ++row) {
                if ((banks >> 4 * row & 15u) != bank) continue;
                to_left = left < 8 && (to_left || right == 8);
                const int place = to_left ? left++ : 8 + right++;
                order |= static_cast<uint64_t>(row) << 4 * place;
                to_left = !to_left;
            }
        }
        dealt[i] = order;
    }
}

// Distance of a token's dY from that of the next: the gap leads them to different banks.
__host__ __device__ inline int grad_stride(int outputs) { return outputs + 8; }

// The dY of `outputs` outputs and a tile of tokens, token-major; what is not there is zero.
template <class T>
__device__ void load_grads(T* grads, const T* first, const Operand& operand, int outputs, int there,
                           int64_t tokens, bool wide) {
    const int width = wide ? kTokens<T> : 1;
    for (int token = threadIdx.x / kWarp; token < kMmaTokens; token += blockDim.x / kWarp) {
        const int outputs_there = token < tokens ? there : 0;
        int output = threadIdx.x % kWarp * width;
        const T* from = first + token * operand.row_stride + output * operand.col_stride;
        T* to = grads + token * grad_stride(outputs) + output;
        for (; output < outputs; output += kWarp * width) {
            const bool valid = output < outputs_there;
            if (wide) {
                store_vector(to, valid ? load_vector(from) : uint4{0, 0, 0, 0});
            } else {
                *to = valid ? *from : T{0};
            }
            from += kWarp * width * operand.col_stride;
            to += kWarp * width;
        }
    }
}

template <class T, int kGathers>
__global__ void __launch_bounds__(kThreads, 1)
    sddmm_unstructured_kernel(const UnstructuredProblem p) {
    constexpr int kJobs = jobs_of_warp(kGathers);
    constexpr int kSlots = 2 * kGathers;                    // of an output in a job
    constexpr int kGatherOutputs = kJobOutputs / kGathers;  // that a gather serves
    const int64_t rows = p.lists.rows, per_row = p.lists.per_row;
    const int outputs = static_cast<int>(p.split_outputs);
    const unsigned zeros = tile_vectors(p.slice_cols, 1);  // the place of eight vectors of them
    SharedMemory shared;
    uint4* const inputs = shared.take<uint4>(zeros + 8);
    T* const grads = shared.take<T>(kMmaTokens * grad_stride(outputs));

    const uint16_t* const columns = static_cast<const uint16_t*>(p.lists.columns);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t split_output = blockIdx.x % p.output_splits * p.split_outputs;
    const int64_t first_output = split_output + warp * kJobs * kJobOutputs;
    const int64_t first_slot = blockIdx.x / p.output_splits * kGathered;
    const int64_t first_token = blockIdx.y * p.part_tokens;
    const int64_t end_token =
        first_token + p.part_tokens < p.tokens ? first_token + p.part_tokens : p.tokens;
    const int tiles = static_cast<int>((end_token - first_token + kMmaTokens - 1) / kMmaTokens);
    const int64_t first_col = int64_t{blockIdx.z} * p.slice_cols;
    const int cols = p.lists.cols - first_col < p.slice_cols
                         ? static_cast<int>(p.lists.cols - first_col)
                         : p.slice_cols;
    // Where a slot of an output of this warp reads in the slice; -1 if nowhere.
    const auto input_of = [&](int output, int slot) -> int {
        if (first_output + output >= rows || first_slot + slot >= per_row) return -1;
        const int64_t at = (first_output + output) * per_row + first_slot + slot;
        const int64_t input = columns[at] - first_col;
        return input < cols ? static_cast<int>(input) : -1;
    };

    const auto dealt = [&](int job, int gather) {
        const int64_t number = first_output / kJobOutputs + job;
        return number * kJobOutputs < rows
                   ? p.lists.dealt[gather_of(number, p.slot_splits, first_slot / kGathered,
                                             kGathers, gather)]
                   : 0;
    };

    // Lanes l and l + 16 give row l of each gather, 8 tokens each.
    SharedAddress gathered[kJobs][kGathers];
    uint32_t readers[kGathers];  // all bits where the lane holds dY of an output of the gather
#pragma unroll
    for (int a = 0; a < kGathers; ++a) {
        readers[a] = lane / 4 / kGatherOutputs == a ? ~0u : 0u;
#pragma unroll
        for (int i = 0; i < kJobs; ++i) {
            const int row = a * kGathered + dealt_row(dealt(i, a), lane % kGathered);
            const int input = input_of(i * kJobOutputs + row / kSlots, row % kSlots);
            const unsigned place = input < 0 ? zeros : tile_base(input, 1);
            gathered[i][a] = shared_address(inputs + (place ^ (lane / 16)));
        }
    }
    // Lane l gives token l % 16 of the dY of two jobs, its lower half the first's.
    const SharedAddress grad_row = shared_address(grads + lane % kMmaTokens * grad_stride(outputs) +
                                                  (warp * kJobs + lane / kMmaTokens) * kJobOutputs);
    if (threadIdx.x < 8) inputs[zeros + threadIdx.x] = {0, 0, 0, 0};

    float sums[kJobs][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        const int64_t token = first_token + tile * kMmaTokens;
        __syncthreads();  // nobody reads the tile before any more
        const T* const x =
            static_cast<const T*>(p.x.data) + token * p.x.row_stride + first_col * p.x.col_stride;
        if (p.wide_x && p.tokens - token >= kMmaTokens) {
            load_matrices<1>(inputs, x, p.x.row_stride, cols);
        } else {
            load_tile(inputs, 1, x, p.x.row_stride, p.x.col_stride, p.tokens - token, cols, false);
        }
        load_grads(grads,
                   static_cast<const T*>(p.grad_output.data) + token * p.grad_output.row_stride +
                       split_output * p.grad_output.col_stride,
                   p.grad_output, outputs, static_cast<int>(rows - split_output), p.tokens - token,
                   p.wide_grad);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kJobs; i += 2) {
            uint32_t grad[4];  // 16 tokens x 8 outputs of two jobs
            ldmatrix_x4_trans(grad_row + i * kJobOutputs * static_cast<int>(sizeof(T)), grad);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
                for (int a = 0; a < kGathers; ++a) {
                    uint32_t input[4];  // 16 inputs x 16 tokens
                    ldmatrix_x4(gathered[i + j][a], input);
                    mma_m16n8k16(sums[i + j], input, grad[2 * j] & readers[a],
                                 grad[2 * j + 1] & readers[a], T{});
                }
            }
        }
    }

    float* const partial = p.partial + blockIdx.y * p.lists.blocks;
#pragma unroll
    for (int i = 0; i < kJobs; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int output = lane % 4 * 2 + e % 2;
            const int row = dealt_row(dealt(i, output / kGatherOutputs), lane / 4 + e / 2 * 8);
            const int slot = row % kSlots;
            if (row / kSlots != output % kGatherOutputs) continue;  // inputs of another output
            if (input_of(i * kJobOutputs + output, slot) < 0) continue;
            partial[(first_output + i * kJobOutputs + output) * per_row + first_slot + slot] =
                sums[i][e];
        }
    }
}

inline bool is_unstructured(const Lists& lists) {
    return lists.out_block == 1 && lists.in_block == 1 && lists.narrow;
}

inline void launch_deal_rows(const Lists& lists, uint64_t* dealt, const Queue& queue) {
    const Jobs jobs = jobs_of(lists);
    const int64_t count = gathers_of(lists);
    launch("the kernel that deals rows", deal_rows_kernel,
           static_cast<unsigned>(
               std::min(ceil_div(count, kThreads), 16 * multiprocessors(queue.device))),
           kThreads, 0, queue, lists, jobs.gathers, jobs.slot_splits, count, dealt);
}

// As many parts as fill the multiprocessors of an H200, whatever the GPU: the same sums on all.
inline int64_t unstructured_parts(const Lists& lists, int64_t tokens) {
    constexpr int64_t kBlocks = 132;
    const Jobs jobs = jobs_of(lists);
    const int64_t tiles = ceil_div(tokens, kMmaTokens);
    const int64_t wanted = std::max<int64_t>(1, kBlocks / (jobs.output_splits * jobs.slot_splits));
    return ceil_div(tiles, ceil_div(tiles, std::min(tiles, wanted)));  // none of them is empty
}

inline int64_t unstructured_part_tokens(int64_t tokens, int64_t parts) {
    return ceil_div(ceil_div(tokens, kMmaTokens), parts) * kMmaTokens;
}

template <class T>
void launch_unstructured(UnstructuredProblem p, int64_t parts, int64_t slice_features,
                         const Queue& queue) {
    const Jobs jobs = jobs_of(p.lists);
    p.split_outputs = jobs.outputs;
    p.output_splits = jobs.output_splits;
    p.slot_splits = jobs.slot_splits;
    p.part_tokens = unstructured_part_tokens(p.tokens, parts);
    const int64_t grad_bytes = kMmaTokens * grad_stride(static_cast<int>(jobs.outputs)) * 2;
    constexpr int64_t kRounding = 16 * 16;  // tile_vectors rounds up, and the zeros
    const int64_t room = (shared_limit(queue.device) - grad_bytes - kRounding) / (2 * kMmaTokens);
    constexpr int64_t kWide = kMatrixFeatures;
    const int64_t slices = ceil_div(p.lists.cols, std::min(slice_features, room / kWide * kWide));
    const int64_t slice_cols = ceil_div(ceil_div(p.lists.cols, slices), kWide) * kWide;
    p.slice_cols = static_cast<int>(std::min({p.lists.cols, slice_cols, slice_features}));
    p.wide_x = loads_matrices(p.x, p.lists.cols) && p.slice_cols % kMatrixFeatures == 0;
    p.wide_grad = wide_loads(p.grad_output, p.lists.rows, jobs.outputs, 2);
    const int64_t bytes = 16 * (tile_vectors(p.slice_cols, 1) + 8) + grad_bytes;
    const dim3 grid(static_cast<unsigned>(jobs.output_splits * jobs.slot_splits),
                    static_cast<unsigned>(parts),
                    static_cast<unsigned>(ceil_div(p.lists.cols, p.slice_cols)));
    const auto kernel = jobs.gathers == 2   ? sddmm_unstructured_kernel<T, 2>
                        : jobs.gathers == 4 ? sddmm_unstructured_kernel<T, 4>
                                            : sddmm_unstructured_kernel<T, 8>;
    launch(describe("grad_weight", p.lists, p.tokens), kernel, grid, kThreads, bytes, queue, p);
}

}  // namespace cuda
}  // namespace sk
