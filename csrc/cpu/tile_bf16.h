// Token tiles of bfloat16, which stays narrow: what an unstructured gather is limited by is how
// many bytes of activations the second-level cache delivers.
//
// Where the processor multiplies pairs of bfloat16 and adds them up in float32 (AVX512-BF16), a
// gather takes two features at a time. A lane then holds a token of one below the same token of the
// other, which two shuffles make of two features' rows. Elsewhere a shift and a mask widen a row to
// two vectors of floats.
#pragma once

#include "tile.h"

namespace sk {
namespace {

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBf16 = true;

inline __attribute__((always_inline)) void add_pair_products(Vec<float>& sum, Words a, Words b) {
    sum = reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
                                                        reinterpret_cast<__m512bh>(a),
                                                        reinterpret_cast<__m512bh>(b)));
}
// In pieces of 16 bytes, 16-bit elements of a and b in turn: of their lower halves, or upper ones.
inline Words zip_low16(Words a, Words b) {
    return reinterpret_cast<Words>(
        _mm512_unpacklo_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
inline Words zip_high16(Words a, Words b) {
    return reinterpret_cast<Words>(
        _mm512_unpackhi_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}
// In pieces of 16 bytes, the low halves of the lanes of a, then of b.
inline Words join_low16(Words a, Words b) {
    return reinterpret_cast<Words>(_mm512_packus_epi32(reinterpret_cast<__m512i>(a & 0xffffu),
                                                       reinterpret_cast<__m512i>(b & 0xffffu)));
}
inline Words join_high16(Words a, Words b) {
    return reinterpret_cast<Words>(_mm512_packus_epi32(reinterpret_cast<__m512i>(a >> 16),
                                                       reinterpret_cast<__m512i>(b >> 16)));
}
#else
constexpr bool kMultipliesBf16 = false;

// Of lanes a and b, the low halves: a's below b's; the high halves.
inline Words join_low16(Words a, Words b) { return (a & 0xffffu) | (b << 16); }
inline Words join_high16(Words a, Words b) { return (a >> 16) | (b & 0xffff0000u); }
#endif

// Where token i of 2 * kLanes lies in the row of a feature.
constexpr int bf16_place(int i) {
    constexpr int kN = kLanes<float>;
    if (!kMultipliesBf16) return 2 * (i % kN) + i / kN;
    return i % kN / 4 * 8 + i / kN * 4 + i % 4;
}

inline Vec<float> as_floats(Words value) { return reinterpret_cast<Vec<float>>(value); }

inline Words rounded_high(Vec<float> value) {
    const Words bits = reinterpret_cast<Words>(value);
    const Words is_nan = reinterpret_cast<Words>((bits & 0x7fffffffu) > 0x7f800000u);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (rounded & ~is_nan) | ((bits | 0x400000u) & is_nan);
}

template <int kVectors>
struct Tile<Bf16, kVectors> {
    static_assert(kVectors % 2 == 0, "bfloat16 tokens are packed in pairs of vectors");
    using Element = Bf16;
    using Weight = std::conditional_t<kMultipliesBf16, Bf16, float>;
    using Raw = Words;
    static constexpr int kN = kLanes<float>;
    static constexpr int kRaw = kVectors / 2;
    static constexpr int64_t kTokens = kVectors * kN;
    static constexpr int kTogether = kMultipliesBf16 ? 2 : 1;

    static void pack(const Matrix<const Bf16>& source, int64_t first_token, int64_t tokens,
                     int64_t first_feature, int64_t features, Element* tile) {
        for (int pair = 0; pair < kVectors / 2; ++pair) {
            const int64_t base = pair * 2 * kN;
            const Bf16* from = source.data + (first_token + base) * source.row_stride +
                               first_feature * source.col_stride;
            const int64_t here = std::clamp<int64_t>(tokens - base, 0, 2 * kN);
            int64_t f = 0;
            if (source.col_stride == 1 && here == 2 * kN) {
                for (; f + 2 * kN <= features; f += 2 * kN) {
                    pack_square(from + f, source.row_stride,
                                later<Bf16>(f, features, 2 * kN * source.row_stride),
                                tile + f * kTokens + base);
                }
            } else if (source.col_stride == 1) {
                PaddedRows<Bf16, 2 * kN> rows;
                for (; f + 2 * kN <= features; f += 2 * kN) {
                    rows.copy(from + f, source.row_stride, here);
                    pack_square(rows.data[0], 2 * kN, 0, tile + f * kTokens + base);
                }
            }
            for (; f < features; ++f) {
                Bf16* to = tile + f * kTokens + base;
                for (int i = 0; i < 2 * kN; ++i) {
                    to[bf16_place(i)] = base + i < tokens
                                            ? from[i * source.row_stride + f * source.col_stride]
                                            : Bf16{0};
                }
            }
        }
    }

    // As many tokens as features, 2 kN, of which a lane is two neighbouring features of one token.
    static inline __attribute__((always_inline)) void pack_square(const Bf16* from, int64_t stride,
                                                                  int64_t ahead, Element* to) {
        Vec<float> low[kN], high[kN];
        SK_UNROLL
        for (int i = 0; i < kN; ++i) {
            const Bf16* row = from + i * stride;
            const Bf16* other = row + kN * stride;
            low[i] = load_user(reinterpret_cast<const float*>(row));
            high[i] = load_user(reinterpret_cast<const float*>(other));
            prefetch(row, ahead);
            prefetch(other, ahead);
        }
        transpose<float>(low);
        transpose<float>(high);
        SK_UNROLL
        for (int i = 0; i < kN; ++i) {
            const Words a = reinterpret_cast<Words>(low[i]);
            const Words b = reinterpret_cast<Words>(high[i]);
            float* const pair = reinterpret_cast<float*>(to + 2 * i * kTokens);
            store(pair, as_floats(join_low16(a, b)));
            store(pair + kTokens / 2, as_floats(join_high16(a, b)));
        }
    }

    // From float32, two features at a time, so that a token's store is a whole vector.
    static void unpack(const float* tile, Bf16* out, int64_t width, int64_t first_token,
                       int64_t tokens, int64_t first_feature, int64_t features, bool stream) {
        const int64_t paired = features / (2 * kN) * (2 * kN);
        for (int group = 0; group < kVectors; ++group) {
            const int64_t base = group * kN;
            const int64_t here = std::clamp<int64_t>(tokens - base, 0, kN);
            Bf16* to = out + (first_token + base) * width + first_feature;
            int64_t f = 0;
            for (; here == kN && f < paired; f += 2 * kN) {
                Vec<float> rows[kN];
                SK_UNROLL
                for (int i = 0; i < kN; ++i) {
                    const float* pair = tile + (f + 2 * i) * kTokens + base;
                    const Words low = rounded_high(load(pair));
                    const Words high = rounded_high(load(pair + kTokens));
                    rows[i] = as_floats((low >> 16) | (high & 0xffff0000u));
                }
                transpose<float>(rows);
                SK_UNROLL
                for (int i = 0; i < kN; ++i) {
                    float* target = reinterpret_cast<float*>(to + i * width + f);
                    if (stream)
                        stream_user(target, rows[i]);
                    else
                        store_user(target, rows[i]);
                }
            }
            for (; f < features; ++f) {
                for (int64_t i = 0; i < here; ++i) {
                    to[i * width + f] = from_compute<Bf16>(tile[f * kTokens + base + i]);
                }
            }
        }
    }

    static Raw load_raw(const Element* from) {
        return reinterpret_cast<Words>(load(reinterpret_cast<const float*>(from)));
    }
    static inline __attribute__((always_inline)) void add_products(Vec<float>& sum, Raw a, Raw b) {
#if defined(__AVX512BF16__)
        add_pair_products(sum, a, b);
#else
        sum += as_floats(a << 16) * as_floats(b << 16);
        sum += as_floats(a & 0xffff0000u) * as_floats(b & 0xffff0000u);
#endif
    }

#if defined(__AVX512BF16__)
    // acc[output] += weights[output][0] * panel[local[0]] + weights[output][1] * panel[local[1]]
    template <int kShared>
    static inline __attribute__((always_inline)) void multiply_pair(
        Vec<float> (&acc)[kShared][kVectors], const Element* panel, const int32_t* local,
        const Weight* weights) {
        const Element* const from = panel + static_cast<int64_t>(local[0]) * kTokens;
        const Element* const other = panel + static_cast<int64_t>(local[1]) * kTokens;
        multiply_zipped<kShared>(acc, weights, [&](auto r) __attribute__((always_inline)) {
            return std::pair<Words, Words>(load_raw(from + r * 2 * kN),
                                           load_raw(other + r * 2 * kN));
        });
    }
    // acc[output] += weights[output] * panel[*local]
    template <int kShared>
    static inline __attribute__((always_inline)) void multiply(Vec<float> (&acc)[kShared][kVectors],
                                                               const Element* panel,
                                                               const int32_t* local,
                                                               const Weight* weights) {
        const Element* const from = panel + static_cast<int64_t>(*local) * kTokens;
        Weight alone[2 * kShared];
        for (int a = 0; a < kShared; ++a) {
            alone[2 * a] = weights[a];
            alone[2 * a + 1] = Bf16{0};
        }
        multiply_zipped<kShared>(acc, alone, [&](auto r) __attribute__((always_inline)) {
            return std::pair<Words, Words>(load_raw(from + r * 2 * kN), Words{});
        });
    }

private:
    template <int kShared, class Rows>
    static inline __attribute__((always_inline)) void multiply_zipped(
        Vec<float> (&acc)[kShared][kVectors], const Weight* weights, const Rows& rows) {
        Words x[kVectors];
        SK_UNROLL
        for (int r = 0; r < kRaw; ++r) {
            const std::pair<Words, Words> both = rows(r);
            x[2 * r] = zip_low16(both.first, both.second);
            x[2 * r + 1] = zip_high16(both.first, both.second);
        }
        SK_UNROLL
        for (int a = 0; a < kShared; ++a) {
            uint32_t pair;
            std::memcpy(&pair, weights + 2 * a, sizeof(pair));
            const Words w = pair - Words{};
            SK_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                add_pair_products(acc[a][v], x[v], w);
            }
        }
    }
#else
    // acc[output] += weights[output] * panel[*local]
    template <int kShared>
    static inline __attribute__((always_inline)) void multiply(Vec<float> (&acc)[kShared][kVectors],
                                                               const Element* panel,
                                                               const int32_t* local,
                                                               const Weight* weights) {
        const Element* const from = panel + static_cast<int64_t>(*local) * kTokens;
        Vec<float> x[kVectors];
        SK_UNROLL
        for (int r = 0; r < kRaw; ++r) {
            const Words both = load_raw(from + r * 2 * kN);
            x[2 * r] = as_floats(both << 16);
            x[2 * r + 1] = as_floats(both & 0xffff0000u);
        }
        SK_UNROLL
        for (int a = 0; a < kShared; ++a) {
            const Vec<float> w = splat<float>(weights[a]);
            SK_UNROLL
            for (int v = 0; v < kVectors; ++v) {
                acc[a][v] += w * x[v];
            }
        }
    }
#endif
};

}  // namespace
}  // namespace sk
