// LoRA on the CPU: a frozen linear layer and its update of rank r as one product, dense or 4-bit, one adapter or many.
//
//   forward    s = scaling drop(x) A^T        2 rows in r flops: x broadcast, the r columns are the lanes
//              y = s B^T + x W^T + bias       the update is the first term of the base product, which goes on in its
//              sums
//   backward   ds = scaling g B, dB = g^T s, dA = ds^T drop(x), and dx = drop'(ds A) + g W, whose update is masked in
//   L1
//              before the base product goes on
//
// Flops beyond the base product: r / in + r / out of it, forward, and twice that, backward. Bytes: x and g are read
// once more each, from L3 where they fit. With rank 0 these are the plain products, which serve nf4_linear and
// nf4_linear_t.
//
// The sides of y = x W^T: the longer is broadcast, because it is only copied; the shorter makes the lanes, for which it
// is transposed. A 4-bit weight is always broadcast: whole runs of its rows are decoded to L2 and used for every row of
// x; for few rows it streams by once and is decoded in registers (nf4_few.h), and the update is added to its sums.
//
// Many adapters: rows are taken through the order that sorts them by adapter, one product for each adapter, all in one
// parallel loop. The updates are summed in float beside the base product, which adds them before it rounds: a scratch
// matrix of the size of y.
#include "cpu/dense_few.h"
#include "cpu/gemm.h"
#include "cpu/level.h"
#include "cpu/nf4.h"
#include "cpu/nf4_few.h"
#include "cpu/philox.h"

namespace tlk {
namespace {

// Words of a chunk of a sum over rows: such sums are long and their C is small, so shorter chunks cost little and round
// less.
constexpr int64_t kRowsDepth = 64;

float inverse_keep(const Lora& lora) { return lora.dropout > 0.f ? float(1.0 / (1.0 - double(lora.dropout))) : 1.f; }
Dropout dropout_of(const Lora& lora) { return {lora.seed, lora.offset, lora.dropout}; }

// f(map): how the adapter sees its input.
template <class F>
void with_mask(const Lora& lora, const F& f) {
    if (lora.dropout > 0.f)
        f(Masked{dropout_of(lora)});
    else
        f(Plain{});
}

template <class Out>
void fill_rows(Out* out, int64_t rows, int64_t n, const Addend& addend) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < n; ++j) convert(addend.at(i, j), out[i * n + j]);
}

// ---- the base product -------------------------------------------------------------------------------------------

// y = update + x W^T + addend: W broadcast, so that features are the rows of C, or x.
template <class T, class In, class W>
void base_columns(const In* x, const W& w, const In* s, const In* b, int64_t rank, const Addend& addend, int64_t rows,
                  int64_t out_features, int64_t in_features, In* y, Parallel parallel) {
    const Term base{in_features, w, AlongK<T, In>{x, in_features}, StoreColumns<In>{y, out_features, addend}};
    product_narrow<T>(out_features, rows, parallel, Term{rank, AlongK<T, In>{b, rank}, AlongK<T, In>{s, rank}}, base);
}

template <class T, class In>
void base_rows(const In* x, const In* w, const In* s, const In* b, int64_t rank, const Addend& addend, int64_t rows,
               int64_t out_features, int64_t in_features, In* y, Parallel parallel) {
    const Term base{in_features, AlongK<T, In>{x, in_features}, AlongK<T, In>{w, in_features},
                    StoreRows<In>{y, out_features, addend}};
    product<T>(rows, out_features, parallel, Term{rank, AlongK<T, In>{s, rank}, AlongK<T, In>{b, rank}}, base);
}

bool few_rows_suffice(int64_t rows, [[maybe_unused]] int64_t in_features, const Base& w) {
    if (w.dense != nullptr) return rows <= kDenseFewRows;
#if defined(__AVX512F__)
    if (rows <= kFewRows && in_features % 64 == 0 && w.nf4.block_size >= 64) return true;
#endif
    return rows <= kDotRows;
}

template <class In>
void few_forward(const In* x, const Base& w, const Addend& addend, int64_t rows, int64_t out_features,
                 int64_t in_features, In* y, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    if (w.dense != nullptr)
        return few_dense<T>(x, typed<In>(w.dense), addend, rows, out_features, in_features, y, parallel);
#if defined(__AVX512F__)
    if (in_features % 64 == 0 && w.nf4.block_size >= 64)
        return few(x, Weight(w.nf4), addend, rows, out_features, in_features, y, parallel);
#endif
    dot_rows(x, Weight(w.nf4), addend, rows, out_features, in_features, y, parallel);
}

