// Numbers of 16 bits; see emulation.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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
