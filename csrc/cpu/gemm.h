// The tile engine: one product for every family (but for few rows, which stream their weight: dense_few.h, nf4_few.h).
//
//   C[i][j] = sum over terms t, sum over k of A_t(i, k) * B_t(j, k)        i < m, j < n
//
// An *operand* packs pieces of itself on demand and converts on the way (float32, bfloat16, float16, decoded 4 bits,
// squared, scaled, shifted, masked). A is packed by rows, [rows][words]: its elements are broadcast. B is packed in
// panels, [words][panel width]: its elements are the lanes. What stands in a word is a trait: `Fp32` multiplies floats,
// `Bf16Pairs` multiplies pairs along k (vdpbf16ps), so that a word is two bfloat16 numbers and words count pairs.
//
// The register tile holds 12 x 2 vectors (AVX-512; 6 x 2 on AVX2), or 24 x 1 where n fits one vector, for the whole
// depth of a chunk. A panel of a chunk (256 words, 32 KiB) stays in L1 while all rows of a block of A, in L2, pass over
// it.
//
// Work is cut into blocks of C, by m and n alone. A block packs what it needs, or, where all of B is small, finds it
// packed already. Each element of C is a sum over chunks of a sum in the order of k, whatever the blocks: results do
// not depend on the number of threads, and the error of a long sum grows with the depth and the number of chunks, not
// with their product. After the last chunk of a term its functor `after` sees each panel of C while it is in L1: the
// last term's is the epilogue.
//
// Flops: 2 m n k. Bytes: m k and n k are read once for each block of the other side (about 256 wide), from L2 or L3.
#pragma once

#include "cpu/simd.h"

namespace tlk {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kNarrowRows = 24;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kNarrowRows = 12;
#else
constexpr int kTileRows = 4, kNarrowRows = 8;
#endif

constexpr int kTileVecs = 2;
constexpr int kTileCols = kTileVecs * Vec::size;

constexpr int64_t kDepth = 256;              // words along k of a panel: [256][32] words are 32 KiB, in L1
constexpr int64_t kPackedBytes = 384 << 10;  // of a block of A, packed: it stays in L2
constexpr int64_t kBlockColumns = 256;       // of C, where each block packs its own panels
constexpr int64_t kBlockBytes = 512 << 10;   // of C, where the panels are shared
constexpr int64_t kSharedBytes = 8 << 20;    // of B, packed once for all blocks
constexpr int64_t kUnits = 4;                // blocks that a product should have at least, to share among threads
constexpr int64_t kSmallWork = 1 << 16;      // multiply-adds below which a thread is not worth waking

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

// ---- words ---------------------------------------------------------------------------------------------------

struct Fp32 {
    using element = float;  // of the unpacked operands
    using word = float;     // of the packed ones
    static constexpr int per_word = 1;
    using Reg = Vec;
    static Reg load_words(const word* p) { return load(p); }
    static Reg broadcast(const word* p) { return splat(*p); }
    static Vec multiply_add(Reg a, Reg b, Vec c) { return fma(a, b, c); }
    // n words, each of one element of `row0`
    static void interleave(const float* row0, const float*, int64_t n, word* out) {
        memcpy(out, row0, size_t(n) * sizeof(float));
    }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    using element = bf16;
    using word = uint32_t;
    static constexpr int per_word = 2;
    using Reg = __m512i;
    static Reg load_words(const word* p) { return _mm512_loadu_si512(p); }
    static Reg broadcast(const word* p) { return _mm512_set1_epi32(int(*p)); }
    static Vec multiply_add(Reg a, Reg b, Vec c) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)}; }
    static void interleave(const bf16* row0, const bf16* row1, int64_t n, word* out) {
        int64_t i = 0;
        for (; i + 16 <= n; i += 16) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row0 + i)));
            const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(row1 + i)));
            _mm512_storeu_si512(out + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        for (; i < n; ++i) out[i] = uint32_t(row0[i].bits) | uint32_t(row1[i].bits) << 16;
    }
};
#endif

