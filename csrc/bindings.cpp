// The Python module: pointers, sizes and a thread count in. It links no torch and knows no tensor,
// so one build serves every torch version; sparse_kernels/cpu.py checks everything before it calls
// in here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>

#include "cpu/dispatch.h"
#include "cpu/schedule.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

sk::DType dtype_from(const std::string& name) {
    if (name == "float32") return sk::DType::kFloat32;
    if (name == "bfloat16") return sk::DType::kBfloat16;
    if (name == "float64") return sk::DType::kFloat64;
    throw std::invalid_argument("dtype is '" + name + "'; needs float32, bfloat16 or float64");
}

using Shape = std::array<int64_t, 5>;
using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

sk::HeadsPointer heads(const HeadsTuple& tensor) {
    const auto [address, batch_stride, token_stride, head_stride] = tensor;
    return {pointer<void>(address), batch_stride, token_stride, head_stride};
}

// A layout as the kernels see it, with the pointers of tensors that the Python side keeps alive.
struct Pattern {
    sk::Lists lists{};
    sk::Schedule schedule{};
};

// Lists of the layout itself: outputs gather from inputs.
Pattern fan_in_pattern(int64_t rows, int64_t per_row, int64_t cols, int32_t block_out,
                       int32_t block_in, uintptr_t indices) {
    Pattern pattern;
    pattern.lists = {rows,     cols,    per_row, nullptr,   pointer<const int32_t>(indices),
                     nullptr,  nullptr, 0,       block_out, block_in,
                     block_in, 1};
    return pattern;
}

// The transposed lists: inputs gather from the outputs that read them.
Pattern fan_out_pattern(int64_t rows, int64_t per_row, int64_t cols, int32_t block_out,
                        int32_t block_in, uintptr_t offsets, uintptr_t source_rows,
                        uintptr_t source_slots) {
    Pattern pattern;
    pattern.lists = {cols,
                     rows,
                     0,
                     pointer<const int64_t>(offsets),
                     pointer<const int32_t>(source_rows),
                     pointer<const int32_t>(source_rows),
                     pointer<const int32_t>(source_slots),
                     per_row,
                     block_in,
                     block_out,
                     1,
                     block_in};
    return pattern;
}

void set_schedule(Pattern& pattern, int64_t panel_features, uintptr_t entry_starts, uintptr_t local,
                  uintptr_t block_ids) {
    const int64_t features = pattern.lists.cols * pattern.lists.in_block;
    pattern.schedule = {(features + panel_features - 1) / panel_features, panel_features,
                        pointer<const int64_t>(entry_starts), pointer<const int32_t>(local),
                        pointer<const int32_t>(block_ids)};
}

}  // namespace

