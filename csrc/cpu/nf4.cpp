// NF4 on the CPU: quantize and decode. The products that read the 4-bit weight in place are those of lora.cpp, without
// an update.
//
//   quantize    reads 4 (2) bytes and writes 0.56 an element. A code comes from two look-ups in registers and one
//               comparison, 16 elements at a time.
//   dequantize  reads 0.56 bytes and writes 2 or 4 an element, so the store rate is its limit.
#include "cpu/nf4.h"

#include "cpu/level.h"

namespace tlk {
namespace {

// Larger outputs leave the caches before anybody reads them, so they need not pass through.
constexpr int64_t kStreamBytes = 16 << 20;

template <class Out>
void dequantize(const Weight& w, Out* out, Parallel parallel) {
    const int64_t blocks = ceil_div(w.numel, w.block_size);
    const bool stream = w.numel * int64_t(sizeof(Out)) > kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    parallel_for(parallel, blocks, ceil_div(32768, w.block_size), [&](int64_t first, int64_t last) {
        const int64_t begin = first << w.shift, end = min(w.numel, last << w.shift);
        if (stream)
            decode<Out, true>(w, begin, end, out + begin);
        else
            decode<Out>(w, begin, end, out + begin);
#if defined(__AVX2__)
        if (stream) _mm_sfence();
#endif
    });
}

}  // namespace

void TLK_LEVEL::nf4_dequantize(const Nf4& w, void* out, Dtype dtype, Parallel parallel) {
    switch (dtype) {
        case Dtype::float32:
            return dequantize(Weight(w), static_cast<float*>(out), parallel);
        case Dtype::bfloat16:
            return dequantize(Weight(w), static_cast<bf16*>(out), parallel);
        case Dtype::float16:
            return dequantize(Weight(w), static_cast<f16*>(out), parallel);
    }
}

namespace {

template <class Out>
void embedding(const int64_t* indices, int64_t n, const Weight& w, int64_t dim, Out* out, Parallel parallel) {
    parallel_for(parallel, n, ceil_div(32768, dim + 1), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) decode<Out>(w, indices[i] * dim, (indices[i] + 1) * dim, out + i * dim);
    });
}

}  // namespace

void TLK_LEVEL::nf4_embedding(const int64_t* indices, int64_t n, const Nf4& w, int64_t dim, void* out, Dtype dtype,
                              Parallel parallel) {
    switch (dtype) {
        case Dtype::float32:
            return embedding(indices, n, Weight(w), dim, static_cast<float*>(out), parallel);
        case Dtype::bfloat16:
            return embedding(indices, n, Weight(w), dim, static_cast<bf16*>(out), parallel);
        case Dtype::float16:
            return embedding(indices, n, Weight(w), dim, static_cast<f16*>(out), parallel);
    }
}

namespace {

// ---- quantizing ------------------------------------------------------------------------------------------------

constexpr float kTiny = 1e-38f;  // below this the reciprocal of absmax would overflow
constexpr int64_t kMaxBlock = 4096;

// The largest magnitude; NaN if there is one, because its bit pattern is above infinity's.
inline float largest(const float* w, int64_t n) {
    uint32_t m = 0;
    int64_t i = 0;
#if defined(__AVX512F__)
    __m512i top = _mm512_setzero_si512();
    for (; i + 16 <= n; i += 16)
        top = _mm512_max_epu32(top, _mm512_and_epi32(_mm512_loadu_si512(w + i), _mm512_set1_epi32(0x7fffffff)));
    m = _mm512_reduce_max_epu32(top);
#endif
    for (; i < n; ++i) m = max(m, bits_of(w[i]) & 0x7fffffff);
    return float_of(m);
}

// The 16 entries in ascending order, where each stood in the caller's table, and the midpoints between neighbours.
struct Encoder {
    float midpoint[16];
    int32_t order[16];
    uint8_t zero;  // the code of 0, which fills the spare nibble of an odd size

    explicit Encoder(const float* code) {
        for (int i = 0; i < 16; ++i) {  // insertion sort, stable
            int j = i;
            for (; j > 0 && code[i] < code[order[j - 1]]; --j) order[j] = order[j - 1];
            order[j] = i;
        }
        for (int i = 0; i < 15; ++i) midpoint[i] = (code[order[i]] + code[order[i + 1]]) * 0.5f;
        midpoint[15] = 0.f;
        zero = encode(0.f);
    }
    // The number of midpoints below v, NaN counting as above all.
    uint8_t encode(float v) const {
        int below = 0;
        for (int i = 0; i < 15; ++i) below += !(v <= midpoint[i]);
        return uint8_t(order[below]);
    }
};

#if defined(__AVX512F__)
// The same count, 16 at a time. [-1, 1] is cut into 32 cells; where no cell holds two midpoints, as in NF4, a cell has
// at most two codes, and one comparison with its midpoint decides between them. Cells are found by a monotonic
// function, evaluated on the midpoints as on the data, so the result is exact. Other tables take a binary search: each
// of its four steps looks the next midpoint up with the bits found so far.
struct WideEncoder : Encoder {
    struct Cells {
        __m512 midpoint[2];  // +inf where a cell has none
        __m512i lower[2], upper[2];

