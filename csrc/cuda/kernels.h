// The entries of the CUDA kernels: device addresses, sizes, a device and its stream in; no CUDA
// type, so that the bindings compile without its headers. Each launches and returns: nothing waits
// for the device. An error of CUDA is thrown as std::runtime_error that names kernel and problem.
#pragma once

#include <cstdint>

namespace sk {
namespace cuda {

enum class DType { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// The CUDA version that the driver serves, 0 without a driver, and that of the runtime which is
// linked into this module: 1000 * major + 10 * minor.
int driver_version();
int runtime_version();

// Where to launch; the stream is a cudaStream_t of that device.
struct Queue {
    int device;
    void* stream;
};

// A user's 2-D tensor in device memory: element (m, f) is number m * row_stride + f * col_stride.
struct Operand {
    const void* data;
    int64_t row_stride;
    int64_t col_stride;
};

// Block-rows that the kernel for blocks of 32 on compute capability 9.0 takes together. For each
// block-column that any of them reads, ascending, `columns` has it and the number of its readers.
constexpr int kGroupRows = 22;
struct Groups {
    const int32_t* rows;     // (groups, kGroupRows) the rows of each group, or -1
    const int32_t* offsets;  // (groups + 1) of the group's columns in `columns`
    const int32_t* columns;  // (columns of all groups, 2)
    const int32_t* places;   // (blocks) where its column is among those of its row's group
};

// For each output block-row the input blocks that it reads, ascending. The blocks of the values
// lie in the order of the lists, except where spmm_words is not 0, or on Hopper.
struct Lists {
    int64_t rows;            // output block-rows
    int64_t cols;            // input block-columns
    int64_t blocks;          // blocks in all
    int64_t per_row;         // blocks in each row, when offsets is null
    const int64_t* offsets;  // (rows + 1), or null
    const void* columns;     // (blocks) input block-column: uint16_t if `narrow`, else int32_t
    bool narrow;
    const int32_t* wide_columns;  // (blocks) the same as int32_t
    const int32_t* ids;           // (blocks) the stored block of each, or null: in that order
    const int32_t* order;         // (units) in which units are taken (see spmm.cu), or null
    const int32_t* starts;        // (rows + 1) offsets in that order, in fours, rounded up, or null
    const int32_t* octets;        // (rows / 8 + 1, rounded up) first block of words (see
                                  // spmm_unstructured.cuh) of each eight rows, or null
    const int32_t* block_octets;  // (octet_blocks) the eight rows of each of them, or null
    int64_t octet_blocks;
    const int32_t* slots;   // (spmm_slots) of order_slots, or null
    const uint64_t* dealt;  // (sddmm_gathers) of deal_rows, or null
    Groups groups;
    int32_t out_block;   // outputs of a block, in the direction of this product
    int32_t in_block;    // inputs of a block
    int32_t out_stride;  // distance in the stored block between neighbouring outputs ...
    int32_t in_stride;   // ... and neighbouring inputs
};

// Entries of working memory, of a float and an index if T is float, else of 4 bytes, that spmm
// wants: 0, or enough for all weights. Then it reads the values where `ids` says.
int64_t spmm_words(DType dtype, const Lists& lists, int64_t slice_features, int device);

// Numbers that order_slots writes: 0 if spmm needs none of them.
int64_t spmm_slots(const Lists& lists, int64_t slice_features, int device);

// Which weight of an output lies in which slot (see spmm_unstructured.cuh): it follows from the
// pattern alone, and 16-bit spmm with words needs it in `lists`.
void order_slots(const Lists& lists, int32_t* slots, const Queue& queue);

// Whether the kernels of compute capability 9.0 for square blocks of 32, 64 and 128 in 16 bits
// serve a product: the device and its driver, the sizes, and where the operands lie. spmm then
// reads the values where `ids` says, and needs `groups` for blocks of 32.
bool spmm_on_hopper(DType dtype, const Lists& lists, const Operand& x, const void* values,
                    int64_t tokens, const Queue& queue);
bool sddmm_on_hopper(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
                     int64_t tokens, const Queue& queue);

// out[m, r] = bias[r] + sum over the kept blocks of row r of W[r, c] * x[m, c]; out is (tokens,
// rows * out_block), contiguous. bias may be null. `product` is its name in messages.
// `slice_features` bounds the inputs that lie in shared memory at a time (see spmm.cu). `on_hopper`
// is what spmm_on_hopper said.
void spmm(const char* product, DType dtype, const Lists& lists, const Operand& x,
          const void* values, const void* bias, void* words, void* out, int64_t tokens,
          int64_t slice_features, bool on_hopper, const Queue& queue);

// packed[i] = values[ids[i]] for blocks of `block_bytes`, which element_bytes (2 or 4) divides.
void pack_blocks(const int32_t* ids, int64_t blocks, int64_t block_bytes, int element_bytes,
                 const void* values, void* packed, const Queue& queue);

// Parts of the tokens whose sums sddmm keeps in `partial`: they follow from the number of tokens,
// the lists and the kernel.
int64_t sddmm_parts(DType dtype, const Lists& lists, int64_t tokens, bool on_hopper);

// Numbers that deal_rows writes: 0 if sddmm needs none of them.
int64_t sddmm_gathers(DType dtype, const Lists& lists);

// How the rows that sddmm gathers are dealt to matrices (see sddmm_unstructured.cuh): it follows
// from the pattern alone, changes no sum, and 16-bit sddmm of unstructured weights needs it.
void deal_rows(const Lists& lists, uint64_t* dealt, const Queue& queue);

// grad_values[r, f, a, b] = sum over tokens of grad_output[m, r, a] * x[m, column(r, f), b].
// `partial` holds a float for each element of each part: working memory.
void sddmm(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
           float* partial, void* grad_values, int64_t tokens, int64_t slice_features,
           bool on_hopper, const Queue& queue);

// What a row of x becomes before abs_topk, rounded to its dtype: x P(X <= x) (X standard normal),
// or x * scales * weight (cols), scales (rows) = 1 / sqrt(mean(x^2) + eps), which is an output.
struct Before {
    enum Kind { kNothing, kGelu, kNorm } kind = kNothing;
    const void* weight = nullptr;
    float eps = 0.0f;
    float* scales = nullptr;
};

// y (rows, cols), contiguous, keeps the k entries of largest magnitude of each row of x. Rows of
// more than `held_bytes` are read again at each step instead of held in registers.
void abs_topk(DType dtype, const Before& before, const Operand& x, void* y, int64_t rows,
              int64_t cols, int64_t k, int64_t held_bytes, const Queue& queue);

// grad_input (rows, cols), contiguous, is grad_output where y is not zero, elsewhere zero; where
// x.data is not null, times the derivative of GELU at x.
void abs_topk_backward(DType dtype, const Operand& grad_output, const Operand& y, const Operand& x,
                       void* grad_input, int64_t rows, int64_t cols, const Queue& queue);

// Floats of working memory that norm_abs_topk_backward wants.
int64_t norm_partial(int64_t rows, int64_t cols);

// The gradients of x (rows, cols), contiguous, and weight (cols) from the results of abs_topk after
// RMSNorm; see topk_backward.cu.
void norm_abs_topk_backward(DType dtype, const Operand& grad_output, const Operand& y,
                            const Operand& x, const void* weight, const float* scales,
                            float* partial, void* grad_input, void* grad_weight, int64_t rows,
                            int64_t cols, const Queue& queue);

}  // namespace cuda
}  // namespace sk
