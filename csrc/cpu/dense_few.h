// The product of few rows with a dense weight: W streams by once, where it lies; the lanes run along k.
//
// The tile engine would copy every element of W for the sake of a few rows. Here a vector of W, once loaded, meets up
// to eight rows of x, and more rows come back to it while it is in L2. 2 flops a weight and row against its 2 or 4
// bytes.
#pragma once

#include "cpu/gemm.h"

namespace tlk {
namespace {

// Elements along k, a vector at a time.
template <class T, class In>
struct Along {
    static constexpr int64_t step = Vec::size;
    static Vec get(const In* p) { return load(p); }
};
#if defined(__AVX512BF16__)
template <>
struct Along<Bf16Pairs, bf16> {
    static constexpr int64_t step = 32;
    static __m512i get(const bf16* p) { return _mm512_loadu_si512(p); }
};
#endif

constexpr int64_t kDenseFewRows = 12;      // above, packing costs less than reading x again for every feature
constexpr int64_t kDenseFewFeatures = 16;  // of a unit of work: 16 rows of W stay in L2 for all rows of x
constexpr int kDenseFewTile = 8;           // rows of x at a time

// y[m][n + f] = W[n + f] . x[m] + addend, for F features and M rows; x is padded with zeros to whole vectors.
template <class T, class In, int M, int F>
void few_dots(const In* w, int64_t in_features, const In* x, int64_t x_stride, const Addend& addend, int64_t m0,
              int64_t n, int64_t out_features, In* y) {
    using A = Along<T, In>;
    Vec acc[F][M];
    for (auto& row : acc)
        for (Vec& a : row) a = zero();
    const auto step = [&](const In* at, int64_t stride, int64_t k) {
        decltype(A::get(at)) weight[F];
        for (int f = 0; f < F; ++f) weight[f] = A::get(at + f * stride);
        for (int m = 0; m < M; ++m) {
            const auto value = A::get(x + m * x_stride + k);
            for (int f = 0; f < F; ++f) acc[f][m] = T::multiply_add(weight[f], value, acc[f][m]);
        }
    };
    int64_t k = 0;
    for (; k + A::step <= in_features; k += A::step) step(w + k, in_features, k);
    if (k < in_features) {
        In rest[F * A::step] = {};
        for (int f = 0; f < F; ++f)
            memcpy(rest + f * A::step, w + f * in_features + k, size_t(in_features - k) * sizeof(In));
        step(rest, A::step, k);
    }
    for (int f = 0; f < F; ++f)
        for (int m = 0; m < M; ++m)
            convert(sum(acc[f][m]) + addend.at(m0 + m, n + f), y[(m0 + m) * out_features + n + f]);
}

template <class T, class In, int M = kDenseFewTile>
void few_features_of(int64_t rows, const In* w, int64_t in_features, const In* x, int64_t x_stride,
                     const Addend& addend, int64_t m0, int64_t n0, int64_t n1, int64_t out_features, In* y) {
    if constexpr (M > 0) {
        if (rows != M)
            return few_features_of<T, In, M - 1>(rows, w, in_features, x, x_stride, addend, m0, n0, n1, out_features,
                                                 y);
        // sums enough to hide the latency of the products, and not more than the registers
        constexpr int F = Vec::size == 16 ? (M <= 4 ? 4 : 2) : (M <= 2 ? 4 : M <= 4 ? 2 : 1);
        int64_t n = n0;
        for (; n + F <= n1; n += F)
            few_dots<T, In, M, F>(w + n * in_features, in_features, x, x_stride, addend, m0, n, out_features, y);
        for (; n < n1; ++n)
            few_dots<T, In, M, 1>(w + n * in_features, in_features, x, x_stride, addend, m0, n, out_features, y);
    }
}

template <class T, class In>
void few_dense(const In* x, const In* w, const Addend& addend, int64_t rows, int64_t out_features, int64_t in_features,
               In* y, Parallel parallel) {
    const int64_t stride = round_up(in_features, Along<T, In>::step);
    Scratch<In> padded(rows * stride);
    for (int64_t m = 0; m < rows; ++m) {
        memcpy(padded + m * stride, x + m * in_features, size_t(in_features) * sizeof(In));
        memset(padded + m * stride + in_features, 0, size_t(stride - in_features) * sizeof(In));
    }
    const int64_t passes = ceil_div(rows, kDenseFewTile);
    parallel_for(parallel, ceil_div(out_features, kDenseFewFeatures),
                 ceil_div(kSmallWork, rows * in_features * kDenseFewFeatures), [&](int64_t first, int64_t last) {
                     for (int64_t u = first; u < last; ++u) {
                         const int64_t n0 = u * kDenseFewFeatures, n1 = min(out_features, n0 + kDenseFewFeatures);
                         for (int64_t i = 0, m = 0; i < passes; ++i) {
                             const int64_t count = ceil_div(rows - m, passes - i);
                             few_features_of<T, In>(count, w, in_features, padded + m * stride, stride, addend, m, n0,
                                                    n1, out_features, y);
                             m += count;
                         }
                     }
                 });
}

}  // namespace
}  // namespace tlk
