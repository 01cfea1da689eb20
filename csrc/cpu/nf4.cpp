// NF4 on the CPU: quantize, decode, and the products that read the 4-bit weight in place.
//
//   quantize    reads 4 (2) bytes and writes 0.56 an element. A code comes from two look-ups in registers and one
//               comparison, 16 elements at a time.
//   dequantize  reads 0.56 bytes and writes 2 or 4 an element, so the store rate is its limit. For each block the 16
//               possible results code[i] * absmax are computed and rounded first; an element is then one table look-up
//               in a register and is rounded exactly once.
//   linear      y = x W^T, 2 flops a weight and row. Three ways, by the number of rows:
//               few rows    the weight streams by once, 0.56 bytes an element, and is decoded in registers. Even and
//                           odd elements stay apart (a nibble shift each), so x is split that way first.
//               more rows   whole rows of W are decoded to L2 once and multiplied with a block of rows of x by the tile
//                           engine: elements of W are broadcast, rows of x are the lanes.
//               any shape   few rows, where in_features is not a multiple of 64 or the level has no such registers:
//                           a row of W at a time is decoded to L1.
//   linear_t    gx = gy W: the same engine with W's decoded rows as the lanes, gy broadcast.
//
// A dense copy of W never exists: the largest scratch is the packed block of activations (kPackedBytes).
// Work is cut by output features (linear) or input features (linear_t), in blocks that do not depend on threads.
#include "cpu/gemm.h"
#include "cpu/level.h"
#include "cpu/simd.h"

namespace tlk {
namespace {

// ---- the weight, read by flat position -------------------------------------------------------------------------

struct Weight : Nf4 {
    int shift, absmax_shift;
    float subnormal_below;  // of absmax: from here on no entry of a block is a subnormal number
    explicit Weight(const Nf4& w)
        : Nf4(w),
          shift(__builtin_ctzll(uint64_t(w.block_size))),
          absmax_shift(__builtin_ctzll(uint64_t(w.absmax_block_size))) {
        float least = 1.f;
        for (int i = 0; i < 16; ++i)
            if (w.code[i] != 0.f) least = min(least, __builtin_fabsf(w.code[i]));
        subnormal_below = 0x1p-125f / least;
    }

    // Two roundings, as the format has it (the build forbids contraction into one).
    float scale(int64_t block) const {
        if (absmax != nullptr) return absmax[block];
        return dynamic_code[absmax_q[block]] * absmax_scale[block >> absmax_shift] + absmax_offset;
    }
    int nibble(int64_t i) const { return i & 1 ? packed[i >> 1] & 15 : packed[i >> 1] >> 4; }
};

// ---- decoding a block: a table of its 16 results, then look-ups --------------------------------------------------

#if defined(__AVX512F__)

template <class Out>
struct Decoder;

template <>
struct Decoder<float> {
    __m512 table;
    template <class Rounded>
    Decoder(const Weight& w, float absmax, Rounded as) : table(round_to(load(w.code) * splat(absmax), as).v) {}

    // 16 bytes -> 32 floats. Interleaving even and odd elements works within 128-bit lanes, so the bytes are first put
    // where each lane finds those of its own two results.
    template <bool Stream>
    void run32(const uint8_t* p, float* out) const {
        const __m128i lanes = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
        const __m512i d = _mm512_cvtepu8_epi32(_mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p), lanes));
        const __m512 even = _mm512_permutexvar_ps(_mm512_srli_epi32(d, 4), table);
        const __m512 odd = _mm512_permutexvar_ps(d, table);  // reads the low four bits only
        put<Stream>(out, _mm512_castps_si512(_mm512_unpacklo_ps(even, odd)));
        put<Stream>(out + 16, _mm512_castps_si512(_mm512_unpackhi_ps(even, odd)));
    }
    template <bool Stream>
    void run64(const uint8_t* p, float* out) const {
        run32<Stream>(p, out);
        run32<Stream>(p + 16, out + 32);
    }
    template <bool Stream>
    static void put(void* out, __m512i x) {
        if constexpr (Stream)
            _mm512_stream_si512((__m512i*)out, x);
        else
            _mm512_storeu_si512(out, x);
    }
};