// y = update + x W^T + addend, where the update s B^T is in the product or, for few rows, in what is added to it.
template <class In>
void forward(const In* x, const Base& w, Addend addend, const In* s, const In* b, int64_t rank, int64_t rows,
             int64_t out_features, int64_t in_features, In* y, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    if (in_features == 0) return fill_rows(y, rows, out_features, addend);
    if (!few_rows_suffice(rows, in_features, w)) {
        if (w.dense != nullptr)
            return base_rows<T>(x, typed<In>(w.dense), s, b, rank, addend, rows, out_features, in_features, y,
                                parallel);
        return base_columns<T>(x, Nf4AlongK<T, In>{Weight(w.nf4), in_features}, s, b, rank, addend, rows, out_features,
                               in_features, y, parallel);
    }
    Scratch<float> update(rank > 0 ? rows * out_features : 0);
    if (rank > 0) {
        product<T>(out_features, rows, parallel,
                   Term{rank, AlongK<T, In>{b, rank}, AlongK<T, In>{s, rank},
                        StoreColumns<float>{update, out_features, addend}});
        addend = {update, out_features};
    }
    few_forward(x, w, addend, rows, out_features, in_features, y, parallel);
}

// gx = after(ds A) + g W + addend
template <class T, class In, class W, class After>
void backward_terms(const In* g, const W& w, const In* ds, const In* a, int64_t rank, const After& after,
                    const Addend& addend, int64_t rows, int64_t out_features, int64_t in_features, In* gx,
                    Parallel parallel) {
    const StoreRows<In> store{gx, in_features, addend};
    const Term base{out_features, AlongK<T, In>{g, out_features}, w, store};
    product<T>(rows, in_features, parallel, Term{rank, AlongK<T, In>{ds, rank}, AcrossK<T, In>{a, in_features}, after},
               base);
}

template <class In, class After>
void backward(const In* g, const Base& w, const In* ds, const In* a, int64_t rank, const After& after,
              const Addend& addend, int64_t rows, int64_t out_features, int64_t in_features, In* gx,
              Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    if (out_features == 0) return fill_rows(gx, rows, in_features, addend);  // ds is zero too
    if (w.dense != nullptr)
        backward_terms<T>(g, AcrossK<T, In>{typed<In>(w.dense), in_features}, ds, a, rank, after, addend, rows,
                          out_features, in_features, gx, parallel);
    else
        backward_terms<T>(g, Nf4AcrossK<T, In>{Weight(w.nf4), in_features}, ds, a, rank, after, addend, rows,
                          out_features, in_features, gx, parallel);
}

}  // namespace

// ---- one adapter --------------------------------------------------------------------------------------------------

void TLK_LEVEL::lora_linear(const void* x_, Dtype dtype, const Base& w, const float* bias, const Lora& lora,
                            int64_t rows, int64_t out_features, int64_t in_features, void* y, void* s_,
                            Parallel parallel) {
    by_dtype(dtype, [&]<class In>(In) {
        using T = typename Arithmetic<In>::type;
        const In *x = typed<In>(x_), *a = typed<In>(lora.a), *b = typed<In>(lora.b);
        auto* s = static_cast<In*>(s_);
        if (lora.rank > 0 && in_features == 0) clear(s, rows * lora.rank);
        if (lora.rank > 0 && in_features > 0) {
            const StoreRows<In> store{s, lora.rank, {}, lora.scaling * inverse_keep(lora)};
            with_mask(lora, [&](auto map) {
                product_narrow<T>(rows, lora.rank, parallel,
                                  Term{in_features, AlongK<T, In, decltype(map)>{x, in_features, nullptr, map},
                                       AlongK<T, In>{a, in_features}, store});
            });
        }
        if (rows == 0 || out_features == 0) return;
        forward(x, w, Addend{bias, 0}, static_cast<const In*>(s), b, lora.rank, rows, out_features, in_features,
                static_cast<In*>(y), parallel);
    });
}