// The words for activations of type In.
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

// ---- the register tile ---------------------------------------------------------------------------------------

template <class T, int Vecs, int Rows>
[[gnu::noinline]] void tile(const typename T::word* a, int64_t a_stride, const typename T::word* b, int64_t words,
                            float* c, bool accumulate) {
    constexpr int64_t width = Vecs * Vec::size;
    Vec acc[Rows][Vecs];
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vecs; ++v) acc[r][v] = zero();
    for (int64_t k = 0; k < words; ++k) {
        typename T::Reg column[Vecs];
        for (int v = 0; v < Vecs; ++v) column[v] = T::load_words(b + k * width + v * Vec::size);
        for (int r = 0; r < Rows; ++r) {
            const typename T::Reg x = T::broadcast(a + r * a_stride + k);
            for (int v = 0; v < Vecs; ++v) acc[r][v] = T::multiply_add(x, column[v], acc[r][v]);
        }
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < Vecs; ++v) {
            float* out = c + r * width + v * Vec::size;
            store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
        }
}

template <class T, int Vecs, int Rows = (Vecs == 1 ? kNarrowRows : kTileRows)>
void tile_rows(int64_t rows, const typename T::word* a, int64_t a_stride, const typename T::word* b, int64_t words,
               float* c, bool accumulate) {
    if constexpr (Rows == 0) {
        return;
    } else if (rows == Rows) {
        tile<T, Vecs, Rows>(a, a_stride, b, words, c, accumulate);
    } else {
        tile_rows<T, Vecs, Rows - 1>(rows, a, a_stride, b, words, c, accumulate);
    }
}

// C[rows][width] (+)= A[rows][words] * panel. The rows are shared evenly among tiles: 16 are 8 + 8, not 12 + 4.
template <class T, int Vecs>
void multiply(int64_t rows, const typename T::word* a, int64_t a_stride, const typename T::word* panel, int64_t words,
              float* c, bool accumulate) {
    constexpr int64_t width = Vecs * Vec::size, most = Vecs == 1 ? kNarrowRows : kTileRows;
    for (int64_t r = 0, tiles = ceil_div(rows, most); tiles > 0; --tiles) {
        const int64_t count = ceil_div(rows - r, tiles);
        tile_rows<T, Vecs>(count, a + r * a_stride, a_stride, panel, words, c + r * width, accumulate);
        r += count;
    }
}

// ---- operands ------------------------------------------------------------------------------------------------

// What is done to a run of contiguous values, `fixed` being the index of the other axis and `start` that of the first
// value: before they are rounded to elements, or (`on_elements`) after.
struct Plain {
    static constexpr bool none = true, on_elements = false;
};
struct Squared {
    static constexpr bool none = false, on_elements = false;
    void operator()(float* x, int64_t n, int64_t, int64_t) const {
        for (int64_t i = 0; i < n; ++i) x[i] *= x[i];
    }
};
struct Scaled {
    static constexpr bool none = false, on_elements = false;
    float factor;
    void operator()(float* x, int64_t n, int64_t, int64_t) const {
        for (int64_t i = 0; i < n; ++i) x[i] *= factor;
    }
};
struct Shifted {
    static constexpr bool none = false, on_elements = false;
    const float* mean;  // along the contiguous axis
    void operator()(float* x, int64_t n, int64_t, int64_t start) const {
        for (int64_t i = 0; i < n; ++i) x[i] -= mean[start + i];
    }
};

// out[n] = the mapped values of in[n], as elements.
template <class In, class Element, class Map>
void load_run(const In* in, int64_t n, int64_t fixed, int64_t start, const Map& map, Element* out) {
    if constexpr (Map::none || Map::on_elements) {
        convert_row(in, n, out);
        if constexpr (Map::on_elements) map(out, n, fixed, start);
    } else {
        constexpr int64_t step = 256;
        float wide[step];
        for (int64_t i = 0; i < n; i += step) {
            const int64_t count = min(step, n - i);
            convert_row(in + i, count, wide);
            map(wide, count, fixed, start + i);
            convert_row(wide, count, out + i);
        }
    }
}

