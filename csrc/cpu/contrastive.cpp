// Contrastive losses on the CPU: functions of the logits z = scale x y^T + bias, which are never stored.
//
//   forward    tiles of z -> (maximum, sum of e^(z - maximum)) for the rows and the columns of a block of C, both from
//              one e^z an element; blocks are merged by their maxima
//   backward   tiles of z again -> G = dL / dz, a part of it at a time (kPart x kPart, in L3), which is an
//              operand of both gradient products, grad_x += G y and grad_y += G^T x
//   sigmoid    needs no sums: loss and G from one pass
//
// Flops: 2 n m d forward and 6 n m d backward (sigmoid 6 in all; x with itself 1 and 3). Bytes: x and y are read once
// for every stripe of kStripe rows, from L3 where they fit. Beyond inputs and results there are the packed operands,
// the part of G, and O(n + m) sums.
//
// Rows and columns are kept relative to maxima of their own, of what a block holds: no bound on the logits is assumed.
// A logit is in its own sum with e^0 = 1 at least, so that log-sum-exp >= logit holds in float too. The logit of a
// row's label is read from the same tile.
#include "cpu/gemm.h"
#include "cpu/level.h"

extern "C" float logf(float) noexcept;
extern "C" float expf(float) noexcept;

namespace tlk {
namespace {

constexpr int64_t kStripe = 16 * 132;  // rows of the forward pass for which each column keeps sums: 16 blocks
constexpr int64_t kPart = 1056;        // rows and columns of a part of G: 8 blocks of the engine
constexpr int64_t kPartPad = 16;       // rows of G must not share cache sets
constexpr float kInfinity = __builtin_inff();

// The value that exponents are taken relative to: the maximum, where it is one.
float reference(float maximum) { return __builtin_isfinite(maximum) ? maximum : 0.f; }

// (maximum, sum relative to it)
struct Sum {
    float max = -kInfinity, sum = 0.f;
    void add(float other_max, float other_sum) {
        if (other_max == -kInfinity && other_sum == 0.f) return;
        const float top = other_max > max ? other_max : max;  // a NaN is in a sum as well
        const float to = reference(top);
        sum = (sum == 0.f ? 0.f : sum * expf(reference(max) - to)) + other_sum * expf(reference(other_max) - to);
        max = top;
    }
    void add(float z) { add(z, expf(z - reference(z))); }
    float log() const { return reference(max) + logf(sum); }
    // log-sum-exp less a logit: near 0 the difference of the first two is exact, and the logarithm small
    float less(float logit) const { return (reference(max) - logit) + logf(sum); }
};

// A column for each row, or -1.
struct Index {
    const int64_t* data;
    int64_t limit;
    int64_t at(int64_t i) const {
        if (data == nullptr) return -1;
        return data[i] >= 0 && data[i] < limit ? data[i] : -1;
    }
};

constexpr int kLanes = Vec::size;
constexpr int64_t kMostRows = 256;  // of a block

// ---- forward ------------------------------------------------------------------------------------------------------

// Sums of the rows and the columns of a block of logits. Element (i, j) of C is logit (first + i, j).
struct Sums {
    float scale, bias;
    int64_t first, n_rows, columns;  // of this stripe
    Index labels, exclude;           // of all rows
    float *row_max, *row_sum;        // [col_block][n_rows]
    float *col_max, *col_sum;        // [row_block][columns], or null
    float* target;                   // [all rows], or null
    bool itself;      // y is x: of the symmetric matrix only j <= first + i, and j < first + i for columns
    float* diagonal;  // then, [all rows]: the logit that is in a row's sum and in no column's