// The 16 results, twice: a look-up index has five bits, and the fifth is the neighbour's.
inline __m512i twice(__m256i table) { return _mm512_broadcast_i64x4(table); }
inline __m512i table_of(const Weight& w, float absmax, f16) {
    return twice(_mm512_cvtps_ph(_mm512_mul_ps(_mm512_loadu_ps(w.code), _mm512_set1_ps(absmax)), 0));
}
inline __m512i table_of(const Weight& w, float absmax, bf16) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(w.code), _mm512_set1_ps(absmax));
#if defined(__AVX512BF16__)
    // vcvtne2ps2bf16 rounds to nearest even but takes subnormal numbers for zero.
    if (absmax >= w.subnormal_below) return (__m512i)_mm512_cvtne2ps_pbh(x, x);
#endif
    return twice(round_bf16(x));
}

template <class Half>
struct HalfDecoder {
    __m512i table;
    HalfDecoder(const Weight& w, float absmax, Half as) : table(table_of(w, absmax, as)) {}
    template <bool Stream>
    void run32(const uint8_t* p, Half* out) const {
        const __m128i b = _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)p), 0xd8);
        const __m256i w = _mm256_cvtepu8_epi16(b), t = _mm512_castsi512_si256(table);
        const __m256i even = _mm256_permutexvar_epi16(_mm256_srli_epi16(w, 4), t);
        const __m256i odd = _mm256_permutexvar_epi16(w, t);
        const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
        if constexpr (Stream) {
            _mm256_stream_si256((__m256i*)out, low);
            _mm256_stream_si256((__m256i*)(out + 16), high);
        } else {
            _mm256_storeu_si256((__m256i*)out, low);
            _mm256_storeu_si256((__m256i*)(out + 16), high);
        }
    }
    // 32 bytes -> 64 halves; the dwords are put where each 128-bit lane finds its own, as above.
    template <bool Stream>
    void run64(const uint8_t* p, Half* out) const {
        const __m256i lanes = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i b = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), lanes);
        const __m512i w = _mm512_cvtepu8_epi16(b);
        const __m512i even = _mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4), table);
        const __m512i odd = _mm512_permutexvar_epi16(w, table);
        Decoder<float>::put<Stream>(out, _mm512_unpacklo_epi16(even, odd));
        Decoder<float>::put<Stream>(out + 32, _mm512_unpackhi_epi16(even, odd));
    }
};
template <>
struct Decoder<bf16> : HalfDecoder<bf16> {
    using HalfDecoder::HalfDecoder;
};
template <>
struct Decoder<f16> : HalfDecoder<f16> {
    using HalfDecoder::HalfDecoder;
};

#elif defined(__AVX2__)

template <class Out>
struct Decoder;

template <>
struct Decoder<float> {
    __m256 low, high;  // results 0..7 and 8..15
    template <class Rounded>
    Decoder(const Weight& w, float absmax, Rounded as)
        : low(round_to(load(w.code) * splat(absmax), as).v), high(round_to(load(w.code + 8) * splat(absmax), as).v) {}