// Element (i, k) at data[row(i) * stride + k]: contiguous along k. `rows`, where given, is which row of the data the
// i-th is.
template <class T, class In, class Map = Plain>
struct AlongK {
    static constexpr int64_t run = kDepth;                 // words of a row to pack at a time
    static constexpr int64_t columns = kBlockColumns;      // lanes to pack at a time
    static constexpr int64_t depth = kDepth;               // words of a panel
    static constexpr int64_t shared_bytes = kSharedBytes;  // of panels that may be packed once for all rows
    using word = typename T::word;
    const In* data;
    int64_t stride;
    const int64_t* rows = nullptr;
    Map map = {};

    int64_t row(int64_t i) const { return rows != nullptr ? rows[i] : i; }
    // Whether rows lie in memory as whole words, `elements` of them from k on.
    bool whole(int64_t k, int64_t elements) const {
        if constexpr (is_same<In, typename T::element> && Map::none)
            return rows == nullptr && stride % T::per_word == 0 && elements % T::per_word == 0 &&
                   reinterpret_cast<uintptr_t>(data + k) % sizeof(word) == 0;
        return false;
    }
    // Rows can be broadcast from where they lie, unless they are so far apart that they would share cache sets.
    const word* in_place(int64_t i, int64_t k, int64_t elements) const {
        if (!whole(k, elements) || stride * int64_t(sizeof(In)) % 4096 == 0) return nullptr;
        return reinterpret_cast<const word*>(data + i * stride + k);
    }
    int64_t word_stride() const { return stride / T::per_word; }
    void line(int64_t i, int64_t k, int64_t count, word* out) const {
        auto* elements = reinterpret_cast<typename T::element*>(out);
        load_run(data + row(i) * stride + k, count, row(i), k, map, elements);
        if (count % T::per_word) elements[count] = {};
    }
    void pack_rows(int64_t i, int64_t count, int64_t k, int64_t elements, word* out, int64_t out_stride) const {
        for (int64_t r = 0; r < count; ++r) line(i + r, k, elements, out + r * out_stride);
    }
    // Panels of the lanes [j, j + count), one after another, the last filled up with zeros.
    template <int Width>
    void pack_panels(int64_t j, int64_t count, int64_t k, int64_t elements, word* out) const {
        alignas(64) word lines[Width * kDepth];
        const int64_t words = ceil_div(elements, T::per_word);
        for (int64_t p = 0; p < count; p += Width, out += words * Width) {
            if (whole(k, elements) && p + Width <= count) {
                transpose(data + (j + p) * stride + k, Width, words, word_stride(), out, Width);
                continue;
            }
            for (int64_t r = 0; r < Width; ++r) {
                if (p + r < count)
                    line(j + p + r, k, elements, lines + r * kDepth);
                else
                    memset(lines + r * kDepth, 0, size_t(words) * sizeof(word));
            }
            transpose(lines, Width, words, kDepth, out, Width);
        }
    }
};

// Element (i, k) at data[row(k) * stride + i]: contiguous along i.
template <class T, class In, class Map = Plain, int64_t Depth = kDepth>
struct AcrossK {
    static constexpr int64_t run = kDepth;
    static constexpr int64_t columns = kBlockColumns;
    static constexpr int64_t depth = Depth;
    static constexpr int64_t shared_bytes = kSharedBytes;
    using word = typename T::word;
    using element = typename T::element;
    const In* data;
    int64_t stride;
    const int64_t* rows = nullptr;
    Map map = {};

