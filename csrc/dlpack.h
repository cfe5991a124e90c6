// The part of DLPack 1.3 by which PyTorch's tensors are read and made. Its structures stay as they
// are within a major version; https://github.com/dmlc/dlpack has the whole header, documented.
//
// Copyright (c) 2017 - by Contributors. Licensed under the Apache License, Version 2.0.
#pragma once

#include <cstdint>

extern "C" {

struct DLPackVersion {
    uint32_t major, minor;
};

enum DLDeviceType : int32_t { kDLCPU = 1 };

struct DLDevice {
    DLDeviceType device_type;
    int32_t device_id;
};

enum DLDataTypeCode { kDLInt = 0, kDLFloat = 2, kDLBfloat = 4 };

struct DLDataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct DLTensor {
    void* data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DLManagedTensorVersioned {
    DLPackVersion version;
    void* manager_ctx;
    void (*deleter)(DLManagedTensorVersioned* self);
    uint64_t flags;
    DLTensor dl_tensor;
};

struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    DLPackExchangeAPIHeader* prev_api;  // an older table, or null
};

// Functions return 0, or -1 with an exception of Python. None of them waits for a device.
struct DLPackExchangeAPI {
    DLPackExchangeAPIHeader header;
    // Memory of the prototype's dtype, shape and device; errors are reported to `set_error`.
    int (*managed_tensor_allocator)(DLTensor* prototype, DLManagedTensorVersioned** out,
                                    void* error_context,
                                    void (*set_error)(void* error_context, const char* kind,
                                                      const char* message));
    int (*managed_tensor_from_py_object_no_sync)(void* object, DLManagedTensorVersioned** out);
    // Steals the tensor.
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** object);
    // Shape and strides stay those of the object. May be null.
    int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
    int (*current_work_stream)(DLDeviceType type, int32_t id, void** stream);
};

}  // extern "C"