    // A look-up reads three bits of the index; the fourth, shifted into the sign, picks the half.
    __m256 look_up(__m256i index, __m256i fourth) const {
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                                _mm256_castsi256_ps(fourth));
    }
    template <bool Stream>
    void run16(const uint8_t* p, float* out) const {
        const __m256i d = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
        const __m256 even = look_up(_mm256_srli_epi32(d, 4), _mm256_slli_epi32(d, 24));
        const __m256 odd = look_up(d, _mm256_slli_epi32(d, 28));
        const __m256 a = _mm256_unpacklo_ps(even, odd), b = _mm256_unpackhi_ps(even, odd);
        const __m256 first = _mm256_permute2f128_ps(a, b, 0x20), second = _mm256_permute2f128_ps(a, b, 0x31);
        if constexpr (Stream) {
            _mm256_stream_ps(out, first);
            _mm256_stream_ps(out + 8, second);
        } else {
            _mm256_storeu_ps(out, first);
            _mm256_storeu_ps(out + 8, second);
        }
    }
    template <bool Stream>
    void run32(const uint8_t* p, float* out) const {
        run16<Stream>(p, out);
        run16<Stream>(p + 8, out + 16);
    }
    template <bool Stream>
    void run64(const uint8_t* p, float* out) const {
        run32<Stream>(p, out);
        run32<Stream>(p + 16, out + 32);
    }
};

// The results' low and high bytes are looked up apart (vpshufb) and interleaved.
template <class Half>
struct HalfDecoder {
    __m256i low, high;
    HalfDecoder(const Weight& w, float absmax, Half) {
        Half t[16];
        for (int i = 0; i < 16; i += 8) store(t + i, load(w.code + i) * splat(absmax));
        const __m128i a = _mm_loadu_si128((const __m128i*)t), b = _mm_loadu_si128((const __m128i*)(t + 8));
        const __m128i byte = _mm_set1_epi16(0xff);
        low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
        high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
    }
    template <bool Stream>
    void run32(const uint8_t* p, Half* out) const {
        const __m128i b = _mm_loadu_si128((const __m128i*)p), nibble = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), nibble), odd = _mm_and_si128(b, nibble);
        const __m256i index = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi8(even, odd)),
                                                      _mm_unpackhi_epi8(even, odd), 1);
        const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
        const __m256i x = _mm256_unpacklo_epi8(l, h), y = _mm256_unpackhi_epi8(l, h);
        const __m256i first = _mm256_permute2x128_si256(x, y, 0x20), second = _mm256_permute2x128_si256(x, y, 0x31);
        if constexpr (Stream) {
            _mm256_stream_si256((__m256i*)out, first);
            _mm256_stream_si256((__m256i*)(out + 16), second);
        } else {
            _mm256_storeu_si256((__m256i*)out, first);
            _mm256_storeu_si256((__m256i*)(out + 16), second);
        }
    }
    template <bool Stream>
    void run64(const uint8_t* p, Half* out) const {
        run32<Stream>(p, out);
        run32<Stream>(p + 16, out + 32);
    }
};
template <>
struct Decoder<bf16> : HalfDecoder<bf16> {
    using HalfDecoder::HalfDecoder;
};
template <>
struct Decoder<f16> : HalfDecoder<f16> {
    using HalfDecoder::HalfDecoder;
};

#else

template <class Out>
struct Decoder {
    Out table[16];
    template <class Rounded>
    Decoder(const Weight& w, float absmax, Rounded as) {
        for (int i = 0; i < 16; ++i) convert(round_to(w.code[i] * absmax, as), table[i]);
    }
    template <bool Stream>
    void run32(const uint8_t* p, Out* out) const {
        for (int i = 0; i < 16; ++i) {
            out[2 * i] = table[p[i] >> 4];
            out[2 * i + 1] = table[p[i] & 15];
        }
    }
    template <bool Stream>
    void run64(const uint8_t* p, Out* out) const {
        run32<Stream>(p, out);
        run32<Stream>(p + 16, out + 32);
    }
};

#endif

