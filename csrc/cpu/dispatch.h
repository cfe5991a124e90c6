// The table of kernels for each instruction set, and which of them this processor can run.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "types.h"

namespace sk {

enum class DType { kFloat32 = 0, kBfloat16 = 1, kFloat64 = 2 };
constexpr int kDTypes = 3;

// A matrix of the kernel's type: element (m, f) is at data[m * row_stride + f * col_stride].
struct MatrixPointer {
    const void* data;
    int64_t row_stride, col_stride;
};

struct SpmmArguments {
    Lists lists;
    Schedule schedule;
    MatrixPointer in;
    const void* values;
    const void* bias;
    void* out;
    int64_t tokens;
    int threads;
};

struct SddmmArguments {
    Lists lists;
    Schedule schedule;
    MatrixPointer grad_output, input;
    void* grad_values;
    int64_t tokens;
    int threads;
};

// Packed rows, as kept.h has them: words of bits, and `room` values for each row.
struct Packed {
    uint64_t* bits;
    void* values;
    int64_t room;
};

// The weight, scales (one of each row, in the compute type) and eps are those of RMSNorm.
struct AbsTopkArguments {
    MatrixPointer x;
    const void* weight;
    double eps;
    void *y, *scales;
    Packed packed;  // null, or with room for k or nothing
    int64_t rows, cols, k;
    int threads;
};

struct AbsTopkBackwardArguments {
    MatrixPointer grad_output;
    Packed packed;
    void* grad_input;
    int64_t rows, cols;
    int threads;
};

struct PackArguments {
    MatrixPointer y, x;
    Packed packed;
    int64_t rows, cols;
    int threads;
};

struct UnpackArguments {
    Packed packed;
    bool of_gelu;
    void* y;
    int64_t rows, cols;
    int threads;
};

struct BiasGradArguments {
    MatrixPointer in;  // with neighbouring columns next to each other
    void* out;
    int64_t tokens, cols;
    int threads;
};

struct NormAbsTopkBackwardArguments {
    MatrixPointer grad_output, x;  // with neighbouring columns next to each other
    const uint64_t* bits;
    const void *weight, *scales;
    void *grad_input, *grad_weight;
    int64_t rows, cols;
    int threads;
};

// A tensor of heads: neighbouring channels are next to each other.
struct HeadsPointer {
    void* data;
    int64_t batch_stride, token_stride, head_stride;
};

// Sinks, logarithms and their gradients are in the compute type.
struct AttentionArguments {
    int64_t batch, queries, keys, heads, channels;
    HeadsPointer q, k, v;
    const void* sinks;
    void *y, *lse;
    int threads;
};

struct AttentionBackwardArguments {
    int64_t batch, queries, keys, heads, channels;
    HeadsPointer q, k, v;
    const void* sinks;
    HeadsPointer y, grad_y;
    const void* lse;
    HeadsPointer grad_q, grad_k, grad_v;
    void* grad_sinks;
    int threads;
};

// The table, losses and scale are in the compute type; the gradient takes the place of the logits.
struct CrossEntropyArguments {
    void* logits;
    const int64_t* targets;
    const void* table;
    const int64_t* tokens;
    void* losses;
    double scale;
    int64_t rows, cols;
    int threads;
};

struct KernelTable {
    void (*spmm[kDTypes])(const SpmmArguments&);
    void (*spmm_scatter[kDTypes])(const SpmmArguments&);
    void (*sddmm[kDTypes])(const SddmmArguments&);
    void (*bias_grad[kDTypes])(const BiasGradArguments&);
    void (*abs_topk[kDTypes])(const AbsTopkArguments&);
    void (*abs_topk_backward[kDTypes])(const AbsTopkBackwardArguments&);
    void (*gelu_abs_topk[kDTypes])(const AbsTopkArguments&);
    void (*gelu_abs_topk_backward[kDTypes])(const AbsTopkBackwardArguments&);
    void (*norm_abs_topk[kDTypes])(const AbsTopkArguments&);
    void (*norm_abs_topk_backward[kDTypes])(const NormAbsTopkBackwardArguments&);
    void (*pack[kDTypes])(const PackArguments&);
    void (*unpack[kDTypes])(const UnpackArguments&);
    void (*attention[kDTypes])(const AttentionArguments&);
    void (*attention_backward[kDTypes])(const AttentionBackwardArguments&);
    void (*cross_entropy[kDTypes])(const CrossEntropyArguments&);
};

// One row of the table for each instruction set, built from isa_*.cpp.
const KernelTable& baseline_table();
const KernelTable& avx2_table();
const KernelTable& avx512_table();
const KernelTable& avx512_bf16_table();

// The instruction sets that were built and that this processor has, lowest first.
std::vector<std::string> usable_isas();
// The place in usable_isas() of the highest, or of the one that SPARSE_KERNELS_CPU_ISA names.
// Throws std::invalid_argument.
size_t default_isa();
// Throws std::out_of_range for a number that is no place in usable_isas().
const KernelTable& table_for(size_t isa);
// A packed tile of inputs stays below this, to leave room for the rest in a second-level cache.
int64_t tile_bytes();

}  // namespace sk
