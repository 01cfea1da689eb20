// Squares of per-sample gradients, second moments, and sweeps over parameters.
//
// F[o][i] = sum over samples of (sum over tokens of g[o] a[i])^2. A block of F stays with one thread: for each sample
// a tile of the product is made over its tokens, squared while it is in L1 and added to F. Nothing else is written.
// Flops: 2 samples tokens out in, as for the gradient itself; bytes: activations and gradients once for each block
// across.
#include "cpu/gemm.h"
#include "cpu/level.h"
#include "cpu/lists.h"

namespace tlk {
namespace {

constexpr Parallel kAlone = {
    [](void*, int64_t n, int64_t, void (*body)(void*, int64_t, int64_t), void* ctx) { body(ctx, 0, n); }, nullptr};

int64_t first_token(const Samples& s, int64_t n) { return s.offsets != nullptr ? s.offsets[n] : n * s.tokens; }
int64_t tokens_of(const Samples& s, int64_t n) {
    return s.offsets != nullptr ? s.offsets[n + 1] - s.offsets[n] : s.tokens;
}
int64_t all_tokens(const Samples& s) { return s.offsets != nullptr ? s.offsets[s.count] : s.count * s.tokens; }
int64_t longest(const Samples& s) {
    int64_t most = 0;
    for (int64_t n = 0; n < s.count; ++n) most = max(most, tokens_of(s, n));
    return most;
}
float weight_of(const Samples& s, int64_t n) { return s.weight != nullptr ? s.weight[n] * s.scale : s.scale; }

// ---- sums of rows --------------------------------------------------------------------------------------------------

// sum[n] += x[n], or with `times` x times
template <class In>
void add_run(const In* x, int64_t n, float* sum) {
    int64_t i = 0;
    for (; i + Vec::size <= n; i += Vec::size) store(sum + i, load(sum + i) + load(x + i));
    for (; i < n; ++i) sum[i] += to_float(x[i]);
}
template <class In>
void add_scaled_run(const In* x, float times, int64_t n, float* sum) {
    const Vec factor = splat(times);
    int64_t i = 0;
    for (; i + Vec::size <= n; i += Vec::size) store(sum + i, fma(load(x + i), factor, load(sum + i)));
    for (; i < n; ++i) sum[i] += to_float(x[i]) * times;
}
template <class In>
void add_products(const In* x, const float* y, int64_t n, float* sum) {
    int64_t i = 0;
    for (; i + Vec::size <= n; i += Vec::size) store(sum + i, fma(load(x + i), load(y + i), load(sum + i)));
    for (; i < n; ++i) sum[i] += to_float(x[i]) * y[i];
}
// f[n] += weight x[n]^2
void add_squares(const float* x, float weight, int64_t n, float* f) {
    const Vec factor = splat(weight);
    int64_t i = 0;
    for (; i + Vec::size <= n; i += Vec::size) {
        const Vec v = load(x + i);
        store(f + i, fma(v * v, factor, load(f + i)));
    }
    for (; i < n; ++i) f[i] += x[i] * x[i] * weight;
}

// f_b[out] += the squares of a sample's summed gradients
template <class In>
void bias_squares(const In* grad, const Samples& samples, int64_t out, float* f_b, Parallel parallel) {
    constexpr int64_t run = 512;
    parallel_for(parallel, ceil_div(out, run), ceil_div(kSmallWork, all_tokens(samples) * run + 1),
                 [&](int64_t first, int64_t last) {
                     alignas(64) float sum[run];
                     for (int64_t c = first * run; c < min(out, last * run); c += run) {
                         const int64_t width = min(run, out - c);
                         for (int64_t n = 0; n < samples.count; ++n) {
                             clear(sum, width);
                             const In* row = grad + first_token(samples, n) * out + c;
                             for (int64_t t = tokens_of(samples, n); t > 0; --t, row += out) add_run(row, width, sum);
                             add_squares(sum, weight_of(samples, n), width, f_b + c);
                         }
                     }
                 });
}

// ---- squares of products -------------------------------------------------------------------------------------------

// f[i][j] += weight C[i][j]^2
struct AddSquares {
    float* f;
    int64_t stride;
    float weight;
    void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) const {
        for (int64_t r = 0; r < rows; ++r) add_squares(c + r * width, weight, cols, f + (i + r) * stride + j);
    }
};

// *total += the sum of C[i][j]^2
struct SumSquares {
    double* total;
    void operator()(int64_t, int64_t rows, int64_t, int64_t cols, float* c, int64_t width) const {
        for (int64_t r = 0; r < rows; ++r) {
            Vec sums = zero();
            float rest = 0;
            int64_t j = 0;
            for (; j + Vec::size <= cols; j += Vec::size) {
                const Vec v = load(c + r * width + j);
                sums = fma(v, v, sums);
            }
            for (; j < cols; ++j) rest += c[r * width + j] * c[r * width + j];
            *total += double(sum(sums)) + double(rest);
        }
    }
};

// The products of all samples, sample(b, n) = their terms, block by block of one m x n: `batch` of these (the groups of
// a convolution), each block by one thread, so that functors may add to the same place.
template <class T, int Vecs, class Sample>
void each_sample(int64_t batch, int64_t m, int64_t n, int64_t samples, int64_t most_tokens, int64_t work,
                 Parallel parallel, const Sample& sample) {
    using Operands = decltype(sample(0, 0));
    using A = decltype(Operands::a);
    constexpr int64_t width = Vecs * Vec::size, rows_of_tile = Vecs == 1 ? kNarrowRows : kTileRows;
    Cut c = cut<T, Vecs>(m, 0, n, false, sample(0, 0));
    const auto grain = [&] { return ceil_div(kSmallWork, work / (batch * c.blocks()) + 1); };
    if (most_tokens > kDepth * T::per_word) {
        parallel_for(parallel, batch * c.blocks(), grain(), [&](int64_t first, int64_t last) {
            Blocks<T> blocks(c, A::run, decltype(Operands::b)::depth);
            for (int64_t u = first; u < last; ++u) {
                const int64_t b = u / c.blocks(), index = u % c.blocks();
                const int64_t i = index % c.row_blocks() * c.rows, j = index / c.row_blocks() * c.cols;
                for (int64_t s = 0; s < samples; ++s)
                    add_term<T, Vecs, false>(sample(b, s), c, i, j, nullptr, false, blocks);
            }
        });
        return;
    }
    // Products of one panel's depth are squared panel by panel, so a block needs room for itself and one side alone: it
    // can be larger, and what it packs is used more often.
    constexpr int64_t side = 384, kPanels = 16384, pad = Blocks<T>::pad;
    const int64_t most_words = ceil_div(most_tokens, T::per_word);
    c.rows = round_up(ceil_div(m, ceil_div(m, side)), rows_of_tile);
    c.cols = round_up(
        ceil_div(n, max(ceil_div(n, side), min(ceil_div(kUnits, batch * c.row_blocks()), ceil_div(n, 2 * width)))),
        width);
    parallel_for(parallel, batch * c.blocks(), grain(), [&](int64_t first, int64_t last) {
        const int64_t stride = most_words + pad;
        const int64_t group = max(width, min(c.cols, kPanels / max<int64_t>(1, most_words) / width * width));
        Scratch<typename T::word> rows_of_a(c.rows * stride), panels(most_words * group);
        Scratch<float> product(c.rows * width);
        for (int64_t u = first; u < last; ++u) {
            const int64_t b = u / c.blocks(), index = u % c.blocks();
            const int64_t i = index % c.row_blocks() * c.rows, j = index / c.row_blocks() * c.cols;
            const int64_t rows = min(c.rows, m - i), end = min(n, j + c.cols);
            for (int64_t s = 0; s < samples; ++s) {
                const auto term = sample(b, s);
                if (term.k == 0) continue;
                const typename T::word* a = nullptr;
                int64_t a_stride = stride;
                if constexpr (requires { term.a.in_place(i, 0, term.k); }) {
                    a = term.a.in_place(i, 0, term.k);
                    if (a != nullptr) a_stride = term.a.word_stride();
                }
                if (a == nullptr) {
                    term.a.pack_rows(i, rows, 0, term.k, rows_of_a, stride);
                    a = rows_of_a;
                }
                const int64_t words = ceil_div(term.k, T::per_word);
                for (int64_t from = j; from < end; from += group) {
                    const int64_t until = min(end, from + group);
                    term.b.template pack_panels<int(width)>(from, until - from, 0, term.k, panels);
                    for (int64_t col = from; col < until; col += width) {
                        multiply<T, Vecs>(rows, a, a_stride, panels + (col - from) * words, words, product, false);
                        term.after(i, rows, col, min(width, until - col), product, width);
                    }
                }
            }
        }
    });
}

// x^2 times the weight of its row
struct SquaredWeighted {
    static constexpr bool none = false, on_elements = false;
    const float* weight;
    void operator()(float* x, int64_t n, int64_t row, int64_t) const {
        const float w = weight != nullptr ? weight[row] : 1.f;
        for (int64_t i = 0; i < n; ++i) x[i] *= x[i] * w;
    }
};

// A sample of few tokens: the tile of F stays in registers next to that of the product, over all samples of a run.
constexpr int kFewRows = kTileRows / 2;
// Up to how many tokens that pays: pairs of bfloat16 are multiplied at once where there are enough to fill them.
template <class In>
constexpr int64_t few_tokens = is_same<typename Arithmetic<In>::type, Fp32> ? 16 : 8;

// f[rows][width] += weight (sum over the sample's tokens)^2, samples one after another along k
template <int Rows>
[[gnu::noinline]] void tile_of_squares(const float* a, int64_t a_stride, const float* panel, const int64_t* tokens,
                                       const float* weight, int64_t samples, float* f) {
    constexpr int64_t width = kTileCols;
    Vec total[Rows][kTileVecs];
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVecs; ++v) total[r][v] = load(f + r * width + v * Vec::size);
    for (int64_t n = 0; n < samples; ++n) {
        Vec c[Rows][kTileVecs];
        for (auto& row : c)
            for (Vec& x : row) x = zero();
        for (const float* end = panel + tokens[n] * width; panel < end; panel += width, ++a) {
            Vec column[kTileVecs];
            for (int v = 0; v < kTileVecs; ++v) column[v] = load(panel + v * Vec::size);
            for (int r = 0; r < Rows; ++r) {
                const Vec x = splat(a[r * a_stride]);
                for (int v = 0; v < kTileVecs; ++v) c[r][v] = fma(x, column[v], c[r][v]);
            }
        }
        const Vec w = splat(weight[n]);
        for (int r = 0; r < Rows; ++r)
            for (int v = 0; v < kTileVecs; ++v) total[r][v] = fma(c[r][v] * c[r][v], w, total[r][v]);
    }
    for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kTileVecs; ++v) store(f + r * width + v * Vec::size, total[r][v]);
}
template <int Rows = kFewRows>
void rows_of_squares(int64_t rows, const float* a, int64_t a_stride, const float* panel, const int64_t* tokens,
                     const float* weight, int64_t samples, float* f) {
    if constexpr (Rows == 0) {
        return;
    } else if (rows == Rows) {
        tile_of_squares<Rows>(a, a_stride, panel, tokens, weight, samples, f);
    } else {
        rows_of_squares<Rows - 1>(rows, a, a_stride, panel, tokens, weight, samples, f);
    }
}

