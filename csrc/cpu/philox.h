// The dropout mask, from a counter: Philox-4x32-10 (Salmon et al. 2011), 16 bits for each element.
//
// Eight neighbours along a row share one counter (col / 8, row, offset) and so one 128-bit block; a block gives one
// byte of the mask, bit i for column i of the eight, 1 where the element is kept. 16 blocks are made at a time.
#pragma once

#include "cpu/simd.h"

namespace tlk {
namespace {

struct Dropout {
    uint64_t seed, offset;
    uint32_t threshold;  // an element is kept where its 16 bits are not below
    Dropout(uint64_t seed_, uint64_t offset_, float p)
        : seed(seed_), offset(offset_), threshold(min<uint32_t>(65535, uint32_t(double(p) * 65536.0 + 0.5))) {}

    static constexpr int kBlocks = 16;
    // The counters of 16 blocks: (col + i % per_row, row + i / per_row), per_row a power of two; `out` gets their
    // bytes.
    void bytes(uint32_t col, uint32_t row, int per_row, uint8_t* out) const;
    // Twice as many, of one row.
    void row_bytes(uint32_t col, uint32_t row, uint8_t* out) const;

    // out[ceil(n / 8)]: the bits of row `row`, columns [8 * first, 8 * first + n)
    void row_bits(int64_t row, int64_t first, int64_t n, uint8_t* out) const {
        const int64_t count = ceil_div(n, 8);
        for (int64_t b = 0; b < count; b += 2 * kBlocks) {
            uint8_t block[2 * kBlocks];
            if (count - b > kBlocks)
                row_bytes(uint32_t(first + b), uint32_t(row), block);
            else
                bytes(uint32_t(first + b), uint32_t(row), kBlocks, block);
            memcpy(out + b, block, size_t(min<int64_t>(2 * kBlocks, count - b)));
        }
    }
};

#if defined(__AVX512F__)

// The high and low halves of 16 products of 32 bits.
inline void multiply_wide(__m512i a, __m512i m, __m512i& high, __m512i& low) {
    const __m512i even = _mm512_mul_epu32(a, m), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), m);
    low = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    high = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
}

struct Counter {
    __m512i c0, c1, c2, c3;
    void round(uint32_t k0, uint32_t k1) {
        __m512i high0, low0, high1, low1;
        multiply_wide(c0, _mm512_set1_epi64(0xD2511F53), high0, low0);
        multiply_wide(c2, _mm512_set1_epi64(0xCD9E8D57), high1, low1);
        c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(int(k0)), 0x96);  // xor of the three
        c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(int(k1)), 0x96);
        c1 = low1;
        c3 = low0;
    }
    // Word w holds elements 2 w (low half) and 2 w + 1: each half leaves its bit at its place.
    void kept(uint32_t threshold, uint8_t* out) const {
        const __m512i least = _mm512_set1_epi16(short(threshold));
        const auto bit = [&](__m512i word, int w) {
            return _mm512_maskz_mov_epi16(_mm512_cmpge_epu16_mask(word, least),
                                          _mm512_set1_epi32(int(1u << (2 * w) | 2u << (2 * w + 16))));
        };
        const __m512i bits =
            _mm512_or_si512(_mm512_or_si512(bit(c0, 0), bit(c1, 1)), _mm512_or_si512(bit(c2, 2), bit(c3, 3)));
        _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8(_mm512_or_si512(bits, _mm512_srli_epi32(bits, 16))));
    }
};

// N groups of 16 blocks: a round waits for its multiplications, so groups share the wait.
template <int N>
inline void generate(const Dropout& d, Counter (&group)[N], uint8_t* out) {
    for (Counter& c : group) {
        c.c2 = _mm512_set1_epi32(int(uint32_t(d.offset)));
        c.c3 = _mm512_set1_epi32(int(uint32_t(d.offset >> 32)));
    }
    uint32_t k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (Counter& c : group) c.round(k0, k1);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    for (int i = 0; i < N; ++i) group[i].kept(d.threshold, out + 16 * i);
}

inline __m512i lanes() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline void Dropout::bytes(uint32_t col, uint32_t row, int per_row, uint8_t* out) const {
    const __m512i i = lanes(), mask = _mm512_set1_epi32(per_row - 1);
    Counter group[1];
    group[0].c0 = _mm512_add_epi32(_mm512_set1_epi32(int(col)), _mm512_and_epi32(i, mask));
    group[0].c1 = _mm512_add_epi32(_mm512_set1_epi32(int(row)),
                                   _mm512_srl_epi32(i, _mm_cvtsi32_si128(__builtin_ctz(unsigned(per_row)))));
    generate(*this, group, out);
}