// `count` whole blocks. BlockSize is theirs where the compiler is to know it, else 0.
template <class Rounded, bool Stream, int BlockSize, class Out>
void decode_blocks(const Weight& w, int64_t block, int64_t count, Out* out) {
    const int64_t block_size = BlockSize > 0 ? BlockSize : w.block_size;
    const uint8_t* p = w.packed + (block << w.shift) / 2;
    for (const int64_t end = block + count; block < end; ++block) {
        const Decoder<Out> decoder(w, w.scale(block), Rounded{});
        if (block_size == 32) {
            decoder.template run32<Stream>(p, out);
            p += 16, out += 32;
        }
        for (int64_t i = 0; i + 64 <= block_size; i += 64, p += 32, out += 64) decoder.template run64<Stream>(p, out);
    }
}

// out[0 .. end - begin) = elements [begin, end) of the flat weight. A row of a matrix may begin anywhere in a block,
// and in the low nibble of a byte. The results are those of `Rounded`, even where they are handed on as float.
// Streaming wants begin at a block's start and out aligned to 64 bytes.
template <class Rounded, bool Stream = false, class Out>
void decode(const Weight& w, int64_t begin, int64_t end, Out* out) {
    while (begin < end) {
        const int64_t block = begin >> w.shift, stop = min(end, (block + 1) << w.shift);
        if (stop - begin == w.block_size) {
            const int64_t count = (end - begin) >> w.shift;
            if (w.block_size == 64)
                decode_blocks<Rounded, Stream, 64>(w, block, count, out);
            else
                decode_blocks<Rounded, Stream, 0>(w, block, count, out);
            begin += count << w.shift, out += count << w.shift;
            continue;
        }
        const float absmax = w.scale(block);
        const auto one = [&] { convert(round_to(w.code[w.nibble(begin++)] * absmax, Rounded{}), *out++); };
        if (begin & 1) one();
        if (stop - begin >= 32) {
            const Decoder<Out> decoder(w, absmax, Rounded{});
            for (; begin + 32 <= stop; begin += 32, out += 32)
                decoder.template run32<Stream>(w.packed + begin / 2, out);
        }
        while (begin < stop) one();
    }
}

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

namespace {

// ---- linear: shared ----------------------------------------------------------------------------------------------

// The operands' type of the tile engine for activations of type In.
template <class In>
struct Arithmetic {
    using type = Fp32;
};
#if defined(__AVX512BF16__)
template <>
struct Arithmetic<bf16> {
    using type = Bf16Pairs;
};
#endif

constexpr int64_t kDepth = 256;            // words along k of a panel: [256][32] words are 32 KiB, in L1
constexpr int64_t kPackedBytes = 2 << 20;  // of packed activations
constexpr int64_t kSmallWork = 1 << 16;    // multiply-adds below which a thread is not worth waking

// How many rows of activations are packed at a time: a multiple of the tile's columns.
inline int64_t row_block(int64_t rows, int64_t depth, int64_t word_bytes, int64_t per_word) {
    const int64_t bytes_a_row = max<int64_t>(1, ceil_div(depth, per_word) * word_bytes);
    const int64_t fit = max<int64_t>(kTileCols, kPackedBytes / bytes_a_row / kTileCols * kTileCols);
    return min(fit, round_up(rows, kTileCols));
}

// Elements [begin, begin + n) of a row as words of the tile engine, the last filled up with zero.
template <class T, class In>
void widen(const In* in, int64_t n, typename T::word* out) {
    auto* elements = reinterpret_cast<typename T::element*>(out);
    convert_row(in, n, elements);
    if (n % T::per_word) elements[n] = {};
}

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
void few_rows(const In* x, const Weight& w, const float* bias, int64_t out_features, int64_t in_features, In* y,
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
                for (int m = 0; m < M; ++m)
                    convert(out[f][m] + (bias != nullptr ? bias[n0 + f] : 0.f), y[m * out_features + n0 + f]);
        }
    });
}

template <class T, class In, int M = kFewTile>
void few_tile(const In* x, const Weight& w, const float* bias, int64_t rows, int64_t out_features, int64_t in_features,
              In* y, Parallel parallel) {
    if constexpr (M > 0) {
        if (rows == M)
            few_rows<T, M>(x, w, bias, out_features, in_features, y, parallel);
        else
            few_tile<T, In, M - 1>(x, w, bias, rows, out_features, in_features, y, parallel);
    }
}

