// Peaks of this machine for the roofline bounds of the benchmarks: multiply-adds per second, and
// bytes per second from a buffer of a given size. Every function returns the best of several short
// runs, since a peak that is measured too low would flatter the kernels.
//
// benchmarks/roofline.py compiles this file for one instruction set, once in a process, and loads
// it with ctypes. It is in no wheel.

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr std::size_t kVecBytes = 64;
#elif defined(__AVX__)
constexpr std::size_t kVecBytes = 32;
#else
constexpr std::size_t kVecBytes = 16;
#endif
typedef float Floats __attribute__((vector_size(kVecBytes)));
constexpr int kVecLanes = static_cast<int>(kVecBytes / sizeof(float));

// Makes the compiler believe that a register is changed here: the work that produced it cannot be
// deleted or hoisted.
template <class V>
inline void keep(V& v) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
    asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
    asm volatile("" : "+w"(v));
#else
    asm volatile("" : "+m"(v));
#endif
}

// The seconds that `body(thread)` takes on all threads at once: the best of `runs`, after one run
// that is thrown away.
template <class Body>
double best_seconds(int threads, int runs, const Body& body) {
    double best = 1e30;
    for (int run = -1; run < runs; ++run) {
        const auto start = std::chrono::steady_clock::now();
#if defined(_OPENMP)
#pragma omp parallel for num_threads(threads) schedule(static, 1)
#endif
        for (int thread = 0; thread < threads; ++thread) body(thread);
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        if (run >= 0) best = std::min(best, seconds.count());
    }
    return best;
}

// Without OpenMP the kernels run on one thread, and so do their peaks.
inline int usable_threads(int threads) {
#if defined(_OPENMP)
    return std::max(1, threads);
#else
    (void)threads;
    return 1;
#endif
}

// Runs of about this length are long beside the start of a parallel region and short beside a
// scheduler's time slice.
constexpr double kFmaSteps = 2e6;
constexpr double kBytesPerRun = 64e6;
// Two multiply-add pipes of latency 4 or 5 need 10 independent chains; 12 and two operands fit the
// 16 registers of AVX2.
constexpr int kChains = 12;

// fp32 multiply-adds, two flops each, from registers alone. (The baseline set has no fused one: a
// multiply and an add.)
inline double measure_fma_gflops(int threads) {
    threads = usable_threads(threads);
    const long steps = static_cast<long>(kFmaSteps);
    const double seconds = best_seconds(threads, 7, [&](int) {
        Floats acc[kChains];
        for (int j = 0; j < kChains; ++j) acc[j] = Floats{} + static_cast<float>(j);
        Floats scale = Floats{} + 0.5f, shift = Floats{} + 1.0f;
        keep(scale);
        keep(shift);
        for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < kChains; ++j) acc[j] = acc[j] * scale + shift;
        }
        for (int j = 0; j < kChains; ++j) keep(acc[j]);
    });
    return 2.0 * kVecLanes * kChains * static_cast<double>(steps) * threads / seconds * 1e-9;
}

// The same through vdpbf16ps (two bf16 products added to an fp32 lane: four flops a lane); 0 where
// the set lacks it.
inline double measure_bf16_gflops(int threads) {
#if defined(__AVX512BF16__)
    threads = usable_threads(threads);
    const long steps = static_cast<long>(kFmaSteps);
    const double seconds = best_seconds(threads, 7, [&](int) {
        __m512 acc[kChains];
        for (int j = 0; j < kChains; ++j) acc[j] = _mm512_setzero_ps();
        __m512i pairs = _mm512_set1_epi32(0x3f803f80);
        keep(pairs);
        for (long i = 0; i < steps; ++i) {
#pragma GCC unroll 12
            for (int j = 0; j < kChains; ++j) {
                acc[j] = _mm512_dpbf16_ps(acc[j], (__m512bh)pairs, (__m512bh)pairs);
            }
        }
        for (int j = 0; j < kChains; ++j) keep(acc[j]);
    });
    return 4.0 * 16 * kChains * static_cast<double>(steps) * threads / seconds * 1e-9;
#else
    (void)threads;
    return 0.0;
#endif
}

// Page-aligned memory that its own thread has touched first, so that it lies near that thread.
class Buffers {
public:
    Buffers(int threads, std::size_t bytes_each) : memory_(static_cast<std::size_t>(threads)) {
        for (auto& memory : memory_) memory.reset(new char[bytes_each + kAlign]);
        best_seconds(threads, 1, [&](int thread) { std::fill_n(at(thread), bytes_each, char{1}); });
    }
    char* at(int thread) const {
        auto address =
            reinterpret_cast<std::uintptr_t>(memory_[static_cast<std::size_t>(thread)].get());
        return reinterpret_cast<char*>((address + kAlign - 1) / kAlign * kAlign);
    }

private:
    static constexpr std::size_t kAlign = 4096;
    std::vector<std::unique_ptr<char[]>> memory_;
};

