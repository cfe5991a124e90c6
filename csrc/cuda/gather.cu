// Products that gather: out[m, r] = bias[r] + sum over the kept blocks of row r of W[r, c] * x[m,
// c]. `forward` runs it over a layout's own lists, `grad_input` over the transposed ones.
//
// A block of threads keeps a tile of tokens in shared memory, with all their inputs, and streams
// weights and indices past it: they are few, and each is read once for a whole tile. Neighbouring
// threads (a group, as many as the tile has vectors) compute the same outputs for different
// tokens; each group has its own outputs. Inputs that do not fit are cut into slices, which are
// loaded one after the other for every chunk of outputs.
#include "launch.cuh"

namespace sk {
namespace cuda {
namespace {

// A sum is taken in stretches of about this many terms that are added up in shared memory: its
// rounding error then grows with the square root of its length, as in a blocked dense product.
constexpr int kStretch = 64;

struct GatherProblem {
    Lists lists;
    Operand x;
    const void* values;
    const void* bias;
    void* out;
    int64_t tokens;
    int64_t slices;
    int slice_cols;       // block-columns of a slice
    int log_vectors;      // the tile has kTokens<T> << log_vectors tokens
    int64_t split_units;  // units that blockIdx.y counts; a unit is kShared neighbouring outputs
};

// A group's sums for one unit: [output][token], where neighbouring outputs lie this far apart. The
// gap makes whoever reads four tokens of eight neighbouring outputs meet every bank once.
__host__ __device__ inline int sums_stride(int tile_tokens) { return tile_tokens + 4; }

// sums += acc; acc = 0. Each element of the sums belongs to one thread.
template <int kShared, int kCount>
__device__ void flush(float* sums, int stride, float (&acc)[kShared][kCount]) {
#pragma unroll
    for (int a = 0; a < kShared; ++a) {
        float4* const to = reinterpret_cast<float4*>(sums + a * stride);
#pragma unroll
        for (int t = 0; t < kCount; t += 4) {
            const float4 old = to[t / 4];
            to[t / 4] = {old.x + acc[a][t], old.y + acc[a][t + 1], old.z + acc[a][t + 2],
                         old.w + acc[a][t + 3]};
        }
#pragma unroll
        for (int t = 0; t < kCount; ++t) acc[a][t] = 0.0f;
    }
}

// kInBlock is the number of inputs of a block, or 0 for any.
template <class T, class Index, int kShared, int kInBlock>
__global__ void __launch_bounds__(kThreads, 1) gather_kernel(const GatherProblem p) {
    const int in_block = kInBlock ? kInBlock : p.lists.in_block;
    const int out_block = p.lists.out_block;
    const int log_vectors = p.log_vectors;
    const int tile_tokens = kTokens<T> << log_vectors;
    const int stride = sums_stride(tile_tokens);
    const int units_at_once = blockDim.x >> log_vectors;
    SharedMemory shared;
    uint4* const tile = shared.take<uint4>((p.slice_cols * in_block) << log_vectors);
    float* const stage = shared.take<float>(units_at_once * kShared * stride);

    const Index* const columns = static_cast<const Index*>(p.lists.columns);
    const T* const bias = static_cast<const T*>(p.bias);
    const int64_t block_size = int64_t{out_block} * in_block;
    const int64_t out_features = p.lists.rows * out_block;
    const int64_t units = out_features / kShared;
    const int64_t units_in_row = out_block / kShared;
    const int64_t first_token = static_cast<int64_t>(blockIdx.x) * tile_tokens;
    const int64_t tokens = p.tokens - first_token;  // of the tile, and all behind it
    const T* const x = static_cast<const T*>(p.x.data) + first_token * p.x.row_stride;
    T* const out = static_cast<T*>(p.out) + first_token * out_features;

    const int vector = threadIdx.x & ((1 << log_vectors) - 1);
    const int group = threadIdx.x >> log_vectors;
    float* const sums = stage + group * kShared * stride + vector * kTokens<T>;

    const int64_t begin = blockIdx.y * p.split_units;
    const int64_t end = begin + p.split_units < units ? begin + p.split_units : units;
    for (int64_t chunk = begin; chunk < end; chunk += units_at_once) {
        const int64_t unit = chunk + group;
        const int64_t row = unit / units_in_row;
        const int first_output = static_cast<int>(unit - row * units_in_row) * kShared;
        for (int64_t slice = 0; slice < p.slices; ++slice) {
            const int64_t first_col = slice * p.slice_cols;
            if (p.slices > 1 || chunk == begin) {
                const int64_t left = p.lists.cols - first_col;
                const int cols = left < p.slice_cols ? static_cast<int>(left) : p.slice_cols;
                __syncthreads();  // nobody reads the slice before any more
                load_tile(tile, log_vectors, x + first_col * in_block * p.x.col_stride,
                          p.x.row_stride, p.x.col_stride, tokens, cols * in_block);
                __syncthreads();
            }
            if (unit >= end) continue;
            if (slice == 0) {
                for (int a = 0; a < kShared; ++a) {
                    const float start = bias ? to_float(bias[unit * kShared + a]) : 0.0f;
                    for (int t = 0; t < kTokens<T>; ++t) sums[a * stride + t] = start;
                }
            }
            const Range range = blocks_in_slice(p.lists.offsets, p.lists.per_row, columns, row,
                                                slice, p.slices, p.slice_cols);
            const T* weight = static_cast<const T*>(p.values) + range.begin * block_size +
                              first_output * p.lists.out_stride;
            const int step = kStretch > in_block ? kStretch / in_block : 1;
            float acc[kShared][kTokens<T>] = {};
            for (int64_t i = range.begin; i < range.end; i += step) {
                const Index* const some = columns + i;
                const int count = range.end - i < step ? static_cast<int>(range.end - i) : step;
#pragma unroll 4
                for (int j = 0; j < count; ++j, weight += block_size) {
                    const int feature = static_cast<int>(some[j] - first_col) * in_block;
                    for (int b = 0; b < in_block; ++b) {
                        float input[kTokens<T>];
                        unpack(tile[tile_slot(feature + b, vector, log_vectors)], input, T{});
#pragma unroll
                        for (int a = 0; a < kShared; ++a) {
                            const float w =
                                to_float(weight[a * p.lists.out_stride + b * p.lists.in_stride]);
#pragma unroll
                            for (int t = 0; t < kTokens<T>; ++t) {
                                acc[a][t] = fmaf(w, input[t], acc[a][t]);
                            }
                        }
                    }
                }
                flush(sums, stride, acc);
            }
        }
        __syncthreads();  // the chunk's sums are complete
        const int64_t left = (end - chunk) * kShared;
        const int outputs =
            left < units_at_once * kShared ? static_cast<int>(left) : units_at_once * kShared;
        // Neighbouring threads take neighbouring outputs: they are neighbours in memory.
        for (int i = threadIdx.x; i < outputs * (tile_tokens / 4); i += blockDim.x) {
            const int first = i / outputs * 4;
            const int output = i % outputs;
            const float4 four = *reinterpret_cast<const float4*>(stage + output * stride + first);
            const float results[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                if (first + t < tokens) {
                    out[(first + t) * out_features + chunk * kShared + output] =
                        from_float<T>(results[t]);
                }
            }
        }
        __syncthreads();  // before the next chunk's sums are set
    }
}

template <class T, class Index, int kShared, int kInBlock>
void launch_gather(const char* product, GatherProblem p, int64_t slice_features,
                   const Queue& queue) {
    const std::string what = describe(product, p.lists, p.tokens);
    const auto stage_bytes = [](int log_vectors) {
        const int tile_tokens = kTokens<T> << log_vectors;
        return int64_t{4} * (kThreads >> log_vectors) * kShared * sums_stride(tile_tokens);
    };
    // Slices as large as a tile of one vector allows, then as many vectors as fit and are needed.
    const int64_t limit = shared_limit(queue.device);
    const int64_t fitting = std::min(slice_features, (limit - stage_bytes(0)) / 16);
    const int64_t slice_cols =
        std::min(p.lists.cols, std::max<int64_t>(1, fitting / p.lists.in_block));
    const auto bytes = [&](int log_vectors) {
        return ((slice_cols * p.lists.in_block * 16) << log_vectors) + stage_bytes(log_vectors);
    };
    p.slices = ceil_div(p.lists.cols, slice_cols);
    p.slice_cols = static_cast<int>(slice_cols);
    p.log_vectors = 3;
    while (p.log_vectors > 0 &&
           (bytes(p.log_vectors) > limit || kTokens<T> << (p.log_vectors - 1) >= p.tokens)) {
        --p.log_vectors;
    }

    // Few tiles leave multiprocessors idle: then several blocks share a tile's outputs.
    const int64_t tiles = ceil_div(p.tokens, kTokens<T> << p.log_vectors);
    const int64_t units = p.lists.rows * (p.lists.out_block / kShared);
    const int64_t chunks = ceil_div(units, kThreads >> p.log_vectors);
    const int64_t wanted = ceil_div(multiprocessors(queue.device), tiles);
    p.split_units = ceil_div(chunks, std::min(chunks, wanted)) * (kThreads >> p.log_vectors);
    const dim3 grid(static_cast<unsigned>(tiles),
                    static_cast<unsigned>(ceil_div(units, p.split_units)));
    const auto kernel = gather_kernel<T, Index, kShared, kInBlock>;
    allow_shared(kernel, bytes(p.log_vectors), what);
    SK_LAUNCH(kernel, grid, kThreads, static_cast<size_t>(bytes(p.log_vectors)),
              static_cast<cudaStream_t>(queue.stream), p);
    check(cudaGetLastError(), what);
}

template <class T, int kShared>
void choose_index(const char* product, const GatherProblem& p, int64_t slice_features,
                  const Queue& queue) {
    if (!p.lists.narrow) {
        launch_gather<T, int32_t, kShared, 0>(product, p, slice_features, queue);
    } else if (p.lists.in_block == 1) {
        launch_gather<T, uint16_t, kShared, 1>(product, p, slice_features, queue);
    } else {
        launch_gather<T, uint16_t, kShared, 0>(product, p, slice_features, queue);
    }
}

template <class T>
void choose_shared(const char* product, const GatherProblem& p, int64_t slice_features,
                   const Queue& queue) {
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

void gather(const char* product, DType dtype, const Lists& lists, const Operand& x,
            const void* values, const void* bias, void* out, int64_t tokens, int64_t slice_features,
            const Queue& queue) {
    if (tokens == 0) return;
    const DeviceGuard guard(queue.device);
    const GatherProblem p{lists, x, values, bias, out, tokens, 1, 1, 0, 1};
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
    const auto stream = static_cast<cudaStream_t>(queue.stream);
    if (element_bytes == 2) {
        SK_LAUNCH(pack_kernel<uint16_t>, grid, kThreads, 0, stream, ids, elements, block_size,
                  static_cast<const uint16_t*>(values), static_cast<uint16_t*>(packed));
    } else {
        SK_LAUNCH(pack_kernel<uint32_t>, grid, kThreads, 0, stream, ids, elements, block_size,
                  static_cast<const uint32_t*>(values), static_cast<uint32_t*>(packed));
    }
    check(cudaGetLastError(),
          "the kernel that orders " + std::to_string(blocks) + " blocks of values");
}

}  // namespace cuda
}  // namespace sk