// Passes over W, each with as many rows of x as the next.
template <class In>
void few(const In* x, const Weight& w, const float* bias, int64_t rows, int64_t out_features, int64_t in_features,
         In* y, Parallel parallel) {
    const int64_t passes = ceil_div(rows, kFewTile);
    for (int64_t i = 0, m = 0; i < passes; ++i) {
        const int64_t count = ceil_div(rows - m, passes - i);
        few_tile<typename FewArithmetic<In>::type>(x + m * in_features, w, bias, count, out_features, in_features,
                                                   y + m * out_features, parallel);
        m += count;
    }
}

#endif

// ---- linear: few rows of any shape, on any level: rows of W decoded to L1
// ---------------------------------------------

constexpr int64_t kDotRows = 4;

template <class In>
void dot_rows(const In* x, const Weight& w, const float* bias, int64_t rows, int64_t out_features, int64_t in_features,
              In* y, Parallel parallel) {
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
            for (int64_t m = 0; m < rows; ++m)
                convert(total[m] + (bias != nullptr ? bias[n] : 0.f), y[m * out_features + n]);
        }
    });
}

// ---- linear: more rows, panels of W decoded to L2
// ---------------------------------------------------------------------

constexpr int64_t kFeatureBlock = 4 * kTileRows;  // output features of a unit of work, at the most
constexpr int64_t kDecodedBytes = 384 << 10;      // of decoded rows of W that stay in L2

template <class T, class In>
void panel_rows(const In* x, const Weight& w, const float* bias, int64_t rows, int64_t out_features,
                int64_t in_features, In* y, Parallel parallel) {
    using word = typename T::word;
    constexpr int64_t step = kDepth * T::per_word;  // elements along k of a panel
    const int64_t words = ceil_div(in_features, T::per_word);
    const int64_t block = row_block(rows, in_features, sizeof(word), T::per_word);
    // Whole rows of W are decoded, front to back: shorter runs, far apart, would wait for memory at each run's start.
    // The rows' stride is not a multiple of the page, so that a tile's rows do not share cache sets.
    const int64_t stride = round_up(words, 16) + 16;
    const int64_t fit = kDecodedBytes / int64_t(stride * sizeof(word)) / kTileRows * kTileRows;
    const int64_t feature_block = max<int64_t>(kTileRows, min(kFeatureBlock, fit));
    Scratch<word> packed(block * words);

    for (int64_t m0 = 0; m0 < rows; m0 += block) {
        const int64_t count = min(block, rows - m0), panels = ceil_div(count, kTileCols);
        // packed: for each step along k, for each panel of rows: [words of the step][kTileCols]
        parallel_for(parallel, panels, ceil_div(kSmallWork / 8, kTileCols * in_features),
                     [&](int64_t first, int64_t last) {
                         Scratch<word> lines(kTileCols * kDepth);
                         for (int64_t p = first; p < last; ++p) {
                             for (int64_t k = 0; k < in_features; k += step) {
                                 const int64_t n = min(step, in_features - k), depth = ceil_div(n, T::per_word);
                                 for (int64_t r = 0; r < kTileCols; ++r) {
                                     const int64_t m = p * kTileCols + r;
                                     if (m < count)
                                         widen<T>(x + (m0 + m) * in_features + k, n, lines + r * kDepth);
                                     else
                                         memset(lines + r * kDepth, 0, size_t(depth) * sizeof(word));
                                 }
                                 word* out = packed + (k / T::per_word * panels + p * depth) * kTileCols;
                                 transpose(lines.data, kTileCols, depth, kDepth, out, kTileCols);
                             }
                         }
                     });
        parallel_for(parallel, ceil_div(out_features, feature_block), 1, [&](int64_t first, int64_t last) {
            const int64_t width = panels * kTileCols;
            Scratch<word> decoded(feature_block * stride);
            Scratch<float> c(feature_block * width), lines(kTileCols * feature_block);
            for (int64_t u = first; u < last; ++u) {
                const int64_t n0 = u * feature_block, features = min(feature_block, out_features - n0);
                for (int64_t f = 0; f < features; ++f) {
                    auto* row = reinterpret_cast<typename T::element*>(decoded + f * stride);
                    decode<In>(w, (n0 + f) * in_features, (n0 + f + 1) * in_features, row);
                    if (in_features % T::per_word) row[in_features] = {};
                }
                for (int64_t k = 0; k < words; k += kDepth)
                    multiply<T>(features, panels, min(kDepth, words - k), decoded + k, stride, packed + k * width, c,
                                k > 0);
                for (int64_t p = 0; p < panels; ++p) {
                    transpose(c + p * features * kTileCols, features, kTileCols, kTileCols, lines.data, feature_block);
                    for (int64_t r = 0; r < min<int64_t>(kTileCols, count - p * kTileCols); ++r) {
                        float* line = lines + r * feature_block;
                        if (bias != nullptr)
                            for (int64_t f = 0; f < features; ++f) line[f] += bias[n0 + f];
                        convert_row(line, features, y + (m0 + p * kTileCols + r) * out_features + n0);
                    }
                }
            }
        });
    }
}

