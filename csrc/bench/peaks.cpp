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
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
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

// Memory in huge pages, if it is large, that its own thread has touched first, so that it lies near
// that thread.
class Buffers {
public:
    Buffers(int threads, std::size_t bytes_each) : memory_(static_cast<std::size_t>(threads)) {
        for (auto& memory : memory_) memory.reset(new char[bytes_each + kAlign]);
#if defined(__linux__)
        // As the kernels' own memory.
        for (int i = 0; i < threads; ++i) madvise(at(i), bytes_each, MADV_HUGEPAGE);
#endif
        best_seconds(threads, 1, [&](int thread) { std::fill_n(at(thread), bytes_each, char{1}); });
    }
    char* at(int thread) const {
        auto address =
            reinterpret_cast<std::uintptr_t>(memory_[static_cast<std::size_t>(thread)].get());
        return reinterpret_cast<char*>((address + kAlign - 1) / kAlign * kAlign);
    }

private:
    static constexpr std::size_t kAlign = std::size_t{2} << 20;
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

// Rows of a tile, kVectors vectors each, as a product reads them: those of an output in order, at
// random distances. Each is multiplied by a weight; the sums of an output are put to `y`.
template <int kVectors, bool kWrites>
__attribute__((noinline)) void multiply_tile(const Floats* tile,
                                             const std::vector<std::int32_t>& rows,
                                             std::size_t fan_in, const float* weight, Floats* y) {
    for (auto row = rows.begin(); row != rows.end();) {
        Floats acc[kVectors] = {};
        for (const auto end = row + static_cast<std::ptrdiff_t>(fan_in); row != end;
             ++row, ++weight) {
            const Floats* const from = tile + *row * kVectors;
            const Floats splat = *weight - Floats{};
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) acc[v] += splat * from[v];
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v, y += kWrites) {
            kWrites ? stream_store(y, acc[v]) : keep(acc[v]);
        }
    }
}

struct ProductShape {
    std::size_t features, outputs, fan_in;

    std::vector<std::int32_t> rows() const {
        std::vector<std::int32_t> out;
        std::uint32_t state = 1;
        while (out.size() < outputs * fan_in) {
            for (std::size_t j = 0; j < fan_in; ++j) {
                state = state * 1664525u + 1013904223u;
                out.push_back(static_cast<std::int32_t>((state >> 8) % features));
            }
            std::sort(out.end() - static_cast<std::ptrdiff_t>(fan_in), out.end());
        }
        return out;
    }
};

// GB/s of such rows from a tile that stays in a cache.
template <int kVectors>
double measure_gather_gbs(int threads, std::size_t tile_bytes) {
    const ProductShape shape{tile_bytes / (kVectors * kVecBytes), 512, 32};
    const auto rows = shape.rows();
    const std::vector<float> weights(rows.size(), 0.5f);
    const Buffers tiles(threads, tile_bytes);
    const double bytes = static_cast<double>(rows.size() * kVectors * kVecBytes);
    return measure_gbs(threads, rows.size() * kVectors * kVecBytes, bytes, [&](int thread) {
        multiply_tile<kVectors, false>(reinterpret_cast<const Floats*>(tiles.at(thread)), rows,
                                       shape.fan_in, weights.data(), nullptr);
    });
}

// Milliseconds of a product with nothing in it but what its bound counts: tiles of X are copied,
// multiplied, and the sums leave past the caches. X and Y lie as the tiles do: nothing is
// transposed. Each thread has an equal share of the tokens.
template <int kVectors>
double measure_product_ms(int threads, std::size_t tokens, const ProductShape& shape) {
    const std::size_t tiles = tokens / static_cast<std::size_t>(kVectors * kVecLanes * threads);
    const std::size_t in_bytes = shape.features * kVectors * kVecBytes;
    const std::size_t out_bytes = shape.outputs * kVectors * kVecBytes;
    const Buffers x(threads, tiles * in_bytes), y(threads, tiles * out_bytes),
        tile(threads, in_bytes);
    const auto rows = shape.rows();
    const std::vector<float> weights(rows.size(), 0.5f);
    return 1e3 * best_seconds(threads, 7, [&](int thread) {
               for (std::size_t t = 0; t < tiles; ++t) {
                   std::memcpy(tile.at(thread), x.at(thread) + t * in_bytes, in_bytes);
                   multiply_tile<kVectors, true>(
                       reinterpret_cast<const Floats*>(tile.at(thread)), rows, shape.fan_in,
                       weights.data(), reinterpret_cast<Floats*>(y.at(thread) + t * out_bytes));
               }
           });
}

// `measure` for tiles of so many vectors of tokens: 1, 2, 4 or 8.
template <class Measure>
double with_vectors(std::size_t vectors, const Measure& measure) {
    switch (vectors) {
        case 1:
            return measure(std::integral_constant<int, 1>());
        case 2:
            return measure(std::integral_constant<int, 2>());
        case 4:
            return measure(std::integral_constant<int, 4>());
        default:
            return measure(std::integral_constant<int, 8>());
    }
}

}  // namespace

extern "C" {
double peaks_gather_gbs(int threads, std::size_t vectors, std::size_t tile_bytes) {
    threads = usable_threads(threads);
    return with_vectors(vectors,
                        [&](auto v) { return measure_gather_gbs<v>(threads, tile_bytes); });
}
double peaks_product_ms(int threads, std::size_t vectors, std::size_t tokens, std::size_t features,
                        std::size_t outputs, std::size_t fan_in) {
    threads = usable_threads(threads);
    return with_vectors(vectors, [&](auto v) {
        return measure_product_ms<v>(threads, tokens, {features, outputs, fan_in});
    });
}
double peaks_fma_gflops(int threads) { return measure_fma_gflops(threads); }
double peaks_bf16_gflops(int threads) { return measure_bf16_gflops(threads); }
double peaks_read_gbs(int threads, std::size_t bytes) { return measure_read_gbs(threads, bytes); }
double peaks_write_gbs(int threads, std::size_t bytes) { return measure_write_gbs(threads, bytes); }
double peaks_copy_gbs(int threads, std::size_t bytes) { return measure_copy_gbs(threads, bytes); }
}