// The same as `linear_squares`, for samples of at most few_tokens.
template <class In>
void few_squares(const In* act, const In* grad, const Samples& samples, int64_t out, int64_t in, float* f,
                 Parallel parallel) {
    constexpr int64_t width = kTileCols, pad = 16;
    const AcrossK<Fp32, In> left{grad, out}, right{act, in};
    Cut c = cut<Fp32, kTileVecs>(out, 0, in, false, Term{kDepth, left, right});
    const int64_t work = all_tokens(samples) * out * in;
    parallel_for(parallel, c.blocks(), ceil_div(kSmallWork, work / c.blocks() + 1), [&](int64_t first, int64_t last) {
        constexpr int64_t stride = kDepth + pad;
        Scratch<float> a(c.rows * stride), b(c.cols * kDepth), weight(kDepth);
        Scratch<int64_t> tokens(kDepth);
        alignas(64) float tile[kFewRows * width];
        for (int64_t u = first; u < last; ++u) {
            const int64_t i = u % c.row_blocks() * c.rows, j = u / c.row_blocks() * c.cols;
            const int64_t rows = min(c.rows, out - i), cols = min(c.cols, in - j);
            for (int64_t n = 0; n < samples.count;) {
                const int64_t at = first_token(samples, n);
                int64_t count = 0, words = 0;  // the run: samples whose tokens fit a panel
                for (; n < samples.count && count < kDepth && words + tokens_of(samples, n) <= kDepth; ++n, ++count) {
                    tokens[count] = tokens_of(samples, n);
                    weight[count] = weight_of(samples, n);
                    words += tokens[count];
                }
                left.pack_rows(i, rows, at, words, a, stride);
                right.template pack_panels<int(width)>(j, cols, at, words, b);
                for (int64_t p = 0; p < cols; p += width) {
                    const int64_t lanes = min(width, cols - p);
                    for (int64_t r = 0; r < rows; r += kFewRows) {
                        const int64_t these = min<int64_t>(kFewRows, rows - r);
                        for (int64_t k = 0; k < these; ++k)
                            convert_row(f + (i + r + k) * in + j + p, lanes, tile + k * width);
                        rows_of_squares(these, a + r * stride, stride, b + p * words, tokens, weight, count, tile);
                        for (int64_t k = 0; k < these; ++k)
                            convert_row(tile + k * width, lanes, f + (i + r + k) * in + j + p);
                    }
                }
            }
        }
    });
}