        __m512i operator()(__m512 v) const {
            const __m512i c = cell(v);
            const __mmask16 above =
                _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(midpoint[0], c, midpoint[1]), _CMP_NLE_UQ);
            const __m512i low = _mm512_permutex2var_epi32(lower[0], c, lower[1]);
            return _mm512_mask_mov_epi32(low, above, _mm512_permutex2var_epi32(upper[0], c, upper[1]));
        }
    };
    struct Search {
        __m512 m8, m4, m2, m1;
        __m512i order;

        __m512i operator()(__m512 v) const {
            __m512i i = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(v, m8, _CMP_NLE_UQ), _mm512_set1_epi32(8));
            const auto step = [&](__m512 table, int bit) {
                const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(i, table), _CMP_NLE_UQ);
                i = _mm512_mask_or_epi32(i, above, i, _mm512_set1_epi32(bit));
            };
            step(m4, 4), step(m2, 2), step(m1, 1);
            return _mm512_permutexvar_epi32(i, order);
        }
    };
    bool one_a_cell = true;
    Cells cells;
    Search search;

    explicit WideEncoder(const float* code) : Encoder(code) {
        float middle[32];
        int32_t lower[32], upper[32], at[16], below = 0;
        for (int i = 0; i < 15; ++i) {
            one_a_cell = one_a_cell && midpoint[i] >= -1.f && midpoint[i] <= 1.f;
            at[i] = one_a_cell ? _mm_cvtsi128_si32(_mm512_castsi512_si128(cell(_mm512_set1_ps(midpoint[i])))) : 0;
            one_a_cell = one_a_cell && (i == 0 || at[i] > at[i - 1]);
        }
        for (int c = 0; c < 32; ++c) {
            const bool holds = below < 15 && at[below] == c;
            middle[c] = holds ? midpoint[below] : __builtin_inff();
            lower[c] = order[below];
            below += holds && one_a_cell;
            upper[c] = order[below];
        }
        for (int half = 0; half < 2; ++half) {
            cells.midpoint[half] = _mm512_loadu_ps(middle + 16 * half);
            cells.lower[half] = _mm512_loadu_si512(lower + 16 * half);
            cells.upper[half] = _mm512_loadu_si512(upper + 16 * half);
        }
        float shifted[16] = {};
        search.m8 = _mm512_set1_ps(midpoint[7]);
        const auto table = [&](int step) {
            for (int i = 0; i + step - 1 < 16; ++i) shifted[i] = midpoint[i + step - 1];
            return _mm512_loadu_ps(shifted);
        };
        search.m4 = table(4), search.m2 = table(2), search.m1 = table(1);
        search.order = _mm512_loadu_si512(order);
    }
    // 0 .. 31 for v in [-1, 1], and for what rounding leaves just outside.
    static __m512i cell(__m512 v) {
        return _mm512_cvttps_epi32(_mm512_fmadd_ps(v, _mm512_set1_ps(15.9f), _mm512_set1_ps(16.f)));
    }
};
using BlockEncoder = WideEncoder;
#else
using BlockEncoder = Encoder;
#endif

// The codes of one block, two a byte. A short last block divides where the others multiply by the reciprocal.
inline void quantize_block(const float* w, int64_t n, bool last_and_short, float absmax, const BlockEncoder& encoder,
                           uint8_t* packed) {
    const float divisor = absmax < kTiny ? kTiny : absmax, reciprocal = 1.f / divisor;
    const bool infinite = !(absmax < __builtin_inff());  // or NaN, which hides one
    const auto normalised = [&](float x) {
        if (infinite && bits_of(x) << 1 == 0xff000000u) return x > 0 ? 1.f : -1.f;
        return last_and_short ? x / divisor : x * reciprocal;
    };
    int64_t i = 0;
#if defined(__AVX512F__)
    if (!infinite && !last_and_short) {
        const __m512 r = _mm512_set1_ps(reciprocal);
        const auto run = [&](auto wide) {
            for (; i + 16 <= n; i += 16) {
                const __m512i q = wide(_mm512_mul_ps(_mm512_loadu_ps(w + i), r));
                // a pair is a 64-bit word (even, odd): even << 4 | odd
                const __m512i pair = _mm512_or_epi64(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
                _mm_storel_epi64((__m128i*)(packed + i / 2), _mm512_cvtepi64_epi8(pair));
            }
        };
        // copies: the compiler would read the tables anew after each store of bytes, which may alias anything
        if (encoder.one_a_cell)
            run(WideEncoder::Cells(encoder.cells));
        else
            run(WideEncoder::Search(encoder.search));
    }
#else
    if (!infinite && !last_and_short) {
        // 15 comparisons an element, without branches: the compiler vectorises them.
        uint8_t below[kMaxBlock];
        int32_t count[64];
        for (; i + 64 <= n; i += 64) {
            for (int j = 0; j < 64; ++j) count[j] = 0;
            for (int m = 0; m < 15; ++m)
                for (int j = 0; j < 64; ++j) count[j] += !(w[i + j] * reciprocal <= encoder.midpoint[m]);
            for (int j = 0; j < 64; ++j) below[j] = uint8_t(encoder.order[count[j]]);
            for (int j = 0; j < 32; ++j) packed[i / 2 + j] = uint8_t(below[2 * j] << 4 | below[2 * j + 1]);
        }
    }
#endif
    for (; i < n; i += 2) {
        const uint8_t even = encoder.encode(normalised(w[i]));
        const uint8_t odd = i + 1 < n ? encoder.encode(normalised(w[i + 1])) : encoder.zero;
        packed[i / 2] = uint8_t(even << 4 | odd);
    }
}

template <class In>
void quantize(const In* w, int64_t numel, int64_t block_size, const float* code, uint8_t* packed, float* absmax,
              Parallel parallel) {
    const BlockEncoder encoder(code);
    parallel_for(parallel, ceil_div(numel, block_size), ceil_div(16384, block_size), [&](int64_t first, int64_t last) {
        float widened[kMaxBlock];
        for (int64_t b = first; b < last; ++b) {
            const int64_t begin = b * block_size, n = min(block_size, numel - begin);
            const float* block = widened;
            if constexpr (sizeof(In) == 4)
                block = w + begin;
            else
                convert_row(w + begin, n, widened);
            absmax[b] = largest(block, n);
            quantize_block(block, n, n < block_size, absmax[b], encoder, packed + begin / 2);
        }
    });
}

}  // namespace

