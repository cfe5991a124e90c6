// What the launchers share on the host.
#pragma once

#include <algorithm>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "kernels.h"
#include "tile.cuh"

namespace sk {
namespace cuda {

inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported here: the next who asks must not find it again
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

#ifndef SK_EMULATION
// What <<<>>> does, with `cluster` neighbouring blocks in a cluster; but the result is that of this
// launch alone, not an error left by an earlier call of somebody else.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned cluster,
                          unsigned threads, size_t shared_bytes, cudaStream_t stream,
                          Arguments&&... arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    return std::apply(
        [&](Parameters&... value) {
            void* pointers[] = {&value...};
            return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers);
        },
        values);
}
#endif

// The driver loads a kernel into a device at its first launch, which it may refuse during the
// capture of a graph: the capture would end with an error that names neither.
inline void refuse_first_use_in_capture(const void* kernel, const std::string& what,
                                        const Queue& queue) {
    static std::mutex mutex;
    static std::set<std::pair<const void*, int>> loaded;
    const std::lock_guard<std::mutex> guard(mutex);
    if (loaded.count({kernel, queue.device})) return;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(static_cast<cudaStream_t>(queue.stream), &status),
          "asking whether a graph is captured");
    if (status != cudaStreamCaptureStatusNone) {
        throw std::runtime_error(what +
                                 " is used for the first time while a CUDA graph is captured, when "
                                 "it cannot be loaded: run the step once before the capture");
    }
    loaded.insert({kernel, queue.device});
}

// Launches a kernel, which `what` describes, on the current device, in clusters of so many blocks.
template <class... Parameters, class... Arguments>
void launch_clusters(const std::string& what, void (*kernel)(Parameters...), dim3 grid,
                     unsigned cluster, unsigned threads, int64_t shared_bytes, const Queue& queue,
                     Arguments&&... arguments) {
    const int64_t limit = shared_limit(queue.device);
    if (shared_bytes > limit) {
        throw std::runtime_error(what + " needs " + std::to_string(shared_bytes) +
                                 " bytes of shared memory, and a block of threads has at most " +
                                 std::to_string(limit) + " on device " +
                                 std::to_string(queue.device));
    }
    refuse_first_use_in_capture(reinterpret_cast<const void*>(kernel), what, queue);
    if (shared_bytes > 48 << 10) {
        // It must be asked for; all that there is, always, so that two threads of the host that
        // launch the kernel with different sizes do not take it from each other.
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(limit)),
              what + ", asking for shared memory,");
    }
    check(launch_kernel(kernel, grid, cluster, threads, static_cast<size_t>(shared_bytes),
                        static_cast<cudaStream_t>(queue.stream),
                        std::forward<Arguments>(arguments)...),
          what + " with " + std::to_string(shared_bytes) + " bytes of shared memory");
}
template <class... Parameters, class... Arguments>
void launch(const std::string& what, void (*kernel)(Parameters...), dim3 grid, unsigned threads,
            int64_t shared_bytes, const Queue& queue, Arguments&&... arguments) {
    launch_clusters(what, kernel, grid, 1, threads, shared_bytes, queue,
                    std::forward<Arguments>(arguments)...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs of a block that a thread computes together, from one read of their input.
inline int shared_outputs(int out_block) {
    return out_block % 4 == 0 ? 4 : out_block % 2 == 0 ? 2 : 1;
}

// Whether load_tile may read 16 bytes at a time, in slices of `slice_features` (or all of them).
inline bool wide_loads(const Operand& x, int64_t features, int64_t slice_features, int bytes) {
    const auto is_multiple = [bytes](int64_t count) { return count * bytes % 16 == 0; };
    return x.col_stride == 1 && is_multiple(x.row_stride) && is_multiple(features) &&
           is_multiple(slice_features) && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Whether load_matrices may load all of these features.
inline bool loads_matrices(const Operand& x, int64_t features) {
    return wide_loads(x, features, features, 2) && features % kMatrixFeatures == 0;
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