    // The one or two rows of word w of the run from k on, at the lanes i..: where they stand, or in `buffer`.
    static constexpr int64_t most = 512;
    struct Lines {
        alignas(64) element buffer[T::per_word][most];
        const element* row[T::per_word];
    };
    void lines(int64_t i, int64_t count, int64_t k, int64_t elements, int64_t w, Lines& out) const {
        for (int64_t e = 0; e < T::per_word; ++e) {
            const int64_t at = w * T::per_word + e;
            const int64_t from = at < elements ? (rows != nullptr ? rows[k + at] : k + at) : -1;
            out.row[e] = out.buffer[e];
            if (from < 0) {
                memset(out.buffer[e], 0, size_t(count) * sizeof(element));
            } else if constexpr (is_same<In, element> && Map::none) {
                out.row[e] = data + from * stride + i;
            } else {
                load_run(data + from * stride + i, count, from, i, map, out.buffer[e]);
            }
        }
    }
    void pack_rows(int64_t i, int64_t count, int64_t k, int64_t elements, word* out, int64_t out_stride) const {
        constexpr int64_t step = 16, across = 256;
        alignas(64) word block[step * across];
        Lines source;
        const int64_t words = ceil_div(elements, T::per_word);
        for (int64_t r = 0; r < count; r += across) {
            const int64_t n = min(across, count - r);
            for (int64_t w = 0; w < words; w += step) {
                const int64_t steps = min(step, words - w);
                for (int64_t d = 0; d < steps; ++d) {
                    lines(i + r, n, k, elements, w + d, source);
                    T::interleave(source.row[0], source.row[T::per_word - 1], n, block + d * across);
                }
                transpose(block, steps, n, across, out + r * out_stride + w, out_stride);
            }
        }
    }
    template <int Width>
    void pack_panels(int64_t j, int64_t count, int64_t k, int64_t elements, word* out) const {
        static_assert(most % Width == 0);
        Lines source;
        const int64_t words = ceil_div(elements, T::per_word);
        for (int64_t done = 0; done < count; done += most) {
            const int64_t n = min(most, count - done);
            for (int64_t w = 0; w < words; ++w) {
                lines(j + done, n, k, elements, w, source);
                for (int64_t p = 0; p < n; p += Width) {
                    word* to = out + (done + p) * words + w * Width;
                    const int64_t lanes = min<int64_t>(Width, n - p);
                    T::interleave(source.row[0] + p, source.row[T::per_word - 1] + p, lanes, to);
                    if (lanes < Width) memset(to + lanes, 0, size_t(Width - lanes) * sizeof(word));
                }
            }
        }
    }
};

// ---- products ------------------------------------------------------------------------------------------------

// Functors get (row, rows, col, cols, c, width): c[rows][width] is C at (row, col), of which `cols` columns are in C.
// One that has a method `block` gets whole blocks, when they are done: (row, rows, col, cols, c, row_block,
// col_block), where c holds panels [rows][kTileCols] one after another, and the last two count blocks.
struct Nothing {
    void operator()(int64_t, int64_t, int64_t, int64_t, float*, int64_t) const {}
};

template <class A, class B, class After = Nothing>
struct Term {
    int64_t k;
    A a;
    B b;
    After after = {};
};
template <class A, class B, class After>
Term(int64_t, A, B, After) -> Term<A, B, After>;
template <class A, class B>
Term(int64_t, A, B) -> Term<A, B>;

// How C is cut: columns [begin, end) of C into blocks of rows x cols.
struct Cut {
    int64_t m, begin, end, rows, cols;
    bool shared;           // these columns of B are packed once, before
    int64_t diagonal = 0;  // of a symmetric product: the row that the first one is
    int64_t before = 0;    // blocks of columns left of `begin`
    int64_t row_blocks() const { return ceil_div(m, rows); }
    int64_t col_blocks() const { return ceil_div(end - begin, cols); }
    int64_t blocks() const { return row_blocks() * col_blocks(); }
    // Columns of the block at (i, j): of a symmetric product only those on or below the diagonal.
    template <bool Half>
    int64_t columns(int64_t i, int64_t n_rows, int64_t j) const {
        return min(min(cols, end - j), Half ? diagonal + i + n_rows - j : cols);
    }
};

