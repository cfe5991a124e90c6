// Fills the dispatch table's row for the instruction set that this translation unit is compiled
// for. Each isa_*.cpp defines SK_ISA_TABLE, the name of its function, and includes this file.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "dispatch.h"
#include "sddmm.h"
#include "spmm.h"
#include "spmm_scatter.h"
#include "transformer/attention.h"
#include "transformer/bias_grad.h"
#include "transformer/cross_entropy.h"
#include "transformer/fused_topk.h"

namespace sk {
namespace {

template <class T>
Matrix<const T> matrix(const MatrixPointer& pointer) {
    return {static_cast<const T*>(pointer.data), pointer.row_stride, pointer.col_stride};
}

template <class T>
SpmmProblem<T> spmm_problem(const SpmmArguments& arguments) {
    return {arguments.lists,
            arguments.schedule,
            matrix<T>(arguments.in),
            static_cast<const T*>(arguments.values),
            static_cast<const T*>(arguments.bias),
            static_cast<T*>(arguments.out),
            arguments.tokens,
            arguments.threads};
}

template <class T>
void run_spmm(const SpmmArguments& arguments) {
    spmm(spmm_problem<T>(arguments));
}

template <class T>
void run_spmm_scatter(const SpmmArguments& arguments) {
    spmm_scatter(spmm_problem<T>(arguments));
}

template <class T>
void run_sddmm(const SddmmArguments& arguments) {
    sddmm(SddmmProblem<T>{arguments.lists, arguments.schedule, matrix<T>(arguments.grad_output),
                          matrix<T>(arguments.input), static_cast<T*>(arguments.grad_values),
                          arguments.tokens, arguments.threads});
}

template <class T>
void run_bias_grad(const BiasGradArguments& arguments) {
    bias_grad(static_cast<const T*>(arguments.in.data), arguments.in.row_stride,
              static_cast<T*>(arguments.out), arguments.tokens, arguments.cols, arguments.threads);
}

template <class T, class Prepare>
void run_topk(const AbsTopkArguments& a, const Prepare& prepare) {
    abs_topk<T>(matrix<T>(a.x), static_cast<T*>(a.y),
                PackedRows<T>{a.packed.bits, static_cast<T*>(a.packed.values), a.packed.room},
                a.rows, a.cols, a.k, a.threads, prepare);
}

template <class T>
void run_abs_topk(const AbsTopkArguments& arguments) {
    run_topk<T>(arguments, AsItIs<T>{});
}

template <class T>
void run_gelu_abs_topk(const AbsTopkArguments& arguments) {
    run_topk<T>(arguments, GeluOfRow<T>{});
}

template <class T>
void run_norm_abs_topk(const AbsTopkArguments& arguments) {
    using C = Compute<T>;
    run_topk<T>(arguments,
                NormOfRow<T>{static_cast<const T*>(arguments.weight), static_cast<C>(arguments.eps),
                             static_cast<C*>(arguments.scales)});
}

template <class T>
void run_abs_topk_backward(const AbsTopkBackwardArguments& a) {
    abs_topk_backward(matrix<T>(a.grad_output), a.packed.bits, static_cast<T*>(a.grad_input),
                      a.rows, a.cols, a.threads);
}

template <class T>
void run_gelu_abs_topk_backward(const AbsTopkBackwardArguments& a) {
    gelu_abs_topk_backward(matrix<T>(a.grad_output), a.packed.bits,
                           static_cast<const T*>(a.packed.values), a.packed.room,
                           static_cast<T*>(a.grad_input), a.rows, a.cols, a.threads);
}

template <class T>
void run_norm_abs_topk_backward(const NormAbsTopkBackwardArguments& arguments) {
    norm_abs_topk_backward(NormAbsTopkBackward<T>{
        matrix<T>(arguments.grad_output), matrix<T>(arguments.x), arguments.bits,
        static_cast<const T*>(arguments.weight), static_cast<const Compute<T>*>(arguments.scales),
        static_cast<T*>(arguments.grad_input), static_cast<T*>(arguments.grad_weight),
        arguments.rows, arguments.cols, arguments.threads});
}

template <class T>
void run_pack(const PackArguments& a) {
    pack(matrix<T>(a.y), matrix<T>(a.x), a.packed.bits, static_cast<T*>(a.packed.values), a.rows,
         a.cols, a.packed.room, a.threads);
}

template <class T>
void run_unpack(const UnpackArguments& a) {
    unpack(a.packed.bits, static_cast<const T*>(a.packed.values), a.packed.room, a.of_gelu,
           static_cast<T*>(a.y), a.rows, a.cols, a.threads);
}

template <class T, class U = T>
Heads<U> heads(const HeadsPointer& tensor) {
    return {static_cast<U*>(tensor.data), tensor.batch_stride, tensor.token_stride,
            tensor.head_stride};
}

template <class T>
void run_attention(const AttentionArguments& a) {
    using C = Compute<T>;
    attention(AttentionProblem<T>{{a.batch, a.queries, a.keys, a.heads, a.channels},
                                  heads<T, const T>(a.q),
                                  heads<T, const T>(a.k),
                                  heads<T, const T>(a.v),
                                  static_cast<const C*>(a.sinks),
                                  static_cast<T*>(a.y),
                                  static_cast<C*>(a.lse),
                                  a.threads});
}

template <class T>
void run_attention_backward(const AttentionBackwardArguments& a) {
    using C = Compute<T>;
    attention_backward(
        AttentionBackwardProblem<T>{{a.batch, a.queries, a.keys, a.heads, a.channels},
                                    heads<T, const T>(a.q),
                                    heads<T, const T>(a.k),
                                    heads<T, const T>(a.v),
                                    static_cast<const C*>(a.sinks),
                                    heads<T, const T>(a.y),
                                    heads<T, const T>(a.grad_y),
                                    static_cast<const C*>(a.lse),
                                    heads<T>(a.grad_q),
                                    heads<T>(a.grad_k),
                                    heads<T>(a.grad_v),
                                    static_cast<C*>(a.grad_sinks),
                                    a.threads});
}

template <class T>
void run_cross_entropy(const CrossEntropyArguments& a) {
    using C = Compute<T>;
    cross_entropy(CrossEntropyProblem<T>{
        static_cast<T*>(a.logits), a.targets, static_cast<const C*>(a.table), a.tokens,
        static_cast<C*>(a.losses), static_cast<C>(a.scale), a.rows, a.cols, a.threads});
}

template <class T>
void set_products(KernelTable& table, DType dtype) {
    const int at = static_cast<int>(dtype);
    table.spmm[at] = run_spmm<T>;
    table.spmm_scatter[at] = run_spmm_scatter<T>;
    table.sddmm[at] = run_sddmm<T>;
}

template <class T>
void set_row_kernels(KernelTable& table, DType dtype) {
    const int at = static_cast<int>(dtype);
    table.bias_grad[at] = run_bias_grad<T>;
    table.abs_topk[at] = run_abs_topk<T>;
    table.abs_topk_backward[at] = run_abs_topk_backward<T>;
    table.gelu_abs_topk[at] = run_gelu_abs_topk<T>;
    table.gelu_abs_topk_backward[at] = run_gelu_abs_topk_backward<T>;
    table.norm_abs_topk[at] = run_norm_abs_topk<T>;
    table.norm_abs_topk_backward[at] = run_norm_abs_topk_backward<T>;
    table.pack[at] = run_pack<T>;
    table.unpack[at] = run_unpack<T>;
    table.attention[at] = run_attention<T>;
    table.attention_backward[at] = run_attention_backward<T>;
    table.cross_entropy[at] = run_cross_entropy<T>;
}

// A row begins as a copy of a lower one, where that has the same code: AVX512-BF16 multiplies pairs
// of bfloat16 and nothing else, and float64 is there to check gradients, whatever it costs.
KernelTable make_table() {
#if defined(__AVX512BF16__)
    KernelTable table = avx512_table();
#else
#if defined(__AVX2__)
    KernelTable table = baseline_table();
#else
    KernelTable table{};
    set_products<double>(table, DType::kFloat64);
    set_row_kernels<double>(table, DType::kFloat64);
#endif
    set_products<float>(table, DType::kFloat32);
    set_row_kernels<float>(table, DType::kFloat32);
    set_row_kernels<Bf16>(table, DType::kBfloat16);
#endif
    set_products<Bf16>(table, DType::kBfloat16);
    return table;
}

}  // namespace

const KernelTable& SK_ISA_TABLE() {
    static const KernelTable table = make_table();
    return table;
}

}  // namespace sk
