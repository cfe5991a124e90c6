// The Python module: device addresses, sizes and a stream in. It links no torch and knows no
// tensor, so one build serves every torch version; sparse_kernels/cuda.py checks everything before
// it calls in here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

#ifndef SK_MODULE
#define SK_MODULE _sparse_kernels_cuda
#endif

namespace py = pybind11;

namespace {

using sk::cuda::Before;
using sk::cuda::DType;
using sk::cuda::Lists;
using sk::cuda::Operand;
using sk::cuda::Queue;

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

DType dtype_from(const std::string& name) {
    if (name == "float32") return DType::kFloat32;
    if (name == "bfloat16") return DType::kBfloat16;
    if (name == "float16") return DType::kFloat16;
    throw std::invalid_argument("dtype is '" + name + "'; needs float32, bfloat16 or float16");
}

// Inputs of each output: the layout itself.
Lists lists_of_rows(int64_t rows, int64_t per_row, int64_t cols, int32_t block_out,
                    int32_t block_in, uintptr_t columns, bool narrow, uintptr_t wide_columns) {
    Lists lists{};
    lists.rows = rows;
    lists.cols = cols;
    lists.blocks = rows * per_row;
    lists.per_row = per_row;
    lists.columns = pointer<const void>(columns);
    lists.narrow = narrow;
    lists.wide_columns = pointer<const int32_t>(wide_columns);
    lists.out_block = block_out;
    lists.in_block = block_in;
    lists.out_stride = block_in;
    lists.in_stride = 1;
    return lists;
}

// Outputs of each input: the transposed lists.
Lists lists_of_columns(int64_t rows, int64_t per_row, int64_t cols, int32_t block_out,
                       int32_t block_in, uintptr_t offsets, uintptr_t source_rows, bool narrow,
                       uintptr_t wide_source_rows, uintptr_t ids, uintptr_t order, uintptr_t starts,
                       uintptr_t octets, uintptr_t block_octets, int64_t octet_blocks) {
    Lists lists{};
    lists.rows = cols;
    lists.cols = rows;
    lists.blocks = rows * per_row;
    lists.offsets = pointer<const int64_t>(offsets);
    lists.columns = pointer<const void>(source_rows);
    lists.narrow = narrow;
    lists.wide_columns = pointer<const int32_t>(wide_source_rows);
    lists.ids = pointer<const int32_t>(ids);
    lists.order = pointer<const int32_t>(order);
    lists.starts = pointer<const int32_t>(starts);
    lists.octets = pointer<const int32_t>(octets);
    lists.block_octets = pointer<const int32_t>(block_octets);
    lists.octet_blocks = octet_blocks;
    lists.out_block = block_in;
    lists.in_block = block_out;
    lists.out_stride = 1;
    lists.in_stride = block_in;
    return lists;
}

}  // namespace

