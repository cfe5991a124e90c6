// spmm of blocks of 32 x 32 in 16 bits, on compute capability 9.0. A block of weights alone uses
// what it loads of x for 32 outputs only, so that the second-level cache would be the limit. Here a
// cluster of two blocks of threads keeps the sums of 22 block-rows for 128 tokens in registers and
// walks over the block-columns that any of the 22 reads: each is loaded once, half by each block of
// threads for both (multicast). At 10% a block-column serves 2.4 rows.
//
// A warp has one block-row: 128 x 32 sums, 128 registers. It waits only for the stages that its row
// reads, and loads the row's weights itself, some blocks ahead. One more warp loads x to a ring of
// stages with two mbarriers each: `full` counts bytes, `empty` the warps of both blocks that have
// read a stage. The loading warp arrives there for those that do not read it.
//
// A parity tells two rounds of the ring apart and not more, so a warp may wait for a column only if
// the one 16 earlier, of the same stage, is known to have come. All warps wait for each eighth
// column, and column n is loaded when all up to n - 8 have come: whoever saw n may wait for any up
// to n + 8.
#include "hopper.h"
#include "hopper_pipeline.cuh"
#include "mma.cuh"

namespace sk {
namespace cuda {
namespace {

constexpr int kBlockSide = 32, kBlockRowBytes = 2 * kBlockSide;
constexpr int kBlockBytes = kBlockSide * kBlockRowBytes;
constexpr int kWarpRows = kHopperThreads / kWarp - 1;  // block-rows of a block of threads
static_assert(kGroupRows == kClusterBlocks * kWarpRows, "a warp has one block-row");
constexpr int kTileTokens = 128, kHalfBytes = kTileTokens / 2 * kBlockRowBytes;
constexpr int kBoxes = 16, kBoxBytes = 2 * kHalfBytes;  // of x
constexpr int kSlots = 3;                               // for the weights of a warp
constexpr int kOutTokens = 32;                          // that a warp stores at a time
static_assert(kOutTokens * kBlockRowBytes == kBlockBytes, "results lie beside the slots");

// Bytes of shared memory, from an address that is a multiple of the atoms of the swizzle.
constexpr int kAtom = 1024, kWarpAt = kBoxes * kBoxBytes, kWarpBytes = (kSlots + 1) * kBlockBytes;
constexpr int kFullAt = kWarpAt + kWarpRows * kWarpBytes, kEmptyAt = kFullAt + kBoxes * 8;
constexpr int kSlotsAt = kEmptyAt + kBoxes * 8;
constexpr int kSharedBytes = (kAtom + kSlotsAt + kWarpRows * kSlots * 8 + 15) / 16 * 16;

// Where the list of a row begins.
template <bool kColumns>
__device__ int begin_of(const Lists& lists, int row) {
    return static_cast<int>(kColumns ? lists.offsets[row] : row * lists.per_row);
}

template <class T, bool kColumns>
struct Problem {
    CUtensorMap x, weights, out;
    Lists lists;
    const T* bias;
    int groups, jobs;
};

#ifdef SK_SM_90A
constexpr int kShared = kBoxes / 2;  // from a column that all warps wait for to the next

// Rows of 64 bytes lie in the swizzle of 64 bytes: bits 7 and 8 of an address turn bits 4 and 5.
__device__ inline uint32_t place_in_box(uint32_t row, uint32_t piece) {
    return row * kBlockRowBytes + ((piece ^ (row / 2 % 4)) * 16);
}

// The jobs of a cluster: `groups` for each 128 tokens.
template <class Use>
__device__ void for_each_job(int groups, int jobs, Use use) {
    for (int number = blockIdx.x / kClusterBlocks; number < jobs;
         number += gridDim.x / kClusterBlocks) {
        const int tile = number / groups;
        use(number - tile * groups, tile * kTileTokens);
    }
}

// Columns are numbered through all jobs of a cluster.
__device__ inline bool is_shared(unsigned column) { return column % kShared == kShared - 1; }
__device__ inline void wait_for(uint32_t memory, unsigned column) {
    mbarrier_wait(memory + kFullAt + column % kBoxes * 8, column / kBoxes & 1);
}

// One thread: x of the block-columns of each job.
template <class T, bool kColumns>
__device__ void load_columns(const Problem<T, kColumns>& p, uint32_t memory, unsigned rank) {
    unsigned count = 0;
    // Nothing more may be sent to this block's stage before: it may have no reader here.
    const auto came = [memory, rank](unsigned number) {
        wait_for(memory, number);
        mbarrier_arrive_at(memory + kEmptyAt + number % kBoxes * 8, 1 - rank);
    };
    for_each_job(p.groups, p.jobs, [&](int group, int token) {
        const int end = p.lists.groups.offsets[group + 1];
        for (int i = p.lists.groups.offsets[group]; i < end; ++i, ++count) {
            const unsigned stage = count % kBoxes;
            const uint32_t full = memory + kFullAt + stage * 8;
            const uint32_t empty = memory + kEmptyAt + stage * 8;
            const int column = p.lists.groups.columns[2 * i];
            const int readers = p.lists.groups.columns[2 * i + 1];
            if (count >= kShared) came(count - kShared);
            mbarrier_wait(empty, (count / kBoxes & 1) ^ 1);
            mbarrier_arrive_for(empty, 1 + (is_shared(count) ? 0 : kGroupRows - readers));
            mbarrier_arrive_expect(full, kBoxBytes);
            load_box(&p.x, memory + stage * kBoxBytes + rank * kHalfBytes, column * kBlockSide,
                     token + rank * (kTileTokens / 2), full, kAllBlocks);
        }
    });
    for (unsigned i = count < kShared ? 0 : count - kShared; i < count; ++i) came(i);
}

// The weights of a warp, block after block of all its jobs, through its slots.
template <class T, bool kColumns>
struct Weights {
    const Problem<T, kColumns>& p;
    uint32_t slots, barriers;
    int member;                     // of each group
    int number, next = 0, end = 0;  // the job after these, and the next block of a list
    int slot = 0;                   // that is read
    unsigned parity = 0;

