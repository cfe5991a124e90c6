// Where the kernels of compute capability 9.0 run, and the tensor maps that they read by.
#include <map>

#include "hopper_pipeline.cuh"

namespace sk {
namespace cuda {
namespace {

// Says whether this module has code for the device's own architecture.
__global__ void SK_HOPPER_BOUNDS probe_kernel() {}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's function, which is not linked to; null if the driver has none.
EncodeTiled encode_tiled() {
    static const EncodeTiled found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result{};
        constexpr unsigned kVersion = 12000;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, kVersion, cudaEnableDefault, &result);
#else
        (void)kVersion;
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function,
                                                          cudaEnableDefault, &result);
#endif
        if (error != cudaSuccess) cudaGetLastError();
        const bool usable = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return usable ? reinterpret_cast<EncodeTiled>(function) : nullptr;
    }();
    return found;
}

// Whether the module has code for a device of this capability; asked once for each.
bool has_code(const Queue& queue) {
    static std::mutex mutex;
    static std::map<int, bool> known;
    const std::lock_guard<std::mutex> guard(mutex);
    const auto found = known.find(queue.device);
    if (found != known.end()) return found->second;
    const DeviceGuard device(queue.device);
    const auto* const kernel = reinterpret_cast<const void*>(probe_kernel);
    refuse_first_use_in_capture(kernel, "a kernel of compute capability 9.0", queue);
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, kernel), "asking for a kernel's code");
    return known[queue.device] = attributes.maxThreadsPerBlock >= kHopperThreads;
}

// What a product must be, wherever its operands lie.
bool is_served(DType dtype, const Lists& lists, int64_t tokens, const Queue& queue) {
    const int side = lists.out_block;
    if (dtype == DType::kFloat32 || lists.in_block != side ||
        (side != 32 && side != 64 && side != 128)) {
        return false;
    }
    // Coordinates and jobs are counted in 32 bits.
    constexpr int64_t kMost = int64_t{1} << 30;
    return tokens > 0 && tokens <= kMost && lists.blocks <= kMost / side &&
           lists.rows <= kMost / side && lists.cols <= kMost / side &&
           ceil_div(tokens, kWide) <= kMost / std::max(lists.rows, lists.blocks) &&
           device_attribute(cudaDevAttrComputeCapabilityMajor, queue.device) == 9 &&
           device_attribute(cudaDevAttrComputeCapabilityMinor, queue.device) == 0 &&
           has_code(queue) && encode_tiled();
}

// Whether a tensor map can describe a matrix of so many features.
bool is_described(const Operand& x, int64_t tokens, int64_t features) {
    constexpr int64_t kMostBytes = int64_t{1} << 40;
    const int64_t row_bytes = 2 * (tokens == 1 ? features : x.row_stride);
    return x.col_stride == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
           row_bytes % 16 == 0 && row_bytes >= 2 * features && row_bytes < kMostBytes;
}

}  // namespace

bool spmm_on_hopper(DType dtype, const Lists& lists, const Operand& x, const void* values,
                    int64_t tokens, const Queue& queue) {
    return reinterpret_cast<uintptr_t>(values) % 16 == 0 &&
           is_described(x, tokens, lists.cols * lists.in_block) &&
           is_served(dtype, lists, tokens, queue);
}

bool sddmm_on_hopper(DType dtype, const Lists& lists, const Operand& grad_output, const Operand& x,
                     int64_t tokens, const Queue& queue) {
    return is_described(grad_output, tokens, lists.rows * lists.out_block) &&
           is_described(x, tokens, lists.cols * lists.in_block) &&
           is_served(dtype, lists, tokens, queue);
}

void make_map(CUtensorMap* map, const std::string& what, DType dtype, const void* data,
              int64_t rows, int64_t cols, int64_t row_bytes, int box_rows, int box_cols) {
    const auto size = [](int64_t number) { return static_cast<cuuint64_t>(number); };
    const cuuint64_t sizes[] = {size(cols), size(rows)}, strides[] = {size(row_bytes)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_cols), static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[] = {1, 1};
    const auto swizzle = box_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const auto type = dtype == DType::kBfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUresult result =
        encode_tiled()(map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                       CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) {
        throw std::runtime_error("CUDA: " + what + ": the driver refused to describe a tensor of " +
                                 std::to_string(rows) + " x " + std::to_string(cols) +
                                 " (CUresult " + std::to_string(result) + ")");
    }
}

}  // namespace cuda
}  // namespace sk