void TLK_LEVEL::lora_grad_ab(const void* g_, const void* x_, const void* s_, Dtype dtype, const Lora& lora,
                             int64_t rows, int64_t out_features, int64_t in_features, void* ds_, float* grad_a,
                             float* grad_b, Parallel parallel) {
    by_dtype(dtype, [&]<class In>(In) {
        using T = typename Arithmetic<In>::type;
        const In *g = typed<In>(g_), *x = typed<In>(x_), *s = typed<In>(s_), *b = typed<In>(lora.b);
        auto* ds = static_cast<In*>(ds_);
        const int64_t rank = lora.rank;
        if (out_features == 0) clear(ds, rows * rank);
        if (rows == 0) {
            clear(grad_a, rank * in_features);
            clear(grad_b, out_features * rank);
            return;
        }
        if (out_features > 0) {
            product_narrow<T>(rows, rank, parallel,
                              Term{out_features, AlongK<T, In>{g, out_features}, AcrossK<T, In>{b, rank},
                                   StoreRows<In>{ds, rank, {}, lora.scaling}});
            product<T>(rank, out_features, parallel,
                       Term{rows, AcrossK<T, In>{s, rank}, AcrossK<T, In, Plain, kRowsDepth>{g, out_features},
                            StoreColumns<float>{grad_b, rank}});
        }
        with_mask(lora, [&](auto map) {
            product<T>(rank, in_features, parallel,
                       Term{rows, AcrossK<T, In>{ds, rank},
                            AcrossK<T, In, decltype(map), kRowsDepth>{x, in_features, nullptr, map},
                            StoreRows<float>{grad_a, in_features, {}, inverse_keep(lora)}});
        });
    });
}

void TLK_LEVEL::lora_grad_x(const void* g, Dtype dtype, const Base& w, const void* ds, const Lora& lora, int64_t rows,
                            int64_t out_features, int64_t in_features, void* grad_x, Parallel parallel) {
    if (rows == 0 || in_features == 0) return;
    by_dtype(dtype, [&]<class In>(In) {
        const auto run = [&](const auto& after) {
            backward(typed<In>(g), w, typed<In>(ds), typed<In>(lora.a), lora.rank, after, Addend{}, rows, out_features,
                     in_features, static_cast<In*>(grad_x), parallel);
        };
        if (lora.dropout > 0.f)
            run(Gate{dropout_of(lora), inverse_keep(lora)});
        else
            run(Nothing{});
    });
}

void TLK_LEVEL::lora_dropout_mask(uint64_t seed, uint64_t offset, float p, int64_t rows, int64_t cols, uint8_t* mask,
                                  Parallel parallel) {
    const Dropout dropout(seed, offset, p);
    parallel_for(parallel, rows, ceil_div(4096, cols + 1), [&](int64_t first, int64_t last) {
        uint8_t bits[64];
        for (int64_t r = first; r < last; ++r)
            for (int64_t c = 0; c < cols; c += 512) {
                const int64_t n = min<int64_t>(512, cols - c);
                dropout.row_bits(r, c / 8, n, bits);
                for (int64_t i = 0; i < n; ++i) mask[r * cols + c + i] = bits[i / 8] >> (i % 8) & 1;
            }
    });
}

// ---- many adapters in one batch -------------------------------------------------------------------------------------

namespace {

struct Group : LoraGroup {
    explicit Group(const LoraGroup& g) : LoraGroup(g) {}
    int64_t count(int64_t l) const { return offsets[l + 1] - offsets[l]; }
    const int64_t* rows(int64_t l) const { return order + offsets[l]; }
};

// With the lanes that the rank fills.
template <class F>
void by_rank(int64_t rank, const F& f) {
    if (rank <= Vec::size)
        f.template operator()<1>();
    else
        f.template operator()<kTileVecs>();
}

// s[row][rank] = scaling x F^T for the factor F of the row's adapter: operand(l). Zero elsewhere.
template <class In, class F>
void down(const In* x, int64_t width, const Group& group, int64_t rows, const F& operand, In* s, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    clear(s, rows * group.rank);
    if (width == 0) return;
    by_rank(group.rank, [&]<int Vecs>() {
        product_batch<T, Vecs>(group.adapters, parallel, [&](int64_t l) {
            const StoreRows<In> store{s, group.rank, {}, group.scalings[l], group.rows(l)};
            return Problem{group.count(l), group.ranks[l],
                           Term{width, AlongK<T, In>{x, width, group.rows(l)}, operand(l), store}};
        });
    });
}

// For each row with an adapter, store(l) sees s F^T for its factor F: operand(l), `width` columns.
template <class In, class F, class Store>
void up(const In* s, int64_t width, const Group& group, const F& operand, const Store& store, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    product_batch<T>(group.adapters, parallel, [&](int64_t l) {
        return Problem{group.count(l), width,
                       Term{group.ranks[l], AlongK<T, In>{s, group.rank, group.rows(l)}, operand(l), store(l)}};
    });
}

template <class In>
auto rows_of_a(const Group& group, int64_t in_features) {
    using T = typename Arithmetic<In>::type;
    return [&group, in_features](int64_t l) {
        return AlongK<T, In>{typed<In>(group.a) + l * group.rank * in_features, in_features};
    };
}
template <class In>
auto columns_of_a(const Group& group, int64_t in_features) {
    using T = typename Arithmetic<In>::type;
    return [&group, in_features](int64_t l) {
        return AcrossK<T, In>{typed<In>(group.a) + l * group.rank * in_features, in_features};
    };
}
template <class In>
auto rows_of_b(const Group& group, int64_t out_features) {
    using T = typename Arithmetic<In>::type;
    return [&group, out_features](int64_t l) {
        return AlongK<T, In>{typed<In>(group.b) + l * out_features * group.rank, group.rank};
    };
}
template <class In>
auto columns_of_b(const Group& group, int64_t out_features) {
    using T = typename Arithmetic<In>::type;
    return [&group, out_features](int64_t l) {
        return AcrossK<T, In>{typed<In>(group.b) + l * out_features * group.rank, group.rank};
    };
}

}  // namespace

