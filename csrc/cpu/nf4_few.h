// The product of few rows with a 4-bit weight: W streams by once and is decoded in registers, or, on levels and for
// shapes without such registers, a row at a time to L1. 2 flops a weight and row against 0.56 bytes a weight: memory is
// the limit.
#pragma once

#include "cpu/nf4.h"

namespace tlk {
namespace {

// ---- linear: few rows, decoded in registers ------------------------------------------------------------------------

#if defined(__AVX512F__)

// x[rows][depth] -> [chunk][row][even, odd], a chunk being what one step of the weight stream decodes.
inline void split_even_odd(const float* x, float* out) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    _mm512_store_ps(out, _mm512_permutex2var_ps(a, even, b));
    _mm512_store_ps(out + 16, _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
}

// One chunk of W: 32 floats, with the precision of x.
template <class In>
struct FewFp32 {
    using element = float;
    static constexpr int chunk = 32;
    using Table = __m512;
    using Half = __m512;
    static Table table(__m512 code, float absmax) { return round_to(Vec{code} * splat(absmax), In{}).v; }
    static void decode(Table t, const uint8_t* p, Half& even, Half& odd) {
        const __m512i d = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
        even = _mm512_permutexvar_ps(_mm512_srli_epi32(d, 4), t);
        odd = _mm512_permutexvar_ps(d, t);
    }
    static Half load_half(const element* x) { return _mm512_load_ps(x); }
    static __m512 multiply_add(Half w, Half x, __m512 acc) { return _mm512_fmadd_ps(w, x, acc); }
    static void split(const In* x, element* out) {
        float wide[chunk];
        convert_row(x, chunk, wide);
        split_even_odd(wide, out);
    }
};

#if defined(__AVX512BF16__)
// One chunk of W: 64 bfloat16.
struct FewBf16 {
    using element = bf16;
    static constexpr int chunk = 64;
    using Table = __m512i;
    using Half = __m512i;
    static Table table(__m512 code, float absmax) {
        const __m512 x = _mm512_mul_ps(code, _mm512_set1_ps(absmax));
        return (__m512i)_mm512_cvtne2ps_pbh(x, x);  // the products below take subnormal numbers for zero anyway
    }
    static void decode(Table t, const uint8_t* p, Half& even, Half& odd) {
        const __m512i w = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
        even = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), t);
        odd = _mm512_permutexvar_epi16(w, t);
    }
    static Half load_half(const element* x) { return _mm512_load_si512(x); }
    static __m512 multiply_add(Half w, Half x, __m512 acc) { return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x); }
    static void split(const bf16* x, element* out) {
        alignas(64) uint16_t pick[32];
        for (int i = 0; i < 32; ++i) pick[i] = uint16_t(2 * i);
        const __m512i even = _mm512_load_si512(pick), a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
        _mm512_store_si512(out, _mm512_permutex2var_epi16(a, even, b));
        _mm512_store_si512(out + 32, _mm512_permutex2var_epi16(a, _mm512_add_epi16(even, _mm512_set1_epi16(1)), b));
    }
};
#endif

template <class In>
struct FewArithmetic {
    using type = FewFp32<In>;
};
#if defined(__AVX512BF16__)
template <>
struct FewArithmetic<bf16> {
    using type = FewBf16;
};
#endif

constexpr int64_t kFewTile = 8;          // rows of x that share one pass over W: more would spill
constexpr int64_t kFewRows = 48;         // above, decoding W to L2 once costs less than the passes
constexpr int64_t kFewFeatures = 32;     // output features of a unit of work
constexpr int64_t kPrefetchRows = 4;     // ahead in the weight stream
constexpr int64_t kFewBytes = 32 << 10;  // of split x that stay in L1 while those features pass over it

// The sums of 16 vectors, as one vector: a transposition that adds on the way.
inline __m512 sums(const __m512* a) {
    __m512 b[8], c[4], d[2];
    for (int i = 0; i < 8; ++i)
        b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[i], a[i + 8]), _mm512_unpackhi_ps(a[i], a[i + 8]));
    for (int i = 0; i < 4; ++i)
        c[i] = _mm512_add_ps(_mm512_unpacklo_ps(b[i], b[i + 4]), _mm512_unpackhi_ps(b[i], b[i + 4]));
    for (int i = 0; i < 2; ++i)
        d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[i], c[i + 2], 0x88), _mm512_shuffle_f32x4(c[i], c[i + 2], 0xdd));
    const __m512 e = _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
    // the 128-bit lanes hold the sums i, i + 4, i + 8, i + 12 of i = 0, 2, 1, 3
    const __m512i ascending = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    return _mm512_permutexvar_ps(ascending, e);
}

