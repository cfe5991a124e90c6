// Tensors of PyTorch in C++, without its headers: they are read and made through the table of
// functions that torch.Tensor.__dlpack_c_exchange_api__ points to, the same for every PyTorch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"
#include "dlpack.h"

inline bool operator==(DLDataType a, DLDataType b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

namespace sk {

namespace py = pybind11;

// What the module needs of PyTorch. These live as long as the process.
struct Torch {
    const DLPackExchangeAPI* exchange;
    py::handle tensor, parameter;                 // types
    py::handle get_num_threads, is_grad_enabled;  // functions
    py::handle requires_grad, is_neg;             // names
};
inline Torch torch;

// Throws ImportError.
inline void import_torch() {
    const py::object module = py::module_::import("torch");
    const py::object tensor = module.attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    void* table = nullptr;
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
        table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    }
    auto* header = static_cast<DLPackExchangeAPIHeader*>(table);
    while (header && header->version.major > 1) header = header->prev_api;
    torch.exchange = reinterpret_cast<const DLPackExchangeAPI*>(header);
    if (!header || header->version.major != 1 || !torch.exchange->dltensor_from_py_object_no_sync) {
        throw py::import_error("it reads tensors through DLPack 1, which this PyTorch has not");
    }
    torch.tensor = py::object(tensor).release();
    torch.parameter = py::object(module.attr("nn").attr("Parameter")).release();
    torch.get_num_threads = py::object(module.attr("get_num_threads")).release();
    torch.is_grad_enabled = py::object(module.attr("is_grad_enabled")).release();
    torch.requires_grad = PyUnicode_InternFromString("requires_grad");
    torch.is_neg = PyUnicode_InternFromString("is_neg");
}

constexpr DLDataType kInt32{kDLInt, 32, 1}, kInt64{kDLInt, 64, 1};
constexpr DLDataType kFloat32{kDLFloat, 32, 1}, kFloat64{kDLFloat, 64, 1};
constexpr DLDataType kBfloat16{kDLBfloat, 16, 1};

inline bool has_kernels(DLDataType type) {
    return type == kFloat32 || type == kBfloat16 || type == kFloat64;
}

// The type in which sums of `type` are taken.
inline DLDataType wide(DLDataType type) { return type == kFloat64 ? kFloat64 : kFloat32; }

// A reference to a strided tensor on the CPU, or to none.
class Tensor {
    py::object object_;
    DLTensor view_{};

public:
    Tensor() = default;

    // Throws what PyTorch raises for a tensor that has no memory, or RuntimeError where that was
    // given back.
    explicit Tensor(py::object object) : object_(std::move(object)) {
        if (torch.exchange->dltensor_from_py_object_no_sync(object_.ptr(), &view_)) {
            throw py::error_already_set();
        }
        if (!view_.data && count() > 0) {
            PyErr_SetString(PyExc_RuntimeError,
                            "a tensor has no memory: its storage was resized to 0");
            throw py::error_already_set();
        }
    }

    // Fresh memory. That of a large result is `Memory`; else it is PyTorch's own.
    static Tensor empty(DLDataType type, std::vector<int64_t> sizes);

    const py::object& object() const { return object_; }
    DLDataType type() const { return view_.dtype; }
    int dims() const { return view_.ndim; }
    const int64_t* sizes() const { return view_.shape; }
    int64_t size(int axis) const { return view_.shape[axis]; }
    int64_t stride(int axis) const { return view_.strides[axis]; }
    int64_t count() const { return count_before(dims()); }
    int64_t count_before(int axis) const {
        int64_t count = 1;
        for (int i = 0; i < axis; ++i) count *= size(i);
        return count;
    }
    bool is_on_cpu() const { return view_.device.device_type == kDLCPU; }

    // The number of the type's kernels in their table. Throws TypeError.
    DType dtype() const {
        if (type() == kFloat32) return DType::kFloat32;
        if (type() == kBfloat16) return DType::kBfloat16;
        if (type() == kFloat64) return DType::kFloat64;
        throw py::type_error("no kernel has this dtype");
    }

    // Null for no tensor.
    template <class T = void>
    T* data() const {
        return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
    }

    bool is_contiguous() const {
        int64_t expected = 1;
        for (int axis = dims() - 1; axis >= 0; --axis) {
            if (size(axis) != 1 && stride(axis) != expected) return false;
            expected *= size(axis);
        }
        return true;
    }

    Tensor contiguous() const {
        if (!object_ || is_contiguous()) return *this;
        return Tensor(object_.attr("contiguous")());
    }

    // Copied if its last axis is not contiguous.
    Tensor with_unit_stride() const { return stride(dims() - 1) == 1 ? *this : contiguous(); }

    MatrixPointer matrix() const { return {data(), stride(0), stride(1)}; }

    // `(B, T, H, d)`, or one of q, k and v of `(B, T, 3, H, d)`.
    HeadsPointer heads(int which = 0) const {
        const int64_t offset = dims() == 5 ? which * stride(2) * view_.dtype.bits / 8 : 0;
        return {data<char>() + offset, stride(0), stride(1), stride(dims() - 2)};
    }
};

// A tensor that PyTorch owns together with its memory.
struct LargeResult {
    Memory memory;
    std::vector<int64_t> sizes, strides;
    DLManagedTensorVersioned managed{};

    LargeResult(size_t bytes, const DLTensor& prototype)
        : memory(bytes),
          sizes(prototype.shape, prototype.shape + prototype.ndim),
          strides(sizes.size()) {
        int64_t stride = 1;
        for (size_t axis = sizes.size(); axis-- > 0; stride *= sizes[axis]) strides[axis] = stride;
        managed.version = {1, 3};
        managed.manager_ctx = this;
        managed.deleter = [](DLManagedTensorVersioned* self) {
            delete static_cast<LargeResult*>(self->manager_ctx);
        };
        managed.dl_tensor = prototype;
        managed.dl_tensor.data = memory.data();
        managed.dl_tensor.shape = sizes.data();
        managed.dl_tensor.strides = strides.data();
    }
};

inline Tensor Tensor::empty(DLDataType type, std::vector<int64_t> sizes) {
    constexpr size_t kLargeBytes = size_t{4} << 20;
    DLTensor prototype{};
    prototype.device = {kDLCPU, 0};
    prototype.dtype = type;
    prototype.ndim = static_cast<int32_t>(sizes.size());
    prototype.shape = sizes.data();
    size_t bytes = type.bits / 8;
    for (int64_t size : sizes) bytes *= static_cast<size_t>(size);
    DLManagedTensorVersioned* managed = nullptr;
    if (bytes >= kLargeBytes) {
        managed = &(new LargeResult(bytes, prototype))->managed;
    } else {
        const auto raise = [](void*, const char*, const char* message) {
            PyErr_SetString(PyExc_RuntimeError, message);
        };
        if (torch.exchange->managed_tensor_allocator(&prototype, &managed, nullptr, raise)) {
            throw py::error_already_set();
        }
    }
    void* object = nullptr;
    if (torch.exchange->managed_tensor_to_py_object_no_sync(managed, &object)) {
        throw py::error_already_set();
    }
    return Tensor(py::reinterpret_steal<py::object>(static_cast<PyObject*>(object)));
}

}  // namespace sk

// Functions of the module take and return tensors, or None for no tensor.
template <>
struct pybind11::detail::type_caster<sk::Tensor> {
    PYBIND11_TYPE_CASTER(sk::Tensor, const_name("Tensor | None"));
    bool load(handle source, bool) {
        if (!source.is_none()) value = sk::Tensor(reinterpret_borrow<object>(source));
        return true;
    }
    static handle cast(const sk::Tensor& tensor, return_value_policy, handle) {
        return tensor.object() ? object(tensor.object()).release() : none().release();
    }
};
