// What the launchers share on the host.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "tile.cuh"

namespace sk {
namespace cuda {

inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    throw std::runtime_error("CUDA: " + what + " failed: " + cudaGetErrorString(error) + " (" +
                             cudaGetErrorName(error) +
                             "); the error may stem from earlier work on the same device");
}

// Makes a device current, and the one before at the end.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&before_), "asking for the current device");
        if (device == before_) return;
        check(cudaSetDevice(device), "choosing device " + std::to_string(device));
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "asking for a device attribute");
    return value;
}

// Shared memory that one block may have.
inline int64_t shared_limit(int device) {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
inline int64_t multiprocessors(int device) {
    return device_attribute(cudaDevAttrMultiProcessorCount, device);
}

// Lets a kernel be launched with that much dynamic shared memory; above 48 KiB it must be asked
// for.
template <class... Parameters>
void allow_shared(void (*kernel)(Parameters...), int64_t bytes, const std::string& what) {
    if (bytes <= 48 << 10) return;
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        what + " with " + std::to_string(bytes) + " bytes of shared memory");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs of a block that a thread computes together, from one read of their input.
inline int shared_outputs(int out_block) {
    return out_block % 4 == 0 ? 4 : out_block % 2 == 0 ? 2 : 1;
}

inline std::string describe(const char* product, const Lists& lists, int64_t tokens) {
    return std::string("the kernel of ") + product + " (" + std::to_string(tokens) + " tokens, " +
           std::to_string(lists.cols * lists.in_block) + " inputs, " +
           std::to_string(lists.rows * lists.out_block) + " outputs, " +
           std::to_string(lists.blocks) + " blocks of " + std::to_string(lists.out_block) + " x " +
           std::to_string(lists.in_block) + ")";
}

}  // namespace cuda
}  // namespace sk
