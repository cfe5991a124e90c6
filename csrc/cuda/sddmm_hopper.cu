// sddmm of square blocks of 32, 64 and 128 in 16 bits, on compute capability 9.0. K are the tokens;
// the wide operand are inputs of up to 256 / side blocks of a block-row, the narrow one is the
// row's dY, and both are MN-major. What is summed is dW transposed, so that neighbouring lanes have
// neighbouring inputs. Where block-rows are few, tokens are cut into parts, whose sums a second
// kernel adds (sddmm.cu).
#include "hopper.h"
#include "hopper_pipeline.cuh"

namespace sk {
namespace cuda {
namespace {

// Blocks that a cluster takes of a row, at most, and into how many groups the row falls.
int64_t groups_of(const Lists& lists) {
    return ceil_div(lists.per_row, kClusterBlocks * kWide / lists.out_block);
}

// A box of x: up to 64 inputs of a block.
template <int kSide>
constexpr int kPiece = kSide < kTileRows ? kSide : kTileRows;
template <int kSide>
constexpr int kPieces = kWide / kPiece<kSide>;
template <int kSide>
constexpr int kPieceBytes = kDepth * kPiece<kSide> * 2;

template <class T, int kSide>
struct Sddmm : HopperProduct<T, kSide, true, true> {
    CUtensorMap x, grad_output;
    Lists lists;
    float* partial;  // of the parts, or null: then there is one, which is the result
    T* out;
    int jobs, groups;
    int all_steps, part_steps;  // of 64 tokens

    // The blocks of a group of a row, for a part of the tokens; each block of threads takes half.
    struct Job {
        int row, pieces, first_step, steps;
        int64_t block;               // the first
        int64_t elements_at;         // in `partial` or `out`
        int inputs[kPieces<kSide>];  // the first of each piece
        unsigned bytes;
    };
    __device__ Job job_at(int number, unsigned rank) const {
        const int rows = static_cast<int>(lists.rows), per_row = static_cast<int>(lists.per_row);
        const int rest = number / rows, part = rest / groups, group = rest - part * groups;
        // The groups of a row are of nearly the same size.
        const int size = per_row / groups, larger = per_row - size * groups;
        const int begin = group * size + (group < larger ? group : larger);
        const int end = begin + size + (group < larger ? 1 : 0);
        const int half = begin + (end - begin + 1) / 2;
        Job job;
        job.row = number - rest * rows;
        job.pieces = (rank == 0 ? half - begin : end - half) * (kSide / kPiece<kSide>);
        job.first_step = part * part_steps;
        job.steps = all_steps - job.first_step;
        job.steps = job.steps < 0 ? 0 : job.steps < part_steps ? job.steps : part_steps;
        job.block = job.row * lists.per_row + (rank == 0 ? begin : half);
        job.elements_at = (part * lists.blocks + job.block) * (kSide * kSide);
        job.bytes = job.pieces * kPieceBytes<kSide> + kSide * kRowBytes;
#pragma unroll
        for (int i = 0; i < kPieces<kSide>; ++i) {
            const int64_t entry = job.block + i * kPiece<kSide> / kSide;
            job.inputs[i] =
                i < job.pieces ? lists.wide_columns[entry] * kSide + i * kPiece<kSide> % kSide : 0;
        }
        return job;
    }

#ifdef SK_SM_90A
    __device__ void load(const Job& job, int step, unsigned rank, const Place& place) const {
        const int token = (job.first_step + step) * kDepth;
#pragma unroll
        for (int i = 0; i < kPieces<kSide>; ++i) {
            if (i >= job.pieces) continue;
            load_box(&x, place.wide + i * kPieceBytes<kSide>, job.inputs[i], token, place.full);
        }
        load_half<kSide>(&grad_output, place, job.row * kSide, token, rank);
    }