void TLK_LEVEL::lora_linear_grouped(const void* x_, Dtype dtype, const void* w, const float* bias,
                                    const LoraGroup& group_, int64_t rows, int64_t out_features, int64_t in_features,
                                    void* y, void* s_, Parallel parallel) {
    const Group group(group_);
    by_dtype(dtype, [&]<class In>(In) {
        const In* x = typed<In>(x_);
        auto* s = static_cast<In*>(s_);
        down(x, in_features, group, rows, rows_of_a<In>(group, in_features), s, parallel);
        if (rows == 0 || out_features == 0) return;
        const Addend one{bias, 0};
        Scratch<float> update(rows * out_features);
        fill_rows(update.data, rows, out_features, one);
        up(
            s, out_features, group, rows_of_b<In>(group, out_features),
            [&](int64_t l) { return StoreRows<float>{update, out_features, one, 1.f, group.rows(l)}; }, parallel);
        const Addend addend{update, out_features};
        forward(x, Base{w, {}}, addend, static_cast<const In*>(nullptr), static_cast<const In*>(nullptr), 0, rows,
                out_features, in_features, static_cast<In*>(y), parallel);
    });
}

void TLK_LEVEL::lora_grouped_delta(const void* x, Dtype dtype, const LoraGroup& group_, int64_t rows,
                                   int64_t out_features, int64_t in_features, void* y, int64_t y_stride,
                                   Parallel parallel) {
    const Group group(group_);
    by_dtype(dtype, [&]<class In>(In) {
        Scratch<In> s(rows * group.rank);
        down(typed<In>(x), in_features, group, rows, rows_of_a<In>(group, in_features), s.data, parallel);
        up(
            s.data, out_features, group, rows_of_b<In>(group, out_features),
            [&](int64_t l) { return AddRows<In>{static_cast<In*>(y), y_stride, 1.f, group.rows(l)}; }, parallel);
    });
}

void TLK_LEVEL::lora_grouped_grad(const void* g_, const void* x_, const void* s_, Dtype dtype, const LoraGroup& group_,
                                  int64_t rows, int64_t out_features, int64_t in_features, void* ds_, float* grad_a,
                                  float* grad_b, Parallel parallel) {
    const Group group(group_);
    by_dtype(dtype, [&]<class In>(In) {
        using T = typename Arithmetic<In>::type;
        const In *g = typed<In>(g_), *x = typed<In>(x_), *s = typed<In>(s_);
        auto* ds = static_cast<In*>(ds_);
        down(g, out_features, group, rows, columns_of_b<In>(group, out_features), ds, parallel);
        clear(grad_a, group.adapters * group.rank * in_features);
        clear(grad_b, group.adapters * out_features * group.rank);
        product_batch<T>(group.adapters, parallel, [&](int64_t l) {
            return Problem{group.ranks[l], in_features,
                           Term{group.count(l), AcrossK<T, In>{ds, group.rank, group.rows(l)},
                                AcrossK<T, In, Plain, kRowsDepth>{x, in_features, group.rows(l)},
                                StoreRows<float>{grad_a + l * group.rank * in_features, in_features}}};
        });
        product_batch<T>(group.adapters, parallel, [&](int64_t l) {
            return Problem{group.ranks[l], out_features,
                           Term{group.count(l), AcrossK<T, In>{s, group.rank, group.rows(l)},
                                AcrossK<T, In, Plain, kRowsDepth>{g, out_features, group.rows(l)},
                                StoreColumns<float>{grad_b + l * out_features * group.rank, group.rank}}};
        });
    });
}