// Where the scales of a row of W stand: in place, or decoded to a buffer when double-quantized.
struct RowScales {
    const float* at;
    int64_t offset;  // of the row within its first block
};
inline RowScales row_scales(const Weight& w, int64_t row, int64_t in_features, float* buffer) {
    const int64_t begin = row * in_features, first = begin >> w.shift, offset = begin & (w.block_size - 1);
    if (w.absmax != nullptr) return {w.absmax + first, offset};
    const int64_t count = ((begin + in_features - 1) >> w.shift) - first + 1;
    for (int64_t b = 0; b < count; ++b) buffer[b] = w.scale(first + b);
    return {buffer, offset};
}

// out[f][m] (+)= sum over chunks [c0, c1) of W[first + f] . x[m], for F features at once: x is loaded once for them.
template <class T, int M, int F>
void few_features(const Weight& w, const RowScales* scales, int64_t first, int64_t in_features, int64_t c0, int64_t c1,
                  const typename T::element* x, float* out) {
    const __m512 code = _mm512_loadu_ps(w.code);
    const int shift = w.shift;
    __m512 acc[16 * ceil_div(F * M, 16)];
    for (__m512& a : acc) a = _mm512_setzero_ps();
    const uint8_t* p[F];
    for (int f = 0; f < F; ++f) p[f] = w.packed + (first + f) * in_features / 2;
    const int64_t ahead = max<int64_t>(kPrefetchRows, F) * in_features / 2;  // beyond the rows read now
    for (int64_t c = c0; c < c1; ++c) {
        const typename T::element* xc = x + c * M * T::chunk;
        typename T::Half even[F], odd[F];
        for (int f = 0; f < F; ++f) {
            const uint8_t* pc = p[f] + c * (T::chunk / 2);
            T::decode(T::table(code, scales[f].at[(scales[f].offset + c * T::chunk) >> shift]), pc, even[f], odd[f]);
            _mm_prefetch((const char*)pc + ahead, _MM_HINT_T0);
        }
        for (int m = 0; m < M; ++m) {
            const typename T::Half x_even = T::load_half(xc + m * T::chunk);
            const typename T::Half x_odd = T::load_half(xc + m * T::chunk + T::chunk / 2);
            for (int f = 0; f < F; ++f) acc[f * M + m] = T::multiply_add(even[f], x_even, acc[f * M + m]);
            for (int f = 0; f < F; ++f) acc[f * M + m] = T::multiply_add(odd[f], x_odd, acc[f * M + m]);
        }
    }
    for (int i = 0; i < F * M; i += 16) {
        const __mmask16 valid = __mmask16((1u << min(16, F * M - i)) - 1);
        __m512 s = sums(acc + i);
        if (c0 > 0) s = _mm512_add_ps(s, _mm512_maskz_loadu_ps(valid, out + i));
        _mm512_mask_storeu_ps(out + i, valid, s);
    }
}