template <int Vecs, class In>
void linear_squares(const In* act, const In* grad, const Samples& samples, int64_t out, int64_t in, float* f,
                    Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    each_sample<T, Vecs>(1, out, in, samples.count, longest(samples), all_tokens(samples) * out * in, parallel,
                         [&](int64_t, int64_t n) {
                             const int64_t at = first_token(samples, n);
                             return Term{tokens_of(samples, n), AcrossK<T, In>{grad + at * out, out},
                                         AcrossK<T, In>{act + at * in, in}, AddSquares{f, in, weight_of(samples, n)}};
                         });
}

}  // namespace

void TLK_LEVEL::diag_fisher_linear(const void* act, const void* grad, Dtype dtype, const Samples& samples, int64_t out,
                                   int64_t in, float* f_w, float* f_b, Parallel parallel) {
    if (samples.count == 0 || out == 0) return;
    by_dtype(dtype, [&]<class In>(In) {
        const In *a = typed<In>(act), *g = typed<In>(grad);
        if (f_b != nullptr) bias_squares(g, samples, out, f_b, parallel);
        if (f_w == nullptr || in == 0) return;
        if (samples.offsets == nullptr && samples.tokens == 1) {  // the square of a product is a product of squares
            product<Fp32>(out, in, parallel,
                          Term{samples.count, AcrossK<Fp32, In, SquaredWeighted>{g, out, nullptr, {samples.weight}},
                               AcrossK<Fp32, In, Squared>{a, in}, AddRows<float>{f_w, in, samples.scale}});
        } else if (longest(samples) <= few_tokens<In>) {
            few_squares(a, g, samples, out, in, f_w, parallel);
        } else if (in <= Vec::size) {
            linear_squares<1>(a, g, samples, out, in, f_w, parallel);
        } else {
            linear_squares<kTileVecs>(a, g, samples, out, in, f_w, parallel);
        }
    });
}

