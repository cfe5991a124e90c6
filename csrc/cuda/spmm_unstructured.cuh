// spmm of unstructured weights in 16 bits, by matrix instructions.
//
// A block of threads keeps all inputs of a tile of tokens in shared memory, feature-major. Eight
// neighbouring outputs (an octet) are multiplied together: a matrix instruction takes 16 gathered
// inputs, two of each output, and weights that are zero but where an input is the output's own. So
// an octet needs as many instructions as its longest list asks for; the others are filled up with
// zeros. What an octet multiplies lies in blocks of words, made anew for each product: four slots
// of each output, that is where their inputs lie in the tile, and their weights as the instruction
// wants them. A warp has a run of octets, about as many blocks as the others, and reads ahead.
//
// Where an input is not finite, its products with those zeros spoil the other outputs of the octet:
// results that are not finite are computed once more, from their own weights.
#pragma once

#include "launch.cuh"
#include "mma.cuh"

namespace sk {
namespace cuda {

constexpr int kOctet = 8;
constexpr int kRunOctets = 4;   // whose results leave together
constexpr int kSlots = 4;       // of an output in a block of words
constexpr int kWordsAhead = 4;  // blocks that a warp reads before it needs them
// Vectors of 16 bytes in a block of words: 32 places, then the weights of eight outputs and zeros.
constexpr int kPlaceVectors = 8, kBlockVectors = kPlaceVectors + kOctet + 1;
// Distance of a token's results from the next in the stage of a warp, which holds two runs.
constexpr int kStageStride = 2 * kRunOctets * kOctet + 8;

struct GatherProblem {
    Lists lists;
    Operand x;
    const void* values;
    const void* bias;
    uint4* words;
    void* out;
    int64_t tokens;
    int64_t blocks = 0;        // of words
    int64_t octet_blocks = 0;  // of each octet, where the lists have no octets
    int log_vectors = 0;
    bool wide_x = false, wide_out = false;
};

inline int64_t octets_of(const Lists& lists) { return ceil_div(lists.rows, kOctet); }
inline int64_t word_blocks(const Lists& lists) {
    return lists.octets ? lists.octet_blocks : octets_of(lists) * ceil_div(lists.per_row, kSlots);
}

// The first block of words of an octet.
__device__ inline int64_t first_block(const GatherProblem& p, int64_t octet) {
    return p.lists.octets ? p.lists.octets[octet] : octet * p.octet_blocks;
}

// In the places of an octet's last block, which are addresses in the tile.
constexpr uint32_t kLast = 1u << 31;

// A warp writes a block of words.
template <class T>
__global__ void __launch_bounds__(kThreads)
    gather_words_kernel(const GatherProblem p, unsigned zero_place) {
    const Lists& lists = p.lists;
    const int lane = threadIdx.x % kWarp, output = lane / kSlots, slot = lane % kSlots;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
    for (int64_t block = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
         block < p.blocks + kWordsAhead; block += warps) {
        const int64_t octet = block >= p.blocks ? (lists.rows + kOctet - 1) / kOctet
                              : lists.octets    ? lists.block_octets[block]
                                                : block / p.octet_blocks;
        const int64_t row = octet * kOctet + output;
        int64_t entry = (block - first_block(p, octet)) * kSlots + slot, end = 0;
        if (row < lists.rows) {
            const int64_t begin = lists.offsets ? lists.offsets[row] : row * lists.per_row;
            end = lists.offsets ? lists.offsets[row + 1] : begin + lists.per_row;
            entry += begin;
        }
        const bool there = entry < end;
        const unsigned place =
            there ? tile_base(lists.wide_columns[entry], p.log_vectors) : zero_place;
        const T* const values = static_cast<const T*>(p.values);
        const T weight = there ? values[lists.ids ? lists.ids[entry] : entry] : T{0};
        const bool is_last = block < p.blocks && block + 1 == first_block(p, octet + 1);
        const int step = slot / 2, half = slot % 2;
        uint4* const words = p.words + block * kBlockVectors;
        reinterpret_cast<uint32_t*>(words)[(output * 2 + half) * 2 + step] =
            place << 4 | (is_last && step == 0 ? kLast : 0);
        T* const weights = reinterpret_cast<T*>(words + kPlaceVectors);
        T* const own = weights + output * 8 + step * 4 + half;
        own[output < 4 ? 0 : 2] = weight;
        own[output < 4 ? 2 : 0] = T{0};
        if (lane < 8) weights[kOctet * 8 + lane] = T{0};
    }
}

// What a lane needs of a block of words.
struct BlockWords {
    uint2 places;   // of a slot in the two steps
    uint4 weights;  // fragments of the two steps
    __device__ void load(const uint4* words, int slot, int weight) {
        places = reinterpret_cast<const uint2*>(words)[slot];
        weights = load_vector(words + weight);
    }
    __device__ bool is_last() const { return places.x >= kLast; }
};

// sums[m] of 8 outputs and the m-th 16 tokens += a block of words. A lane gives rows of the vector
// that `turn` says, in bytes. In a tile of 8 tokens it says the step: one load serves both, and the
// lower halves of the sums mean nothing.
template <int kLogVectors, int kSums, class T>
__device__ void multiply_block(const BlockWords& now, SharedAddress tile, unsigned turn,
                               float (&sums)[kSums][4], T) {
    const uint4& weights = now.weights;
    const unsigned places[2] = {now.places.x & ~kLast, now.places.y};
    uint32_t inputs[4];
    if constexpr (kLogVectors == 0) {
        ldmatrix_x4_trans(tile + (turn ? places[1] : places[0]), inputs);
        mma_m16n8k16(sums[0], inputs, weights.x, weights.y, T{});
        inputs[0] = inputs[1], inputs[2] = inputs[3];
        mma_m16n8k16(sums[0], inputs, weights.z, weights.w, T{});
    } else {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
            for (int m = 0; m < kSums; ++m) {
                ldmatrix_x4_trans(tile + (places[step] ^ turn ^ m << 5), inputs);
                mma_m16n8k16(sums[m], inputs, step ? weights.z : weights.x,
                             step ? weights.w : weights.y, T{});
            }
        }
    }
}

// A result, from nothing but its own weights.
template <class T>
__device__ T result_again(const GatherProblem& p, const uint4* tile, int token, int row) {
    const int output = row % kOctet;
    float sum = 0.0f;
    for (int64_t block = first_block(p, row / kOctet); block < first_block(p, row / kOctet + 1);
         ++block) {
        const uint4* const words = p.words + block * kBlockVectors;
        for (int slot = 0; slot < kSlots; ++slot) {
            const int step = slot / 2, half = slot % 2;
            const unsigned place =
                (reinterpret_cast<const uint32_t*>(words)[(output * 2 + half) * 2 + step] &
                 ~kLast) >>
                4;
            const T weight = reinterpret_cast<const T*>(
                words + kPlaceVectors + output)[step * 4 + half + (output < 4 ? 0 : 2)];
            const T* const inputs = reinterpret_cast<const T*>(tile + (place ^ (token / 8)));
            sum = fmaf(to_float(weight), to_float(inputs[token % 8]), sum);
        }
    }
    return from_float<T>(p.bias ? sum + to_float(static_cast<const T*>(p.bias)[row]) : sum);
}

__device__ inline uint32_t exponent_bits(Bf16) { return 0x7f80u; }
__device__ inline uint32_t exponent_bits(Half) { return 0x7c00u; }
template <class T>
__device__ bool is_finite(T value) {
    return (value.bits & exponent_bits(T{})) != exponent_bits(T{});
}
template <class T>
__device__ bool are_finite(const uint4& vector) {
    // All bits of an exponent and its lowest one more make a carry.
    const uint32_t all = exponent_bits(T{}) * 0x10001u, one = (all & ~(all << 1));
    return !((((vector.x & all) + one) | ((vector.y & all) + one) | ((vector.z & all) + one) |
              ((vector.w & all) + one)) &
             0x80008000u);
}

// Which of 8 tokens a lane takes to memory: eight neighbouring lanes read from different banks.
__device__ inline int leaving_token(int lane) {
    return lane / kRunOctets % 2 * 4 + lane / (2 * kRunOctets);
}

// A warp writes the results of a run, `outputs` of a token from `row` on for each lane, from its
// stage to `out`: those of the tokens that exist.
template <class T, int kTileTokens>
__device__ void store_octets(const GatherProblem& p, const uint4* tile, const T* from, T* out,
                             int row, int tokens) {
    const int outputs = static_cast<int>(p.lists.rows) - row;
    if (outputs <= 0) return;
#pragma unroll
    for (int i = 0; i < kTileTokens; i += kWarp / kRunOctets) {
        const int token = i + leaving_token(threadIdx.x % kWarp);
        if (token >= tokens) break;
        const uint4 vector = load_vector(from);
        if (p.wide_out) __stcs(reinterpret_cast<uint4*>(out), vector);
        if (!p.wide_out || !are_finite<T>(vector)) {
#pragma unroll 1
            for (int e = 0; e < kOctet && e < outputs; ++e) {
                out[e] = is_finite(from[e]) ? from[e] : result_again<T>(p, tile, token, row + e);
            }
        }
        from += kWarp / kRunOctets * kStageStride;
        out += kWarp / kRunOctets * p.lists.rows;
    }
}

template <class T, int kLogVectors>
__global__ void __launch_bounds__(kThreads, 1) gather_kernel(const GatherProblem p) {
    constexpr int kTileTokens = 8 << kLogVectors, kSums = kLogVectors == 2 ? 2 : 1;
    constexpr int kRunOutputs = kRunOctets * kOctet;
    const int cols = static_cast<int>(p.lists.cols), zeros = tile_vectors(cols, kLogVectors);
    const int rows = static_cast<int>(p.lists.rows);
    SharedMemory shared;
    uint4* const tile = shared.take<uint4>(zeros + 8);
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    T* const stage = shared.take<T>(kThreads / kWarp * kTileTokens * kStageStride) +
                     warp * kTileTokens * kStageStride;

    // The runs of this warp: a part of about as many blocks as the others have.
    const int octets = (rows + kOctet - 1) / kOctet;
    const int64_t parts = static_cast<int64_t>(gridDim.y) * (kThreads / kWarp);
    const auto first_run = [&](int64_t part) {
        const int runs = (octets + kRunOctets - 1) / kRunOctets;
        if (!p.lists.octets) return static_cast<int>(runs * part / parts);
        const int64_t octet = lower_bound(p.lists.octets, 0, octets, p.blocks * part / parts);
        return part < parts ? static_cast<int>((octet + kRunOctets - 1) / kRunOctets) : runs;
    };
    const int64_t part = static_cast<int64_t>(blockIdx.y) * (kThreads / kWarp) + warp;
    int run = first_run(part);
    const int end_run = first_run(part + 1);
    const int end_octet = end_run * kRunOctets < octets ? end_run * kRunOctets : octets;

    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTileTokens;
    const T* const x = static_cast<const T*>(p.x.data) + first_token * p.x.row_stride;
    if (p.wide_x && p.tokens - first_token >= kTileTokens) {
        load_matrices<kLogVectors>(tile, x, p.x.row_stride, cols);
    } else {
        load_tile(tile, kLogVectors, x, p.x.row_stride, p.x.col_stride, p.tokens - first_token,
                  cols, false);
    }
    if (threadIdx.x < 8) tile[zeros + threadIdx.x] = {0, 0, 0, 0};
    __syncthreads();
    if (run >= end_run) return;
    const uint4* words = p.words + first_block(p, run * kRunOctets) * kBlockVectors;
    int left = static_cast<int>(first_block(p, end_octet) - first_block(p, run * kRunOctets));

    // Lane 4 g + t has a weight where slot 2 g of output g is 2 t or 2 t + 8.
    const int g = lane / 4, t = lane % 4;
    const int weight = kPlaceVectors + (t == g % 4 ? g : kOctet);
    // Lane l gives row l % 8 of matrix l / 8.
    const int slot = lane % 8 + lane / 16 * 8;
    const unsigned turn = kept(lane / 8 % 2 << 4);
    const SharedAddress tile_address = shared_address(tile);
    const SharedAddress staged = kept(shared_address(stage + g * kStageStride + t * 2));
    const T* const leaving =
        stage + leaving_token(lane) * kStageStride + lane % kRunOctets * kOctet;
    T* const out = static_cast<T*>(p.out) +
                   kept((first_token + leaving_token(lane)) * rows + lane % kRunOctets * kOctet);
    const int tokens = static_cast<int>(
        p.tokens - first_token < kTileTokens ? p.tokens - first_token : kTileTokens);

    BlockWords ahead[kWordsAhead];
#pragma unroll
    for (int i = 0; i < kWordsAhead; ++i) ahead[i].load(words + i * kBlockVectors, slot, weight);
    float sums[kSums][4] = {};
    unsigned done = run * kRunOctets;  // octets whose results are in the stage or have left
    while (run < end_run) {
        words += kWordsAhead * kBlockVectors;
        left -= kWordsAhead;
        // Past the end it computes what others store.
#pragma unroll
        for (int i = 0; i < kWordsAhead; ++i) {
            multiply_block<kLogVectors>(ahead[i], tile_address, turn, sums, T{});
            const bool is_last = ahead[i].is_last();
            ahead[i].load(words + i * kBlockVectors, slot, weight);
            if (!is_last) continue;
            if (p.bias) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = static_cast<int>(done) * kOctet + t * 2 + e;
                    if (row >= rows) continue;
                    const float bias = to_float(static_cast<const T*>(p.bias)[row]);
#pragma unroll
                    for (int m = 0; m < kSums; ++m) sums[m][e] += bias, sums[m][2 + e] += bias;
                }
            }
            const SharedAddress to = staged + done % (2 * kRunOctets) * kOctet * sizeof(T);
#pragma unroll
            for (int token = 0; token < kTileTokens; token += 8) {
                const float* const of = sums[token / 16] + token / 8 % 2 * 2;
                store_shared(to + token * kStageStride * sizeof(T), pack_pair(of[0], of[1], T{}));
            }
#pragma unroll
            for (int m = 0; m < kSums; ++m) sums[m][0] = sums[m][1] = sums[m][2] = sums[m][3] = 0;
            ++done;
        }
#pragma unroll 1
        for (; run < end_run && (left <= 0 || done >= (run + 1u) * kRunOctets); ++run) {
            __syncwarp();  // the run's results are complete
            store_octets<T, kTileTokens>(p, tile, leaving + (run & 1) * kRunOutputs,
                                         out + int64_t{run} * kRunOutputs,
                                         run * kRunOutputs + lane % kRunOctets * kOctet, tokens);
            __syncwarp();  // before others take their place
        }
    }
}

