// spmm of square blocks of 64 and 128 in 16 bits, on compute capability 9.0: the wide operand is
// 256 tokens of x, the narrow one a block of weights, which is MN-major where the lists are those
// of columns (grad_input): blocks are read where they lie. Results leave by TMA, which stores no
// token that does not exist.
#include "hopper.h"
#include "hopper_pipeline.cuh"

namespace sk {
namespace cuda {
namespace {

template <class T, int kSide, bool kColumns>
struct Spmm : HopperProduct<T, kSide, false, kColumns> {
    CUtensorMap x, weights, out;
    Lists lists;
    const T* bias;
    int jobs;

    // The results of a block-row for the tokens of a cluster.
    struct Job {
        int64_t begin;  // in the lists
        int row, token, steps;
        unsigned bytes;
    };
    __device__ Job job_at(int number, unsigned rank) const {
        constexpr int kUnits = kSide / 4;  // of a row, in the lists' order: the longest first
        const int rows = static_cast<int>(lists.rows), tile = number / rows;
        const int place = number - tile * rows;
        const int row = kColumns && lists.order ? lists.order[place * kUnits] / kUnits : place;
        const int64_t begin = kColumns ? lists.offsets[row] : row * lists.per_row;
        const int64_t end = kColumns ? lists.offsets[row + 1] : begin + lists.per_row;
        return {begin, row, static_cast<int>(tile * kClusterBlocks + rank) * kWide,
                static_cast<int>(end - begin) * (kSide / kDepth),
                static_cast<unsigned>(Shared<kSide>::kStageBytes)};
    }

#ifdef SK_SM_90A
    __device__ void load(const Job& job, int step, unsigned rank, const Place& place) const {
        const int64_t entry = job.begin + step / (kSide / kDepth);
        const int inside = step % (kSide / kDepth) * kDepth;
        const int block = kColumns && lists.ids ? lists.ids[entry] : static_cast<int>(entry);
        load_box(&x, place.wide, lists.wide_columns[entry] * kSide + inside, job.token, place.full);
        if constexpr (kColumns) {
            load_half<kSide>(&weights, place, 0, block * kSide + inside, rank);
        } else {
            load_box(&weights, place.narrow + rank * (kSide / 2 * kRowBytes), inside,
                     block * kSide + rank * (kSide / 2), place.full, kAllBlocks);
        }
    }

    // Tile after tile through the staging, in boxes of 64 outputs.
    __device__ void store(const Job& job, int warpgroup, const float (&d)[2][kSide / 2],
                          uint32_t staging) const {
        const int thread = threadIdx.x % kWarpgroup, lane = thread % kWarp;
        // Where the row lies that this lane addresses, of the four matrices that are stored at a
        // time: 16 tokens, 16 outputs.
        const int token = thread / kWarp * 16 + lane / 8 % 2 * 8 + lane % 8;
        const uint32_t row = staging + token * kRowBytes;
        float biases[kSide / 8][2] = {};
        if (bias) {
#pragma unroll
            for (int i = 0; i < kSide / 8; ++i) {
                const T* const from = bias + job.row * kSide + i * 8 + lane % 4 * 2;
                biases[i][0] = to_float(from[0]);
                biases[i][1] = to_float(from[1]);
            }
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            if (thread == 0) store_wait_read();
            warpgroup_barrier(1 + warpgroup);
#pragma unroll
            for (int i = 0; i < kSide / 8; i += 2) {
                uint32_t matrices[4];
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float* const pair = &d[tile][(i + j / 2) * 4 + j % 2 * 2];
                    const float* const add = biases[i + j / 2];
                    matrices[j] = pack_pair(pair[0] + add[0], pair[1] + add[1], T{});
                }
                const uint32_t piece = ((i % 8 + lane / 16) ^ (token % 8)) * 16;
                stmatrix_x4(row + i / 8 * kTileBytes + piece, matrices);
            }
            fence_proxy();
            warpgroup_barrier(1 + warpgroup);
            if (thread == 0) {
                const int first = job.token + (warpgroup + tile * kConsumers) * kTileRows;
#pragma unroll
                for (int i = 0; i < kSide / 64; ++i) {
                    store_box(&out, staging + i * kTileBytes, job.row * kSide + i * 64, first);
                }
                store_commit();
            }
        }
    }

    // Before the block ends.
    __device__ void finish() const {
        if (threadIdx.x % kWarpgroup == 0) store_wait_read();
    }
#endif
};

template <class T, int kSide, bool kColumns>
void run(const char* product, DType dtype, const Lists& lists, const Operand& x, const void* values,
         const void* bias, void* out, int64_t tokens, const Queue& queue) {
    const std::string what = describe(product, lists, tokens);
    const int64_t inputs = lists.cols * kSide, outputs = lists.rows * kSide;
    const int64_t x_row = tokens == 1 ? inputs : x.row_stride;
    Spmm<T, kSide, kColumns> p;
    make_map(&p.x, what, dtype, x.data, tokens, inputs, 2 * x_row, kWide);
    make_map(&p.weights, what, dtype, values, lists.blocks * kSide, kSide, 2 * kSide, kSide / 2);
    make_map(&p.out, what, dtype, out, tokens, outputs, 2 * outputs, kTileRows);
    p.lists = lists;
    p.bias = static_cast<const T*>(bias);
    p.jobs = static_cast<int>(ceil_div(tokens, kClusterBlocks * kWide) * lists.rows);
    launch_hopper(what, hopper_kernel<decltype(p)>, p, Shared<kSide>::kBytes, queue);
}

template <class T>
void choose_kernel(const char* product, DType dtype, const Lists& lists, const Operand& x,
                   const void* values, const void* bias, void* out, int64_t tokens,
                   const Queue& queue) {
    const auto kernel = lists.out_block == 128
                            ? (lists.offsets ? run<T, 128, true> : run<T, 128, false>)
                            : (lists.offsets ? run<T, 64, true> : run<T, 64, false>);
    kernel(product, dtype, lists, x, values, bias, out, tokens, queue);
}

}  // namespace

void spmm_hopper(const char* product, DType dtype, const Lists& lists, const Operand& x,
                 const void* values, const void* bias, void* out, int64_t tokens,
                 const Queue& queue) {
    const auto kernel = dtype == DType::kBfloat16 ? choose_kernel<Bf16> : choose_kernel<Half>;
    kernel(product, dtype, lists, x, values, bias, out, tokens, queue);
}

}  // namespace cuda
}  // namespace sk
