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

#include "attention.h"
#include "dispatch.h"
#include "fused_topk.h"
#include "gather.h"
#include "grad_weight.h"
#include "scatter.h"
#include "sum_tokens.h"

namespace sk {
namespace {

template <class T>
GatherProblem<T> gather_problem(const GatherArguments& arguments) {
    return {arguments.lists,
            arguments.schedule,
            Matrix<const T>{static_cast<const T*>(arguments.in), arguments.in_row_stride,
                            arguments.in_col_stride},
            static_cast<const T*>(arguments.values),
            static_cast<const T*>(arguments.bias),
            static_cast<T*>(arguments.out),
            arguments.tokens,
            arguments.threads};
}

template <class T>
void run_gather(const GatherArguments& arguments) {
    gather(gather_problem<T>(arguments));
}

template <class T>
void run_scatter(const GatherArguments& arguments) {
    scatter(gather_problem<T>(arguments));
}

template <class T>
void run_grad_weight(const GradWeightArguments& arguments) {
    grad_weight(GradWeightProblem<T>{
        arguments.lists, arguments.schedule,
        Matrix<const T>{static_cast<const T*>(arguments.grad_output),
                        arguments.grad_output_row_stride, arguments.grad_output_col_stride},
        Matrix<const T>{static_cast<const T*>(arguments.input), arguments.input_row_stride,
                        arguments.input_col_stride},
        static_cast<T*>(arguments.grad_values), arguments.tokens, arguments.threads});
}

template <class T>
void run_sum_tokens(const SumTokensArguments& arguments) {
    sum_tokens(static_cast<const T*>(arguments.in), arguments.row_stride,
               static_cast<T*>(arguments.out), arguments.tokens, arguments.cols, arguments.threads);
}

template <class T>
void run_abs_topk(const AbsTopkArguments& arguments) {
    abs_topk<T>(static_cast<const T*>(arguments.x), arguments.row_stride, arguments.col_stride,
                static_cast<T*>(arguments.y), arguments.rows, arguments.cols, arguments.k,
                arguments.threads);
}

template <class T>
void run_abs_topk_backward(const AbsTopkBackwardArguments& arguments) {
    abs_topk_backward(
        Matrix<const T>{static_cast<const T*>(arguments.grad_output),
                        arguments.grad_output_row_stride, arguments.grad_output_col_stride},
        Matrix<const T>{static_cast<const T*>(arguments.y), arguments.y_row_stride,
                        arguments.y_col_stride},
        static_cast<T*>(arguments.grad_input), arguments.rows, arguments.cols, arguments.threads);
}

template <class T>
void run_gelu_abs_topk(const AbsTopkArguments& arguments) {
    abs_topk<T>(static_cast<const T*>(arguments.x), arguments.row_stride, arguments.col_stride,
                static_cast<T*>(arguments.y), arguments.rows, arguments.cols, arguments.k,
                arguments.threads, GeluOfRow<T>{});
}

template <class T>
void run_gelu_abs_topk_backward(const GeluAbsTopkBackwardArguments& arguments) {
    gelu_abs_topk_backward(
        Matrix<const T>{static_cast<const T*>(arguments.grad_output),
                        arguments.grad_output_row_stride, arguments.grad_output_col_stride},
        Matrix<const T>{static_cast<const T*>(arguments.y), arguments.y_row_stride,
                        arguments.y_col_stride},
        Matrix<const T>{static_cast<const T*>(arguments.x), arguments.x_row_stride,
                        arguments.x_col_stride},
        static_cast<T*>(arguments.grad_input), arguments.rows, arguments.cols, arguments.threads);
}

template <class T>
void run_norm_abs_topk(const NormAbsTopkArguments& arguments) {
    using C = Compute<T>;
    abs_topk<T>(static_cast<const T*>(arguments.x), arguments.row_stride, arguments.col_stride,
                static_cast<T*>(arguments.y), arguments.rows, arguments.cols, arguments.k,
                arguments.threads,
                NormOfRow<T>{static_cast<const T*>(arguments.weight), static_cast<C>(arguments.eps),
                             static_cast<C*>(arguments.scales)});
}

template <class T>
void run_norm_abs_topk_backward(const NormAbsTopkBackwardArguments& arguments) {
    norm_abs_topk_backward(NormAbsTopkBackward<T>{
        Matrix<const T>{static_cast<const T*>(arguments.grad_output), arguments.grad_output_stride,
                        1},
        Matrix<const T>{static_cast<const T*>(arguments.y), arguments.y_stride, 1},
        Matrix<const T>{static_cast<const T*>(arguments.x), arguments.x_stride, 1},
        static_cast<const T*>(arguments.weight), static_cast<const Compute<T>*>(arguments.scales),
        static_cast<T*>(arguments.grad_input), static_cast<T*>(arguments.grad_weight),
        arguments.rows, arguments.cols, arguments.threads});
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

}  // namespace

const KernelTable& SK_ISA_TABLE() {
    static const KernelTable table = {
        {run_gather<float>, run_gather<Bf16>, run_gather<double>},
        {run_scatter<float>, run_scatter<Bf16>, run_scatter<double>},
        {run_grad_weight<float>, run_grad_weight<Bf16>, run_grad_weight<double>},
        {run_sum_tokens<float>, run_sum_tokens<Bf16>, run_sum_tokens<double>},
        {run_abs_topk<float>, run_abs_topk<Bf16>, run_abs_topk<double>},
        {run_abs_topk_backward<float>, run_abs_topk_backward<Bf16>, run_abs_topk_backward<double>},
        {run_gelu_abs_topk<float>, run_gelu_abs_topk<Bf16>, run_gelu_abs_topk<double>},
        {run_gelu_abs_topk_backward<float>, run_gelu_abs_topk_backward<Bf16>,
         run_gelu_abs_topk_backward<double>},
        {run_norm_abs_topk<float>, run_norm_abs_topk<Bf16>, run_norm_abs_topk<double>},
        {run_norm_abs_topk_backward<float>, run_norm_abs_topk_backward<Bf16>,
         run_norm_abs_topk_backward<double>},
        {run_attention<float>, run_attention<Bf16>, run_attention<double>},
        {run_attention_backward<float>, run_attention_backward<Bf16>,
         run_attention_backward<double>},
    };
    return table;
}

}  // namespace sk
