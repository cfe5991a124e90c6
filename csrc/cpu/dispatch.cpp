#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace sk {

namespace {

struct Isa {
    const char* name;
    bool (*usable)();
    const KernelTable& (*table)();
};

bool always() { return true; }

#if defined(__x86_64__)
#ifdef SK_HAVE_AVX2
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi2");
}
#endif
#ifdef SK_HAVE_AVX512
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef SK_HAVE_AVX512BF16
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

const Isa kIsas[] = {
#if defined(__aarch64__)
    {"neon", always, baseline_table},
#else
    {"baseline", always, baseline_table},
#endif
#ifdef SK_HAVE_AVX2
    {"avx2", has_avx2, avx2_table},
#endif
#ifdef SK_HAVE_AVX512
    {"avx512", has_avx512, avx512_table},
#endif
#ifdef SK_HAVE_AVX512BF16
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_table},
#endif
};

std::string usable_names() {
    std::string names;
    for (const std::string& name : usable_isas()) names += (names.empty() ? "" : ", ") + name;
    return names;
}

}  // namespace

std::vector<std::string> usable_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) {
        if (isa.usable()) names.emplace_back(isa.name);
    }
    return names;
}

size_t default_isa() {
    const char* forced = std::getenv("SPARSE_KERNELS_CPU_ISA");
    const std::vector<std::string> names = usable_isas();
    if (!forced || !*forced) return names.size() - 1;
    for (size_t isa = 0; isa < names.size(); ++isa) {
        if (names[isa] == forced) return isa;
    }
    throw std::invalid_argument("SPARSE_KERNELS_CPU_ISA is '" + std::string(forced) +
                                "'; this machine can run: " + usable_names());
}

const KernelTable& table_for(size_t isa) {
    static const std::vector<const KernelTable*> tables = [] {
        std::vector<const KernelTable*> usable;
        for (const Isa& each : kIsas) {
            if (each.usable()) usable.push_back(&each.table());
        }
        return usable;
    }();
    return *tables.at(isa);
}

int64_t tile_bytes() {
#if defined(__x86_64__)
    // Second-level caches that feed a vector of AVX-512 each cycle came with AVX-VNNI. Before, what
    // a tile leaves free of 1 MB is worth more than its width: docs/experiments.md.
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    static const bool has_avx_vnni =
        __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
    return (has_avx_vnni ? int64_t{640} : int64_t{320}) << 10;
#else
    return int64_t{640} << 10;
#endif
}

}  // namespace sk
