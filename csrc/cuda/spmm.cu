// spmm: out[m, r] = bias[r] + sum over the kept blocks of row r of W[r, c] * x[m, c]. `forward`
// runs it over the rows of a layout, `grad_input` over its columns.
//
// A block of threads keeps a tile of tokens in shared memory, with all their inputs, and streams
// weights and indices past it: they are few, and each is read once for a whole tile. Neighbouring
// threads (a group, as many as the tile has vectors) compute the same outputs for different
// tokens; each group has its own outputs. A warp takes a run of neighbouring outputs after the
// other and passes their results through shared memory of its own, so that they leave in pieces of
// 16 bytes: no warp waits for another. Inputs that do not fit are cut into slices, which are loaded
// one after the other for every turn of the warps.
//
// Lists of different lengths have an order, the longest first: it permutes runs of 32 units and,
// where a unit is a single output, the units within a run, so that the groups of a warp have lists
// of like lengths. A unit is kShared neighbouring outputs of a block-row. Unstructured weights in
// 16 bits whose inputs need no slices have a kernel of their own.
#include <type_traits>

#include "hopper.h"
#include "launch.cuh"
#include "spmm_unstructured.cuh"

namespace sk {
namespace cuda {
namespace {

// A sum is taken in stretches of about this many terms, whose sums are added up: its rounding error
// then grows with the square root of its length, as in a blocked dense product.
constexpr int kStretch = 64;
constexpr int kWarps = kThreads / kWarp;

// Unstructured weights in 32 bits that need no slices are read from words that hold a weight and
// the place of its input in the tile, made anew for each product: one load serves several weights,
// and nothing is left to compute for each. Rows begin at multiples of this many words, and are
// filled up with zero weights of a place that holds zeros.
constexpr int kWordsAtOnce = 4;

struct alignas(8) Word {
    uint32_t place;
    float weight;
};

struct SpmmProblem {
    Lists lists;
    Operand x;
    const void* values;
    const void* bias;
    void* words;
    void* out;
    int64_t tokens;
    int64_t slices;
    int slice_cols;      // block-columns of a slice
    int log_vectors;     // the tile has kTokens<T> << log_vectors tokens; 0 if there are slices
    int64_t split_runs;  // runs of outputs that blockIdx.y counts
    bool wide_loads;
    bool wide_stores;
};

// Units of a run: enough for the groups of a warp, and for 32 outputs.
template <int kShared>
__host__ __device__ int log_run(int log_vectors) {
    if (kShared == 1) return 5;
    constexpr int kLeast = kShared == 4 ? 3 : 4;
    return 5 - log_vectors > kLeast ? 5 - log_vectors : kLeast;
}

// A warp's results, [vector][token][output]: elements from a vector to the next. The gap leads the
// vectors to different banks.
template <class T>
__host__ __device__ int vector_stride(int width, int log_vectors) {
    return kTokens<T> * width + (128 >> log_vectors) / static_cast<int>(sizeof(T));
}

// The results of one token for the neighbouring outputs of a unit.
template <class T, int kShared>
struct alignas(kShared * sizeof(T)) Results {
    T of[kShared];
};

// total += acc; acc = 0.
template <int kShared, int kCount>
__device__ void flush(float (&total)[kShared][kCount], float (&acc)[kShared][kCount]) {
#pragma unroll
    for (int a = 0; a < kShared; ++a) {
#pragma unroll
        for (int t = 0; t < kCount; ++t) {
            total[a][t] += acc[a][t];
            acc[a][t] = 0.0f;
        }
    }
}

template <class T>
__device__ void multiply(float weight, const uint4& vector, float (&acc)[1][kTokens<T>]) {
    float input[kTokens<T>];
    unpack(vector, input, T{});
#pragma unroll
    for (int t = 0; t < kTokens<T>; ++t) acc[0][t] = fmaf(weight, input[t], acc[0][t]);
}

// kWordsAtOnce words, and what they say.
struct Words {
    uint4 first, second;
    __device__ void load(const Word* from) {
        first = load_vector(from);
        second = load_vector(from + 2);
    }
    __device__ void add(const uint4* tile, unsigned lane, float (&acc)[1][4]) const {
        const uint4 inputs[4] = {tile[first.x ^ lane], tile[first.z ^ lane], tile[second.x ^ lane],
                                 tile[second.z ^ lane]};
        multiply<float>(__uint_as_float(first.y), inputs[0], acc);
        multiply<float>(__uint_as_float(first.w), inputs[1], acc);
        multiply<float>(__uint_as_float(second.y), inputs[2], acc);
        multiply<float>(__uint_as_float(second.w), inputs[3], acc);
    }
};

// Where the words of the unit at a place of the order lie, and how many, a multiple of
// kWordsAtOnce.
struct WordRange {
    Word* begin;
    int count;
};
__device__ inline WordRange words_at(const SpmmProblem& p, int64_t at) {
    Word* const words = static_cast<Word*>(p.words);
    if (p.lists.starts) {
        const int begin = p.lists.starts[at], end = p.lists.starts[at + 1];
        return {words + int64_t{begin} * kWordsAtOnce, (end - begin) * kWordsAtOnce};
    }
    const int count = static_cast<int>(p.lists.per_row + kWordsAtOnce - 1) & ~(kWordsAtOnce - 1);
    return {words + at * count, count};
}

// Writes all words; eight threads take a row.
__global__ void __launch_bounds__(kThreads) words_kernel(const SpmmProblem p, unsigned zero_place) {
    constexpr int kPerRow = 8;
    const Lists& lists = p.lists;
    const float* const values = static_cast<const float*>(p.values);
    const int64_t step = static_cast<int64_t>(gridDim.x) * (blockDim.x / kPerRow);
    for (int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kPerRow;
         at < lists.rows; at += step) {
        const int64_t row = lists.order ? lists.order[at] : at;
        const int64_t begin = lists.offsets ? lists.offsets[row] : row * lists.per_row;
        const int64_t end = lists.offsets ? lists.offsets[row + 1] : begin + lists.per_row;
        const WordRange range = words_at(p, at);
        for (int i = threadIdx.x % kPerRow; i < range.count; i += kPerRow) {
            const int64_t entry = begin + i;
            Word word{zero_place, 0.0f};
            if (entry < end) {
                word.place = tile_base(lists.wide_columns[entry], p.log_vectors);
                word.weight = values[lists.ids ? lists.ids[entry] : entry];
            }
            range.begin[i] = word;
        }
    }
}

// total += the products of a unit's words; `next` are those of the unit after it. `ahead` are words
// that are loaded before they are needed: of this unit at the beginning, of the next in the end.
__device__ inline void add_words(const WordRange& range, const WordRange& next, Words& ahead,
                                 const uint4* tile, unsigned vector, float (&total)[1][4]) {
    const Word* words = range.begin;
    float acc[1][4] = {};
    for (int left = range.count; left > 0; left -= kStretch) {
        const int count = left < kStretch ? left : kStretch;
        for (int i = 0; i < count; i += kWordsAtOnce) {
            const Words now = ahead;
            words += kWordsAtOnce;
            if (i + kWordsAtOnce < left) ahead.load(words);
            now.add(tile, vector, acc);
        }
        flush(total, acc);
    }
    if (next.count > 0) ahead.load(next.begin);
}

// total += the products of a unit's blocks that lie in a slice.
template <class T, class Index, int kShared, int kInBlock>
__device__ void add_blocks(const SpmmProblem& p, int64_t unit, int64_t slice, const uint4* tile,
                           unsigned vector, float (&total)[kShared][kTokens<T>]) {
    const int in_block = kInBlock ? kInBlock : p.lists.in_block;
    const int units_in_row = p.lists.out_block / kShared;
    const int64_t row = units_in_row == 1 ? unit : unit / units_in_row;
    const int first_output = static_cast<int>(unit - row * units_in_row) * kShared;
    const int block_size = p.lists.out_block * in_block;
    const int first_col = static_cast<int>(slice * p.slice_cols);
    const int step = kStretch > in_block ? kStretch / in_block : 1;
    constexpr int kUnrolled = kShared == 4 ? 2 : 4;  // as many as there are registers for
    const Index* const columns = static_cast<const Index*>(p.lists.columns);
    const Range range = blocks_in_slice(p.lists.offsets, p.lists.per_row, columns, row, slice,
                                        p.slices, p.slice_cols);
    const Index* column = columns + range.begin;
    const T* weight = static_cast<const T*>(p.values) + range.begin * block_size +
                      first_output * p.lists.out_stride;
    float acc[kShared][kTokens<T>] = {};
    for (int64_t left = range.end - range.begin; left > 0; left -= step) {
        const int count = left < step ? static_cast<int>(left) : step;
#pragma unroll(kUnrolled)
        for (int j = 0; j < count; ++j, ++column, weight += block_size) {
            const int feature = (static_cast<int>(*column) - first_col) * in_block;
            for (int b = 0; b < in_block; ++b) {
                float input[kTokens<T>];
                unpack(tile[tile_base(feature + b, p.log_vectors) ^ vector], input, T{});
#pragma unroll
                for (int a = 0; a < kShared; ++a) {
                    const float w =
                        to_float(weight[a * p.lists.out_stride + b * p.lists.in_stride]);
#pragma unroll
                    for (int t = 0; t < kTokens<T>; ++t) acc[a][t] = fmaf(w, input[t], acc[a][t]);
                }
            }
        }
        flush(total, acc);
    }
}

// A warp writes the results of `width` neighbouring outputs from its stage to `out`, where
// `outputs` of them and `tokens` tokens exist; kPiece at a time, for whole pieces.
template <int kPiece, class T>
__device__ void store_run(const T* stage, int stride, int width, int outputs, int log_vectors,
                          T* out, int64_t out_features, int64_t tokens) {
    const int pieces = width / kPiece;
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < pieces * kTokens<T>; i += kWarp) {
        // Neighbouring threads take neighbouring pieces of a token, and the same of all vectors.
        const int output = i % pieces * kPiece;
        const int token = i / pieces;
        if (output >= outputs) continue;
        const T* from = stage + token * width + output;
        T* to = out + token * out_features + output;
#pragma unroll 1
        for (int64_t at = token; at < tokens && at < kTokens<T> << log_vectors;
             at += kTokens<T>, from += stride, to += kTokens<T> * out_features) {
            if constexpr (kPiece == 1) {
                *to = *from;
            } else {
                store_vector(to, load_vector(from));
            }
        }
    }
}

// Index says what the columns are, or is void for words. kInBlock is the number of inputs of a
// block, or 0 for any.
template <class T, class Index, int kShared, int kInBlock>
__global__ void __launch_bounds__(kThreads, 1) spmm_kernel(const SpmmProblem p) {
    constexpr bool kWords = std::is_void<Index>::value;
    const int in_block = kInBlock ? kInBlock : p.lists.in_block;
    const int log_vectors = p.log_vectors;
    const int log_units = log_run<kShared>(log_vectors);
    const int run = 1 << log_units;
    const int width = run * kShared;
    const int stride = vector_stride<T>(width, log_vectors);
    const int places = tile_vectors(p.slice_cols * in_block, log_vectors);
    SharedMemory shared;
    uint4* const tile = shared.take<uint4>(places + (kWords ? 8 : 0));
    T* const stage = shared.take<T>(kWarps * (stride << log_vectors)) +
                     threadIdx.x / kWarp * (stride << log_vectors);

    const T* const bias = static_cast<const T*>(p.bias);
    const int64_t out_features = p.lists.rows * p.lists.out_block;
    const int64_t units = out_features / kShared;
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * (kTokens<T> << log_vectors);
    const int64_t tokens = p.tokens - first_token;  // of the tile, and all behind it
    const T* const x = static_cast<const T*>(p.x.data) + first_token * p.x.row_stride;
    T* const out = static_cast<T*>(p.out) + first_token * out_features;

    const int lane = threadIdx.x % kWarp;
    const int vector = lane & ((1 << log_vectors) - 1);
    const int groups = kWarp >> log_vectors;  // of a warp

    if (p.slices == 1) {
        load_tile(tile, log_vectors, x, p.x.row_stride, p.x.col_stride, tokens,
                  static_cast<int>(p.lists.cols) * in_block, p.wide_loads);
        if (kWords && threadIdx.x < 8) tile[places + threadIdx.x] = {0, 0, 0, 0};
        __syncthreads();
    }
    const int64_t runs = (units + run - 1) >> log_units;
    const int64_t begin = blockIdx.y * p.split_runs;
    const int64_t end = begin + p.split_runs < runs ? begin + p.split_runs : runs;
    for (int64_t turn = begin; turn < end; turn += kWarps) {
        // All warps come to the barriers of the slices, also those that are left without a run.
        const bool idle = turn + threadIdx.x / kWarp >= end;
        if (idle && p.slices == 1) break;
        const int64_t first = (turn + threadIdx.x / kWarp) << log_units;
        const int64_t last = idle ? first : first + run < units ? first + run : units;
        int64_t at = first + (lane >> log_vectors);
        WordRange range{nullptr, 0};
        Words ahead;
        if constexpr (kWords) {
            if (at < last) range = words_at(p, at);
            if (range.count > 0) ahead.load(range.begin);
        }
        for (int local = 0; local < run; local += groups, at += groups) {
            const bool mine = at < last;
            const int64_t unit = mine && p.lists.order ? p.lists.order[at] : at;
            float total[kShared][kTokens<T>];
#pragma unroll
            for (int a = 0; a < kShared; ++a) {
                const float start = mine && bias ? to_float(bias[unit * kShared + a]) : 0.0f;
#pragma unroll
                for (int t = 0; t < kTokens<T>; ++t) total[a][t] = start;
            }
            if constexpr (kWords) {
                WordRange next{nullptr, 0};
                if (at + groups < last) next = words_at(p, at + groups);
                add_words(range, next, ahead, tile, vector, total);
                range = next;
            } else {
                for (int64_t slice = 0; slice < p.slices; ++slice) {
                    if (p.slices > 1) {
                        const int64_t first_col = slice * p.slice_cols;
                        const int64_t left = p.lists.cols - first_col;
                        __syncthreads();  // nobody reads the slice before any more
                        // Four outputs leave no registers for wide loads.
                        load_tile(tile, 0, x + first_col * in_block * p.x.col_stride,
                                  p.x.row_stride, p.x.col_stride, tokens,
                                  (left < p.slice_cols ? static_cast<int>(left) : p.slice_cols) *
                                      in_block,
                                  kShared == 1 && p.wide_loads);
                        __syncthreads();
                    }
                    if (mine) {
                        add_blocks<T, Index, kShared, kInBlock>(p, unit, slice, tile, vector,
                                                                total);
                    }
                }
            }
            if (!mine) continue;
            T* const to = stage + vector * stride + (static_cast<int>(unit) & (run - 1)) * kShared;
#pragma unroll
            for (int t = 0; t < kTokens<T>; ++t) {
                Results<T, kShared> results;
#pragma unroll
                for (int a = 0; a < kShared; ++a) results.of[a] = from_float<T>(total[a][t]);
                *reinterpret_cast<Results<T, kShared>*>(to + t * width) = results;
            }
        }
        __syncwarp();  // the run's results are complete
        if (!idle) {
            const int64_t in_memory =
                p.lists.order ? p.lists.order[first] >> log_units : first >> log_units;
            const int64_t left = out_features - in_memory * width;
            const int outputs = left < width ? static_cast<int>(left) : width;
            T* const to = out + in_memory * width;
            if (p.wide_stores) {
                store_run<kTokens<T>>(stage, stride, width, outputs, log_vectors, to, out_features,
                                      tokens);
            } else {
                store_run<1>(stage, stride, width, outputs, log_vectors, to, out_features, tokens);
            }
        }
        __syncwarp();  // before the next run's results are set
    }
}

// The slices that the inputs are cut into: as large as a tile of one vector allows.
template <class T, int kShared>
int64_t stage_bytes(int log_vectors) {
    const int width = kShared << log_run<kShared>(log_vectors);
    return (int64_t{kWarps} * vector_stride<T>(width, log_vectors) << log_vectors) *
           static_cast<int64_t>(sizeof(T));
}
template <class T, int kShared>
int64_t slice_cols(const Lists& lists, int64_t slice_features, int device) {
    constexpr int64_t kRounding = 16 * 16;  // tile_vectors rounds up, and the words' zeros
    const int64_t room = shared_limit(device) - stage_bytes<T, kShared>(0) - kRounding;
    const int64_t fitting = std::min(slice_features, room / 16);
    return std::min(lists.cols, std::max<int64_t>(1, fitting / lists.in_block));
}

// Whether words serve: single weights, inputs in one slice, lists that say where words begin.
bool uses_words(const Lists& lists, int64_t slice_features, int device) {
    return lists.out_block == 1 && lists.in_block == 1 && (lists.per_row || lists.starts) &&
           slice_cols<float, 1>(lists, slice_features, device) == lists.cols;
}

template <class T, class Index, int kShared, int kInBlock>
void launch_spmm(const char* product, SpmmProblem p, int64_t slice_features, const Queue& queue) {
    constexpr bool kWords = std::is_void<Index>::value;
    const std::string what = describe(product, p.lists, p.tokens);
    // Slices as large as a tile of one vector allows, then as many vectors as fit and are needed.
    const int64_t limit = shared_limit(queue.device);
    p.slice_cols = static_cast<int>(slice_cols<T, kShared>(p.lists, slice_features, queue.device));
    p.slices = ceil_div(p.lists.cols, p.slice_cols);
    const int64_t features = int64_t{p.slice_cols} * p.lists.in_block;
    const auto places = [&](int log_vectors) {
        return tile_vectors(static_cast<int>(features), log_vectors) + (kWords ? 8 : 0);
    };
    const auto bytes = [&](int log_vectors) {
        return int64_t{16} * places(log_vectors) + stage_bytes<T, kShared>(log_vectors);
    };
    p.log_vectors = p.slices > 1 ? 0 : 3;
    while (p.log_vectors > 0 &&
           (bytes(p.log_vectors) > limit || kTokens<T> << (p.log_vectors - 1) >= p.tokens)) {
        --p.log_vectors;
    }
    const auto in_bytes = static_cast<int>(sizeof(T));
    p.wide_loads = wide_loads(p.x, p.lists.cols * p.lists.in_block, features, in_bytes);
    p.wide_stores = p.lists.rows * p.lists.out_block * in_bytes % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(p.out) % 16 == 0;

    // Few tiles leave multiprocessors idle: then several blocks share a tile's outputs.
    const int64_t tiles = ceil_div(p.tokens, kTokens<T> << p.log_vectors);
    const int64_t units = p.lists.rows * (p.lists.out_block / kShared);
    const int64_t runs = ceil_div(units, int64_t{1} << log_run<kShared>(p.log_vectors));
    const int64_t turns = ceil_div(runs, kWarps);
    const int64_t wanted = ceil_div(multiprocessors(queue.device), tiles);
    p.split_runs = ceil_div(turns, std::min(turns, wanted)) * kWarps;
    const dim3 grid(static_cast<unsigned>(tiles),
                    static_cast<unsigned>(ceil_div(runs, p.split_runs)));
    if constexpr (kWords) {
        const auto blocks = static_cast<unsigned>(
            std::min(ceil_div(p.lists.rows, kThreads / 8), 16 * multiprocessors(queue.device)));
        launch(what + ", its words,", words_kernel, blocks, kThreads, 0, queue, p,
               static_cast<unsigned>(places(p.log_vectors) - 8));
    }
    launch(what, spmm_kernel<T, Index, kShared, kInBlock>, grid, kThreads, bytes(p.log_vectors),
           queue, p);
}

template <class T, int kShared>
void choose_index(const char* product, const SpmmProblem& p, int64_t slice_features,
                  const Queue& queue) {
    if (!p.lists.narrow) {
        launch_spmm<T, int32_t, kShared, 0>(product, p, slice_features, queue);
    } else if (kShared > 1 && p.lists.in_block == 1) {
        // Single weights are here only where they do not fit into words.
        launch_spmm<T, uint16_t, kShared, kShared == 1 ? 0 : 1>(product, p, slice_features, queue);
    } else {
        launch_spmm<T, uint16_t, kShared, 0>(product, p, slice_features, queue);
    }
}

template <class T>
void choose_shared(const char* product, const SpmmProblem& p, int64_t slice_features,
                   const Queue& queue) {
    if constexpr (sizeof(T) == 2) {
        if (gathers(p.lists, slice_features, queue.device)) {
            return launch_gather<T>(
                product,
                {p.lists, p.x, p.values, p.bias, static_cast<uint4*>(p.words), p.out, p.tokens},
                queue);
        }
    } else if (uses_words(p.lists, slice_features, queue.device)) {
        return launch_spmm<float, void, 1, 1>(product, p, slice_features, queue);
    }
    switch (shared_outputs(p.lists.out_block)) {
        case 4:
            return choose_index<T, 4>(product, p, slice_features, queue);
        case 2:
            return choose_index<T, 2>(product, p, slice_features, queue);
        default:
            return choose_index<T, 1>(product, p, slice_features, queue);
    }
}

template <class Bits>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const int32_t* ids, int64_t elements, int64_t block_size, const Bits* values,
                Bits* packed) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < elements;
         i += step) {
        const int64_t block = i / block_size;
        packed[i] = values[ids[block] * block_size + (i - block * block_size)];
    }
}

}  // namespace

