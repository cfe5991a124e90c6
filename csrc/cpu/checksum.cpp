#include "checksum.h"

#include <cstring>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SK_CHECKSUM_X86 1
#endif

namespace sk {
namespace {

constexpr int kLanes = 8;
constexpr int kStreams = 8;  // read side by side: one alone waits for memory at each new page
constexpr int kSums = 4;     // a third of the streams' sums fill the registers

typedef uint32_t Vector __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// Each lane holds the sum of what it meets, the sum of those sums, and these rotated and combined
// by exclusive or: sums alone cancel for changes such as +1, -3, +3, -1 at equal distances.
__attribute__((always_inline)) inline uint64_t sums_of_sums(const uint32_t* entries,
                                                            int64_t count) {
    Vector first[kSums] = {}, second[kSums] = {}, third[kSums] = {};
    const int64_t stream = count / (kStreams * kLanes) * kLanes;
    for (int64_t i = 0; i < stream; i += kLanes) {
#pragma GCC unroll 8
        for (int s = 0; s < kStreams; ++s) {
            Vector met;
            std::memcpy(&met, entries + s * stream + i, sizeof met);
            first[s % kSums] += met;
            second[s % kSums] += first[s % kSums];
            third[s % kSums] = (third[s % kSums] << 5 | third[s % kSums] >> 27) ^ second[s % kSums];
        }
    }
    uint64_t hash = static_cast<uint64_t>(count);
    const auto mix = [&hash](uint32_t word) {
        hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
        hash ^= hash >> 32;
    };
    for (int s = 0; s < kSums; ++s) {
        for (int lane = 0; lane < kLanes; ++lane) {
            mix(first[s][lane]);
            mix(second[s][lane]);
            mix(third[s][lane]);
        }
    }
    for (int64_t i = kStreams * stream; i < count; ++i) mix(entries[i]);
    return hash;
}

#ifdef SK_CHECKSUM_X86
__attribute__((target("avx2"))) uint64_t checksum_avx2(const uint32_t* entries, int64_t count) {
    return sums_of_sums(entries, count);
}

// Rotates in one instruction.
__attribute__((target("avx2,avx512f,avx512vl"))) uint64_t checksum_avx512vl(const uint32_t* entries,
                                                                            int64_t count) {
    return sums_of_sums(entries, count);
}
#endif

}  // namespace

uint64_t checksum(const uint32_t* entries, int64_t count) {
#ifdef SK_CHECKSUM_X86
    static const bool has_avx512vl = __builtin_cpu_supports("avx512vl");
    static const bool has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx512vl) return checksum_avx512vl(entries, count);
    if (has_avx2) return checksum_avx2(entries, count);
#endif
    return sums_of_sums(entries, count);
}

}  // namespace sk