    __device__ uint32_t place(int of) const { return slots + of * kBlockBytes; }
    __device__ uint32_t barrier(int of) const { return barriers + of * 8; }
    // Loads the next block to a slot, if there is one.
    __device__ void load(int to) {
        for (; next == end && number < p.jobs; number += gridDim.x / kClusterBlocks) {
            const int row = p.lists.groups.rows[number % p.groups * kGroupRows + member];
            if (row < 0) continue;
            next = begin_of<kColumns>(p.lists, row);
            end = begin_of<kColumns>(p.lists, row + 1);
        }
        if (next == end) return;
        const int block = kColumns && p.lists.ids ? p.lists.ids[next] : next;
        ++next;
        if (threadIdx.x % kWarp == 0) {
            mbarrier_arrive_expect(barrier(to), kBlockBytes);
            load_box(&p.weights, place(to), 0, block * kBlockSide, barrier(to));
        }
    }
    // After a slot was read.
    __device__ void advance() {
        load(slot);
        if (++slot < kSlots) return;
        slot = 0;
        parity ^= 1;
    }
};

// A warp: sums (16 i + tokens) x (8 j + outputs) += x (128 x 32) w, from shared memory.
template <class T, bool kColumns>
__device__ void multiply_block(float (&sums)[8][4][4], uint32_t x, uint32_t w) {
    const uint32_t lane = threadIdx.x % kWarp;
    const uint32_t place = place_in_box(lane % 16, lane / 16);
    // Four matrices of 16 outputs and 16 inputs, which are a block's rows where it is transposed.
    const uint32_t block =
        w + (kColumns ? place : place_in_box(lane / 16 * 8 + lane % 8, lane / 8 % 2));
    const uint32_t token = x + place;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        uint32_t b[2][4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if constexpr (kColumns) {
                ldmatrix_x4_trans(shared_at((block + k * 16 * kBlockRowBytes) ^ (j * 32)), b[j]);
            } else {
                ldmatrix_x4(shared_at((block + j * 16 * kBlockRowBytes) ^ (k * 32)), b[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            uint32_t a[4];
            ldmatrix_x4(shared_at((token + i * 16 * kBlockRowBytes) ^ (k * 32)), a);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const uint32_t* const of = &b[j / 2][j % 2 * 2];
                mma_m16n8k16(sums[i][j], a, of[0], of[1], T{});
            }
        }
    }
}

// A warp stores its sums and the bias, 32 tokens at a time.
template <class T, bool kColumns>
__device__ void store_sums(const Problem<T, kColumns>& p, const float (&sums)[8][4][4], int row,
                           int token, uint32_t staging) {
    const uint32_t lane = threadIdx.x % kWarp;
    float biases[4][2] = {};
    if (p.bias) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const T* const from = p.bias + row * kBlockSide + j * 8 + lane % 4 * 2;
            biases[j][0] = to_float(from[0]);
            biases[j][1] = to_float(from[1]);
        }
    }
#pragma unroll
    for (int tokens = 0; tokens < kTileTokens; tokens += kOutTokens) {
        if (lane == 0) store_wait_read();  // of what lay there
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kOutTokens / 16; ++i) {
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                uint32_t matrices[4];
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    const float* const pair = &sums[tokens / 16 + i][j + m / 2][m % 2 * 2];
                    const float* const add = biases[j + m / 2];
                    matrices[m] = pack_pair(pair[0] + add[0], pair[1] + add[1], T{});
                }
                stmatrix_x4(staging + place_in_box(i * 16 + lane % 16, j + lane / 16), matrices);
            }
        }
        fence_proxy();
        __syncwarp();
        if (lane == 0) {
            store_box(&p.out, staging, row * kBlockSide, token + tokens);
            store_commit();
        }
    }
}