    void block(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t row_block, int64_t col_block) const {
        const int64_t panels = ceil_div(cols, kTileCols);
        alignas(64) float top[kMostRows * kLanes];  // then the sums
        float of_row[kMostRows], factor[kMostRows];
        for (int64_t r = 0; r < rows * kLanes; ++r) top[r] = -kInfinity;
        const int64_t padded = panels * kTileCols;
        Scratch<float> of_col(padded);

        const Vec times = splat(scale), shift = splat(bias);
        for (int64_t p = 0; p < panels; ++p) {
            float* panel = c + p * rows * kTileCols;
            const int64_t col = j + p * kTileCols, n = min<int64_t>(kTileCols, cols - p * kTileCols);
            Vec low[kTileVecs];
            for (int v = 0; v < kTileVecs; ++v) low[v] = splat(-kInfinity);
            const bool crossing = itself && col + n > first + i;
            for (int64_t r = 0; r < rows; ++r) {
                float* line = panel + r * kTileCols;
                for (int v = 0; v < kTileVecs; ++v)
                    store(line + v * kLanes, fma(load(line + v * kLanes), times, shift));
                const int64_t row = first + i + r;
                if (target != nullptr) {
                    const int64_t l = labels.at(row) - col;
                    if (l >= 0 && l < n && !(itself && col + l > row)) target[row] = line[l];
                }
                if (crossing) {
                    if (row >= col && row < col + n) diagonal[row] = line[row - col];
                    for (int64_t l = max<int64_t>(0, row - col); l < n; ++l) line[l] = -kInfinity;
                }
                if (exclude.data != nullptr) {
                    const int64_t l = exclude.at(row) - col;
                    if (l >= 0 && l < n) line[l] = -kInfinity;
                }
                for (int64_t l = n; l < kTileCols; ++l) line[l] = -kInfinity;
                Vec both = load(top + r * kLanes);
                for (int v = 0; v < kTileVecs; ++v) {
                    const Vec z = load(line + v * kLanes);
                    low[v] = max(low[v], z);
                    both = max(both, z);
                }
                store(top + r * kLanes, both);
            }
            for (int v = 0; v < kTileVecs; ++v) store(of_col + p * kTileCols + v * kLanes, low[v]);
            if (target != nullptr && itself)  // labels above the diagonal: their mirror images
                for (int64_t l = 0; l < n; ++l) {
                    const int64_t r = labels.at(col + l) - first - i;
                    if (r >= 0 && r < rows && col + l < first + i + r) target[col + l] = panel[r * kTileCols + l];
                }
        }

        float highest = -kInfinity;
        bool simple = true;  // every row has a finite maximum, or nothing
        for (int64_t r = 0; r < rows; ++r) {
            of_row[r] = largest(load(top + r * kLanes));
            if (of_row[r] == -kInfinity) continue;
            simple = simple && __builtin_isfinite(of_row[r]);
            highest = max(highest, of_row[r]);
        }
        const float base = reference(highest);
        for (int64_t r = 0; r < rows; ++r) {
            factor[r] = of_row[r] == -kInfinity ? 0.f : expf(reference(of_row[r]) - base);
            for (int l = 0; l < kLanes; ++l) top[r * kLanes + l] = 0.f;
        }

        for (int64_t p = 0; p < panels; ++p) {
            const float* panel = c + p * rows * kTileCols;
            const int64_t n = min<int64_t>(kTileCols, cols - p * kTileCols);
            Vec sums[kTileVecs];
            for (int v = 0; v < kTileVecs; ++v) sums[v] = zero();
            for (int64_t r = 0; r < rows; ++r) {
                const float* line = panel + r * kTileCols;
                const Vec from = splat(reference(of_row[r])), f = splat(factor[r]);
                Vec both = load(top + r * kLanes);
                for (int v = 0; v < kTileVecs; ++v) {
                    const Vec e = exp(load(line + v * kLanes) - from);
                    both = both + e;
                    sums[v] = fma(e, f, sums[v]);
                }
                store(top + r * kLanes, both);
            }
            if (col_max == nullptr) continue;
            const float* maxima = of_col + p * kTileCols;
            alignas(64) float total[kTileCols], from[kTileCols];
            bool near = simple;
            for (int64_t l = 0; l < n; ++l) near = near && (maxima[l] > base - 60.f || maxima[l] == -kInfinity);
            if (near) {
                for (int v = 0; v < kTileVecs; ++v) store(total + v * kLanes, sums[v]);
                for (int64_t l = 0; l < n; ++l) {
                    // relative to its own maximum it is 1 at least, whatever was rounded
                    const float s = maxima[l] == -kInfinity ? total[l] : total[l] * expf(base - maxima[l]);
                    total[l] = s < 1.f && maxima[l] != -kInfinity ? 1.f : s;
                }
            } else {
                // so far below the rest of the block that float has no room for it: by itself
                for (int64_t l = 0; l < kTileCols; ++l) from[l] = l < n ? reference(maxima[l]) : 0.f;
                for (int v = 0; v < kTileVecs; ++v) {
                    const Vec by_column = load(from + v * kLanes);
                    Vec s = zero();
                    for (int64_t r = 0; r < rows; ++r)
                        s = s + exp(load(panel + r * kTileCols + v * kLanes) - by_column);
                    store(total + v * kLanes, s);
                }
            }
            const int64_t at = row_block * columns + j + p * kTileCols;
            convert_row(maxima, n, col_max + at);
            convert_row(static_cast<const float*>(total), n, col_sum + at);
        }
        for (int64_t r = 0; r < rows; ++r) {
            row_max[col_block * n_rows + i + r] = of_row[r];
            row_sum[col_block * n_rows + i + r] = sum(load(top + r * kLanes));
        }
    }
};

template <class In>
void sums(const Contrastive& a, float* lse_row, float* lse_col, float* nll_row, float* nll_col, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    const In *x = typed<In>(a.x), *y = typed<In>(a.itself ? a.x : a.y);
    const int64_t n = a.n, m = a.itself ? a.n : a.m, d = a.d;
    const bool cols = lse_col != nullptr || a.itself;
    Scratch<float> target(nll_row != nullptr ? n : 0), diagonal(a.itself ? n : 0);
    Scratch<Sum> of_row(n), of_col(cols ? m : 0);
    for (int64_t j = 0; j < (cols ? m : 0); ++j) of_col[j] = {};
    const Index labels{a.labels, m}, exclude{a.itself ? nullptr : a.exclude, m};

    for (int64_t first = 0; first < n; first += kStripe) {
        const int64_t rows = min(kStripe, n - first), columns = a.itself ? first + rows : m;
        const AlongK<T, In> left{x + first * d, d}, right{y, d};
        const Grid g = grid<T>(rows, columns, Term{d, left, right});
        Scratch<float> row_sums(2 * g.col_blocks * rows), col_sums(cols ? 2 * g.row_blocks * columns : 0);
        const Sums after{a.scale,
                         a.bias,
                         first,
                         rows,
                         columns,
                         labels,
                         exclude,
                         row_sums,
                         row_sums + g.col_blocks * rows,
                         cols ? col_sums.data : nullptr,
                         cols ? col_sums + g.row_blocks * columns : nullptr,
                         nll_row != nullptr ? target.data : nullptr,
                         a.itself,
                         diagonal};
        if (a.itself) {  // blocks above the diagonal are not computed: they hold nothing
            clear(after.row_sum, g.col_blocks * rows);
            clear(after.col_sum, g.row_blocks * columns);
            for (int64_t k = 0; k < g.col_blocks * rows; ++k) after.row_max[k] = -kInfinity;
            for (int64_t k = 0; k < g.row_blocks * columns; ++k) after.col_max[k] = -kInfinity;
            product_lower<T>(columns, first, parallel, Term{d, left, right, after});
        } else {
            product<T>(rows, columns, parallel, Term{d, left, right, after});
        }
        parallel_for(parallel, rows, 512, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                Sum s;
                for (int64_t b = 0; b < g.col_blocks; ++b)
                    s.add(after.row_max[b * rows + i], after.row_sum[b * rows + i]);
                of_row[first + i] = s;
            }
        });
        if (!cols) continue;
        parallel_for(parallel, columns, 512, [&](int64_t begin, int64_t end) {
            for (int64_t j = begin; j < end; ++j)
                for (int64_t b = 0; b < g.row_blocks; ++b)
                    of_col[j].add(after.col_max[b * columns + j], after.col_sum[b * columns + j]);
        });
    }

