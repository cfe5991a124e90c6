// The Python module: pointers, sizes and a thread count in. It links no torch and knows no tensor,
// so one build serves every torch version; sparse_kernels/cpu.py checks everything before it calls
// in here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/checksum.h"
#include "cpu/dispatch.h"
#include "cpu/schedule.h"
#include "cpu/scratch.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// A kernel's arguments, read from left to right. pybind11 would convert them as well, but compiles
// its conversion again for each list of types, which makes the build slower.
class Arguments {
    py::tuple items_;
    size_t next_ = 0;

public:
    Arguments(py::tuple items, size_t count) : items_(std::move(items)) {
        if (items_.size() == count) return;
        throw py::type_error("needs " + std::to_string(count) + " arguments, got " +
                             std::to_string(items_.size()));
    }
    py::handle next() { return PyTuple_GET_ITEM(items_.ptr(), next_++); }
    int64_t size() { return next().cast<int64_t>(); }
    int threads() { return next().cast<int>(); }
    void* data() { return pointer<void>(next().cast<uintptr_t>()); }
    sk::HeadsPointer heads() {
        Arguments tensor(next().cast<py::tuple>(), 4);
        return {tensor.data(), tensor.size(), tensor.size(), tensor.size()};
    }
};

// A layout as the kernels see it, with the pointers of tensors that its attribute `tensors` keeps.
struct Pattern {
    sk::Lists lists{};
    sk::Schedule schedule{};
};

// Inputs of each output: the layout itself.
Pattern rows_of(int64_t rows, int64_t per_row, int64_t cols, int32_t block_out, int32_t block_in,
                uintptr_t indices) {
    Pattern pattern;
    sk::Lists& lists = pattern.lists;
    lists.rows = rows;
    lists.cols = cols;
    lists.per_row = per_row;
    lists.columns = pointer<const int32_t>(indices);
    lists.out_block = block_out;
    lists.in_block = lists.out_stride = block_in;
    lists.in_stride = 1;
    return pattern;
}

// Outputs of each input: the transposed lists.
Pattern columns_of(int64_t rows, int64_t per_row, int64_t cols, int32_t block_out, int32_t block_in,
                   uintptr_t offsets, uintptr_t source_rows, uintptr_t source_slots) {
    Pattern pattern;
    sk::Lists& lists = pattern.lists;
    lists.rows = cols;
    lists.cols = rows;
    lists.offsets = pointer<const int64_t>(offsets);
    lists.columns = lists.source_rows = pointer<const int32_t>(source_rows);
    lists.source_slots = pointer<const int32_t>(source_slots);
    lists.source_per_row = per_row;
    lists.out_block = lists.in_stride = block_in;
    lists.in_block = block_out;
    lists.out_stride = 1;
    return pattern;
}