template <class... Ts>
constexpr int64_t largest_of(Ts... values) {
    int64_t top = INT64_MIN;
    ((top = max<int64_t>(top, values)), ...);
    return top;
}

template <class T, class... Terms>
int64_t words_of(const Terms&... terms) {
    return (ceil_div(terms.k, T::per_word) + ...);
}

// How many columns of B are packed at a time for all rows: none where that is worth less than packing them block by
// block.
template <class T, int Vecs, class... Terms>
int64_t shared_columns(int64_t m, int64_t n, const Terms&... terms) {
    constexpr int64_t width = Vecs * Vec::size;
    const int64_t bytes = -largest_of(-decltype(terms.a)::shared_bytes..., -decltype(terms.b)::shared_bytes...);
    const int64_t fit = bytes / int64_t(sizeof(typename T::word)) / words_of<T>(terms...) / width * width;
    return m > 256 && fit >= min(round_up(n, width), 4 * width) ? fit : 0;
}

template <class T, int Vecs, class... Terms>
Cut cut(int64_t m, int64_t begin, int64_t end, bool shared, const Terms&... terms) {
    constexpr int64_t width = Vecs * Vec::size, tile = Vecs == 1 ? kNarrowRows : kTileRows;
    const int64_t n = end - begin;
    const int64_t run = max(kDepth, min(largest_of(decltype(terms.a)::run...), words_of<T>(terms...)));
    const int64_t fit = max<int64_t>(1, kPackedBytes / int64_t(sizeof(typename T::word)) / run / tile);
    // a narrow product uses A once: what is packed of it should not even leave L1
    const int64_t row_blocks = ceil_div(m, min<int64_t>(fit, Vecs == 1 ? 1 : (shared ? 132 : 256) / tile) * tile);
    Cut c{m, begin, end, round_up(ceil_div(m, row_blocks), tile), 0, shared, 0, 0};
    const int64_t most =
        shared ? kBlockBytes / int64_t(sizeof(float)) / c.rows : largest_of(decltype(terms.b)::columns...);
    int64_t col_blocks = ceil_div(n, max(width, most / width * width));
    col_blocks = max(col_blocks, min(ceil_div(kUnits, c.row_blocks()), ceil_div(n, 2 * width)));
    c.cols = round_up(ceil_div(n, col_blocks), width);
    return c;
}

// The panels [first, last) of the columns from `begin` on: for each chunk of B::depth words, [panel][words][width].
template <class T, int Vecs, class A, class B, class After>
void pack_shared(const Term<A, B, After>& term, int64_t begin, int64_t end, int64_t first, int64_t last,
                 typename T::word* out) {
    constexpr int64_t width = Vecs * Vec::size, step = B::depth * T::per_word;
    const int64_t panels = ceil_div(end - begin, width), col = begin + first * width;
    for (int64_t k = 0; k < term.k; k += step) {
        const int64_t count = min(step, term.k - k), words = ceil_div(count, T::per_word);
        term.b.template pack_panels<int(width)>(col, min(end, begin + last * width) - col, k, count,
                                                out + (k / T::per_word * panels + first * words) * width);
    }
}

// What a thread needs for a block of C.
template <class T>
struct Blocks {
    using word = typename T::word;
    static constexpr int64_t pad = 16;  // rows of A must not share cache sets
    Scratch<word> a, b;
    Scratch<float> c;
    int64_t a_stride;
    Blocks(const Cut& cut, int64_t run, int64_t depth)
        : a(cut.rows * (run + pad)),
          b(cut.shared ? 0 : cut.cols * depth),
          c(cut.rows * cut.cols),
          a_stride(run + pad) {}
};