void TLK_LEVEL::per_sample_sqnorm(const void* act, const void* grad, Dtype dtype, const Samples& samples, int64_t out,
                                  int64_t in, float* norms, Parallel parallel) {
    by_dtype(dtype, [&]<class In>(In) {
        using T = typename Arithmetic<In>::type;
        const int64_t mean_work = all_tokens(samples) / max<int64_t>(1, samples.count) * out * in;
        parallel_for(parallel, samples.count, ceil_div(kSmallWork, mean_work + 1), [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; ++n) {
                const int64_t at = first_token(samples, n), tokens = tokens_of(samples, n);
                const In *a = typed<In>(act) + at * in, *g = typed<In>(grad) + at * out;
                double total = 0;
                if (tokens == 1) {
                    double squares[2] = {0, 0};
                    const auto add = [](const In* x, int64_t count, double& into) {
                        for (int64_t i = 0; i < count; ++i) into += double(to_float(x[i])) * double(to_float(x[i]));
                    };
                    add(a, in, squares[0]);
                    add(g, out, squares[1]);
                    total = squares[0] * squares[1];
                } else if (tokens * (in + out) < 2 * in * out) {  // by halves of two symmetric products of tokens
                    Scratch<float> gram(tokens * tokens);
                    product_lower<T>(
                        tokens, 0, kAlone,
                        Term{in, AlongK<T, In>{a, in}, AlongK<T, In>{a, in}, StoreRows<float>{gram, tokens}});
                    const auto dot = [&](int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) {
                        for (int64_t r = 0; r < rows; ++r) {
                            double sum = 0;
                            for (int64_t l = 0; l < cols && j + l <= i + r; ++l)
                                sum += (j + l < i + r ? 2. : 1.) * double(c[r * width + l]) *
                                       double(gram[(i + r) * tokens + j + l]);
                            total += sum;
                        }
                    };
                    product_lower<T>(tokens, 0, kAlone, Term{out, AlongK<T, In>{g, out}, AlongK<T, In>{g, out}, dot});
                } else {
                    product<T>(out, in, kAlone,
                               Term{tokens, AcrossK<T, In>{g, out}, AcrossK<T, In>{a, in}, SumSquares{&total}});
                }
                norms[n] = total < 0 ? 0.f : float(total);  // NaN stays
            }
        });
    });
}

// ---- convolutions --------------------------------------------------------------------------------------------------

namespace {

// out[n] = in[n]: rows of images are short, so the last vector goes over the one before instead of by elements.
template <class In, class Out>
inline void copy_short(const In* in, int64_t n, Out* out) {
    if (n < Vec::size) {
        for (int64_t i = 0; i < n; ++i) convert(to_float(in[i]), out[i]);
        return;
    }
    for (int64_t i = 0; i + Vec::size < n; i += Vec::size) store(out + i, load(in + i));
    store(out + n - Vec::size, load(in + n - Vec::size));
}

// The patches of one sample and group as an operand: lane j is a place of the kernel (channel, vertical, horizontal),
// and k runs over the positions of the output.
template <class T, class In>
struct Patches {
    static constexpr int64_t run = kDepth, columns = kBlockColumns, depth = kDepth, shared_bytes = kSharedBytes;
    using word = typename T::word;
    using element = typename T::element;
    const In* data;  // [channels of the group][height][width]
    const Conv* conv;