inline void Dropout::row_bytes(uint32_t col, uint32_t row, uint8_t* out) const {
    Counter group[2];
    group[0].c0 = _mm512_add_epi32(_mm512_set1_epi32(int(col)), lanes());
    group[1].c0 = _mm512_add_epi32(_mm512_set1_epi32(int(col + 16)), lanes());
    group[0].c1 = group[1].c1 = _mm512_set1_epi32(int(row));
    generate(*this, group, out);
}

#else

inline void Dropout::bytes(uint32_t col, uint32_t row, int per_row, uint8_t* out) const {
    uint32_t c0[kBlocks], c1[kBlocks], c2[kBlocks], c3[kBlocks];
    for (int i = 0; i < kBlocks; ++i) {
        c0[i] = col + uint32_t(i % per_row);
        c1[i] = row + uint32_t(i / per_row);
        c2[i] = uint32_t(offset);
        c3[i] = uint32_t(offset >> 32);
    }
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kBlocks; ++i) {
            const uint64_t p0 = uint64_t(c0[i]) * 0xD2511F53u, p1 = uint64_t(c2[i]) * 0xCD9E8D57u;
            c0[i] = uint32_t(p1 >> 32) ^ c1[i] ^ k0;
            c2[i] = uint32_t(p0 >> 32) ^ c3[i] ^ k1;
            c1[i] = uint32_t(p1);
            c3[i] = uint32_t(p0);
        }
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    for (int i = 0; i < kBlocks; ++i) {
        const uint32_t words[4] = {c0[i], c1[i], c2[i], c3[i]};
        uint32_t byte = 0;
        for (int w = 0; w < 4; ++w) {
            byte |= uint32_t((words[w] & 0xffff) >= threshold) << (2 * w);
            byte |= uint32_t((words[w] >> 16) >= threshold) << (2 * w + 1);
        }
        out[i] = uint8_t(byte);
    }
}

inline void Dropout::row_bytes(uint32_t col, uint32_t row, uint8_t* out) const {
    bytes(col, row, kBlocks, out);
    bytes(col + kBlocks, row, kBlocks, out + kBlocks);
}

#endif

// x[i] = 0 where bit i is 0.
template <class T>
inline void keep(T* x, int64_t n, const uint8_t* bits) {
    int64_t i = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
        for (; i + 32 <= n; i += 32) {
            uint32_t mask;
            memcpy(&mask, bits + i / 8, 4);
            _mm512_storeu_si512(x + i, _mm512_maskz_loadu_epi16(mask, x + i));
        }
    } else {
        for (; i + 16 <= n; i += 16) {
            uint16_t mask;
            memcpy(&mask, bits + i / 8, 2);
            _mm512_storeu_ps(x + i, _mm512_maskz_loadu_ps(mask, x + i));
        }
    }
#endif
    for (; i < n; ++i)
        if ((bits[i / 8] >> (i % 8) & 1) == 0) x[i] = {};
}

// As a map of an operand whose rows are the input's: runs begin at multiples of 8.
struct Masked {
    static constexpr bool none = false, on_elements = true;
    Dropout dropout;
    template <class T>
    void operator()(T* x, int64_t n, int64_t row, int64_t start) const {
        uint8_t bits[64];
        for (int64_t i = 0; i < n; i += 512) {
            const int64_t count = min<int64_t>(512, n - i);
            dropout.row_bits(row, (start + i) / 8, count, bits);
            keep(x + i, count, bits);
        }
    }
};

// As what is done to C between its terms: C = mask o C / (1 - p). Panels begin at multiples of 8.
struct Gate {
    Dropout dropout;
    float scale;
    void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) const {
        // as many rows at a time as fill the generator
        int per_row = 1;
        while (8 * per_row < cols) per_row *= 2;
        const int64_t together = Dropout::kBlocks / per_row;
        const Vec factor = splat(scale);
        for (int64_t r = 0; r < rows; r += together) {
            uint8_t bits[Dropout::kBlocks];
            dropout.bytes(uint32_t(j / 8), uint32_t(i + r), per_row, bits);
            for (int64_t q = 0; q < min(together, rows - r); ++q) {
                float* line = c + (r + q) * width;  // all of the panel's width: what is beyond C is not looked at
                for (int64_t l = 0; l < width; l += Vec::size) store(line + l, load(line + l) * factor);
                keep(line, cols, bits + q * per_row);
            }
        }
    }
};

}  // namespace
}  // namespace tlk