// C (+)= one term, for the block of C at (i, j).
template <class T, int Vecs, bool Half, class A, class B, class After>
[[gnu::noinline]] void add_term(const Term<A, B, After>& term, const Cut& cut, int64_t i, int64_t j,
                                const typename T::word* shared, bool accumulate, Blocks<T>& blocks) {
    constexpr int64_t width = Vecs * Vec::size, run = A::run * T::per_word, depth = B::depth * T::per_word;
    static_assert(run % depth == 0);
    const int64_t rows = min(cut.rows, cut.m - i);
    const int64_t cols = cut.columns<Half>(i, rows, j);
    const int64_t panels = ceil_div(cols, width), all = ceil_div(cut.end - cut.begin, width);
    for (int64_t ka = 0; ka < term.k; ka += run) {
        const int64_t run_end = min(ka + run, term.k);
        const typename T::word* a = nullptr;
        int64_t a_stride = blocks.a_stride;
        if constexpr (requires { term.a.in_place(i, ka, run); }) {
            a = term.a.in_place(i, ka, run_end - ka);
            if (a != nullptr) a_stride = term.a.word_stride();
        }
        if (a == nullptr) {
            term.a.pack_rows(i, rows, ka, run_end - ka, blocks.a, a_stride);
            a = blocks.a;
        }
        for (int64_t k = ka; k < run_end; k += depth) {
            const int64_t count = min(depth, run_end - k), words = ceil_div(count, T::per_word);
            const typename T::word* packed = blocks.b;
            if (cut.shared)
                packed = shared + (k / T::per_word * all + (j - cut.begin) / width * words) * width;
            else
                term.b.template pack_panels<int(width)>(j, min(panels * width, cut.end - j), k, count, blocks.b);
            for (int64_t p = 0; p < panels; ++p) {
                float* c = blocks.c + p * rows * width;
                multiply<T, Vecs>(rows, a + (k - ka) / T::per_word, a_stride, packed + p * words * width, words, c,
                                  accumulate || k > 0);
                const int64_t col = j + p * width;
                if constexpr (requires { term.after(i, rows, col, width, c, width); })
                    if (k + count == term.k) term.after(i, rows, col, min(width, cut.end - col), c, width);
            }
        }
    }
}

// One block of C through all terms; `shared` holds their panels one after another.
template <class T, int Vecs, bool Half, class... Terms>
void block(const Cut& cut, int64_t index, const typename T::word* shared, Blocks<T>& blocks, const Terms&... terms) {
    if (Half) index = index % 2 ? cut.blocks() - 1 - index / 2 : index / 2;  // a share of both the long and the short
    const int64_t row_block = index % cut.row_blocks(), col_block = index / cut.row_blocks();
    const int64_t i = row_block * cut.rows, j = cut.begin + col_block * cut.cols;
    const int64_t rows = min(cut.rows, cut.m - i), cols = cut.columns<Half>(i, rows, j);
    if (cols <= 0) return;
    bool accumulate = false;
    ((add_term<T, Vecs, Half>(terms, cut, i, j, shared, accumulate, blocks), accumulate = accumulate || terms.k > 0,
      shared += words_of<T>(terms) * round_up(cut.end - cut.begin, Vecs * Vec::size)),
     ...);
    const auto whole = [&](const auto& after) {
        if constexpr (requires { after.block(i, rows, j, cols, (float*)nullptr, row_block, col_block); })
            after.block(i, rows, j, cols, blocks.c, row_block, cut.before + col_block);
    };
    (whole(terms.after), ...);
}