int64_t spmm_words(DType dtype, const Lists& lists, int64_t slice_features, int device) {
    if (dtype != DType::kFloat32) {
        return gathers(lists, slice_features, device) ? gather_words(lists) * 4 : 0;
    }
    if (!uses_words(lists, slice_features, device)) return 0;
    if (lists.starts) return lists.blocks + (kWordsAtOnce - 1) * lists.rows;
    return lists.rows * (ceil_div(lists.per_row, kWordsAtOnce) * kWordsAtOnce);
}

int64_t spmm_slots(const Lists& lists, int64_t slice_features, int device) {
    return gathers(lists, slice_features, device) ? slots_of(lists) : 0;
}

void order_slots(const Lists& lists, int32_t* slots, const Queue& queue) {
    const DeviceGuard guard(queue.device);
    launch_order_slots(lists, slots, queue);
}

void spmm(const char* product, DType dtype, const Lists& lists, const Operand& x,
          const void* values, const void* bias, void* words, void* out, int64_t tokens,
          int64_t slice_features, bool on_hopper, const Queue& queue) {
    if (tokens == 0) return;
    const DeviceGuard guard(queue.device);
    if (on_hopper) {
        const auto kernel = lists.out_block == 32 ? spmm_hopper_32 : spmm_hopper;
        return kernel(product, dtype, lists, x, values, bias, out, tokens, queue);
    }
    const SpmmProblem p{lists, x, values, bias, words, out, tokens, 1, 1, 0, 1, false, false};
    switch (dtype) {
        case DType::kFloat32:
            return choose_shared<float>(product, p, slice_features, queue);
        case DType::kBfloat16:
            return choose_shared<Bf16>(product, p, slice_features, queue);
        case DType::kFloat16:
            return choose_shared<Half>(product, p, slice_features, queue);
    }
}

void pack_blocks(const int32_t* ids, int64_t blocks, int64_t block_bytes, int element_bytes,
                 const void* values, void* packed, const Queue& queue) {
    if (blocks == 0) return;
    const DeviceGuard guard(queue.device);
    const int64_t block_size = block_bytes / element_bytes;
    const int64_t elements = blocks * block_size;
    const auto grid = static_cast<unsigned>(
        std::min(ceil_div(elements, kThreads), 16 * multiprocessors(queue.device)));
    const std::string what =
        "the kernel that orders " + std::to_string(blocks) + " blocks of values";
    if (element_bytes == 2) {
        launch(what, pack_kernel<uint16_t>, grid, kThreads, 0, queue, ids, elements, block_size,
               static_cast<const uint16_t*>(values), static_cast<uint16_t*>(packed));
    } else {
        launch(what, pack_kernel<uint32_t>, grid, kThreads, 0, queue, ids, elements, block_size,
               static_cast<const uint32_t*>(values), static_cast<uint32_t*>(packed));
    }
}

}  // namespace cuda
}  // namespace sk
