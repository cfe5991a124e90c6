// The Python module. Its functions take and return tensors; except for `try_spmm` and `try_sddmm`,
// which look at everything, they trust that sparse_kernels/ops.py has checked the arguments.
#include "tensor.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/checksum.h"
#include "cpu/schedule.h"

namespace {

namespace py = pybind11;
using sk::DType;
using sk::Tensor;
using Table = sk::KernelTable;

size_t isa = 0;

int threads() { return py::cast<int>(sk::torch.get_num_threads()); }

// Calls a kernel of the instruction set in use without the interpreter's lock.
template <class Member, class Arguments>
void run(Member kernels, DType dtype, const Arguments& arguments) {
    const auto kernel = (sk::table_for(isa).*kernels)[static_cast<int>(dtype)];
    py::gil_scoped_release release;
    kernel(arguments);
}

// The lists of one side of a layout, their schedule, and the tensors that hold them.
struct Pattern {
    sk::Lists lists{};
    sk::Schedule schedule{};
    std::vector<Tensor> tensors;

    void build_schedule() {
        const int64_t features = lists.cols * lists.in_block, size = sk::panel_features(lists);
        schedule.panels = (features + size - 1) / size;
        schedule.panel_features = size;
        Tensor starts = Tensor::empty(sk::kInt64, {schedule.panels * lists.rows + 1});
        Tensor local = Tensor::empty(sk::kInt32, {lists.blocks() * lists.in_block});
        Tensor ids = Tensor::empty(sk::kInt32, {lists.blocks()});
        {
            py::gil_scoped_release release;
            sk::build_schedule(lists, size, starts.data<int64_t>(), local.data<int32_t>(),
                               ids.data<int32_t>());
        }
        schedule.entry_starts = starts.data<int64_t>();
        schedule.local = local.data<int32_t>();
        schedule.block_ids = ids.data<int32_t>();
        tensors.insert(tensors.end(), {starts, local, ids});
    }
};
using Shared = std::shared_ptr<Pattern>;

// Inputs of each output: the layout itself.
Shared rows_of(const Tensor& indices, int64_t cols, std::array<int32_t, 2> block) {
    auto pattern = std::make_shared<Pattern>();
    sk::Lists& lists = pattern->lists;
    lists.rows = indices.size(0);
    lists.cols = cols;
    lists.per_row = indices.size(1);
    lists.columns = indices.data<int32_t>();
    lists.out_block = block[0];
    lists.in_block = lists.out_stride = block[1];
    lists.in_stride = 1;
    pattern->tensors = {indices};
    return pattern;
}

// Outputs of each input: the transposed lists of a layout with so many block-rows, of so many
// blocks.
Shared columns_of(const std::array<Tensor, 3>& transposed, int64_t rows, int64_t per_row,
                  std::array<int32_t, 2> block) {
    const auto& [offsets, source_rows, source_slots] = transposed;
    auto pattern = std::make_shared<Pattern>();
    sk::Lists& lists = pattern->lists;
    lists.rows = offsets.size(0) - 1;
    lists.cols = rows;
    lists.offsets = offsets.data<int64_t>();
    lists.columns = lists.source_rows = source_rows.data<int32_t>();
    lists.source_slots = source_slots.data<int32_t>();
    lists.source_per_row = per_row;
    lists.out_block = lists.in_stride = block[1];
    lists.in_block = block[0];
    lists.out_stride = 1;
    pattern->tensors = {offsets, source_rows, source_slots};
    return pattern;
}

// `Y = X W^T` or `Y = X W` over one layout. Scattering walks the outputs of W^T in order, and adds
// to the inputs; gathering walks what it writes.
struct Product {
    Shared pattern;
    bool scatters;
    Shared one_token;  // what a single token scatters over, if that is something else
    Tensor indices;
    uint64_t checksum;
    std::array<int64_t, 4> values_shape;