template <class T, int Vecs, bool Half, class... Terms>
void product_of(int64_t m, int64_t n, int64_t diagonal, Parallel parallel, const Terms&... terms) {
    constexpr int64_t width = Vecs * Vec::size;
    const int64_t k = (terms.k + ...), run = largest_of(decltype(terms.a)::run...);
    const int64_t depth = largest_of(decltype(terms.b)::depth...), group = shared_columns<T, Vecs>(m, n, terms...);
    Scratch<typename T::word> shared(words_of<T>(terms...) * min(group, round_up(n, width)));
    int64_t before = 0;
    for (int64_t begin = 0, end; begin < n; begin = end) {
        end = group > 0 ? min(n, begin + group) : n;
        Cut c = cut<T, Vecs>(m, begin, end, group > 0, terms...);
        c.diagonal = diagonal;
        c.before = before;
        before += c.col_blocks();
        if (c.shared) {
            parallel_for(parallel, ceil_div(end - begin, width), ceil_div(kSmallWork / 8, width * k),
                         [&](int64_t first, int64_t last) {
                             typename T::word* out = shared;
                             ((pack_shared<T, Vecs>(terms, begin, end, first, last, out),
                               out += words_of<T>(terms) * round_up(end - begin, width)),
                              ...);
                         });
        }
        parallel_for(parallel, c.blocks(), ceil_div(kSmallWork, c.rows * c.cols * k), [&](int64_t first, int64_t last) {
            Blocks<T> blocks(c, run, depth);
            for (int64_t u = first; u < last; ++u) block<T, Vecs, Half>(c, u, shared, blocks, terms...);
        });
    }
}

// C[m][n] of the given terms; nothing is written but by their functors. A term of k = 0 is left out; the last is not.
template <class T, class... Terms>
void product(int64_t m, int64_t n, Parallel parallel, const Terms&... terms) {
    if (m > 0 && n > 0) product_of<T, kTileVecs, false>(m, n, 0, parallel, terms...);
}

// The same where n is often no more than one vector.
template <class T, class... Terms>
void product_narrow(int64_t m, int64_t n, Parallel parallel, const Terms&... terms) {
    if (m == 0 || n == 0) return;
    if (n <= Vec::size)
        product_of<T, 1, false>(m, n, 0, parallel, terms...);
    else
        product_of<T, kTileVecs, false>(m, n, 0, parallel, terms...);
}

// The same for a symmetric C: panels that lie wholly above the diagonal are left out. With `first`, A holds the rows
// from there on of the n that B holds.
template <class T, class... Terms>
void product_lower(int64_t n, int64_t first, Parallel parallel, const Terms&... terms) {
    if (n > first) product_of<T, kTileVecs, true>(n - first, n, first, parallel, terms...);
}

// How many blocks `product` cuts C into: what a functor's `block` is told counts up to these.
struct Grid {
    int64_t row_blocks, col_blocks;
};
template <class T, class... Terms>
Grid grid(int64_t m, int64_t n, const Terms&... terms) {
    Grid g{0, 0};
    const int64_t group = shared_columns<T, kTileVecs>(m, n, terms...);
    for (int64_t begin = 0, end; begin < n && m > 0; begin = end) {
        end = group > 0 ? min(n, begin + group) : n;
        const Cut c = cut<T, kTileVecs>(m, begin, end, group > 0, terms...);
        g.row_blocks = c.row_blocks();
        g.col_blocks += c.col_blocks();
    }
    return g;
}

// Many products in one call, of any sizes: problem(index) returns {m, n, term}.
template <class Term_>
struct Problem {
    int64_t m, n;
    Term_ term;
};
template <class Term_>
Problem(int64_t, int64_t, Term_) -> Problem<Term_>;

template <class T, int Vecs = kTileVecs, class F>
void product_batch(int64_t count, Parallel parallel, const F& problem) {
    if (count == 0) return;
    Scratch<int64_t> begin(count + 1);  // of each problem's blocks
    begin[0] = 0;
    int64_t work = 0;
    Cut largest{};
    for (int64_t b = 0; b < count; ++b) {
        const auto p = problem(b);
        begin[b + 1] = begin[b];
        if (p.m == 0 || p.n == 0 || p.term.k == 0) continue;
        const Cut c = cut<T, Vecs>(p.m, 0, p.n, false, p.term);
        begin[b + 1] += c.blocks();
        work += p.m * p.n * p.term.k;
        largest.rows = max(largest.rows, c.rows);
        largest.cols = max(largest.cols, c.cols);
    }
    const int64_t total = begin[count];
    if (total == 0) return;
    using Operands = decltype(problem(0).term);
    parallel_for(parallel, total, ceil_div(kSmallWork, ceil_div(work, total) + 1), [&](int64_t first, int64_t last) {
        Blocks<T> blocks(largest, decltype(Operands::a)::run, decltype(Operands::b)::depth);
        int64_t b = 0;
        for (int64_t step = int64_t(1) << 62; step > 0;
             step >>= 1)  // the last problem that begins at or before `first`
            if (b + step < count && begin[b + step] <= first) b += step;
        for (int64_t u = first; u < last; ++u) {
            while (begin[b + 1] <= u) ++b;
            const auto p = problem(b);
            const Cut c = cut<T, Vecs>(p.m, 0, p.n, false, p.term);
            block<T, Vecs, false>(c, u - begin[b], nullptr, blocks, p.term);
        }
    });
}