// Steps of 8 vectors: what one iteration of the loops below moves.
constexpr std::size_t kStepBytes = 8 * kVecBytes;

inline std::size_t share_of(int threads, std::size_t bytes) {
    return std::max<std::size_t>(1, bytes / static_cast<std::size_t>(threads) / kStepBytes) *
           kStepBytes;
}

template <class Body>
double measure_gbs(int threads, std::size_t share, double bytes_per_pass, const Body& pass) {
    // Big buffers take one pass a run; small ones many, so that a run is never short.
    const long passes = std::max(1L, static_cast<long>(kBytesPerRun / static_cast<double>(share)));
    const double seconds = best_seconds(threads, 5, [&](int thread) {
        for (long i = 0; i < passes; ++i) pass(thread);
    });
    return bytes_per_pass * static_cast<double>(passes) * threads / seconds * 1e-9;
}

// GB/s of reading `bytes` in all, an equal contiguous share for each thread, again and again.
inline double measure_read_gbs(int threads, std::size_t bytes) {
    threads = usable_threads(threads);
    const std::size_t share = share_of(threads, bytes);
    const Buffers source(threads, share);
    return measure_gbs(threads, share, static_cast<double>(share), [&](int thread) {
        const char* from = source.at(thread);
        for (std::size_t i = 0; i < share; i += kStepBytes) {
#pragma GCC unroll 8
            for (std::size_t j = 0; j < 8; ++j) {
                Floats v = *reinterpret_cast<const Floats*>(from + i + j * kVecBytes);
                keep(v);
            }
        }
    });
}

inline void stream_store(Floats* to, Floats v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)v);
#elif defined(__AVX__)
    _mm256_stream_ps(reinterpret_cast<float*>(to), (__m256)v);
#elif defined(__x86_64__)
    _mm_stream_ps(reinterpret_cast<float*>(to), (__m128)v);
#else
    *to = v;
#endif
}

// Whether stores bypass the caches: they save the read of the line that they replace, and lose
// where caches would do.
template <bool kStream>
inline void put(char* to, Floats v) {
    if constexpr (kStream) {
        stream_store(reinterpret_cast<Floats*>(to), v);
    } else {
        *reinterpret_cast<Floats*>(to) = v;
        asm volatile("" : : : "memory");
    }
}

template <bool kStream>
inline double measure_write_once(int threads, std::size_t bytes) {
    const std::size_t share = share_of(threads, bytes);
    const Buffers target(threads, share);
    return measure_gbs(threads, share, static_cast<double>(share), [&](int thread) {
        char* to = target.at(thread);
        const Floats value = Floats{} + 1.5f;  // some processors write zeros twice as fast
        for (std::size_t i = 0; i < share; i += kStepBytes) {
#pragma GCC unroll 8
            for (std::size_t j = 0; j < 8; ++j) put<kStream>(to + i + j * kVecBytes, value);
        }
    });
}

template <bool kStream>
inline double measure_copy_once(int threads, std::size_t bytes) {
    const std::size_t share = share_of(threads, bytes / 2);
    const Buffers source(threads, share), target(threads, share);
    return measure_gbs(threads, share, 2.0 * static_cast<double>(share), [&](int thread) {
        const char* from = source.at(thread);
        char* to = target.at(thread);
        for (std::size_t i = 0; i < share; i += kStepBytes) {
#pragma GCC unroll 8
            for (std::size_t j = 0; j < 8; ++j) {
                put<kStream>(to + i + j * kVecBytes,
                             *reinterpret_cast<const Floats*>(from + i + j * kVecBytes));
            }
        }
    });
}

// GB/s of writing `bytes` in all: the better of ordinary and non-temporal stores.
inline double measure_write_gbs(int threads, std::size_t bytes) {
    threads = usable_threads(threads);
    return std::max(measure_write_once<false>(threads, bytes),
                    measure_write_once<true>(threads, bytes));
}

// GB/s, read and written together, of copying one half of `bytes` to the other half.
inline double measure_copy_gbs(int threads, std::size_t bytes) {
    threads = usable_threads(threads);
    return std::max(measure_copy_once<false>(threads, bytes),
                    measure_copy_once<true>(threads, bytes));
}

}  // namespace

extern "C" {
double peaks_fma_gflops(int threads) { return measure_fma_gflops(threads); }
double peaks_bf16_gflops(int threads) { return measure_bf16_gflops(threads); }
double peaks_read_gbs(int threads, std::size_t bytes) { return measure_read_gbs(threads, bytes); }
double peaks_write_gbs(int threads, std::size_t bytes) { return measure_write_gbs(threads, bytes); }
double peaks_copy_gbs(int threads, std::size_t bytes) { return measure_copy_gbs(threads, bytes); }
}