    parallel_for(parallel, n, 512, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            if (a.itself) {
                of_row[i].add(of_col[i].max, of_col[i].sum);
                if (a.exclude == nullptr || a.exclude[i] != i) of_row[i].add(diagonal[i]);
            }
            lse_row[i] = of_row[i].log();
            if (nll_row != nullptr) nll_row[i] = labels.at(i) < 0 ? 0.f : of_row[i].less(target[i]);
        }
    });
    if (lse_col == nullptr) {
        if (nll_col != nullptr) clear(nll_col, n);  // of no columns
        return;
    }
    parallel_for(parallel, m, 512, [&](int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) lse_col[j] = of_col[j].log();
    });
    if (nll_col == nullptr) return;
    for (int64_t i = 0; i < n; ++i) nll_col[i] = labels.at(i) < 0 ? 0.f : of_col[labels.at(i)].less(target[i]);
}

// ---- backward -----------------------------------------------------------------------------------------------------

// Sums over the columns of a block, for each of its rows: kept a vector wide until the block is done.
struct RowTotals {
    alignas(64) float lanes[kMostRows * kLanes];
    explicit RowTotals(int64_t rows) { clear(lanes, rows * kLanes); }
    void add(int64_t r, Vec x) { store(lanes + r * kLanes, load(lanes + r * kLanes) + x); }
    void add(int64_t r, float x) { lanes[r * kLanes] += x; }
    void write(int64_t rows, float* out) const {
        for (int64_t r = 0; r < rows; ++r) out[r] = sum(load(lanes + r * kLanes));
    }
};