template <class In>
void linear(const In* x, const Weight& w, const float* bias, int64_t rows, int64_t out_features, int64_t in_features,
            In* y, Parallel parallel) {
    if (in_features == 0) {
        for (int64_t i = 0; i < rows * out_features; ++i) convert(bias != nullptr ? bias[i % out_features] : 0.f, y[i]);
        return;
    }
#if defined(__AVX512F__)
    if (rows <= kFewRows && in_features % 64 == 0 && w.block_size >= 64)
        return few(x, w, bias, rows, out_features, in_features, y, parallel);
#endif
    if (rows <= kDotRows) return dot_rows(x, w, bias, rows, out_features, in_features, y, parallel);
    panel_rows<typename Arithmetic<In>::type>(x, w, bias, rows, out_features, in_features, y, parallel);
}

}  // namespace

void TLK_LEVEL::nf4_linear(const void* x, Dtype dtype, const Nf4& w, const float* bias, int64_t rows,
                           int64_t out_features, int64_t in_features, void* y, Parallel parallel) {
    if (rows == 0 || out_features == 0) return;
    const auto run = [&]<class In>(const In* in) {
        linear<In>(in, Weight(w), bias, rows, out_features, in_features, static_cast<In*>(y), parallel);
    };
    switch (dtype) {
        case Dtype::float32:
            return run(static_cast<const float*>(x));
        case Dtype::bfloat16:
            return run(static_cast<const bf16*>(x));
        case Dtype::float16:
            return run(static_cast<const f16*>(x));
    }
}