    int64_t in_features() const {
        const sk::Lists& lists = pattern->lists;
        return scatters ? lists.rows * lists.out_block : lists.cols * lists.in_block;
    }
    int64_t out_features() const {
        const sk::Lists& lists = pattern->lists;
        return scatters ? lists.cols * lists.in_block : lists.rows * lists.out_block;
    }
};

// x is `(..., in_features)` with leading dimensions that are one to a matrix; all else contiguous.
Tensor run_spmm(const Product& product, const Tensor& x, const sk::MatrixPointer& in,
                const Tensor& values, const Tensor& bias) {
    const int last = x.dims() - 1;
    std::vector<int64_t> sizes(x.sizes(), x.sizes() + last);
    sizes.push_back(product.out_features());
    const Tensor out = Tensor::empty(x.type(), sizes);
    const int64_t tokens = x.count_before(last);
    const bool alone = tokens == 1 && product.one_token;
    const Pattern& pattern = alone ? *product.one_token : *product.pattern;
    run(alone || product.scatters ? &Table::spmm_scatter : &Table::spmm, x.dtype(),
        sk::SpmmArguments{pattern.lists, pattern.schedule, in, values.data(), bias.data(),
                          out.data(), tokens, threads()});
    return out;
}

Tensor spmm(const Product& product, const Tensor& x, const Tensor& values, const Tensor& bias) {
    const Tensor whole = values.contiguous(), added = bias.contiguous();
    return run_spmm(product, x, x.matrix(), whole, added);
}

Tensor sddmm(const Pattern& pattern, const Tensor& grad_output, const Tensor& x) {
    const sk::Lists& lists = pattern.lists;
    const Tensor out =
        Tensor::empty(x.type(), {lists.rows, lists.per_row, lists.out_block, lists.in_block});
    run(&Table::sddmm, x.dtype(),
        sk::SddmmArguments{pattern.lists, pattern.schedule, grad_output.matrix(), x.matrix(),
                           out.data(), x.size(0), threads()});
    return out;
}

uint64_t checksum(const Tensor& indices) {
    return sk::checksum(indices.data<uint32_t>(), indices.count());
}

// Whether the tensors are alike and the first has this content; nothing if PyTorch must compare.
std::optional<bool> has_content(const Tensor& indices, const Tensor& like, uint64_t sum) {
    if (!indices.is_on_cpu() || !like.is_on_cpu() || !indices.is_contiguous()) return {};
    return indices.type() == like.type() && indices.dims() == like.dims() &&
           std::equal(like.sizes(), like.sizes() + like.dims(), indices.sizes()) &&
           checksum(indices) == sum;
}

// The tensor if it is no subclass and has memory on the CPU.
std::optional<Tensor> memory(py::handle object) {
    const py::handle type = py::type::handle_of(object);
    if (!type.is(sk::torch.tensor) && !type.is(sk::torch.parameter)) return {};
    try {
        Tensor tensor(py::reinterpret_borrow<py::object>(object));
        if (!tensor.is_on_cpu()) return {};
        return tensor;
    } catch (py::error_already_set&) {
        return {};
    }
}

// The same if only its numbers matter: neither a sign is pending nor a gradient to be recorded.
std::optional<Tensor> plain(py::handle object, bool recording) {
    auto tensor = memory(object);
    if (!tensor || !sk::has_kernels(tensor->type())) return {};
    if (recording && object.attr(sk::torch.requires_grad).ptr() == Py_True) return {};
    const auto is_neg = py::reinterpret_steal<py::object>(
        PyObject_CallMethodNoArgs(object.ptr(), sk::torch.is_neg.ptr()));
    if (!is_neg) throw py::error_already_set();
    return is_neg.ptr() == Py_False ? tensor : std::nullopt;
}

template <size_t kCount>
bool has_shape(const Tensor& tensor, const std::array<int64_t, kCount>& shape) {
    return tensor.dims() == int{kCount} && std::equal(shape.begin(), shape.end(), tensor.sizes());
}

// Its rows, if the leading dimensions are one to a matrix.
std::optional<sk::MatrixPointer> rows_of(const Tensor& x) {
    const int last = x.dims() - 1;
    int64_t row_stride = 0, rows = 1;
    for (int axis = last - 1; axis >= 0; --axis) {
        if (x.size(axis) == 1) continue;
        if (rows == 1) row_stride = x.stride(axis);
        if (x.stride(axis) != row_stride * rows) return {};
        rows *= x.size(axis);
    }
    return sk::MatrixPointer{x.data(), row_stride, x.stride(last)};
}

// `spmm` if these are plain tensors that fit the product, and unless other indices than the
// layout's are given, else nothing.
std::optional<Tensor> try_spmm(const Product& product, py::handle x, py::handle values,
                               py::handle bias, py::handle indices) {
    if (!indices.is_none()) {
        const auto given = memory(indices);
        if (!given || has_content(*given, product.indices, product.checksum) != true) return {};
    }
    const bool recording = sk::torch.is_grad_enabled().ptr() == Py_True;
    const auto in = plain(x, recording), weights = plain(values, recording);
    const auto added = bias.is_none() ? Tensor() : plain(bias, recording);
    if (!in || !weights || !added || in->dims() == 0) return {};
    const bool fits = in->size(in->dims() - 1) == product.in_features() &&
                      has_shape(*weights, product.values_shape) && weights->is_contiguous() &&
                      weights->type() == in->type();
    const bool adds = bias.is_none() || (has_shape<1>(*added, {product.out_features()}) &&
                                         added->is_contiguous() && added->type() == in->type());
    const auto rows = rows_of(*in);
    if (!fits || !adds || !rows) return {};
    return run_spmm(product, *in, *rows, *weights, *added);
}

// `sddmm` if these are plain matrices that fit the pattern, else nothing.
std::optional<Tensor> try_sddmm(const Pattern& pattern, py::handle grad_output, py::handle x) {
    const bool recording = sk::torch.is_grad_enabled().ptr() == Py_True;
    const auto grad = plain(grad_output, recording), in = plain(x, recording);
    const sk::Lists& lists = pattern.lists;
    if (!grad || !in || grad->dims() != 2 || !(grad->type() == in->type()) ||
        grad->size(1) != lists.rows * lists.out_block ||
        !has_shape<2>(*in, {grad->size(0), lists.cols * lists.in_block})) {
        return {};
    }
    return sddmm(pattern, *grad, *in);
}

Tensor bias_grad(const Tensor& grad_output) {
    const Tensor rows = grad_output.with_unit_stride();
    const Tensor out = Tensor::empty(rows.type(), {rows.size(1)});
    run(&Table::bias_grad, rows.dtype(),
        sk::BiasGradArguments{rows.matrix(), out.data(), rows.size(0), rows.size(1), threads()});
    return out;
}

// Room for the bits and values of x, see kept.h; none if `room` is negative.
std::pair<Tensor, Tensor> empty_packed(const Tensor& x, int64_t room) {
    if (room < 0) return {};
    const int64_t rows = x.size(0), words = (x.size(1) + 63) / 64;
    return {Tensor::empty(sk::kInt64, {rows, words}), Tensor::empty(x.type(), {rows, room})};
}

sk::Packed packed(const Tensor& bits, const Tensor& values) {
    return {bits.data<uint64_t>(), values.data(), values.dims() ? values.size(1) : 0};
}

// (y, scales, bits, values): scales if there is a weight, bits and values unless `room` is
// negative.
template <class Member>
std::tuple<Tensor, Tensor, Tensor, Tensor> topk(Member kernels, const Tensor& x, int64_t k,
                                                int64_t room, const Tensor& weight = {},
                                                double eps = 0) {
    const int64_t rows = x.size(0), cols = x.size(1);
    const Tensor factors = weight.contiguous(), y = Tensor::empty(x.type(), {rows, cols});
    const Tensor scales = weight.dims() ? Tensor::empty(sk::wide(x.type()), {rows}) : Tensor();
    const auto [bits, values] = empty_packed(x, room);
    run(kernels, x.dtype(),
        sk::AbsTopkArguments{x.matrix(), factors.data(), eps, y.data(), scales.data(),
                             packed(bits, values), rows, cols, k, threads()});
    return {y, scales, bits, values};
}

template <class Member>
Tensor topk_backward(Member kernels, const Tensor& grad_output, const Tensor& bits,
                     const Tensor& values) {
    const Tensor whole_bits = bits.contiguous(), whole_values = values.contiguous();
    const int64_t rows = grad_output.size(0), cols = grad_output.size(1);
    const Tensor grad = Tensor::empty(grad_output.type(), {rows, cols});
    run(kernels, grad.dtype(),
        sk::AbsTopkBackwardArguments{grad_output.matrix(), packed(whole_bits, whole_values),
                                     grad.data(), rows, cols, threads()});
    return grad;
}

std::pair<Tensor, Tensor> norm_topk_backward(const Tensor& grad_output, const Tensor& bits,
                                             const Tensor& x, const Tensor& weight,
                                             const Tensor& scales) {
    const Tensor grad_rows = grad_output.with_unit_stride(), rows = x.with_unit_stride();
    const Tensor whole_bits = bits.contiguous(), factors = weight.contiguous(),
                 whole_scales = scales.contiguous();
    const Tensor grad = Tensor::empty(x.type(), {x.size(0), x.size(1)});
    const Tensor grad_weight = Tensor::empty(x.type(), {x.size(1)});
    run(&Table::norm_abs_topk_backward, x.dtype(),
        sk::NormAbsTopkBackwardArguments{
            grad_rows.matrix(), rows.matrix(), whole_bits.data<uint64_t>(), factors.data(),
            whole_scales.data(), grad.data(), grad_weight.data(), x.size(0), x.size(1), threads()});
    return {grad, grad_weight};
}

std::pair<Tensor, Tensor> pack(const Tensor& y, const Tensor& x, int64_t room) {
    const auto result = empty_packed(x, room);
    run(&Table::pack, x.dtype(),
        sk::PackArguments{y.matrix(), x.matrix(), packed(result.first, result.second), x.size(0),
                          x.size(1), threads()});
    return result;
}

Tensor unpack(const Tensor& values, const Tensor& bits, int64_t width, bool of_gelu) {
    const Tensor whole_values = values.contiguous(), whole_bits = bits.contiguous();
    const Tensor y = Tensor::empty(values.type(), {values.size(0), width});
    run(&Table::unpack, y.dtype(),
        sk::UnpackArguments{packed(whole_bits, whole_values), of_gelu, y.data(), y.size(0), width,
                            threads()});
    return y;
}

// `sinks` in the compute type.
std::pair<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& sinks) {
    const Tensor queries = q.with_unit_stride(), keys = k.with_unit_stride(),
                 values = v.with_unit_stride(), whole_sinks = sinks.contiguous();
    const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), channels = q.size(3);
    const Tensor y = Tensor::empty(q.type(), {batch, tokens, heads, channels});
    const Tensor lse = Tensor::empty(sk::wide(q.type()), {batch, heads, tokens});
    run(&Table::attention, q.dtype(),
        sk::AttentionArguments{batch, tokens, k.size(1), heads, channels, queries.heads(),
                               keys.heads(), values.heads(), whole_sinks.data(), y.data(),
                               lse.data(), threads()});
    return {y, lse};
}