template <class T, int M, class In>
void few_rows(const In* x, const Weight& w, const Addend& addend, int64_t out_features, int64_t in_features, In* y,
              Parallel parallel) {
    // Enough sums in flight to hide the latency of the products, few enough for the registers: sums and both halves of
    // W.
    constexpr int F = M <= 4 ? 4 : 2;
    using element = typename T::element;
    const int64_t chunks = in_features / T::chunk;
    Scratch<element> split(M * in_features);
    for (int64_t m = 0; m < M; ++m)
        for (int64_t c = 0; c < chunks; ++c)
            T::split(x + m * in_features + c * T::chunk, split + (c * M + m) * T::chunk);

    const int64_t chunk_block = max<int64_t>(1, kFewBytes / int64_t(M * T::chunk * sizeof(element)));
    const int64_t row_blocks = (in_features >> w.shift) + 2;
    const int64_t grain = ceil_div(kSmallWork, M * in_features * kFewFeatures);
    parallel_for(parallel, ceil_div(out_features, kFewFeatures), grain, [&](int64_t first, int64_t last) {
        Scratch<float> buffer(w.absmax != nullptr ? 0 : kFewFeatures * row_blocks);
        float out[kFewFeatures][M];
        for (int64_t u = first; u < last; ++u) {
            const int64_t n0 = u * kFewFeatures, count = min(kFewFeatures, out_features - n0);
            RowScales scales[kFewFeatures];
            for (int64_t f = 0; f < count; ++f) scales[f] = row_scales(w, n0 + f, in_features, buffer + f * row_blocks);
            for (int64_t c0 = 0; c0 < chunks; c0 += chunk_block) {
                const int64_t c1 = min(chunks, c0 + chunk_block);
                int64_t f = 0;
                for (; f + F <= count; f += F)
                    few_features<T, M, F>(w, scales + f, n0 + f, in_features, c0, c1, split, out[f]);
                for (; f < count; ++f) few_features<T, M, 1>(w, scales + f, n0 + f, in_features, c0, c1, split, out[f]);
            }
            for (int64_t f = 0; f < count; ++f)
                for (int m = 0; m < M; ++m) convert(out[f][m] + addend.at(m, n0 + f), y[m * out_features + n0 + f]);
        }
    });
}

template <class T, class In, int M = kFewTile>
void few_tile(const In* x, const Weight& w, const Addend& addend, int64_t rows, int64_t out_features,
              int64_t in_features, In* y, Parallel parallel) {
    if constexpr (M > 0) {
        if (rows == M)
            few_rows<T, M>(x, w, addend, out_features, in_features, y, parallel);
        else
            few_tile<T, In, M - 1>(x, w, addend, rows, out_features, in_features, y, parallel);
    }
}

// Passes over W, each with as many rows of x as the next.
template <class In>
void few(const In* x, const Weight& w, const Addend& addend, int64_t rows, int64_t out_features, int64_t in_features,
         In* y, Parallel parallel) {
    const int64_t passes = ceil_div(rows, kFewTile);
    for (int64_t i = 0, m = 0; i < passes; ++i) {
        const int64_t count = ceil_div(rows - m, passes - i);
        few_tile<typename FewArithmetic<In>::type>(x + m * in_features, w, addend.from(m), count, out_features,
                                                   in_features, y + m * out_features, parallel);
        m += count;
    }
}

#endif

// ---- linear: few rows of any shape, on any level: rows of W decoded to L1
// ---------------------------------------------

constexpr int64_t kDotRows = 4;

template <class In>
void dot_rows(const In* x, const Weight& w, const Addend& addend, int64_t rows, int64_t out_features,
              int64_t in_features, In* y, Parallel parallel) {
    constexpr int64_t depth = 2048, lanes = 4 * Vec::size;
    Scratch<float> wide(rows * in_features);
    convert_row(x, rows * in_features, wide.data);
    parallel_for(parallel, out_features, ceil_div(kSmallWork, rows * in_features), [&](int64_t first, int64_t last) {
        alignas(64) float row[depth];
        for (int64_t n = first; n < last; ++n) {
            float total[kDotRows] = {};
            for (int64_t k0 = 0; k0 < in_features; k0 += depth) {
                const int64_t count = min(depth, in_features - k0);
                decode<In>(w, n * in_features + k0, n * in_features + k0 + count, row);
                for (int64_t m = 0; m < rows; ++m) {
                    const float* xm = wide + m * in_features + k0;
                    Vec acc[4] = {zero(), zero(), zero(), zero()};
                    int64_t k = 0;
                    for (; k + lanes <= count; k += lanes)
                        for (int v = 0; v < 4; ++v)
                            acc[v] = fma(load(row + k + v * Vec::size), load(xm + k + v * Vec::size), acc[v]);
                    float s = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
                    for (; k < count; ++k) s += row[k] * xm[k];
                    total[m] += s;
                }
            }
            for (int64_t m = 0; m < rows; ++m) convert(total[m] + addend.at(m, n), y[m * out_features + n]);
        }
    });
}

}  // namespace
}  // namespace tlk