namespace {

// ---- linear_t
// --------------------------------------------------------------------------------------------------------

// The words of two decoded rows side by side: (row0[k], row1[k]) for bfloat16; for float the row itself.
inline void interleave(const float* row0, const float*, int64_t n, float* out) {
    memcpy(out, row0, size_t(n) * sizeof(float));
}
inline void interleave(const bf16* row0, const bf16* row1, int64_t n, uint32_t* out) {
    for (int64_t k = 0; k < n; ++k) out[k] = uint32_t(row0[k].bits) | uint32_t(row1[k].bits) << 16;
}

constexpr int64_t kStepWords = 128;   // along the output features, decoded at a time
constexpr int64_t kMaxColumns = 512;  // input features of a unit of work: decoded W and the sums stay in L2 together

template <class T, class In>
void panel_columns(const In* g, const Weight& w, int64_t rows, int64_t out_features, int64_t in_features, In* gx,
                   Parallel parallel) {
    using word = typename T::word;
    using element = typename T::element;
    constexpr int64_t step = kStepWords * T::per_word;
    // Wide enough that a run of a row is several cache lines, narrow enough to make work for several threads.
    const int64_t columns = min(kMaxColumns, max<int64_t>(2 * kTileCols, round_up(in_features / 8, kTileCols)));
    const int64_t words = ceil_div(out_features, T::per_word);
    const int64_t block = min(row_block(rows, out_features, sizeof(word), T::per_word), rows);
    Scratch<word> packed(block * words);

    for (int64_t m0 = 0; m0 < rows; m0 += block) {
        const int64_t count = min(block, rows - m0);
        // packed: for each step, [rows][words of the step]: close together, whatever the stride of g
        parallel_for(parallel, count, ceil_div(kSmallWork / 8, out_features), [&](int64_t first, int64_t last) {
            for (int64_t n = 0; n < out_features; n += step) {
                const int64_t features = min(step, out_features - n), depth = ceil_div(features, T::per_word);
                for (int64_t m = first; m < last; ++m)
                    widen<T>(g + (m0 + m) * out_features + n, features, packed + n / T::per_word * count + m * depth);
            }
        });
        parallel_for(parallel, ceil_div(in_features, columns), 1, [&](int64_t first, int64_t last) {
            Scratch<word> decoded(kStepWords * columns);
            Scratch<float> c(count * columns);
            Scratch<element> line(T::per_word * columns);
            for (int64_t u = first; u < last; ++u) {
                const int64_t k0 = u * columns, width = min(columns, in_features - k0);
                const int64_t panels = ceil_div(width, kTileCols);
                memset(line.data, 0, size_t(T::per_word * columns) * sizeof(element));
                for (int64_t n = 0; n < out_features; n += step) {
                    const int64_t features = min(step, out_features - n), depth = ceil_div(features, T::per_word);
                    for (int64_t d = 0; d < depth; ++d) {
                        for (int64_t i = 0; i < T::per_word; ++i) {
                            const int64_t feature = n + d * T::per_word + i, at = feature * in_features + k0;
                            if (feature < out_features)
                                decode<In>(w, at, at + width, line + i * columns);
                            else
                                memset(line + i * columns, 0, size_t(columns) * sizeof(element));
                        }
                        for (int64_t p = 0; p < panels; ++p)
                            interleave(line + p * kTileCols, line + (T::per_word - 1) * columns + p * kTileCols,
                                       kTileCols, decoded + (p * depth + d) * kTileCols);
                    }
                    multiply<T>(count, panels, depth, packed + n / T::per_word * count, depth, decoded, c, n > 0);
                }
                for (int64_t m = 0; m < count; ++m)
                    for (int64_t p = 0; p < panels; ++p)
                        convert_row(c + (p * count + m) * kTileCols, min<int64_t>(kTileCols, width - p * kTileCols),
                                    gx + (m0 + m) * in_features + k0 + p * kTileCols);
            }
        });
    }
}

}  // namespace

void TLK_LEVEL::nf4_linear_t(const void* g, Dtype dtype, const Nf4& w, int64_t rows, int64_t out_features,
                             int64_t in_features, void* gx, Parallel parallel) {
    if (rows == 0 || in_features == 0) return;
    const auto run = [&]<class In>(const In* in) {
        if (out_features == 0)
            memset(gx, 0, size_t(rows * in_features) * sizeof(In));
        else
            panel_columns<typename Arithmetic<In>::type>(in, Weight(w), rows, out_features, in_features,
                                                         static_cast<In*>(gx), parallel);
    };
    switch (dtype) {
        case Dtype::float32:
            return run(static_cast<const float*>(g));
        case Dtype::bfloat16:
            return run(static_cast<const bf16*>(g));
        case Dtype::float16:
            return run(static_cast<const f16*>(g));
    }
}

}  // namespace tlk