// Fills the arrays and points to them from then on.
void build_schedule(Pattern& pattern, int64_t panel_features, uintptr_t entry_starts,
                    uintptr_t local, uintptr_t block_ids) {
    py::gil_scoped_release release;
    sk::build_schedule(pattern.lists, panel_features, pointer<int64_t>(entry_starts),
                       pointer<int32_t>(local), pointer<int32_t>(block_ids));
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

    py::class_<sk::Memory>(module, "Memory", py::buffer_protocol())
        .def(py::init<size_t>())
        .def_buffer([](sk::Memory& memory) {
            return py::buffer_info(memory.data(), static_cast<py::ssize_t>(memory.size()), false);
        });

    module.def("checksum", [](uintptr_t entries, int64_t count) {
        return sk::checksum(pointer<const uint32_t>(entries), count);
    });

    py::class_<Pattern>(module, "Pattern", py::dynamic_attr())
        .def_static("rows", rows_of)
        .def_static("columns", columns_of)
        .def("build_schedule", build_schedule);

    // name(isa, dtype, ...), both as numbers, where `read` makes the kernel's arguments of the
    // other `count`.
    const auto define = [&](const char* name, auto member, size_t count, auto read) {
        module.def(name, [=](size_t isa, size_t dtype, py::args items) {
            if (dtype >= sk::kDTypes) throw std::invalid_argument("dtype is no sk::DType");
            const auto kernel = (sk::table_for(isa).*member)[dtype];
            Arguments given(std::move(items), count);
            const auto arguments = read(given);
            py::gil_scoped_release release;
            kernel(arguments);
        });
    };
    using Table = sk::KernelTable;
    // A braced list is evaluated in order.
    const auto spmm = [](Arguments& a) {
        const auto& pattern = a.next().cast<const Pattern&>();
        return sk::SpmmArguments{pattern.lists, pattern.schedule, a.data(), a.size(), a.size(),
                                 a.data(),      a.data(),         a.data(), a.size(), a.threads()};
    };
    define("spmm", &Table::spmm, 9, spmm);
    define("spmm_scatter", &Table::spmm_scatter, 9, spmm);
    define("sddmm", &Table::sddmm, 10, [](Arguments& a) {
        const auto& pattern = a.next().cast<const Pattern&>();
        return sk::SddmmArguments{pattern.lists, pattern.schedule, a.data(),   a.size(),
                                  a.size(),      a.data(),         a.size(),   a.size(),
                                  a.data(),      a.size(),         a.threads()};
    });
    define("bias_grad", &Table::bias_grad, 6, [](Arguments& a) {
        return sk::BiasGradArguments{a.data(), a.size(), a.data(), a.size(), a.size(), a.threads()};
    });
    const auto packed = [](Arguments& a) {
        return sk::Packed{static_cast<uint64_t*>(a.data()), a.data(), a.size()};
    };
    const auto topk = [=](Arguments& a) {
        return sk::AbsTopkArguments{
            a.data(), a.size(),   a.size(),  a.data(), a.next().cast<double>(),
            a.data(), a.data(),   packed(a), a.size(), a.size(),
            a.size(), a.threads()};
    };
    define("abs_topk", &Table::abs_topk, 14, topk);
    define("gelu_abs_topk", &Table::gelu_abs_topk, 14, topk);
    define("norm_abs_topk", &Table::norm_abs_topk, 14, topk);
    const auto topk_backward = [=](Arguments& a) {
        return sk::AbsTopkBackwardArguments{a.data(), a.size(), a.size(), packed(a),
                                            a.data(), a.size(), a.size(), a.threads()};
    };
    define("abs_topk_backward", &Table::abs_topk_backward, 10, topk_backward);
    define("gelu_abs_topk_backward", &Table::gelu_abs_topk_backward, 10, topk_backward);
    define("norm_abs_topk_backward", &Table::norm_abs_topk_backward, 12, [](Arguments& a) {
        return sk::NormAbsTopkBackwardArguments{
            a.data(), a.size(),   a.data(), a.size(), static_cast<const uint64_t*>(a.data()),
            a.data(), a.data(),   a.data(), a.data(), a.size(),
            a.size(), a.threads()};
    });
    define("pack", &Table::pack, 12, [=](Arguments& a) {
        return sk::PackArguments{a.data(), a.size(),  a.size(), a.data(), a.size(),
                                 a.size(), packed(a), a.size(), a.size(), a.threads()};
    });
    define("unpack", &Table::unpack, 8, [=](Arguments& a) {
        return sk::UnpackArguments{packed(a),  a.next().cast<bool>(), a.data(), a.size(), a.size(),
                                   a.threads()};
    });
    // Shapes are (batch, queries, keys, heads, channels); a tensor of heads is its address and its
    // strides over batch, tokens and heads.
    define("attention", &Table::attention, 8, [](Arguments& a) {
        Arguments shape(a.next().cast<py::tuple>(), 5);
        return sk::AttentionArguments{shape.size(), shape.size(), shape.size(), shape.size(),
                                      shape.size(), a.heads(),    a.heads(),    a.heads(),
                                      a.data(),     a.data(),     a.data(),     a.threads()};
    });
    define("attention_backward", &Table::attention_backward, 13, [](Arguments& a) {
        Arguments shape(a.next().cast<py::tuple>(), 5);
        return sk::AttentionBackwardArguments{
            shape.size(), shape.size(), shape.size(), shape.size(), shape.size(), a.heads(),
            a.heads(),    a.heads(),    a.data(),     a.heads(),    a.heads(),    a.data(),
            a.heads(),    a.heads(),    a.heads(),    a.data(),     a.threads()};
    });
    define("cross_entropy", &Table::cross_entropy, 9, [](Arguments& a) {
        const auto numbers = [&] { return static_cast<const int64_t*>(a.data()); };
        return sk::CrossEntropyArguments{a.data(),  numbers(), a.data(),
                                         numbers(), a.data(),  a.next().cast<double>(),
                                         a.size(),  a.size(),  a.threads()};
    });
}