PYBIND11_MODULE(_sparse_kernels_cpu, module) {
    module.doc() = "CPU kernels of sparse_kernels; use sparse_kernels, which checks its arguments.";

    module.def("isas", sk::usable_isas);
    module.def("default_isa", sk::default_isa);
    module.def("has_openmp", [] {
#ifdef _OPENMP
        return true;
#else
        return false;
#endif
    });

    py::class_<Pattern>(module, "Pattern")
        .def_static("fan_in", fan_in_pattern)
        .def_static("fan_out", fan_out_pattern)
        .def("set_schedule", set_schedule)
        .def("build_schedule", [](const Pattern& pattern, int64_t panel_features,
                                  uintptr_t entry_starts, uintptr_t local, uintptr_t block_ids) {
            py::gil_scoped_release release;
            sk::build_schedule(pattern.lists, panel_features, pointer<int64_t>(entry_starts),
                               pointer<int32_t>(local), pointer<int32_t>(block_ids));
        });

    const auto define = [&](const char* name, auto member) {
        module.def(name, [member](const std::string& isa, const std::string& dtype,
                                  const Pattern& pattern, uintptr_t in, int64_t row_stride,
                                  int64_t col_stride, uintptr_t values, uintptr_t bias,
                                  uintptr_t out, int64_t tokens, int threads) {
            const auto kernel = (sk::table_for(isa).*member)[static_cast<int>(dtype_from(dtype))];
            py::gil_scoped_release release;
            kernel({pattern.lists, pattern.schedule, pointer<void>(in), row_stride, col_stride,
                    pointer<void>(values), pointer<void>(bias), pointer<void>(out), tokens,
                    threads});
        });
    };
    define("gather", &sk::KernelTable::gather);
    define("scatter", &sk::KernelTable::scatter);
    module.def(
        "grad_weight", [](const std::string& isa, const std::string& dtype, const Pattern& pattern,
                          uintptr_t grad_output, int64_t grad_row_stride, int64_t grad_col_stride,
                          uintptr_t input, int64_t row_stride, int64_t col_stride,
                          uintptr_t grad_values, int64_t tokens, int threads) {
            const auto kernel = sk::table_for(isa).grad_weight[static_cast<int>(dtype_from(dtype))];
            py::gil_scoped_release release;
            kernel({pattern.lists, pattern.schedule, pointer<void>(grad_output), grad_row_stride,
                    grad_col_stride, pointer<void>(input), row_stride, col_stride,
                    pointer<void>(grad_values), tokens, threads});
        });
    module.def("sum_tokens", [](const std::string& isa, const std::string& dtype, uintptr_t in,
                                int64_t row_stride, uintptr_t out, int64_t tokens, int64_t cols,
                                int threads) {
        const auto kernel = sk::table_for(isa).sum_tokens[static_cast<int>(dtype_from(dtype))];
        py::gil_scoped_release release;
        kernel({pointer<void>(in), row_stride, pointer<void>(out), tokens, cols, threads});
    });
    module.def("abs_topk", [](const std::string& isa, const std::string& dtype, uintptr_t x,
                              int64_t row_stride, int64_t col_stride, uintptr_t y, int64_t rows,
                              int64_t cols, int64_t k, int threads) {
        const auto kernel = sk::table_for(isa).abs_topk[static_cast<int>(dtype_from(dtype))];
        py::gil_scoped_release release;
        kernel(
            {pointer<void>(x), row_stride, col_stride, pointer<void>(y), rows, cols, k, threads});
    });
    module.def(
        "abs_topk_backward",
        [](const std::string& isa, const std::string& dtype, uintptr_t grad_output,
           int64_t grad_row_stride, int64_t grad_col_stride, uintptr_t y, int64_t row_stride,
           int64_t col_stride, uintptr_t grad_input, int64_t rows, int64_t cols, int threads) {
            const auto kernel =
                sk::table_for(isa).abs_topk_backward[static_cast<int>(dtype_from(dtype))];
            py::gil_scoped_release release;
            kernel({pointer<void>(grad_output), grad_row_stride, grad_col_stride, pointer<void>(y),
                    row_stride, col_stride, pointer<void>(grad_input), rows, cols, threads});
        });
    module.def("gelu_abs_topk", [](const std::string& isa, const std::string& dtype, uintptr_t x,
                                   int64_t row_stride, int64_t col_stride, uintptr_t y,
                                   int64_t rows, int64_t cols, int64_t k, int threads) {
        const auto kernel = sk::table_for(isa).gelu_abs_topk[static_cast<int>(dtype_from(dtype))];
        py::gil_scoped_release release;
        kernel(
            {pointer<void>(x), row_stride, col_stride, pointer<void>(y), rows, cols, k, threads});
    });
    module.def(
        "gelu_abs_topk_backward",
        [](const std::string& isa, const std::string& dtype, uintptr_t grad_output,
           int64_t grad_row_stride, int64_t grad_col_stride, uintptr_t y, int64_t row_stride,
           int64_t col_stride, uintptr_t x, int64_t x_row_stride, int64_t x_col_stride,
           uintptr_t grad_input, int64_t rows, int64_t cols, int threads) {
            const auto kernel =
                sk::table_for(isa).gelu_abs_topk_backward[static_cast<int>(dtype_from(dtype))];
            py::gil_scoped_release release;
            kernel({pointer<void>(grad_output), grad_row_stride, grad_col_stride, pointer<void>(y),
                    row_stride, col_stride, pointer<void>(x), x_row_stride, x_col_stride,
                    pointer<void>(grad_input), rows, cols, threads});
        });
    module.def("norm_abs_topk", [](const std::string& isa, const std::string& dtype, uintptr_t x,
                                   int64_t row_stride, int64_t col_stride, uintptr_t weight,
                                   double eps, uintptr_t y, uintptr_t scales, int64_t rows,
                                   int64_t cols, int64_t k, int threads) {
        const auto kernel = sk::table_for(isa).norm_abs_topk[static_cast<int>(dtype_from(dtype))];
        py::gil_scoped_release release;
        kernel({pointer<void>(x), row_stride, col_stride, pointer<void>(weight), eps,
                pointer<void>(y), pointer<void>(scales), rows, cols, k, threads});
    });
    module.def(
        "norm_abs_topk_backward",
        [](const std::string& isa, const std::string& dtype, uintptr_t grad_output,
           int64_t grad_stride, uintptr_t y, int64_t y_stride, uintptr_t x, int64_t x_stride,
           uintptr_t weight, uintptr_t scales, uintptr_t grad_input, uintptr_t grad_weight,
           int64_t rows, int64_t cols, int threads) {
            const auto kernel =
                sk::table_for(isa).norm_abs_topk_backward[static_cast<int>(dtype_from(dtype))];
            py::gil_scoped_release release;
            kernel({pointer<void>(grad_output), grad_stride, pointer<void>(y), y_stride,
                    pointer<void>(x), x_stride, pointer<void>(weight), pointer<void>(scales),
                    pointer<void>(grad_input), pointer<void>(grad_weight), rows, cols, threads});
        });
    // Shapes are (batch, queries, keys, heads, channels); a tensor of heads is its address and its
    // strides over batch, tokens and heads.
    module.def("attention", [](const std::string& isa, const std::string& dtype, const Shape& shape,
                               const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v,
                               uintptr_t sinks, uintptr_t y, uintptr_t lse, int threads) {
        const auto kernel = sk::table_for(isa).attention[static_cast<int>(dtype_from(dtype))];
        py::gil_scoped_release release;
        kernel({shape[0], shape[1], shape[2], shape[3], shape[4], heads(q), heads(k), heads(v),
                pointer<void>(sinks), pointer<void>(y), pointer<void>(lse), threads});
    });
    module.def(
        "attention_backward",
        [](const std::string& isa, const std::string& dtype, const Shape& shape,
           const HeadsTuple& q, const HeadsTuple& k, const HeadsTuple& v, uintptr_t sinks,
           const HeadsTuple& y, const HeadsTuple& grad_y, uintptr_t lse, const HeadsTuple& grad_q,
           const HeadsTuple& grad_k, const HeadsTuple& grad_v, uintptr_t grad_sinks, int threads) {
            const auto kernel =
                sk::table_for(isa).attention_backward[static_cast<int>(dtype_from(dtype))];
            py::gil_scoped_release release;
            kernel({shape[0], shape[1], shape[2], shape[3], shape[4], heads(q), heads(k), heads(v),
                    pointer<void>(sinks), heads(y), heads(grad_y), pointer<void>(lse),
                    heads(grad_q), heads(grad_k), heads(grad_v), pointer<void>(grad_sinks),
                    threads});
        });
}