// dL / dz of a block, stored as an operand: element (i, j) of C is logit (row + i, col + j), and stands at
// out[i * stride + j]; and the sums over its rows of dL / dz times the similarity, which are the scale's gradient.
template <class Out>
struct SoftmaxGradient {
    float scale, bias;
    int64_t row, col, n_rows;
    Index labels, exclude;
    const float *row_shift, *row_grad;  // of all rows: e^(z - shift) is the softmax
    const float *col_shift, *col_grad;  // of all columns, or null
    const float* pair;                  // of all rows, or null
    bool itself;                        // C is symmetric, and what is stored is G + G^T
    float* scale_sums;                  // [col_block][n_rows]
    Out* out;
    int64_t stride;

    void block(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t, int64_t col_block) const {
        RowTotals totals(rows);
        const Vec factor = splat(scale), shift = splat(bias);
        for (int64_t p = 0; p < cols; p += kTileCols) {
            float* panel = c + p * rows;
            const int64_t at = col + j + p, n = min<int64_t>(kTileCols, cols - p);
            alignas(64) float shifts[kTileCols] = {}, grads[kTileCols] = {};
            if (col_grad != nullptr) {
                convert_row(col_shift + at, n, shifts);
                convert_row(col_grad + at, n, grads);
            }
            Vec col_from[kTileVecs], col_by[kTileVecs];
            for (int v = 0; v < kTileVecs; ++v) {
                col_from[v] = load(shifts + v * kLanes);
                col_by[v] = load(grads + v * kLanes);
            }
            if (itself && pair != nullptr)
                for (int64_t l = 0; l < n; ++l) {
                    const int64_t r = labels.at(at + l) - row - i;
                    if (r >= 0 && r < rows) totals.add(r, pair[at + l] * panel[r * kTileCols + l]);
                }
            for (int64_t r = 0; r < rows; ++r) {
                float* line = panel + r * kTileCols;
                const int64_t mine = row + i + r;
                const Vec from = splat(row_shift[mine]), by = splat(row_grad[mine]);
                const int64_t excluded = exclude.at(mine) - at, label = pair != nullptr ? labels.at(mine) - at : -1;
                const bool labelled = label >= 0 && label < n;
                const float paired = labelled ? pair[mine] * line[label] : 0.f;
                Vec dot[kTileVecs];
                for (int v = 0; v < kTileVecs; ++v) {
                    dot[v] = load(line + v * kLanes);
                    const Vec z = fma(dot[v], factor, shift);
                    Vec g = exp(z - from) * by;
                    if (col_grad != nullptr) g = fma(exp(z - col_from[v]), col_by[v], g);
                    store(line + v * kLanes, g);
                }
                if (excluded >= 0 && excluded < n) line[excluded] = 0.f;
                for (int64_t l = n; l < kTileCols; ++l) line[l] = 0.f;
                Vec total = zero();
                for (int v = 0; v < kTileVecs; ++v) total = fma(load(line + v * kLanes), dot[v], total);
                totals.add(r, total);
                if (labelled) {
                    line[label] += pair[mine];
                    totals.add(r, paired);
                }
            }
            if (itself && pair != nullptr)
                for (int64_t l = 0; l < n; ++l) {
                    const int64_t r = labels.at(at + l) - row - i;
                    if (r >= 0 && r < rows) panel[r * kTileCols + l] += pair[at + l];
                }
            for (int64_t r = 0; out != nullptr && r < rows; ++r)
                convert_row(panel + r * kTileCols, n, out + (i + r) * stride + j + p);
        }
        totals.write(rows, scale_sums + col_block * n_rows + i);
    }
};