    void line(int64_t j, int64_t k, int64_t count, element* out) const {
        const Conv& c = *conv;
        const int64_t kx = j % c.kernel[1], ky = j / c.kernel[1] % c.kernel[0];
        const In* plane = data + j / (c.kernel[0] * c.kernel[1]) * c.height * c.width;
        const int64_t end = k + count;
        while (k < end) {
            const int64_t oy = k / c.out_width, ox = k % c.out_width, n = min(end - k, c.out_width - ox);
            const int64_t y = oy * c.stride[0] - c.padding[0] + ky * c.dilation[0];
            int64_t x = ox * c.stride[1] - c.padding[1] + kx * c.dilation[1];
            if (y < 0 || y >= c.height) {
                for (int64_t i = 0; i < n; ++i) out[i] = {};
            } else if (c.stride[1] == 1) {
                const int64_t left = min(n, max<int64_t>(0, -x)), stop = max(left, min(n, c.width - x));
                for (int64_t i = 0; i < left; ++i) out[i] = {};
                copy_short(plane + y * c.width + x + left, stop - left, out + left);
                for (int64_t i = stop; i < n; ++i) out[i] = {};
            } else {
                for (int64_t i = 0; i < n; ++i, x += c.stride[1]) {
                    if (x >= 0 && x < c.width)
                        convert(to_float(plane[y * c.width + x]), out[i]);
                    else
                        out[i] = {};
                }
            }
            out += n;
            k += n;
        }
        if (count % T::per_word) *out = {};
    }
    template <int Width>
    void pack_panels(int64_t j, int64_t count, int64_t k, int64_t elements, word* out) const {
        alignas(64) word lines[Width * kDepth];
        const int64_t words = ceil_div(elements, T::per_word);
        for (int64_t p = 0; p < count; p += Width, out += words * Width) {
            for (int64_t r = 0; r < Width; ++r) {
                if (p + r < count)
                    line(j + p + r, k, elements, reinterpret_cast<element*>(lines + r * kDepth));
                else
                    memset(lines + r * kDepth, 0, size_t(words) * sizeof(word));
            }
            transpose(lines, Width, words, kDepth, out, Width);
        }
    }
};

template <int Vecs, class In>
void conv_squares(const In* act, const In* grad, const Samples& samples, const Conv& conv, float* f,
                  Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    const int64_t positions = conv.out_height * conv.out_width, area = conv.height * conv.width;
    const int64_t outs = conv.out_channels / conv.groups, channels = conv.channels / conv.groups;
    const int64_t places = channels * conv.kernel[0] * conv.kernel[1];
    const int64_t work = samples.count * conv.out_channels * places * positions;
    const auto gradient = [&](int64_t b, int64_t n) {
        return AlongK<T, In>{grad + (n * conv.out_channels + b * outs) * positions, positions};
    };
    const auto patches = [&](int64_t b, int64_t n) {
        return Patches<T, In>{act + (n * conv.channels + b * channels) * area, &conv};
    };
    each_sample<T, Vecs>(conv.groups, outs, places, samples.count, positions, work, parallel,
                         [&](int64_t b, int64_t n) {
                             return Term{positions, gradient(b, n), patches(b, n),
                                         AddSquares{f + b * outs * places, places, weight_of(samples, n)}};
                         });
}

// The sum of x[n], in pieces of double
template <class In>
double sum_run(const In* x, int64_t n) {
    constexpr int64_t piece = 64 * Vec::size;
    double total = 0;
    for (int64_t i = 0; i < n;) {
        const int64_t end = min(n, i + piece);
        Vec v = zero();
        for (; i + Vec::size <= end; i += Vec::size) v = v + load(x + i);
        float rest = 0;
        for (; i < end; ++i) rest += to_float(x[i]);
        total += double(sum(v)) + double(rest);
    }
    return total;
}
template <class In>
double dot_run(const In* x, float shift, const In* y, int64_t n) {
    constexpr int64_t piece = 64 * Vec::size;
    double total = 0;
    for (int64_t i = 0; i < n;) {
        const int64_t end = min(n, i + piece);
        Vec v = zero();
        for (; i + Vec::size <= end; i += Vec::size) v = fma(load(x + i) - splat(shift), load(y + i), v);
        float rest = 0;
        for (; i < end; ++i) rest += (to_float(x[i]) - shift) * to_float(y[i]);
        total += double(sum(v)) + double(rest);
    }
    return total;
}

}  // namespace

void TLK_LEVEL::diag_fisher_conv2d(const void* act, const void* grad, Dtype dtype, const Samples& samples,
                                   const Conv& conv, float* f_w, float* f_b, Parallel parallel) {
    const int64_t positions = conv.out_height * conv.out_width;
    if (samples.count == 0 || conv.out_channels == 0) return;
    by_dtype(dtype, [&]<class In>(In) {
        const In *a = typed<In>(act), *g = typed<In>(grad);
        if (f_b != nullptr)
            parallel_for(parallel, conv.out_channels, ceil_div(kSmallWork, samples.count * positions),
                         [&](int64_t first, int64_t last) {
                             for (int64_t c = first; c < last; ++c)
                                 for (int64_t n = 0; n < samples.count; ++n) {
                                     const auto sum =
                                         float(sum_run(g + (n * conv.out_channels + c) * positions, positions));
                                     f_b[c] += sum * sum * weight_of(samples, n);
                                 }
                         });
        const int64_t places = conv.channels / conv.groups * conv.kernel[0] * conv.kernel[1];
        if (places == 0) return;
        if (places <= Vec::size)
            conv_squares<1>(a, g, samples, conv, f_w, parallel);
        else
            conv_squares<kTileVecs>(a, g, samples, conv, f_w, parallel);
    });
}

// ---- embeddings and norms ------------------------------------------------------------------------------------------

