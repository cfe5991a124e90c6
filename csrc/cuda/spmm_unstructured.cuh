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
// One matrix that is gathered has the same slot of all eight outputs. Shared memory reads its rows
// at once if they lie in different banks, so the weights of an output are put into slots in an
// order that avoids meetings (order_slots_kernel). It follows from the pattern alone, and with it
// the order of the sums.
//
// Where an input is not finite, its products with those zeros spoil the other outputs of the octet:
// results that are not finite are computed once more, from their own weights.
#pragma once

#include "launch.cuh"
#include "mma.cuh"

namespace sk {
namespace cuda {

constexpr int kOctet = 8;
constexpr int kRunOctets = 4;      // whose results leave together
constexpr int kSlots = 4;          // of an output in a block of words
constexpr int kMaxLogVectors = 2;  // of a tile
constexpr int kWordsAhead = 4;     // blocks that a warp reads before it needs them
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
__device__ inline int64_t first_block(const Lists& lists, int64_t octet_blocks, int64_t octet) {
    return lists.octets ? lists.octets[octet] : octet * octet_blocks;
}
__device__ inline int64_t first_block(const GatherProblem& p, int64_t octet) {
    return first_block(p.lists, p.octet_blocks, octet);
}

// The weights of an output, those of a part of its octet's matrices: empty past the last output.
__device__ inline Range weights_of(const Lists& lists, int64_t row, int64_t first_matrix,
                                   int64_t end_matrix, int64_t matrices) {
    if (row >= lists.rows) return {0, 0};
    const int64_t begin = lists.offsets ? lists.offsets[row] : row * lists.per_row;
    const int64_t count = lists.offsets ? lists.offsets[row + 1] - begin : lists.per_row;
    return {begin + count * first_matrix / matrices, begin + count * end_matrix / matrices};
}

// So many matrices are put in order together.
constexpr int kOrdered = kWarp;
constexpr int kBanks = 8, kNoBank = 8;  // of 16 bytes

// Small numbers of eight banks, or outputs, in a register.
__device__ inline int small(uint32_t numbers, int i) { return numbers >> 4 * i & 15u; }
__device__ inline uint32_t one_in(int bank) { return bank < kBanks ? 1u << 4 * bank : 0; }
__device__ inline int largest(uint32_t numbers) {
    int found = 0;
#pragma unroll
    for (int i = 0; i < kBanks; ++i) {
        const int number = small(numbers, i);
        found = number > found ? number : found;
    }
    return found;
}

// A lane's matrix: how many rows lie in each bank; the bank of each output's row, and its weight,
// counted from the first that is put in order together with it.
struct GatheredMatrix {
    uint32_t rows = 0, banks = 0x11111111u * kNoBank;
    uint64_t weights = 0;
    __device__ int bank(int output) const { return small(banks, output); }
    __device__ int weight(int output) const { return weights >> 8 * output & 0xffu; }
    __device__ void put(int output, int to_bank, int to_weight) {
        rows += one_in(to_bank) - one_in(bank(output));
        banks ^= static_cast<uint32_t>(bank(output) ^ to_bank) << 4 * output;
        weights ^= static_cast<uint64_t>(weight(output) ^ to_weight) << 8 * output;
    }
};

// A warp orders the slots of an octet, a lane for each matrix: first one weight after the other
// takes the best of the slots that are left, then slots are exchanged where that is better, twice.
// Better are fewer passes (the largest number of rows in a bank, of each matrix), then fewer pairs
// of rows that meet. `slots` (matrix, output) gets the place of the weight in the lists, or
// -1 - b where there is none, and zeros are to be read from bank b.
__global__ void __launch_bounds__(kThreads)
    order_slots_kernel(const Lists lists, int64_t octet_blocks, int log_vectors, int32_t* slots) {
    const int lane = threadIdx.x % kWarp;
    const int64_t octets = (lists.rows + kOctet - 1) / kOctet;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
    for (int64_t octet = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
         octet < octets; octet += warps) {
        const int64_t start = first_block(lists, octet_blocks, octet) * kSlots;
        const int64_t all = first_block(lists, octet_blocks, octet + 1) * kSlots - start;
        for (int64_t first = 0; first < all; first += kOrdered) {
            const int matrices = all - first < kOrdered ? static_cast<int>(all - first) : kOrdered;
            const auto range_of = [&](int output) {
                return weights_of(lists, octet * kOctet + output, first, first + matrices, all);
            };
            GatheredMatrix mine;
#pragma unroll 1
            for (int output = 0; output < kOctet; ++output) {
                const Range range = range_of(output);
                const int weights = static_cast<int>(range.end - range.begin);
                const int32_t* const column = lists.wide_columns + range.begin + lane;
                const unsigned place = lane < weights ? tile_base(*column, log_vectors) : 0;
#pragma unroll 1
                for (int weight = 0; weight < weights; ++weight) {
                    const int bank = __shfl_sync(kAllLanes, place, weight) % kBanks;
                    const bool is_free = lane < matrices && mine.bank(output) == kNoBank;
                    const int there = small(mine.rows, bank);
                    const unsigned grows = there == largest(mine.rows);
                    const unsigned cost = is_free ? grows << 10 | there << 5 | lane : ~0u;
                    const int best = __reduce_min_sync(kAllLanes, cost) % kWarp;
                    if (lane == best) mine.put(output, bank, weight);
                }
            }
#pragma unroll 1
            for (int i = 0; i < 2 * kOctet * matrices; ++i) {
                const int output = i / matrices % kOctet, other = i % matrices;
                const uint32_t rows = __shfl_sync(kAllLanes, mine.rows, other);
                const int bank = mine.bank(output), its = __shfl_sync(kAllLanes, bank, other);
                const uint32_t moves = one_in(bank) - one_in(its);
                int gain = 0;
                if (lane < matrices && bank != its) {
                    gain = (largest(rows) + largest(mine.rows) - largest(rows + moves) -
                            largest(mine.rows - moves)) *
                           32;
                    if (its < kBanks) gain += small(rows, its) - small(mine.rows, its) - 1;
                    if (bank < kBanks) gain += small(mine.rows, bank) - small(rows, bank) - 1;
                }
                const unsigned offer = gain > 0 ? gain << 5 | (kWarp - 1 - lane) : 0;
                const unsigned taken = __reduce_max_sync(kAllLanes, offer);
                if (taken == 0) continue;
                const int best = kWarp - 1 - static_cast<int>(taken % kWarp);
                const int from = lane == other ? best : other, weight = mine.weight(output);
                const int new_bank = __shfl_sync(kAllLanes, bank, from);
                const int new_weight = __shfl_sync(kAllLanes, weight, from);
                if (lane == other || lane == best) mine.put(output, new_bank, new_weight);
            }
            if (lane >= matrices) continue;
            int zeros = 0;
#pragma unroll
            for (int b = 1; b < kBanks; ++b) {
                if (small(mine.rows, b) < small(mine.rows, zeros)) zeros = b;
            }
#pragma unroll 1
            for (int output = 0; output < kOctet; ++output) {
                const auto at = static_cast<int32_t>(range_of(output).begin) + mine.weight(output);
                slots[(start + first + lane) * kOctet + output] =
                    mine.bank(output) == kNoBank ? -1 - zeros : at;
            }
        }
    }
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
        const int32_t entry =
            block < p.blocks ? lists.slots[(block * kSlots + slot) * kOctet + output] : -1;
        const bool there = entry >= 0;
        const unsigned place = there ? tile_base(lists.wide_columns[entry], p.log_vectors)
                                     : zero_place + static_cast<unsigned>(-1 - entry);
        const T* const values = static_cast<const T*>(p.values);
        const T weight = there ? values[lists.ids ? lists.ids[entry] : entry] : T{0};
        const bool is_last = block < p.blocks && block + 1 == first_block(p, octet + 1);
        const int step = slot / 2, half = slot % 2;
        uint4* const words = p.words + block * kBlockVectors;
        reinterpret_cast<uint32_t*>(words)[(half * kOctet + output) * 2 + step] =
            place << 4 | (is_last && step == 0 ? kLast : 0);
        T* const weights = reinterpret_cast<T*>(words + kPlaceVectors);
        T* const own = weights + output * 8 + step * 4 + half * 2;
        own[output % 2] = weight;
        own[1 - output % 2] = T{0};
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
                (reinterpret_cast<const uint32_t*>(words)[(half * kOctet + output) * 2 + step] &
                 ~kLast) >>
                4;
            const T weight = reinterpret_cast<const T*>(words + kPlaceVectors +
                                                        output)[step * 4 + half * 2 + output % 2];
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

    // Lane 4 g + t has weights of output g where that is 2 t or 2 t + 1.
    const int g = lane / 4, t = lane % 4;
    const int weight = kPlaceVectors + (t == g / 2 ? g : kOctet);
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

// Slots of all words.
inline int64_t slots_of(const Lists& lists) { return word_blocks(lists) * kSlots * kOctet; }

// Orders them for the tiles of an H200, on other GPUs too: the same sums on all.
inline void launch_order_slots(const Lists& lists, int32_t* slots, const Queue& queue) {
    constexpr int64_t kShared = 227 << 10;
    int log_vectors = kMaxLogVectors;
    while (log_vectors > 0 && gather_bytes(lists, log_vectors) > kShared) --log_vectors;
    const int64_t blocks = ceil_div(octets_of(lists), kThreads / kWarp);
    launch("the kernel that orders slots", order_slots_kernel,
           static_cast<unsigned>(std::min(blocks, 16 * multiprocessors(queue.device))), kThreads, 0,
           queue, lists, ceil_div(lists.per_row, kSlots), log_vectors, slots);
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
    p.log_vectors = kMaxLogVectors;
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