// Losses of the rows of a block, log(1 + e^z), or log(1 + e^-z) at a label; and dL / dz, where it is wanted.
template <class Out>
struct SigmoidGradient {
    float scale, bias;
    int64_t row, col, n_rows;
    Index labels;
    const float* weights;  // of all rows, or null for 1
    bool gradient;
    float *losses, *scale_sums, *bias_sums;  // [col_block][n_rows]; the last two with `gradient`
    Out* out;
    int64_t stride;

    void block(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t, int64_t col_block) const {
        RowTotals loss(rows), of_scale(gradient ? rows : 0), of_bias(gradient ? rows : 0);
        const Vec factor = splat(scale), shift = splat(bias), one = splat(1.f);
        for (int64_t p = 0; p < cols; p += kTileCols) {
            float* panel = c + p * rows;
            const int64_t at = col + j + p, n = min<int64_t>(kTileCols, cols - p);
            for (int64_t r = 0; r < rows; ++r) {
                float* line = panel + r * kTileCols;
                const int64_t mine = row + i + r, l = labels.at(mine) - at;
                const bool here = l >= 0 && l < n;
                const float weight = weights != nullptr ? weights[mine] : 1.f;
                const Vec by = splat(weight);
                const float label_dot = here ? line[l] : 0.f;
                Vec dot[kTileVecs];
                for (int v = 0; v < kTileVecs; ++v) {
                    dot[v] = load(line + v * kLanes);
                    store(line + v * kLanes, fma(dot[v], factor, shift));
                }
                const float positive = here ? line[l] : 0.f;
                if (here) line[l] = -kInfinity;
                for (int64_t k = n; k < kTileCols; ++k) line[k] = -kInfinity;
                Vec total = zero(), g_total = zero(), dot_total = zero();
                for (int v = 0; v < kTileVecs; ++v) {
                    const Vec z = load(line + v * kLanes), u = exp(zero() - abs(z));
                    total = total + (max(zero(), z) + log1p_unit(u));
                    if (!gradient) continue;
                    const Vec g = where_negative(z, u, one) / (u + one) * by;
                    g_total = g_total + g;
                    dot_total = fma(g, dot[v], dot_total);
                    store(line + v * kLanes, g);
                }
                loss.add(r, total);
                if (gradient) {
                    of_bias.add(r, g_total);
                    of_scale.add(r, dot_total);
                }
                if (here) {
                    const float size = positive < 0 ? -positive : positive, u = expf(-size);
                    alignas(64) float lanes[kLanes] = {u};
                    store(lanes, log1p_unit(load(lanes)));
                    loss.add(r, (positive < 0 ? size : 0.f) + lanes[0]);
                    const float g = -(positive < 0 ? 1.f : u) / (1.f + u) * weight;
                    line[l] = g;
                    if (gradient) {
                        of_bias.add(r, g);
                        of_scale.add(r, g * label_dot);
                    }
                }
                if (out != nullptr) convert_row(line, n, out + (i + r) * stride + j + p);
            }
        }
        loss.write(rows, losses + col_block * n_rows + i);
        if (!gradient) return;
        of_scale.write(rows, scale_sums + col_block * n_rows + i);
        of_bias.write(rows, bias_sums + col_block * n_rows + i);
    }
};

// out = C where it is the first to be written, else out += C, in float
struct Accumulate {
    float* out;
    int64_t stride;
    bool first;
    void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) const {
        for (int64_t r = 0; r < rows; ++r) {
            float* to = out + (i + r) * stride + j;
            store_line(c + r * width, cols, 1.f, first ? nullptr : to, to);
        }
    }
};