namespace {

float root(float x) {
    alignas(64) float out[Vec::size];
    store(out, sqrt(splat(x)));
    return out[0];
}

// order[n] = 0 .. n - 1 by ascending keys, equal ones in their order; by merging.
void sort_by(const int64_t* keys, int64_t n, int64_t* order, int64_t* spare) {
    for (int64_t i = 0; i < n; ++i) order[i] = i;
    for (int64_t width = 1; width < n; width *= 2) {
        for (int64_t low = 0; low < n; low += 2 * width) {
            const int64_t middle = min(n, low + width), high = min(n, low + 2 * width);
            int64_t a = low, b = middle;
            for (int64_t i = low; i < high; ++i)
                spare[i] = a < middle && (b >= high || keys[order[a]] <= keys[order[b]]) ? order[a++] : order[b++];
        }
        memcpy(order, spare, size_t(n) * sizeof(int64_t));
    }
}

}  // namespace

void TLK_LEVEL::diag_fisher_embedding(const int64_t* indices, const void* grad, Dtype dtype, const Samples& samples,
                                      int64_t d, int64_t padding, float* f_w, Parallel parallel) {
    const int64_t most = longest(samples);
    if (most == 0 || d == 0) return;
    by_dtype(dtype, [&]<class In>(In) {
        constexpr int64_t run = 256;  // columns of a thread: samples share rows, columns nobody
        parallel_for(parallel, ceil_div(d, run), ceil_div(kSmallWork, all_tokens(samples) * run),
                     [&](int64_t first, int64_t last) {
                         const int64_t from = first * run, width = min(d, last * run) - from;
                         Scratch<int64_t> order(most), spare(most);
                         Scratch<float> sum(width);
                         for (int64_t n = 0; n < samples.count; ++n) {
                             const int64_t at = first_token(samples, n), tokens = tokens_of(samples, n);
                             const int64_t* index = indices + at;
                             sort_by(index, tokens, order, spare);
                             for (int64_t t = 0; t < tokens;) {
                                 const int64_t row = index[order[t]];
                                 clear(sum.data, width);
                                 for (; t < tokens && index[order[t]] == row; ++t)
                                     add_run(typed<In>(grad) + (at + order[t]) * d + from, width, sum);
                                 if (row != padding)
                                     add_squares(sum, weight_of(samples, n), width, f_w + row * d + from);
                             }
                         }
                     });
    });
}

void TLK_LEVEL::diag_fisher_norm(const void* x, const void* grad, Dtype dtype, const Samples& samples, int64_t d,
                                 Norm norm, float eps, float* f_w, float* f_b, Parallel parallel) {
    // rows are normalised whole, so samples are shared among threads, in groups that depend on their number alone
    constexpr int64_t most = 16;
    const int64_t groups = min(most, samples.count);
    if (groups == 0 || d == 0) return;
    by_dtype(dtype, [&]<class In>(In) {
        Scratch<float> partial(groups * 2 * d);
        parallel_for(parallel, groups, ceil_div(kSmallWork, all_tokens(samples) * d / groups + 1),
                     [&](int64_t first, int64_t last) {
                         Scratch<float> row(d), by_weight(d), by_bias(d);
                         for (int64_t group = first; group < last; ++group) {
                             float *part_w = partial + group * 2 * d, *part_b = part_w + d;
                             clear(part_w, 2 * d);
                             for (int64_t n = samples.count * group / groups; n < samples.count * (group + 1) / groups;
                                  ++n) {
                                 clear(by_weight.data, d);
                                 clear(by_bias.data, d);
                                 const int64_t at = first_token(samples, n);
                                 for (int64_t t = at; t < at + tokens_of(samples, n); ++t) {
                                     const In* g = typed<In>(grad) + t * d;
                                     if (f_w != nullptr) {
                                         convert_row(typed<In>(x) + t * d, d, row.data);
                                         if (norm != Norm::none) {
                                             const auto mean =
                                                 norm == Norm::layer ? float(sum_run(row.data, d) / double(d)) : 0.f;
                                             for (int64_t i = 0; i < d; ++i) row[i] -= mean;
                                             const double square = dot_run(row.data, 0.f, row.data, d) / double(d);
                                             const float rstd = 1.f / root(float(square + double(eps)));
                                             for (int64_t i = 0; i < d; ++i) row[i] *= rstd;
                                         }
                                         add_products(g, row, d, by_weight);
                                     }
                                     add_run(g, d, by_bias);
                                 }
                                 add_squares(by_weight, weight_of(samples, n), d, part_w);
                                 add_squares(by_bias, weight_of(samples, n), d, part_b);
                             }
                         }
                     });
        for (int64_t group = 0; group < groups; ++group) {
            if (f_w != nullptr) add_run(partial + group * 2 * d, d, f_w);
            if (f_b != nullptr) add_run(partial + group * 2 * d + d, d, f_b);
        }
    });
}

