// Runs CUDA kernels on the CPU: as much of CUDA as csrc/cuda/ uses, for g++ or clang++.
//
// The blocks of a launch run one after the other. The threads of a block are fibers: one runs until
// it comes to a barrier or a warp operation, then the next has its turn. Nothing happens at the
// same time, so a result depends on the order of the fibers alone - and must not depend on it: the
// tests run every kernel in several orders (SK_EMULATION_ORDER), in which a missing barrier shows
// as a result that is wrong or different. Shared memory is as large as it was asked for, each piece
// an allocation of its own that begins as NaN, so that AddressSanitizer sees a step outside.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

constexpr unsigned kWarpLanes = 32;

// Where a fiber or the scheduler goes on.
struct Context {
    ucontext_t start;
    jmp_buf place;
    bool started = true;
};
// A swapcontext whose system calls are made at the start of a fiber only.
inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)  // it follows swapcontext
    swapcontext(&from.start, &to.start);
#else
    if (_setjmp(from.place)) return;
    if (to.started) _longjmp(to.place, 1);
    to.started = true;
    setcontext(&to.start);
#endif
}

// A thread of the block that is running.
struct Fiber {
    dim3 index;
    unsigned rank;
    Context context;
    std::unique_ptr<char[]> stack;
    size_t pieces = 0;  // of shared memory taken
    enum { kRuns, kAtBarrier, kAtWarp, kDone } state = kRuns;
    bool warp_turn = false;
    unsigned char exchange[2][32] = {};  // what it shows to its warp, in alternating turns
};

struct Block {
    dim3 index, size, grid;
    std::function<void()> kernel;
    size_t shared_bytes = 0;
    std::vector<std::pair<std::unique_ptr<unsigned char[]>, size_t>> pieces;
    std::vector<Fiber> fibers;
    Fiber* current = nullptr;
    Context scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    std::string error;
};

inline Block*& block() {
    static Block* running = nullptr;
    return running;
}

constexpr size_t kStackBytes = 64 << 10;

// Switches tell AddressSanitizer which stack it is on.
inline void to_scheduler(bool for_good = false) {
    Block& b = *block();
    Fiber& fiber = *b.current;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, b.scheduler_stack,
                                   b.scheduler_stack_size);
#endif
    (void)for_good;
    switch_context(fiber.context, b.scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
}

inline void fiber_main() {
    Block& b = *block();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_stack_size);
#endif
    try {
        b.kernel();
    } catch (const std::exception& error) {
        b.error = error.what();
    }
    b.current->state = Fiber::kDone;
    to_scheduler(true);
}

