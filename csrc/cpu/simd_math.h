// Functions of vectors: exp and GELU, as exact as float32 shows; sums and maxima of lanes.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace sk {
namespace {

// exp(x) for x <= 0, of which those below -87 give 0: to about one unit in the last place.
inline __attribute__((always_inline)) Vec<float> exp_negative(Vec<float> x) {
    typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
    constexpr float kLeast = -87.0f;
    const Int vanishes = x < kLeast;
    // n = round(x / ln 2) by adding and subtracting a number whose last bit is worth 1.
    const Vec<float> magic = splat(12582912.0f);
    const Vec<float> shifted = x * 1.44269504f + magic;
    const Vec<float> n = shifted - magic;
    Vec<float> r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    // The polynomial of Cephes' expf (S. Moshier).
    Vec<float> p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // The last bits of `shifted` are n. A product, so that a NaN stays one.
    const Words power = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
    p = p * reinterpret_cast<Vec<float>>(power);
    return reinterpret_cast<Vec<float>>(reinterpret_cast<Int>(p) & ~vanishes);
}
inline Vec<double> exp_negative(Vec<double> x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

template <class C>
inline C largest_lane(Vec<C> value) {
    C lanes[kLanes<C>];
    store_user(lanes, value);
    for (int step = kLanes<C> / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] = std::max(lanes[i], lanes[i + step]);
    }
    return lanes[0];
}
template <class C>
inline C sum_lanes(Vec<C> value) {
    C lanes[kLanes<C>];
    store_user(lanes, value);
    for (int step = kLanes<C> / 2; step > 0; step /= 2) {
        for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    }
    return lanes[0];
}

// The value GELU(x) = x P(x), where P is the normal distribution's, and its derivative
// P(x) + x p(x), where p is the density.
template <class C>
struct Gelu {
    Vec<C> value, derivative;
};

template <class C>
inline __attribute__((always_inline)) Gelu<C> gelu(Vec<C> x);

template <>
inline __attribute__((always_inline)) Gelu<float> gelu<float>(Vec<float> x) {
    // erf(z) = 1 - (a1 t + .. + a5 t^5) exp(-z^2), t = 1 / (1 + 0.3275911 z): Abramowitz and Stegun
    // 7.1.26, to 1.5e-7, as in PyTorch. Here z = |x| / sqrt(2).
    const Vec<float> size = x < 0.0f ? -x : x;
    const Vec<float> t = 1.0f / (size * (0.3275911f * 0.707106781f) + 1.0f);
    const Vec<float> density = exp_negative(x * x * -0.5f);
    Vec<float> p = splat(1.061405429f);
    p = p * t + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    const Vec<float> tail = p * t * density * 0.5f;  // P(-|x|)
    const Vec<float> below = x < 0.0f ? tail : 1.0f - tail;
    return {x * below, below + x * density * 0.398942280f};
}
// Not inlined, so that a lane's bits do not depend on where it stands.
__attribute__((noinline)) inline void gelu_of(double x, double& value, double& derivative) {
    const double below = 0.5 * std::erfc(-x * std::sqrt(0.5));
    value = x * below;
    derivative = below + x * std::exp(-0.5 * x * x) * 0.39894228040143267794;
}
template <>
inline Gelu<double> gelu<double>(Vec<double> x) {
    Gelu<double> out;
    for (int i = 0; i < kLanes<double>; ++i) {
        double value, derivative;
        gelu_of(x[i], value, derivative);
        out.value[i] = value;
        out.derivative[i] = derivative;
    }
    return out;
}

}  // namespace
}  // namespace sk