void TLK_LEVEL::lora_grouped_grad_x(const void* g, Dtype dtype, const void* w, const void* ds, const LoraGroup& group_,
                                    int64_t rows, int64_t out_features, int64_t in_features, void* grad_x,
                                    Parallel parallel) {
    if (rows == 0 || in_features == 0) return;
    const Group group(group_);
    by_dtype(dtype, [&]<class In>(In) {
        Scratch<float> update(rows * in_features);
        clear(update.data, rows * in_features);
        up(
            typed<In>(ds), in_features, group, columns_of_a<In>(group, in_features),
            [&](int64_t l) { return StoreRows<float>{update, in_features, {}, 1.f, group.rows(l)}; }, parallel);
        backward(typed<In>(g), Base{w, {}}, static_cast<const In*>(nullptr), static_cast<const In*>(nullptr), 0,
                 Nothing{}, Addend{update, in_features}, rows, out_features, in_features, static_cast<In*>(grad_x),
                 parallel);
    });
}

// ---- norms and merging ----------------------------------------------------------------------------------------------

namespace {

inline float dot(const float* a, const float* b, int64_t n) {
    Vec acc[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * Vec::size <= n; i += 4 * Vec::size)
        for (int v = 0; v < 4; ++v) acc[v] = fma(load(a + i + v * Vec::size), load(b + i + v * Vec::size), acc[v]);
    float s = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
    for (; i < n; ++i) s += a[i] * b[i];
    return s;
}

// norm_i^2 = |W_i|^2 + 2 s <(W A^T)_i, B_i> + s^2 <(B A A^T)_i, B_i>; line(i, out) is row i of W in float.
template <class W, class Line>
void row_norms(const W& w, const Line& line, const float* a, const float* b, int64_t rank, float scaling, int64_t rows,
               int64_t width, float* norm, Parallel parallel) {
    Scratch<float> wa(rows * rank), gram(rank * rank), bg(rows * rank);
    using Plane = AlongK<Fp32, float>;
    if (width > 0) {
        product<Fp32>(rows, rank, parallel, Term{width, w, Plane{a, width}, StoreRows<float>{wa, rank}});
        product<Fp32>(rank, rank, parallel,
                      Term{width, Plane{a, width}, Plane{a, width}, StoreRows<float>{gram, rank}});
        product<Fp32>(rows, rank, parallel, Term{rank, Plane{b, rank}, Plane{gram, rank}, StoreRows<float>{bg, rank}});
    }
    parallel_for(parallel, rows, ceil_div(kSmallWork, width + 1), [&](int64_t first, int64_t last) {
        Scratch<float> row(width);
        for (int64_t i = first; i < last; ++i) {
            line(i, row.data);
            float square = dot(row, row, width);
            if (width > 0) {
                square += 2 * scaling * dot(wa + i * rank, b + i * rank, rank);
                square += scaling * scaling * dot(bg + i * rank, b + i * rank, rank);
            }
            norm[i] = __builtin_sqrtf(square < 0.f ? 0.f : square);
        }
    });
}

}  // namespace

void TLK_LEVEL::dora_weight_norm(const Base& w, Dtype dtype, const float* a, const float* b, int64_t rank,
                                 float scaling, int64_t out_features, int64_t in_features, float* norm,
                                 Parallel parallel) {
    if (w.dense == nullptr) {
        const Weight weight(w.nf4);
        return row_norms(
            Nf4AlongK<Fp32, float>{weight, in_features},
            [&](int64_t i, float* row) { decode<float>(weight, i * in_features, (i + 1) * in_features, row); }, a, b,
            rank, scaling, out_features, in_features, norm, parallel);
    }
    by_dtype(dtype, [&]<class In>(In) {
        const In* dense = typed<In>(w.dense);
        row_norms(
            AlongK<Fp32, In>{dense, in_features},
            [&](int64_t i, float* row) { convert_row(dense + i * in_features, in_features, row); }, a, b, rank, scaling,
            out_features, in_features, norm, parallel);
    });
}

void TLK_LEVEL::lora_merge(void* weight, Dtype dtype, const float* a, const float* b, int64_t rank, float scaling,
                           int64_t out_features, int64_t in_features, Parallel parallel) {
    by_dtype(dtype, [&]<class In>(In) {
        product<Fp32>(out_features, in_features, parallel,
                      Term{rank, AlongK<Fp32, float>{b, rank}, AcrossK<Fp32, float>{a, in_features},
                           AddRows<In>{static_cast<In*>(weight), in_features, scaling}});
    });
}

}  // namespace tlk
