// The runtime of CUDA, as far as the launchers use it, and an emulated device; see emulation.h.
#pragma once

#include "tensor_copy.h"

#define CUDART_VERSION 13000

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidDevice,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

// The emulated device: compute capability 9.0 with its shared memory, and few multiprocessors.
inline int emulated_number(const char* name, int otherwise) {
    const char* number = std::getenv(name);
    return number ? std::atoi(number) : otherwise;
}
inline int emulated_shared() { return emulated_number("SK_EMULATION_SHARED", 227 << 10); }
inline int emulated_multiprocessors() { return emulated_number("SK_EMULATION_MULTIPROCESSORS", 3); }

inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidDevice  ? "cudaErrorInvalidDevice"
           : error == cudaErrorInvalidValue ? "cudaErrorInvalidValue"
                                            : "cudaErrorInvalidConfiguration";
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidDevice  ? "invalid device ordinal"
           : error == cudaErrorInvalidValue ? "invalid argument"
                                            : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
    *version = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
// Tests say with SK_EMULATION_CAPTURE that a graph is captured.
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = std::getenv("SK_EMULATION_CAPTURE") ? cudaStreamCaptureStatusActive
                                                  : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const int capability = emulated_number("SK_EMULATION_CAPABILITY", 90);
    *value = attribute == cudaDevAttrMultiProcessorCount      ? emulated_multiprocessors()
             : attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10
             : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10
                                                              : emulated_shared();
    return cudaSuccess;
}
// The dynamic shared memory that a kernel may be launched with, once it was asked for.
inline std::map<const void*, int>& allowed_shared() {
    static std::map<const void*, int> allowed;
    return allowed;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    if (bytes > emulated_shared()) return cudaErrorInvalidValue;
    allowed_shared()[kernel] = bytes;
    return cudaSuccess;
}

// A function of the driver by its name; SK_EMULATION_DRIVER=0 is a driver without it.
enum cudaDriverEntryPointQueryResult {
    cudaDriverEntryPointSuccess,
    cudaDriverEntryPointSymbolNotFound
};
constexpr unsigned long long cudaEnableDefault = 0;
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
    const bool found =
        std::string(name) == "cuTensorMapEncodeTiled" && emulated_number("SK_EMULATION_DRIVER", 1);
    *function = found ? reinterpret_cast<void*>(cuTensorMapEncodeTiled) : nullptr;
    *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
// The most threads that a kernel can have; SK_EMULATION_CODE says another number.
struct cudaFuncAttributes {
    int maxThreadsPerBlock;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->maxThreadsPerBlock = emulated_number("SK_EMULATION_CODE", 384);
    return cudaSuccess;
}

// With SK_EMULATION_COUNT no kernel runs: the blocks and the shared memory of the launch that asked
// for most of it are remembered.
namespace emulation {
struct Launch {
    uint64_t blocks = 0, shared_bytes = 0;
};
inline Launch& largest_launch() {
    static Launch launch;
    return launch;
}
}  // namespace emulation
extern "C" __attribute__((visibility("default"), used)) inline void take_largest_launch(
    uint64_t* blocks, uint64_t* shared_bytes) {
    *blocks = emulation::largest_launch().blocks;
    *shared_bytes = emulation::largest_launch().shared_bytes;
    emulation::largest_launch() = {};
}

namespace sk {
namespace cuda {

// Refuses what a device refuses.
template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned cluster,
                          unsigned threads, size_t shared_bytes, cudaStream_t,
                          Arguments&&... arguments) {
    constexpr unsigned kMaxX = 0x7fffffffu, kMaxYZ = 0xffffu, kMaxThreads = 1024;
    const auto outside = [](unsigned size, unsigned limit) { return size == 0 || size > limit; };
    if (outside(grid.x, kMaxX) || outside(grid.y, kMaxYZ) || outside(grid.z, kMaxYZ) ||
        outside(threads, kMaxThreads) || outside(cluster, 8) || grid.x % cluster != 0) {
        return cudaErrorInvalidConfiguration;
    }
    const auto asked = allowed_shared().find(reinterpret_cast<const void*>(kernel));
    const int allowed = asked == allowed_shared().end() ? 48 << 10 : asked->second;
    if (shared_bytes > static_cast<size_t>(allowed)) return cudaErrorInvalidValue;
    if (std::getenv("SK_EMULATION_COUNT")) {
        if (shared_bytes >= emulation::largest_launch().shared_bytes) {
            emulation::largest_launch() = {uint64_t{grid.x} * grid.y * grid.z, shared_bytes};
        }
        return cudaSuccess;
    }
    std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
    emulation::launch(grid, threads, shared_bytes, cluster, [&] { std::apply(kernel, values); });
    return cudaSuccess;
}

// Each piece is an allocation of its own. It begins as NaN: nothing may be read before it is set.
class SharedMemory {
public:
    template <class T>
    T* take(int count) {
        emulation::Block& b = *emulation::block();
        const size_t at = b.current->pieces++;
        const size_t bytes = static_cast<size_t>(count) * sizeof(T);
        if (at == b.pieces.size()) {
            size_t taken = (bytes + 15) / 16 * 16;
            for (const auto& piece : b.pieces) taken += (piece.second + 15) / 16 * 16;
            if (taken > b.shared_bytes) {
                throw std::runtime_error(
                    "emulation: more shared memory taken than launched with: " +
                    std::to_string(taken) + " of " + std::to_string(b.shared_bytes) + " bytes");
            }
            b.pieces.emplace_back(new unsigned char[bytes], bytes);
            std::memset(b.pieces.back().first.get(), 0xff, bytes);
        }
        if (b.pieces[at].second != bytes) {
            throw std::runtime_error("emulation: threads take different shared memory");
        }
        return reinterpret_cast<T*>(b.pieces[at].first.get());
    }
};

}  // namespace cuda
}  // namespace sk