// Shared memory of a block.
inline int64_t gather_bytes(const Lists& lists, int log_vectors) {
    const int64_t stage = int64_t{kThreads / kWarp} * (8 << log_vectors) * kStageStride * 2;
    return 16 * (int64_t{tile_vectors(static_cast<int>(lists.cols), log_vectors)} + 8) + stage;
}

// Whether the products of a layout are these: all inputs in shared memory.
inline bool gathers(const Lists& lists, int64_t slice_features, int device) {
    return lists.out_block == 1 && lists.in_block == 1 && (lists.per_row || lists.octets) &&
           lists.cols <= slice_features && lists.cols < 1 << 16 &&
           gather_bytes(lists, 0) <= shared_limit(device);
}

// Vectors of words in working memory: after those of the octets come empty blocks, and such as are
// only read ahead.
inline int64_t gather_words(const Lists& lists) {
    return (word_blocks(lists) + 2 * kWordsAhead) * kBlockVectors;
}

template <class T>
void launch_gather(const char* product, GatherProblem p, const Queue& queue) {
    const std::string what = describe(product, p.lists, p.tokens);
    p.blocks = word_blocks(p.lists);
    p.octet_blocks = ceil_div(p.lists.per_row, kSlots);
    p.log_vectors = 2;
    while (p.log_vectors > 0 &&
           (gather_bytes(p.lists, p.log_vectors) > shared_limit(queue.device) ||
            8 << (p.log_vectors - 1) >= p.tokens)) {
        --p.log_vectors;
    }
    p.wide_x = loads_matrices(p.x, p.lists.cols);
    p.wide_out = p.lists.rows % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
    const int64_t warps = kThreads / kWarp, processors = multiprocessors(queue.device);
    launch(what + ", its words,", gather_words_kernel<T>,
           static_cast<unsigned>(std::min(ceil_div(p.blocks, warps), 16 * processors)), kThreads, 0,
           queue, p, tile_vectors(static_cast<int>(p.lists.cols), p.log_vectors));
    // Few tiles leave multiprocessors idle: then several blocks share a tile's outputs.
    const int64_t tiles = ceil_div(p.tokens, 8 << p.log_vectors);
    const int64_t turns = ceil_div(octets_of(p.lists), kRunOctets * warps);
    const dim3 grid(static_cast<unsigned>(tiles),
                    static_cast<unsigned>(std::min(turns, ceil_div(processors, tiles))));
    const auto kernel = p.log_vectors == 2   ? gather_kernel<T, 2>
                        : p.log_vectors == 1 ? gather_kernel<T, 1>
                                             : gather_kernel<T, 0>;
    launch(what, kernel, grid, kThreads, gather_bytes(p.lists, p.log_vectors), queue, p);
}

}  // namespace cuda
}  // namespace sk