// The gradients of qkv and, in the compute type, of the sinks of each sequence, `(B, H)`.
std::pair<Tensor, Tensor> attention_backward(const Tensor& qkv, const Tensor& sinks,
                                             const Tensor& y, const Tensor& lse,
                                             const Tensor& grad_y) {
    const Tensor inputs = qkv.with_unit_stride(), whole_sinks = sinks.contiguous(),
                 outputs = y.with_unit_stride(), whole_lse = lse.contiguous(),
                 grad_outputs = grad_y.with_unit_stride();
    const int64_t batch = y.size(0), tokens = y.size(1), heads = y.size(2), channels = y.size(3);
    const Tensor grad = Tensor::empty(y.type(), {batch, tokens, 3, heads, channels});
    const Tensor grad_sinks = Tensor::empty(lse.type(), {batch, heads});
    std::memset(grad_sinks.data(), 0, grad_sinks.count() * lse.type().bits / 8);
    run(&Table::attention_backward, y.dtype(),
        sk::AttentionBackwardArguments{batch, tokens, tokens, heads, channels, inputs.heads(0),
                                       inputs.heads(1), inputs.heads(2), whole_sinks.data(),
                                       outputs.heads(), grad_outputs.heads(), whole_lse.data(),
                                       grad.heads(0), grad.heads(1), grad.heads(2),
                                       grad_sinks.data(), threads()});
    return {grad, grad_sinks};
}