// grad[rows][d] = factor * sums, rounded once (in place for float32)
template <class In>
void finish(const float* sums, int64_t rows, int64_t d, float factor, In* grad, Parallel parallel) {
    constexpr int64_t step = 1 << 14;
    parallel_for(parallel, ceil_div(rows * d, step), 4, [&](int64_t begin, int64_t end) {
        const int64_t first = begin * step, count = min(rows * d, end * step) - first;
        store_line(sums + first, count, factor, nullptr, grad + first);
    });
}

// Both gradients from G, a part at a time: gradient(row, rows, col, cols, out, stride) fills G.
template <class In, class F>
void gradients(const Contrastive& a, const F& gradient, const ContrastiveGrad& grad, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    using Element = typename T::element;
    const In *x = typed<In>(a.x), *y = typed<In>(a.itself ? a.x : a.y);
    const int64_t n = a.n, m = a.itself ? a.n : a.m, d = a.d;
    float *of_x = grad.sums_x, *of_y = a.itself ? nullptr : grad.sums_y;
    const bool one = a.itself || (of_x == of_y && of_x != nullptr);  // y is x, and so are their gradients
    if (n == 0 || m == 0 || one) {
        if (of_x != nullptr) clear(of_x, n * d);
        if (of_y != nullptr) clear(of_y, m * d);
    }
    const int64_t part_rows = min(kPart, n), part_cols = min(kPart, m);
    const int64_t stride = round_up(part_cols, kPartPad) + kPartPad;
    const bool features = of_x != nullptr || of_y != nullptr;
    Scratch<Element> part(features ? part_rows * stride : 0);
    for (int64_t row = 0; row < n; row += kPart)
        for (int64_t col = 0; col < (a.itself ? row + 1 : m); col += kPart) {
            const int64_t rows = min(kPart, n - row), cols = min(kPart, m - col);
            gradient(row, rows, col, cols, features ? part.data : nullptr, stride);
            if (of_x != nullptr)
                product<T>(rows, d, parallel,
                           Term{cols, AlongK<T, Element>{part, stride}, AcrossK<T, In>{y + col * d, d},
                                Accumulate{of_x + row * d, d, !one && col == 0}});
            // what stands below the diagonal of a symmetric G stands above it too
            float* mirrored = !a.itself ? of_y : col < row ? of_x : nullptr;
            if (mirrored != nullptr)
                product<T>(cols, d, parallel,
                           Term{rows, AcrossK<T, Element>{part, stride}, AcrossK<T, In>{x + row * d, d},
                                Accumulate{mirrored + col * d, d, !one && row == 0}});
        }
    if (of_x != nullptr && grad.grad_x != nullptr) finish(of_x, n, d, a.scale, static_cast<In*>(grad.grad_x), parallel);
    if (of_y != nullptr && !one && grad.grad_y != nullptr)
        finish(of_y, m, d, a.scale, static_cast<In*>(grad.grad_y), parallel);
}

// One part of the logits through a functor, made by after(sums, count) for `Kinds` sums over the columns of each block
// of `count` = [col_block][rows] floats each; adds them up to totals[kind][rows], in a fixed order.
template <int Kinds, class In, class F>
void logits(const Contrastive& a, int64_t row, int64_t rows, int64_t col, int64_t cols, double* totals,
            const F& functor, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    const AlongK<T, In> x{typed<In>(a.x) + row * a.d, a.d};
    const AlongK<T, In> y{typed<In>(a.itself ? a.x : a.y) + col * a.d, a.d};
    const int64_t col_blocks = grid<T>(rows, cols, Term{a.d, x, y}).col_blocks, count = col_blocks * rows;
    Scratch<float> sums(Kinds * count);
    product<T>(rows, cols, parallel, Term{a.d, x, y, functor(sums.data, count)});
    for (int kind = 0; kind < Kinds; ++kind)
        for (int64_t b = 0; b < col_blocks; ++b)
            for (int64_t i = 0; i < rows; ++i) totals[kind * rows + i] += sums[kind * count + b * rows + i];
}

// What e^(z - shift) is to be taken with: nothing has weight where the sum is empty.
void shifts(const float* lse, int64_t n, float* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = lse[i] == -kInfinity ? kInfinity : lse[i];
}

}  // namespace