// A warp: the block-row of its number of each job.
template <class T, bool kColumns>
__device__ void multiply_rows(const Problem<T, kColumns>& p, uint32_t memory, unsigned rank,
                              int warp) {
    const unsigned lane = threadIdx.x % kWarp;
    const int member = warp * kClusterBlocks + rank;
    const uint32_t slots = memory + kWarpAt + warp * kWarpBytes;
    Weights<T, kColumns> weights{p, slots, memory + kSlotsAt + warp * kSlots * 8, member,
                                 static_cast<int>(blockIdx.x / kClusterBlocks)};
    for (int i = 0; i < kSlots; ++i) weights.load(i);
    unsigned first = 0, next_shared = kShared - 1;  // the first column of the job
    const auto release = [memory, lane](unsigned column) {
        __syncwarp();
        if (lane < kClusterBlocks) {
            mbarrier_arrive_at(memory + kEmptyAt + column % kBoxes * 8, lane);
        }
    };
    const auto pass_until = [&](unsigned column) {
        for (; next_shared < column; next_shared += kShared) {
            wait_for(memory, next_shared);
            release(next_shared);
        }
    };
    for_each_job(p.groups, p.jobs, [&](int group, int token) {
        const int row = p.lists.groups.rows[group * kGroupRows + member];
        const unsigned end =
            first + p.lists.groups.offsets[group + 1] - p.lists.groups.offsets[group];
        if (row >= 0) {
            float sums[8][4][4] = {};
            const int list_end = begin_of<kColumns>(p.lists, row + 1);
            for (int entry = begin_of<kColumns>(p.lists, row); entry < list_end; ++entry) {
                const unsigned column = first + p.lists.groups.places[entry];
                pass_until(column);
                wait_for(memory, column);  // for x
                mbarrier_wait(weights.barrier(weights.slot), weights.parity);
                multiply_block<T, kColumns>(sums, memory + column % kBoxes * kBoxBytes,
                                            weights.place(weights.slot));
                release(column);
                if (column == next_shared) next_shared += kShared;
                weights.advance();
            }
            store_sums(p, sums, row, token, slots + kSlots * kBlockBytes);
        }
        pass_until(end);
        first = end;
    });
    if (lane == 0) store_wait_read();  // before the block ends
}
#endif

