// The matrix instructions of a warp, with the fragments that PTX documents; see emulation.h.
#pragma once

#include "fibers.h"

namespace emulation {

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

// stmatrix of four matrices: the inverse of ldmatrix.
inline void stmatrix(const unsigned char* row, bool transposed, const uint32_t (&matrices)[4]) {
    check_alignment(row, 16);
    const auto all = exchange(
        0xffffffffu, std::array<uint32_t, 4>{matrices[0], matrices[1], matrices[2], matrices[3]});
    const unsigned lane = block()->current->rank % kWarpLanes, i = lane / 8, r = lane % 8;
    for (unsigned column = 0; column < 8; ++column) {
        const unsigned g = transposed ? column : r, element = transposed ? r : column;
        const auto bits = static_cast<uint16_t>(all[4 * g + element / 2][i] >> element % 2 * 16);
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