// ---- epilogues -----------------------------------------------------------------------------------------------

// What is added to C before it is rounded: nothing, a vector along the features, or a matrix of float.
struct Addend {
    const float* data = nullptr;
    int64_t stride = 0;  // 0: the same for every row
    const float* row(int64_t i) const { return data != nullptr ? data + i * stride : nullptr; }
    float at(int64_t i, int64_t j) const { return data != nullptr ? data[i * stride + j] : 0.f; }
    Addend from(int64_t i) const { return {row(i), stride}; }
};

// out[n] = scale * c[n] + addend[n], rounded once. A whole line of vectors, as most are, takes no branches.
template <class Out>
inline void store_line(const float* c, int64_t n, float scale, const float* addend, Out* out) {
    const Vec factor = splat(scale);
    int64_t i = 0;
    if (addend != nullptr) {
        for (; i + Vec::size <= n; i += Vec::size) store(out + i, load(c + i) * factor + load(addend + i));
        for (; i < n; ++i) convert(c[i] * scale + addend[i], out[i]);
    } else {
        for (; i + Vec::size <= n; i += Vec::size) store(out + i, load(c + i) * factor);
        for (; i < n; ++i) convert(c[i] * scale, out[i]);
    }
}

// out[row(i) * stride + j] = scale * C[i][j] + addend
template <class Out>
struct StoreRows {
    Out* out;
    int64_t stride;
    Addend addend = {};
    float scale = 1.f;
    const int64_t* rows = nullptr;
    void operator()(int64_t i, int64_t rows_, int64_t j, int64_t cols, float* c, int64_t width) const {
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t row = rows != nullptr ? rows[i + r] : i + r;
            const float* a = addend.row(row);
            store_line(c + r * width, cols, scale, a != nullptr ? a + j : nullptr, out + row * stride + j);
        }
    }
};

// out[row(i) * stride + j] += scale * C[i][j], in float, rounded once
template <class Out>
struct AddRows {
    Out* out;
    int64_t stride;
    float scale = 1.f;
    const int64_t* rows = nullptr;
    void operator()(int64_t i, int64_t rows_, int64_t j, int64_t cols, float* c, int64_t width) const {
        float old[kTileCols];
        for (int64_t r = 0; r < rows_; ++r) {
            Out* to = out + (rows != nullptr ? rows[i + r] : i + r) * stride + j;
            convert_row(to, cols, old);
            store_line(c + r * width, cols, scale, old, to);
        }
    }
};

// out[j * stride + i] = C[i][j] + addend, where i are the features
template <class Out>
struct StoreColumns {
    Out* out;
    int64_t stride;
    Addend addend = {};
    void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) const {
        constexpr int64_t most = 256;
        alignas(64) float lines[kTileCols * most];
        for (int64_t r = 0; r < rows; r += most) {
            const int64_t n = min(most, rows - r);
            transpose(c + r * width, n, width, width, lines, most);
            for (int64_t l = 0; l < cols; ++l) {
                const float* a = addend.row(j + l);
                store_line(lines + l * most, n, 1.f, a != nullptr ? a + i + r : nullptr,
                           out + (j + l) * stride + i + r);
            }
        }
    }
};

}  // namespace
}  // namespace tlk