inline void run(Fiber& fiber) {
    Block& b = *block();
    b.current = &fiber;
    fiber.state = Fiber::kRuns;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
    switch_context(b.scheduler, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

inline void wait(decltype(Fiber::state) state) {
    block()->current->state = state;
    to_scheduler();
}

// The orders in which the fibers of a block have their turns.
inline std::vector<unsigned> order_of(unsigned count, uint64_t launch) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    const char* named = std::getenv("SK_EMULATION_ORDER");
    const std::string name = named ? named : "forward";
    if (name == "reversed") {
        std::reverse(order.begin(), order.end());
    } else if (name == "shuffled") {
        std::shuffle(order.begin(), order.end(), std::mt19937_64(launch));
    } else if (name != "forward") {
        throw std::runtime_error("SK_EMULATION_ORDER must be forward, reversed or shuffled");
    }
    return order;
}

// Runs a block to its end. Throws if its threads do not meet at the same barriers.
inline void run_block(Block& b, const std::vector<unsigned>& order) {
    const unsigned threads = static_cast<unsigned>(b.fibers.size());
    for (unsigned rank = 0; rank < threads; ++rank) {
        Fiber& fiber = b.fibers[rank];
        fiber.rank = rank;
        fiber.index = dim3(rank);
        fiber.pieces = 0;
        fiber.state = Fiber::kRuns;
        fiber.warp_turn = false;
        if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
        ucontext_t& start = fiber.context.start;
        getcontext(&start);
        start.uc_stack.ss_sp = fiber.stack.get();
        start.uc_stack.ss_size = kStackBytes;
        start.uc_link = nullptr;
        makecontext(&start, fiber_main, 0);
        fiber.context.started = false;
    }
    // Warp by warp, and within a warp in the same order. Each runs as far as it gets on its own, so
    // that a warp that no barrier holds back overtakes the others by as much as it can.
    std::vector<std::vector<unsigned>> warps((threads + kWarpLanes - 1) / kWarpLanes);
    std::vector<unsigned> warp_order;
    for (const unsigned rank : order) {
        std::vector<unsigned>& warp = warps[rank / kWarpLanes];
        if (warp.empty()) warp_order.push_back(rank / kWarpLanes);
        warp.push_back(rank);
    }
    for (;;) {
        bool moved = false;
        for (const unsigned warp : warp_order) {
            const auto state_is = [&](int state) {
                return [&b, state](unsigned rank) { return b.fibers[rank].state == state; };
            };
            const std::vector<unsigned>& lanes = warps[warp];
            while (std::any_of(lanes.begin(), lanes.end(), state_is(Fiber::kRuns))) {
                for (const unsigned rank : lanes) {
                    if (b.fibers[rank].state != Fiber::kRuns) continue;
                    run(b.fibers[rank]);
                    moved = true;
                    if (!b.error.empty()) throw std::runtime_error(b.error);
                }
                // The warp goes on when all of its lanes have come to the operation.
                if (std::all_of(lanes.begin(), lanes.end(), state_is(Fiber::kAtWarp))) {
                    for (const unsigned rank : lanes) b.fibers[rank].state = Fiber::kRuns;
                }
            }
        }
        const auto count = [&](int state) {
            return std::count_if(b.fibers.begin(), b.fibers.end(),
                                 [&](const Fiber& f) { return f.state == state; });
        };
        if (count(Fiber::kDone) == threads) return;
        if (count(Fiber::kAtBarrier) == threads) {
            for (Fiber& fiber : b.fibers) fiber.state = Fiber::kRuns;
            moved = true;
        }
        if (!moved) {
            throw std::runtime_error("emulation: threads wait at different barriers: " +
                                     std::to_string(count(Fiber::kAtBarrier)) +
                                     " at the block's, " + std::to_string(count(Fiber::kAtWarp)) +
                                     " at their warp's, " + std::to_string(count(Fiber::kDone)) +
                                     " have ended");
        }
    }
}

inline void launch(dim3 grid, dim3 size, size_t shared_bytes, std::function<void()> kernel) {
    static uint64_t launches = 0;
    if (size.x % kWarpLanes) throw std::runtime_error("emulation: blocks are whole warps");
    Block running;
    running.size = size;
    running.grid = grid;
    running.kernel = std::move(kernel);
    running.shared_bytes = shared_bytes;
    running.fibers.resize(size.x);
    block() = &running;
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                running.index = dim3(x, y, z);
                running.pieces.clear();
                run_block(running, order_of(size.x, launches++));
            }
        }
    }
    block() = nullptr;
}

// CUDA refuses an access whose address is no multiple of its size.
inline void check_alignment(const void* address, size_t size) {
    if (reinterpret_cast<uintptr_t>(address) % size) {
        throw std::runtime_error("emulation: an address that is no multiple of " +
                                 std::to_string(size));
    }
}

// All lanes of the warp show a value and see those of the others.
template <class T>
std::array<T, kWarpLanes> exchange(unsigned mask, T value) {
    static_assert(sizeof(T) <= sizeof(Fiber::exchange[0]), "at most 32 bytes");
    if (mask != 0xffffffffu) throw std::runtime_error("emulation: needs the mask of all lanes");
    Fiber& self = *block()->current;
    const bool turn = self.warp_turn;
    self.warp_turn = !turn;
    std::memcpy(self.exchange[turn], &value, sizeof(T));
    wait(Fiber::kAtWarp);
    std::array<T, kWarpLanes> all;
    const unsigned first = self.rank / kWarpLanes * kWarpLanes;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
        std::memcpy(&all[lane], block()->fibers[first + lane].exchange[turn], sizeof(T));
    }
    return all;
}