// The losses; the gradient takes the place of the logits.
Tensor cross_entropy(const Tensor& logits, const Tensor& targets, const Tensor& bigram,
                     const Tensor& tokens, double scale) {
    const Tensor whole_targets = targets.contiguous(), whole_tokens = tokens.contiguous();
    const int64_t rows = logits.size(0), cols = logits.size(1);
    const Tensor losses = Tensor::empty(sk::wide(logits.type()), {rows});
    run(&Table::cross_entropy, logits.dtype(),
        sk::CrossEntropyArguments{logits.data(), whole_targets.data<int64_t>(), bigram.data(),
                                  whole_tokens.data<int64_t>(), losses.data(), scale, rows, cols,
                                  threads()});
    return losses;
}

}  // namespace

PYBIND11_MODULE(_sparse_kernels_cpu, module) {
    module.doc() = "CPU kernels of sparse_kernels; use sparse_kernels, which checks its arguments.";
    sk::import_torch();

    module.def("isas", sk::usable_isas);
    module.def("default_isa", sk::default_isa);
    module.def("isa", [] { return isa; });
    module.def("set_isa", [](size_t number) { isa = number; });
    module.def("has_openmp", [] {
#ifdef _OPENMP
        return true;
#else
        return false;
#endif
    });
    module.def("keep_results", sk::Memory::keep);
    module.def("checksum", checksum);
    module.def("has_content", has_content);

    py::class_<Pattern, Shared>(module, "Pattern")
        .def_static("rows",
                    py::overload_cast<const Tensor&, int64_t, std::array<int32_t, 2>>(rows_of))
        .def_static("columns", columns_of)
        .def("build_schedule", &Pattern::build_schedule);
    py::class_<Product>(module, "Product")
        .def(py::init<Shared, bool, Shared, Tensor, uint64_t, std::array<int64_t, 4>>());

    module.def("spmm", spmm);
    module.def("try_spmm", try_spmm);
    module.def("sddmm", sddmm);
    module.def("try_sddmm", try_sddmm);
    module.def("bias_grad", bias_grad);
    module.def("abs_topk", [](const Tensor& x, int64_t k, int64_t room) {
        return topk(&Table::abs_topk, x, k, room);
    });
    module.def("gelu_abs_topk", [](const Tensor& x, int64_t k, int64_t room) {
        return topk(&Table::gelu_abs_topk, x, k, room);
    });
    module.def("norm_abs_topk",
               [](const Tensor& x, const Tensor& weight, int64_t k, double eps, int64_t room) {
                   return topk(&Table::norm_abs_topk, x, k, room, weight, eps);
               });
    module.def("abs_topk_backward", [](const Tensor& grad_output, const Tensor& bits) {
        return topk_backward(&Table::abs_topk_backward, grad_output, bits, {});
    });
    module.def("gelu_abs_topk_backward",
               [](const Tensor& grad_output, const Tensor& bits, const Tensor& values) {
                   return topk_backward(&Table::gelu_abs_topk_backward, grad_output, bits, values);
               });
    module.def("norm_abs_topk_backward", norm_topk_backward);
    module.def("pack", pack);
    module.def("unpack", unpack);
    module.def("attention", attention);
    module.def("attention_backward", attention_backward);
    module.def("cross_entropy", cross_entropy);
}