template <class T, bool kColumns>
__global__ void SK_HOPPER_BOUNDS
spmm_32_hopper_kernel(const __grid_constant__ Problem<T, kColumns> p) {
#ifdef SK_SM_90A
    SharedMemory shared;
    const uint32_t begin = window_address(shared.take<unsigned char>(kSharedBytes));
    const uint32_t memory = (begin + kAtom - 1) & ~(kAtom - 1u);
    const unsigned rank = blockIdx.x % kClusterBlocks;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kBoxes; ++i) {
            mbarrier_init(memory + kFullAt + i * 8, 1);
            mbarrier_init(memory + kEmptyAt + i * 8, kGroupRows + kClusterBlocks);
        }
        for (int i = 0; i < kWarpRows * kSlots; ++i) mbarrier_init(memory + kSlotsAt + i * 8, 1);
        mbarrier_init_fence();
    }
    cluster_barrier();
    // The same in all lanes of a warp, which the compiler cannot see from threadIdx.
    const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0);
    if (warp == kWarpRows) {
        if (threadIdx.x % kWarp == 0) load_columns(p, memory, rank);
    } else {
        multiply_rows(p, memory, rank, warp);
    }
    cluster_barrier();  // nobody reaches into the memory of a block that has ended
#endif
}

template <class T, bool kColumns>
void run(const char* product, DType dtype, const Lists& lists, const Operand& x, const void* values,
         const void* bias, void* out, int64_t tokens, const Queue& queue) {
    const std::string what = describe(product, lists, tokens);
    const int64_t inputs = lists.cols * kBlockSide, outputs = lists.rows * kBlockSide;
    const int64_t x_row = tokens == 1 ? inputs : x.row_stride;
    Problem<T, kColumns> p;
    make_map(&p.x, what, dtype, x.data, tokens, inputs, 2 * x_row, kTileTokens / 2, kBlockSide);
    make_map(&p.weights, what, dtype, values, lists.blocks * kBlockSide, kBlockSide, kBlockRowBytes,
             kBlockSide, kBlockSide);
    make_map(&p.out, what, dtype, out, tokens, outputs, 2 * outputs, kOutTokens, kBlockSide);
    p.lists = lists;
    p.bias = static_cast<const T*>(bias);
    p.groups = static_cast<int>(ceil_div(lists.rows, kGroupRows));
    p.jobs = static_cast<int>(ceil_div(tokens, kTileTokens) * p.groups);
    launch_hopper(what, spmm_32_hopper_kernel<T, kColumns>, p, kSharedBytes, queue);
}

template <class T>
void choose_kernel(const char* product, DType dtype, const Lists& lists, const Operand& x,
                   const void* values, const void* bias, void* out, int64_t tokens,
                   const Queue& queue) {
    const auto kernel = lists.offsets ? run<T, true> : run<T, false>;
    kernel(product, dtype, lists, x, values, bias, out, tokens, queue);
}

}  // namespace

void spmm_hopper_32(const char* product, DType dtype, const Lists& lists, const Operand& x,
                    const void* values, const void* bias, void* out, int64_t tokens,
                    const Queue& queue) {
    const auto kernel = dtype == DType::kBfloat16 ? choose_kernel<Bf16> : choose_kernel<Half>;
    kernel(product, dtype, lists, x, values, bias, out, tokens, queue);
}

}  // namespace cuda
}  // namespace sk