void TLK_LEVEL::nf4_quantize(const void* w, Dtype dtype, int64_t numel, int64_t block_size, const float* code,
                             uint8_t* packed, float* absmax, Parallel parallel) {
    const auto run = [&](auto* p) { quantize(p, numel, block_size, code, packed, absmax, parallel); };
    switch (dtype) {
        case Dtype::float32:
            return run(static_cast<const float*>(w));
        case Dtype::bfloat16:
            return run(static_cast<const bf16*>(w));
        case Dtype::float16:
            return run(static_cast<const f16*>(w));
    }
}

namespace {

// ---- 8-bit scales ----------------------------------------------------------------------------------------------

}  // namespace

void TLK_LEVEL::absmax_quantize(const float* absmax, int64_t n, int64_t block_size, float offset, uint8_t* q,
                                float* scale, Parallel parallel) {
    float midpoint[255];
    for (int i = 0; i < 255; ++i) midpoint[i] = (dynamic_code[i] + dynamic_code[i + 1]) * 0.5f;
    parallel_for(parallel, ceil_div(n, block_size), ceil_div(4096, block_size), [&](int64_t first, int64_t last) {
        float shifted[kMaxBlock];
        for (int64_t b = first; b < last; ++b) {
            const int64_t begin = b * block_size, count = min(block_size, n - begin);
            for (int64_t i = 0; i < count; ++i) shifted[i] = absmax[begin + i] - offset;
            const float top = largest(shifted, count);
            scale[b] = top;
            const float divisor = top < kTiny ? kTiny : top, reciprocal = 1.f / divisor;
            for (int64_t i = 0; i < count; ++i) {
                float v = count < block_size ? shifted[i] / divisor : shifted[i] * reciprocal;
                if (bits_of(shifted[i]) << 1 == 0xff000000u) v = shifted[i] > 0 ? 1.f : -1.f;
                int below = 0;  // binary search without branches: 128 + 64 + ... + 1
                for (int step = 128; step > 0; step >>= 1) below += !(v <= midpoint[below + step - 1]) ? step : 0;
                q[begin + i] = uint8_t(below);
            }
        }
    });
}

float TLK_LEVEL::absmax_mean(const float* absmax, int64_t n) {
    double lane[8] = {};  // a fixed order that vectorises
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) lane[j] += double(absmax[i + j]);
    double total = ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
    for (; i < n; ++i) total += double(absmax[i]);
    return float(total / double(n));
}

void TLK_LEVEL::absmax_dequantize(const uint8_t* q, const float* scale, float offset, int64_t n, int64_t block_size,
                                  float* absmax, Parallel parallel) {
    parallel_for(parallel, ceil_div(n, block_size), ceil_div(16384, block_size), [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b)
            for (int64_t i = b * block_size; i < min(n, (b + 1) * block_size); ++i)
                absmax[i] = dynamic_code[q[i]] * scale[b] + offset;
    });
}

void TLK_LEVEL::nf4_linear(const void* x, Dtype dtype, const Nf4& w, const float* bias, int64_t rows,
                           int64_t out_features, int64_t in_features, void* y, Parallel parallel) {
    lora_linear(x, dtype, Base{nullptr, w}, bias, Lora{}, rows, out_features, in_features, y, nullptr, parallel);
}

void TLK_LEVEL::nf4_linear_t(const void* g, Dtype dtype, const Nf4& w, int64_t rows, int64_t out_features,
                             int64_t in_features, void* gx, Parallel parallel) {
    lora_grad_x(g, dtype, Base{nullptr, w}, nullptr, Lora{}, rows, out_features, in_features, gx, parallel);
}

}  // namespace tlk