void TLK_LEVEL::diag_fisher_channel_norm(const void* x, const void* grad, Dtype dtype, const Samples& samples,
                                         int64_t channels, const float* mean, const float* rstd, float* f_w, float* f_b,
                                         Parallel parallel) {
    const int64_t length = samples.tokens;
    if (samples.count == 0 || length == 0) return;
    by_dtype(dtype, [&]<class In>(In) {
        parallel_for(parallel, channels, ceil_div(kSmallWork, samples.count * length),
                     [&](int64_t first, int64_t last) {
                         for (int64_t c = first; c < last; ++c)
                             for (int64_t n = 0; n < samples.count; ++n) {
                                 const int64_t at = (n * channels + c) * length;
                                 const In* g = typed<In>(grad) + at;
                                 const float w = weight_of(samples, n);
                                 if (f_w != nullptr) {
                                     const auto dot = float(dot_run(typed<In>(x) + at, mean[c], g, length)) * rstd[c];
                                     f_w[c] += dot * dot * w;
                                 }
                                 if (f_b != nullptr) {
                                     const auto sum = float(sum_run(g, length));
                                     f_b[c] += sum * sum * w;
                                 }
                             }
                     });
    });
}

// ---- second moments ------------------------------------------------------------------------------------------------

namespace {

// x times the weight of its row
struct Weighted {
    static constexpr bool none = false, on_elements = false;
    const float* weight;
    void operator()(float* x, int64_t n, int64_t row, int64_t) const {
        for (int64_t i = 0; i < n; ++i) x[i] *= weight[row];
    }
};

// moment[i][j] and moment[j][i] += scale C[i][j], of the lower half
struct AddBoth {
    float* moment;
    int64_t stride;
    float scale;
    void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) const {
        for (int64_t r = i; r < i + rows; ++r) {
            const float* line = c + (r - i) * width;
            for (int64_t l = j; l < min(j + cols, r + 1); ++l) {
                moment[r * stride + l] += scale * line[l - j];
                if (l < r) moment[l * stride + r] += scale * line[l - j];
            }
        }
    }
};

// The moment of rows[n][d], and of the ones after them, whose weights are `ones`
template <class In>
void add_moment(const In* rows, const float* weight, const float* ones, int64_t n, int64_t d, bool append, float scale,
                float* moment, Parallel parallel) {
    if (n == 0) return;
    const int64_t side = d + append;
    const AddBoth add{moment, side, scale};
    using T = typename Arithmetic<In>::type;
    if (weight == nullptr)
        product_lower<T>(d, 0, parallel, Term{n, AcrossK<T, In>{rows, d}, AcrossK<T, In>{rows, d}, add});
    else  // weights are not rounded
        product_lower<Fp32>(
            d, 0, parallel,
            Term{n, AcrossK<Fp32, In, Weighted>{rows, d, nullptr, {weight}}, AcrossK<Fp32, In>{rows, d}, add});
    if (!append) return;
    constexpr int64_t run = 512, batch = 1024;
    parallel_for(parallel, ceil_div(d + 1, run), ceil_div(kSmallWork, n * run + 1), [&](int64_t first, int64_t last) {
        alignas(64) float sum[run];
        for (int64_t c = first * run; c < min(d + 1, last * run); c += run) {
            const int64_t width = max<int64_t>(0, min(run, d - c));
            double total = 0;
            for (int64_t from = 0; from < n; from += batch) {
                clear(sum, width);
                for (int64_t r = from; r < min(n, from + batch); ++r) {
                    const float w = (weight != nullptr ? weight[r] : 1.f) * (ones != nullptr ? ones[r] : 1.f);
                    add_scaled_run(rows + r * d + c, w, width, sum);
                    total += double(w) * double(ones != nullptr ? ones[r] : 1.f);
                }
                for (int64_t i = 0; i < width; ++i) {
                    moment[d * side + c + i] += scale * sum[i];
                    moment[(c + i) * side + d] += scale * sum[i];
                }
            }
            if (c + run > d) moment[d * side + d] += scale * float(total);
        }
    });
}

}  // namespace

void TLK_LEVEL::second_moment(const void* x, Dtype dtype, const Samples& samples, int64_t d, Rows rows, bool ones,
                              float* moment, Parallel parallel) {
    by_dtype(dtype, [&]<class In>(In) {
        const In* data = typed<In>(x);
        if (rows == Rows::tokens) {
            add_moment(data, samples.weight, nullptr, all_tokens(samples), d, ones, samples.scale, moment, parallel);
            return;
        }
        constexpr int64_t batch = 256;  // samples at a time
        const int64_t most = min(batch, samples.count);
        Scratch<float> sums(most * d), one(most);
        for (int64_t from = 0; from < samples.count; from += batch) {
            const int64_t count = min(batch, samples.count - from);
            parallel_for(parallel, count, ceil_div(kSmallWork, all_tokens(samples) / samples.count * d + 1),
                         [&](int64_t first, int64_t last) {
                             for (int64_t n = first; n < last; ++n) {
                                 const int64_t at = first_token(samples, from + n);
                                 float* sum = sums + n * d;
                                 clear(sum, d);
                                 double total = 0;
                                 for (int64_t t = at; t < at + tokens_of(samples, from + n); ++t) {
                                     const float w = samples.weight != nullptr ? samples.weight[t] : 1.f;
                                     add_scaled_run(data + t * d, w, d, sum);
                                     total += double(w);
                                 }
                                 // a sample without tokens has no mean, and no part
                                 one[n] = rows == Rows::sum ? float(total) : (total != 0 ? 1.f : 0.f);
                                 if (rows == Rows::mean && total != 0)
                                     for (int64_t i = 0; i < d; ++i) sum[i] = float(double(sum[i]) / total);
                             }
                         });
            add_moment(sums.data, nullptr, one.data, count, d, ones, samples.scale, moment, parallel);
        }
    });
}