    // Rows that no block fills were multiplied, from whatever lay there, and are not stored.
    __device__ void store(const Job& job, int warpgroup, const float (&d)[2][kSide / 2],
                          uint32_t) const {
        const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int first = (warpgroup + i * kConsumers) * kTileRows + thread / kWarp * 16;
            if (first / kPiece<kSide> >= job.pieces) continue;
            const int64_t at = job.elements_at + int64_t{first / kSide} * (kSide * kSide) +
                               first % kSide + lane / 4;
#pragma unroll
            for (int j = 0; j < kSide / 2; ++j) {
                const int output = j / 4 * 8 + lane % 4 * 2 + j % 2;
                const int64_t element = at + output * kSide + j / 2 % 2 * 8;
                if (partial) {
                    partial[element] = d[i][j];
                } else {
                    out[element] = from_float<T>(d[i][j]);
                }
            }
        }
    }
    __device__ void finish() const {}
#endif
};

template <class T, int kSide>
void run(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
         float* partial, void* grad_values, int64_t parts, int64_t tokens, const Queue& queue) {
    const std::string what = describe("grad_weight", lists, tokens);
    const auto describe_to = [&](CUtensorMap* map, const Operand& operand, int64_t features,
                                 int box_rows) {
        const int64_t row = tokens == 1 ? features : operand.row_stride;
        make_map(map, what, dtype, operand.data, tokens, features, 2 * row, box_rows,
                 kRowBytesOf<kSide> / 2);
    };
    Sddmm<T, kSide> p;
    describe_to(&p.x, x, lists.cols * kSide, kDepth);
    describe_to(&p.grad_output, grad_output, lists.rows * kSide, kHalfRows<kSide>);
    p.lists = lists;
    p.partial = parts > 0 ? partial : nullptr;
    p.out = static_cast<T*>(grad_values);
    parts = std::max<int64_t>(1, parts);
    p.groups = static_cast<int>(groups_of(lists));
    p.jobs = static_cast<int>(lists.rows * p.groups * parts);
    p.all_steps = static_cast<int>(ceil_div(tokens, kDepth));
    p.part_steps = static_cast<int>(ceil_div(p.all_steps, parts));
    launch_hopper(what, hopper_kernel<decltype(p)>, p, Shared<kSide>::kBytes, queue);
}

template <class T>
void choose_kernel(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
                   float* partial, void* grad_values, int64_t parts, int64_t tokens,
                   const Queue& queue) {
    const int side = lists.out_block;
    const auto kernel = side == 128 ? run<T, 128> : side == 64 ? run<T, 64> : run<T, 32>;
    kernel(dtype, lists, grad_output, x, partial, grad_values, parts, tokens, queue);
}

}  // namespace

int64_t sddmm_hopper_parts(const Lists& lists, int64_t tokens) {
    // The fewest that leave few of an H200's clusters idle in the last round; they cost memory.
    constexpr int64_t kClusters = 66, kLeastSteps = 8, kMostParts = 16;
    const int64_t steps = ceil_div(tokens, kDepth), jobs = lists.rows * groups_of(lists);
    const auto busy = [jobs](int64_t parts) {
        return static_cast<double>(jobs * parts) / (ceil_div(jobs * parts, kClusters) * kClusters);
    };
    int64_t best = 1;
    for (int64_t parts = 2; parts <= std::min(kMostParts, steps / kLeastSteps); ++parts) {
        if (busy(best) >= 0.9) break;
        if (busy(parts) > busy(best)) best = parts;
    }
    return best > 1 ? best : 0;
}

void sddmm_hopper(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
                  float* partial, void* grad_values, int64_t parts, int64_t tokens,
                  const Queue& queue) {
    const auto kernel = dtype == DType::kFloat16 ? choose_kernel<Half> : choose_kernel<Bf16>;
    kernel(dtype, lists, grad_output, x, partial, grad_values, parts, tokens, queue);
}

}  // namespace cuda
}  // namespace sk
