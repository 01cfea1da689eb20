// A 4-bit weight, for the kernels that read it: by flat position, by decoded runs, and as an operand of the tile
// engine.
//
// A block's 16 possible results code[i] * absmax are computed and rounded first; an element is then one table look-up
// in a register and is rounded exactly once.
#pragma once

#include "cpu/gemm.h"
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

// ---- operands of the tile engine -------------------------------------------------------------------------------

// Element (i, k) of W[rows][width]: contiguous along k.
template <class T, class In>
struct Nf4AlongK {
    // Long runs of a row, front to back: shorter ones, far apart, would wait for memory at each run's start.
    static constexpr int64_t run = 1024;
    static constexpr int64_t shared_bytes = 2 << 20;  // of the other operand: with a 4-bit weight memory is what counts
    using word = typename T::word;
    Weight w;
    int64_t width;

    void pack_rows(int64_t i, int64_t count, int64_t k, int64_t elements, word* out, int64_t out_stride) const {
        for (int64_t r = 0; r < count; ++r) {
            auto* row = reinterpret_cast<typename T::element*>(out + r * out_stride);
            const int64_t begin = (i + r) * width + k;
            decode<In>(w, begin, begin + elements, row);
            if (elements % T::per_word) row[elements] = {};
        }
    }
};

// Element (j, k) of W^T: contiguous along j.
template <class T, class In>
struct Nf4AcrossK {
    static constexpr int64_t columns = 512;     // a decoded run is several cache lines,
    static constexpr int64_t depth = 128;       // and the panels stay in L2 beside C
    static constexpr int64_t shared_bytes = 0;  // decoding is cheaper than reading shared panels of a wide weight
    using word = typename T::word;
    using element = typename T::element;
    Weight w;
    int64_t width;

    template <int Width>
    void pack_panels(int64_t j, int64_t count, int64_t k, int64_t elements, word* out) const {
        alignas(64) element lines[T::per_word][columns];
        const int64_t words = ceil_div(elements, T::per_word);
        memset(lines, 0, sizeof lines);
        for (int64_t d = 0; d < words; ++d) {
            for (int64_t e = 0; e < T::per_word; ++e) {
                const int64_t at = d * T::per_word + e, begin = (k + at) * width + j;
                if (at < elements)
                    decode<In>(w, begin, begin + count, lines[e]);
                else
                    memset(lines[e], 0, sizeof lines[e]);
            }
            for (int64_t p = 0; p < count; p += Width)
                T::interleave(lines[0] + p, lines[T::per_word - 1] + p, Width, out + p * words + d * Width);
        }
    }
};

}  // namespace
}  // namespace tlk