PYBIND11_MODULE(SK_MODULE, module) {
    module.doc() =
        "CUDA kernels of sparse_kernels; use sparse_kernels, which checks its arguments.";

    // Local, so that the tests can load a second build beside this one.
    py::class_<Lists>(module, "Lists", py::module_local())
        .def_static("rows", lists_of_rows)
        .def_static("columns", lists_of_columns)
        .def("set_dealt",
             [](Lists& lists, uintptr_t dealt) { lists.dealt = pointer<const uint64_t>(dealt); })
        .def("set_groups",
             [](Lists& lists, uintptr_t rows, uintptr_t offsets, uintptr_t columns,
                uintptr_t places) {
                 lists.groups = {pointer<const int32_t>(rows), pointer<const int32_t>(offsets),
                                 pointer<const int32_t>(columns), pointer<const int32_t>(places)};
             })
        .def("set_slots",
             [](Lists& lists, uintptr_t slots) { lists.slots = pointer<const int32_t>(slots); });

    module.def("driver_version", sk::cuda::driver_version);
    module.def("runtime_version", sk::cuda::runtime_version);
    module.def("spmm_words", [](const std::string& dtype, const Lists& lists,
                                int64_t slice_features, int device) {
        return sk::cuda::spmm_words(dtype_from(dtype), lists, slice_features, device);
    });
    module.def("spmm_slots", sk::cuda::spmm_slots);
    module.def("order_slots",
               [](const Lists& lists, uintptr_t slots, int device, uintptr_t stream) {
                   py::gil_scoped_release release;
                   sk::cuda::order_slots(lists, pointer<int32_t>(slots), {device, pointer(stream)});
               });
    module.def("spmm", [](const std::string& product, const std::string& dtype, const Lists& lists,
                          uintptr_t x, int64_t row_stride, int64_t col_stride, uintptr_t values,
                          uintptr_t bias, uintptr_t words, uintptr_t out, int64_t tokens,
                          int64_t slice_features, bool on_hopper, int device, uintptr_t stream) {
        const DType type = dtype_from(dtype);
        py::gil_scoped_release release;
        sk::cuda::spmm(product.c_str(), type, lists, {pointer(x), row_stride, col_stride},
                       pointer(values), pointer(bias), pointer(words), pointer(out), tokens,
                       slice_features, on_hopper, {device, pointer(stream)});
    });
    module.def(
        "pack_blocks", [](uintptr_t ids, int64_t blocks, int64_t block_bytes, int element_bytes,
                          uintptr_t values, uintptr_t packed, int device, uintptr_t stream) {
            py::gil_scoped_release release;
            sk::cuda::pack_blocks(pointer<const int32_t>(ids), blocks, block_bytes, element_bytes,
                                  pointer(values), pointer(packed), {device, pointer(stream)});
        });
    module.def("sddmm_gathers", [](const std::string& dtype, const Lists& lists) {
        return sk::cuda::sddmm_gathers(dtype_from(dtype), lists);
    });
    module.def("deal_rows", [](const Lists& lists, uintptr_t dealt, int device, uintptr_t stream) {
        py::gil_scoped_release release;
        sk::cuda::deal_rows(lists, pointer<uint64_t>(dealt), {device, pointer(stream)});
    });
    module.def("sddmm_parts",
               [](const std::string& dtype, const Lists& lists, int64_t tokens, bool on_hopper) {
                   return sk::cuda::sddmm_parts(dtype_from(dtype), lists, tokens, on_hopper);
               });
    module.def("sddmm", [](const std::string& dtype, const Lists& lists, uintptr_t grad_output,
                           int64_t grad_row_stride, int64_t grad_col_stride, uintptr_t x,
                           int64_t row_stride, int64_t col_stride, uintptr_t partial,
                           uintptr_t grad_values, int64_t tokens, int64_t slice_features,
                           bool on_hopper, int device, uintptr_t stream) {
        const DType type = dtype_from(dtype);
        py::gil_scoped_release release;
        sk::cuda::sddmm(type, lists, {pointer(grad_output), grad_row_stride, grad_col_stride},
                        {pointer(x), row_stride, col_stride}, pointer<float>(partial),
                        pointer(grad_values), tokens, slice_features, on_hopper,
                        {device, pointer(stream)});
    });
    // A matrix is its address and its two strides.
    using Matrix = std::tuple<uintptr_t, int64_t, int64_t>;
    const auto operand = [](const Matrix& matrix) {
        const auto [address, row_stride, col_stride] = matrix;
        return Operand{pointer(address), row_stride, col_stride};
    };
    module.def("spmm_on_hopper", [operand](const std::string& dtype, const Lists& lists,
                                           const Matrix& x, uintptr_t values, int64_t tokens,
                                           int device, uintptr_t stream) {
        return sk::cuda::spmm_on_hopper(dtype_from(dtype), lists, operand(x), pointer(values),
                                        tokens, {device, pointer(stream)});
    });
    module.def("sddmm_on_hopper",
               [operand](const std::string& dtype, const Lists& lists, const Matrix& grad_output,
                         const Matrix& x, int64_t tokens, int device, uintptr_t stream) {
                   return sk::cuda::sddmm_on_hopper(dtype_from(dtype), lists, operand(grad_output),
                                                    operand(x), tokens, {device, pointer(stream)});
               });
    module.def("abs_topk", [operand](const std::string& dtype, const Matrix& x, uintptr_t y,
                                     int64_t rows, int64_t cols, int64_t k, int64_t held_bytes,
                                     int device, uintptr_t stream) {
        const DType type = dtype_from(dtype);
        py::gil_scoped_release release;
        sk::cuda::abs_topk(type, {}, operand(x), pointer(y), rows, cols, k, held_bytes,
                           {device, pointer(stream)});
    });
    module.def("gelu_abs_topk", [operand](const std::string& dtype, const Matrix& x, uintptr_t y,
                                          int64_t rows, int64_t cols, int64_t k, int64_t held_bytes,
                                          int device, uintptr_t stream) {
        const DType type = dtype_from(dtype);
        const Before before{Before::kGelu, nullptr, 0.0f, nullptr};
        py::gil_scoped_release release;
        sk::cuda::abs_topk(type, before, operand(x), pointer(y), rows, cols, k, held_bytes,
                           {device, pointer(stream)});
    });
    module.def("norm_abs_topk",
               [operand](const std::string& dtype, uintptr_t weight, float eps, uintptr_t scales,
                         const Matrix& x, uintptr_t y, int64_t rows, int64_t cols, int64_t k,
                         int64_t held_bytes, int device, uintptr_t stream) {
                   const DType type = dtype_from(dtype);
                   const Before before{Before::kNorm, pointer(weight), eps, pointer<float>(scales)};
                   py::gil_scoped_release release;
                   sk::cuda::abs_topk(type, before, operand(x), pointer(y), rows, cols, k,
                                      held_bytes, {device, pointer(stream)});
               });
    module.def(
        "abs_topk_backward", [operand](const std::string& dtype, const Matrix& grad_output,
                                       const Matrix& y, const Matrix& x, uintptr_t grad_input,
                                       int64_t rows, int64_t cols, int device, uintptr_t stream) {
            const DType type = dtype_from(dtype);
            py::gil_scoped_release release;
            sk::cuda::abs_topk_backward(type, operand(grad_output), operand(y), operand(x),
                                        pointer(grad_input), rows, cols, {device, pointer(stream)});
        });
    module.def("norm_partial", sk::cuda::norm_partial);
    module.def("norm_abs_topk_backward",
               [operand](const std::string& dtype, const Matrix& grad_output, const Matrix& y,
                         const Matrix& x, uintptr_t weight, uintptr_t scales, uintptr_t partial,
                         uintptr_t grad_input, uintptr_t grad_weight, int64_t rows, int64_t cols,
                         int device, uintptr_t stream) {
                   const DType type = dtype_from(dtype);
                   py::gil_scoped_release release;
                   sk::cuda::norm_abs_topk_backward(
                       type, operand(grad_output), operand(y), operand(x), pointer(weight),
                       pointer<const float>(scales), pointer<float>(partial), pointer(grad_input),
                       pointer(grad_weight), rows, cols, {device, pointer(stream)});
               });
}
