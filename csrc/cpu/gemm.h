// The tile engine: a register tile over packed operands, for every product in the library.
//
//   C[r][j] (+)= sum_k A[r][k] * B[k][j]        r < rows <= kTileRows,  j < kTileCols
//
// One element of A is broadcast against kTileCols contiguous elements of B, which stays in L1 as a packed panel
// [k][kTileCols]; the accumulators stay in registers for the whole of k (12 x 2 vectors on AVX-512, 6 x 2 on AVX2).
// The operands' type is a trait: `Fp32` multiplies floats, `Bf16Pairs` multiplies pairs along k (vdpbf16ps), so an
// element of its panels is a 32-bit word of two bfloat16 numbers and its k counts pairs.
//
// Each element of C is a sum over the panels of a sum in the order of k, whatever the tiling: results do not depend on
// threads, and the error of a long sum grows with the panel's depth and the number of panels, not with their product.
#pragma once

#include "cpu/simd.h"

namespace tlk {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * Vec::size;

struct Fp32 {
    using element = float;  // of the unpacked operands
    using word = float;     // of the packed ones
    static constexpr int per_word = 1;
    using Reg = Vec;
    static Reg load_words(const word* p) { return load(p); }
    static Reg broadcast(const word* p) { return splat(*p); }
    static Vec multiply_add(Reg a, Reg b, Vec c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    using element = bf16;
    using word = uint32_t;
    static constexpr int per_word = 2;
    using Reg = __m512i;
    static Reg load_words(const word* p) { return _mm512_loadu_si512(p); }
    static Reg broadcast(const word* p) {
        uint32_t w;
        memcpy(&w, p, 4);  // rows of bfloat16 are only 2-byte aligned
        return _mm512_set1_epi32(int(w));
    }
    static Vec multiply_add(Reg a, Reg b, Vec c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)}; }
};
#endif

template <class T, int Rows>
void tile(const typename T::word* a, int64_t a_stride, const typename T::word* b, int64_t words, float* c,
          bool accumulate) {
    Vec acc[Rows][kTileVecs];
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVecs; ++v) acc[r][v] = zero();
    for (int64_t k = 0; k < words; ++k) {
        typename T::Reg column[kTileVecs];
        for (int v = 0; v < kTileVecs; ++v) column[v] = T::load_words(b + k * kTileCols + v * Vec::size);
        for (int r = 0; r < Rows; ++r) {
            const typename T::Reg x = T::broadcast(a + r * a_stride + k);
            for (int v = 0; v < kTileVecs; ++v) acc[r][v] = T::multiply_add(x, column[v], acc[r][v]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVecs; ++v) {
            float* out = c + r * kTileCols + v * Vec::size;
            store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
        }
}

// C[rows][kTileCols] (+)= A[rows][words] * panel; A's rows are a_stride words apart, C's are contiguous.
template <class T, int Rows = kTileRows>
void tile_rows(int64_t rows, const typename T::word* a, int64_t a_stride, const typename T::word* b, int64_t words,
               float* c, bool accumulate) {
    if constexpr (Rows == 0) {
        return;
    } else if (rows >= Rows) {
        tile<T, Rows>(a, a_stride, b, words, c, accumulate);
    } else {
        tile_rows<T, Rows - 1>(rows, a, a_stride, b, words, c, accumulate);
    }
}

// C (+)= A[rows][words] * B, with B as `panels` packed panels of [words][kTileCols], and C as panels of
// [rows][kTileCols]: a tile of C is contiguous, where rows of a wide matrix would be pages apart.
// Panels outside, so that one of B stays in L1 while all rows of A, in L2, pass over it.
template <class T>
void multiply(int64_t rows, int64_t panels, int64_t words, const typename T::word* a, int64_t a_stride,
              const typename T::word* b, float* c, bool accumulate) {
    for (int64_t p = 0; p < panels; ++p)
        for (int64_t r = 0; r < rows; r += kTileRows)
            tile_rows<T>(min<int64_t>(kTileRows, rows - r), a + r * a_stride, a_stride, b + p * words * kTileCols,
                         words, c + (p * rows + r) * kTileCols, accumulate);
}

}  // namespace
}  // namespace tlk