// ---- sweeps --------------------------------------------------------------------------------------------------------

void TLK_LEVEL::importance_accum(const Lists& lists, float* const* acc, const void* const* grads, bool absolute,
                                 float decay, float scale, Parallel parallel) {
    Pieces pieces(lists);
    pieces.run(parallel, [&](int64_t, int64_t tensor, int64_t at, int64_t n) {
        by_dtype(lists.dtypes[tensor], [&]<class In>(In) {
            const In* g = typed<In>(grads[tensor]) + at;
            float* a = acc[tensor] + at;
            const Vec keep = splat(decay), factor = splat(scale);
            int64_t i = 0;
            for (; i + Vec::size <= n; i += Vec::size) {
                const Vec v = load(g + i);
                store(a + i, fma(absolute ? abs(v) : v * v, factor, load(a + i) * keep));
            }
            for (; i < n; ++i) {
                const float v = to_float(g[i]);
                a[i] = (absolute ? __builtin_fabsf(v) : v * v) * scale + a[i] * decay;
            }
        });
    });
}

void TLK_LEVEL::si_accum(const Lists& lists, float* const* omega, const void* const* grads, const void* const* deltas,
                         float scale, Parallel parallel) {
    Pieces pieces(lists);
    pieces.run(parallel, [&](int64_t, int64_t tensor, int64_t at, int64_t n) {
        by_dtype(lists.dtypes[tensor], [&]<class In>(In) {
            const In *g = typed<In>(grads[tensor]) + at, *d = typed<In>(deltas[tensor]) + at;
            float* o = omega[tensor] + at;
            const Vec factor = splat(scale);
            int64_t i = 0;
            for (; i + Vec::size <= n; i += Vec::size)
                store(o + i, fma(load(g + i) * factor, load(d + i), load(o + i)));
            for (; i < n; ++i) o[i] += to_float(g[i]) * scale * to_float(d[i]);
        });
    });
}

namespace {

enum class Write { nothing, add, over };

// The sum of f (p - a)^2 of one piece; its gradient goes to `grad` as `write` says.
template <Write write, class In>
double penalty_piece(const In* p, const In* a, const float* f, float scale, int64_t n, In* grad) {
    constexpr int64_t run = 256 * Vec::size;  // the longest sum in float, in four parts
    const Vec factor = splat(scale);
    double total = 0;
    for (int64_t i = 0; i < n;) {
        const int64_t end = min(n, i + run);
        Vec sums[4] = {zero(), zero(), zero(), zero()};
        const auto step = [&](int64_t at, Vec& sum) {
            const Vec delta = load(p + at) - load(a + at), slope = load(f + at) * delta;
            sum = fma(slope, delta, sum);
            if constexpr (write == Write::add) store(grad + at, fma(slope, factor, load(grad + at)));
            if constexpr (write == Write::over) store(grad + at, slope * factor);
        };
        for (; i + 4 * Vec::size <= end; i += 4 * Vec::size)
            for (int v = 0; v < 4; ++v) step(i + v * Vec::size, sums[v]);
        for (; i + Vec::size <= end; i += Vec::size) step(i, sums[0]);
        float rest = 0;
        for (; i < end; ++i) {
            const float delta = to_float(p[i]) - to_float(a[i]), slope = f[i] * delta;
            rest += slope * delta;
            if constexpr (write == Write::add) convert(slope * scale + to_float(grad[i]), grad[i]);
            if constexpr (write == Write::over) convert(slope * scale, grad[i]);
        }
        total += double(sum((sums[0] + sums[1]) + (sums[2] + sums[3]))) + double(rest);
    }
    return total;
}

}  // namespace

double TLK_LEVEL::quad_penalty(const Lists& lists, const void* const* params, const void* const* anchors,
                               const float* const* importances, void* const* grads, bool overwrite, float scale,
                               Parallel parallel) {
    Pieces pieces(lists);
    Scratch<double> partial(pieces.count());
    pieces.run(parallel, [&](int64_t piece, int64_t tensor, int64_t at, int64_t n) {
        by_dtype(lists.dtypes[tensor], [&]<class In>(In) {
            const In *p = typed<In>(params[tensor]) + at, *a = typed<In>(anchors[tensor]) + at;
            const float* f = importances[tensor] + at;
            In* g = grads != nullptr ? static_cast<In*>(grads[tensor]) + at : nullptr;
            if (g == nullptr)
                partial[piece] = penalty_piece<Write::nothing>(p, a, f, scale, n, g);
            else if (overwrite)
                partial[piece] = penalty_piece<Write::over>(p, a, f, scale, n, g);
            else
                partial[piece] = penalty_piece<Write::add>(p, a, f, scale, n, g);
        });
    });
    double total = 0;
    for (int64_t i = 0; i < pieces.count(); ++i) total += partial[i];
    return 0.5 * total;
}

}  // namespace tlk