void TLK_LEVEL::sim_lse(const Contrastive& a, float* lse_row, float* lse_col, float* nll_row, float* nll_col,
                        Parallel parallel) {
    by_dtype(a.dtype, [&]<class In>(In) { sums<In>(a, lse_row, lse_col, nll_row, nll_col, parallel); });
}

void TLK_LEVEL::sim_lse_backward(const Contrastive& a, const float* lse_row, const float* lse_col,
                                 const float* grad_row, const float* grad_col, const float* grad_pair,
                                 const ContrastiveGrad& grad, Parallel parallel) {
    by_dtype(a.dtype, [&]<class In>(In) {
        using T = typename Arithmetic<In>::type;
        const int64_t m = a.itself ? a.n : a.m;
        Scratch<float> row_shift(a.n), col_shift(grad_col != nullptr ? m : 0);
        shifts(lse_row, a.n, row_shift);
        if (grad_col != nullptr) shifts(lse_col, m, col_shift);
        const Index labels{a.labels, m}, exclude{a.exclude, m};
        double total = 0;
        Scratch<double> of_rows(kPart);
        gradients<In>(
            a,
            [&](int64_t row, int64_t rows, int64_t col, int64_t cols, auto* out, int64_t stride) {
                clear(of_rows.data, rows);
                // the symmetric matrix counts once for its rows and once for its columns: G + G^T
                const float* of_col = a.itself ? row_shift.data : grad_col != nullptr ? col_shift.data : nullptr;
                const auto functor = [&](float* sums, int64_t) {
                    return SoftmaxGradient<typename T::element>{a.scale,
                                                                a.bias,
                                                                row,
                                                                col,
                                                                rows,
                                                                labels,
                                                                exclude,
                                                                row_shift.data,
                                                                grad_row,
                                                                of_col,
                                                                a.itself ? grad_row : grad_col,
                                                                grad_pair,
                                                                a.itself,
                                                                sums,
                                                                out,
                                                                stride};
                };
                logits<1, In>(a, row, rows, col, cols, of_rows, functor, parallel);
                const double times = a.itself && col < row ? 2 : 1;
                for (int64_t i = 0; i < rows; ++i) total += times * of_rows[i];
            },
            grad, parallel);
        *grad.grad_scale = a.itself ? 0.5 * total : total;
    });
}

void TLK_LEVEL::sigmoid_contrastive(const Contrastive& a, const float* weights, float* loss, double* grad_bias,
                                    const ContrastiveGrad* grad, Parallel parallel) {
    by_dtype(a.dtype, [&]<class In>(In) {
        using Element = typename Arithmetic<In>::type::element;
        const int64_t stripe = grad != nullptr ? kPart : kStripe;
        Scratch<double> losses(a.n), of_rows(3 * stripe);
        clear(losses.data, a.n);
        double of_scale = 0, of_bias = 0;
        const Index labels{a.labels, a.m};
        const auto part = [&](int64_t row, int64_t rows, int64_t col, int64_t cols, Element* out, int64_t stride) {
            clear(of_rows.data, 3 * rows);
            const auto functor = [&](float* sums, int64_t count) {
                return SigmoidGradient<Element>{
                    a.scale,      a.bias,           row, col,   rows, labels, weights, grad != nullptr, sums,
                    sums + count, sums + 2 * count, out, stride};
            };
            if (grad != nullptr)
                logits<3, In>(a, row, rows, col, cols, of_rows, functor, parallel);
            else
                logits<1, In>(a, row, rows, col, cols, of_rows, functor, parallel);
            for (int64_t i = 0; i < rows; ++i) {
                losses[row + i] += of_rows[i];
                of_scale += of_rows[rows + i];
                of_bias += of_rows[2 * rows + i];
            }
        };
        if (grad != nullptr) {
            gradients<In>(a, part, *grad, parallel);
            *grad->grad_scale = of_scale;
            *grad_bias = of_bias;
        } else {
            for (int64_t row = 0; row < a.n; row += stripe)
                if (a.m > 0) part(row, min(stripe, a.n - row), 0, a.m, nullptr, 0);
        }
        for (int64_t i = 0; i < a.n; ++i) loss[i] = float(losses[i]);
    });
}

}  // namespace tlk