// Matrices that were loaded by ldmatrix, and how often shared memory was read for them: the rows of
// a matrix that lie in one bank of 16 bytes are read one after another, equal ones once.
struct MatrixLoads {
    uint64_t matrices = 0, passes = 0;
};
inline MatrixLoads& matrix_loads() {
    static MatrixLoads loads;
    return loads;
}
inline void count_passes(const std::array<const unsigned char*, kWarpLanes>& rows, size_t count) {
    constexpr uintptr_t kBanks = 8, kRowBytes = 16;
    for (size_t i = 0; i < count; ++i) {
        const std::set<const unsigned char*> matrix(&rows[8 * i], &rows[8 * i] + 8);
        std::array<uint64_t, kBanks> in_bank = {};
        for (const auto row : matrix)
            ++in_bank[reinterpret_cast<uintptr_t>(row) / kRowBytes % kBanks];
        matrix_loads().passes += *std::max_element(in_bank.begin(), in_bank.end());
    }
    matrix_loads().matrices += count;
}

// ldmatrix of kCount matrices: lane 8 i + r says where row r of matrix i lies. Lane 4 g + t gets of
// each the elements 2 t and 2 t + 1 of row g, or of column g if it is transposed.
template <size_t kCount>
void ldmatrix(const unsigned char* row, bool transposed, uint32_t (&matrices)[kCount]) {
    const auto rows = exchange(0xffffffffu, row);
    const unsigned lane = block()->current->rank % kWarpLanes, g = lane / 4, t = lane % 4;
    if (lane == 0) count_passes(rows, kCount);
    for (unsigned i = 0; i < kCount; ++i) {
        uint16_t pair[2];
        for (unsigned e = 0; e < 2; ++e) {
            const unsigned r = transposed ? 2 * t + e : g, column = transposed ? g : 2 * t + e;
            check_alignment(rows[8 * i + r], 16);
            std::memcpy(&pair[e], rows[8 * i + r] + 2 * column, 2);
        }
        matrices[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

// stmatrix of four matrices, transposed: the inverse of a transposed ldmatrix.
inline void stmatrix_trans(const unsigned char* row, const uint32_t (&matrices)[4]) {
    check_alignment(row, 16);
    const auto all = exchange(
        0xffffffffu, std::array<uint32_t, 4>{matrices[0], matrices[1], matrices[2], matrices[3]});
    const unsigned lane = block()->current->rank % kWarpLanes, i = lane / 8, r = lane % 8;
    for (unsigned column = 0; column < 8; ++column) {
        const auto bits = static_cast<uint16_t>(all[4 * column + r / 2][i] >> r % 2 * 16);
        std::memcpy(const_cast<unsigned char*>(row) + 2 * column, &bits, 2);
    }
}

// mma.m16n8k16 with sums in fp32; `number` widens an element.
template <class Number>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Number number) {
    struct Operands {
        uint32_t a[4], b[2];
    };
    const auto all = exchange(0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const unsigned lane = block()->current->rank % kWarpLanes;
    for (unsigned e = 0; e < 4; ++e) {
        const unsigned row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned holder = k % 8 / 2, half = k % 2 * 16;
            const uint32_t left = all[row % 8 * 4 + holder].a[row / 8 + k / 8 * 2] >> half;
            const uint32_t right = all[column * 4 + holder].b[k / 8] >> half;
            d[e] += number(static_cast<uint16_t>(left)) * number(static_cast<uint16_t>(right));
        }
    }
}

}  // namespace emulation

// Gives what was counted since the last call.
extern "C" __attribute__((visibility("default"), used)) inline void take_matrix_loads(
    uint64_t* matrices, uint64_t* passes) {
    *matrices = emulation::matrix_loads().matrices;
    *passes = emulation::matrix_loads().passes;
    emulation::matrix_loads() = {};
}

#define threadIdx (emulation::block()->current->index)
#define blockIdx (emulation::block()->index)
#define blockDim (emulation::block()->size)
#define gridDim (emulation::block()->grid)
inline void __syncthreads() { emulation::wait(emulation::Fiber::kAtBarrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::exchange(mask, 0); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    const unsigned lane = emulation::block()->current->rank % emulation::kWarpLanes;
    return emulation::exchange(mask, value)[lane ^ static_cast<unsigned>(distance)];
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const unsigned lane = emulation::block()->current->rank % emulation::kWarpLanes;
    const unsigned w = static_cast<unsigned>(width);
    return emulation::exchange(mask, value)[lane / w * w + static_cast<unsigned>(source) % w];
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    const auto all = emulation::exchange(mask, static_cast<int>(value));
    unsigned bits = 0;
    for (unsigned lane = 0; lane < emulation::kWarpLanes; ++lane) {
        bits |= static_cast<unsigned>(all[lane] != 0) << lane;
    }
    return bits;
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    const unsigned lane = emulation::block()->current->rank % emulation::kWarpLanes;
    const unsigned from = lane - static_cast<unsigned>(distance);
    return emulation::exchange(mask, value)[from < lane ? from : lane];
}
inline int __reduce_add_sync(unsigned mask, int value) {
    const auto all = emulation::exchange(mask, value);
    return std::accumulate(all.begin(), all.end(), 0);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    const auto all = emulation::exchange(mask, value);
    return *std::min_element(all.begin(), all.end());
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    const auto all = emulation::exchange(mask, value);
    return *std::max_element(all.begin(), all.end());
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
    for (int i = 0; i < 32; i += 8) c += (a >> i & 0xff) * (b >> i & 0xff);
    return c;
}

template <class T>
void __stcs(T* to, T value) {
    emulation::check_alignment(to, sizeof(T));
    *to = value;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

struct __half {
    _Float16 value;
};
inline __half __ushort_as_half(uint16_t bits) {
    __half half;
    std::memcpy(&half, &bits, sizeof(half));
    return half;
}
inline uint16_t __half_as_ushort(__half half) {
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof(bits));
    return bits;
}
inline float __half2float(__half half) { return static_cast<float>(half.value); }
inline __half __float2half_rn(float value) { return {static_cast<_Float16>(value)}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (std::isnan(value)) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Two numbers in a register, and what is done to both at once.
struct __half2 {
    __half x, y;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
namespace emulation {
inline float number(__half half) { return __half2float(half); }
inline float number(__nv_bfloat16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
inline void round_to(float value, __half& to) { to = __float2half_rn(value); }
inline void round_to(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }
}  // namespace emulation
template <class Pair>
float __low2float(Pair pair) {
    return emulation::number(pair.x);
}
template <class Pair>
float __high2float(Pair pair) {
    return emulation::number(pair.y);
}
template <class Pair>
Pair __hadd2(Pair a, Pair b) {
    emulation::round_to(__low2float(a) + __low2float(b), a.x);
    emulation::round_to(__high2float(a) + __high2float(b), a.y);
    return a;
}
// Greater, or one of the two is NaN: all bits of a half, or none.
template <class Pair>
unsigned __hgtu2_mask(Pair a, Pair b) {
    const bool low = !(__low2float(a) <= __low2float(b));
    const bool high = !(__high2float(a) <= __high2float(b));
    return (low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u);
}
template <class Pair>
Pair __hgtu2(Pair a, Pair b) {
    const unsigned mask = __hgtu2_mask(a, b);
    emulation::round_to(mask & 1u ? 1.0f : 0.0f, a.x);
    emulation::round_to(mask >> 16 ? 1.0f : 0.0f, a.y);
    return a;
}

using cudaStream_t = void*;
enum cudaError_t {
    cudaSuccess,
    cudaErrorInvalidDevice,
    cudaErrorInvalidValue,
    cudaErrorInvalidConfiguration
};
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };

// The emulated device: the shared memory of compute capability 9.0, and few multiprocessors.
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
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulated_multiprocessors()
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
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, unsigned threads,
                          size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
    constexpr unsigned kMaxX = 0x7fffffffu, kMaxYZ = 0xffffu, kMaxThreads = 1024;
    const auto outside = [](unsigned size, unsigned limit) { return size == 0 || size > limit; };
    if (outside(grid.x, kMaxX) || outside(grid.y, kMaxYZ) || outside(grid.z, kMaxYZ) ||
        outside(threads, kMaxThreads)) {
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
    emulation::launch(grid, threads, shared_bytes, [&] { std::apply(kernel, values); });
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
