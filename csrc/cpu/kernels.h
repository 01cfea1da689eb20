// The table of CPU entry points: all that a caller of the CPU kernels may include.
//
// The kernels are compiled once per instruction-set level (scalar, avx2, avx512, avx512_bf16) and each
// level fills one `Kernels` table. They know neither torch nor Python: raw pointers, sizes, and a
// parallel_for that the caller hands in. Pointers may have any alignment. Nothing here checks its
// arguments: the bindings do, before they call.
//
// Work is cut into blocks that do not depend on the number of threads, so the same input gives the same
// bits for any thread pool.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tlk {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A parallel_for over [0, n): calls body(ctx, begin, end) on disjoint ranges that cover it, each at least
// `grain` long where possible, and returns when all are done.
struct Parallel {
    void (*run)(void* pool, int64_t n, int64_t grain, void (*body)(void* ctx, int64_t begin, int64_t end), void* ctx);
    void* pool;
};

// A tensor in 4-bit NF4 storage. Blocks run over the flat tensor; the even element of a pair is in the
// high nibble. The scales are float32 (`absmax`), or, double-quantized, 8-bit (`absmax_q`, and then
// absmax[i] = dynamic_code[absmax_q[i]] * absmax_scale[i / absmax_block_size] + absmax_offset).
struct Nf4 {
    const uint8_t* packed;
    const float* absmax;      // null when double-quantized
    const uint8_t* absmax_q;  // null when not
    const float* absmax_scale;
    float absmax_offset;
    int64_t absmax_block_size;  // a power of two
    int64_t numel;
    int64_t block_size;  // a power of two, 32 to 4096
    const float* code;   // 16 entries
};

// C = A B^T on the tile engine: C[i][j] = sum_k A(i, k) B(j, k), of one dtype, C contiguous [m][n]. An operand stands
// as [rows][k], or `across` as [k][rows]; `map`
// is applied to the elements of both before they are multiplied. Mixed layouts are for single plain products, maps for
// float32.
struct Gemm {
    enum Map { plain, squared, scaled, shifted };
    const void *a, *b;
    void* c;
    int64_t m, n, k;
    int64_t a_stride, b_stride;  // between the rows of what stands in memory
    bool a_across, b_across;
    bool symmetric;          // A is B: half of the work
    int64_t batch;           // this many products, one after another in memory
    const int64_t* offsets;  // ragged: batch + 1 bounds among the rows of A and C, instead of m; not across
    Map map;
    float factor;
    const float* mean;  // along the contiguous axis
};

// A frozen weight [out_features][in_features]: dense, of the activations' dtype, or 4-bit.
struct Base {
    const void* dense;  // null: nf4
    Nf4 nf4;
};

// The update of a linear layer by factors of low rank, both of the activations' dtype and contiguous.
struct Lora {
    const void* a;  // [rank][in_features]
    const void* b;  // [out_features][rank]
    int64_t rank;
    float scaling;
    float dropout;  // 0: rng is not read
    uint64_t seed, offset;
};

// The logits scale x y^T + bias of features x[n][d] and y[m][d]. `itself`: y is x, and m is not read. Labels and
// exclude hold a column for each row, or are null; an entry that is no column means none. With `itself`, only the row
// itself can be excluded.
struct Contrastive {
    const void *x, *y;
    Dtype dtype;
    int64_t n, m, d;
    float scale, bias;
    const int64_t *labels, *exclude;
    bool itself;
};

// Where gradients go. The sums are float32 [n][d] and [m][d], null where that gradient is not wanted, and may be the
// gradients themselves if those are float32. With `itself` x's is all; where both are the
// same, y is x, and it holds the sum of the two.
struct ContrastiveGrad {
    float *sums_x, *sums_y;
    void *grad_x, *grad_y;  // of the features' dtype
    double* grad_scale;
};

// Kernels of a pair of rows; with t their squared distance, or (polynomial) their product, and r the root of t:
// e^(-t / 2 sigma2), e^(-r / sigma), -r, (1 + t / sigma2)^(-1/2), (t / sigma2 + coef0)^degree.
enum class PairKernel : int { gaussian, laplacian, energy, inverse_multiquadric, polynomial };

// Problems that compare rows [x_offsets[p], x_offsets[p + 1]) of x with the same of y. Rows are d features: `layers`
// runs of `widths`, each with a sum of `kernels` kernels, weights beta; the kernel of a pair is the product over
// layers. The weight of a pair is the scalar product of two rows of wx and wy, times coef of xx, yy or xy.
struct Mmd {
    static constexpr int64_t most_layers = 64;
    const void *x, *y;
    Dtype dtype;
    int64_t d, problems;
    const int64_t *x_offsets, *y_offsets;
    int64_t layers, kernels_in_all;
    const int64_t *widths, *kernels;
    PairKernel kind;
    int degree;
    float coef0;
    bool diagonal;                      // whether pairs of a row with itself count
    const float *sigma2, *beta, *coef;  // [problems][kernels_in_all], twice, and [problems][3]; sigma2 may be null
    int64_t ranks;
    const float *wx, *wy;  // [rows][ranks]
};

// value[problems], and the gradients of each problem's value; null where not wanted, but grad_coef.
struct MmdGrad {
    float *value, *grad_x, *grad_y, *grad_sigma2, *grad_beta, *grad_coef, *grad_wx, *grad_wy;
};

// Many of them in one batch. Row order[i], for i from offsets[l] on and below offsets[l + 1], has adapter l.
struct LoraGroup {
    const void* a;  // [adapters][rank][in_features]
    const void* b;  // [adapters][out_features][rank]
    int64_t adapters, rank;
    const int64_t* order;
    const int64_t* offsets;
    const float* scalings;  // [adapters]
    const int64_t* ranks;   // [adapters], each at most `rank`
};

// Whose tokens are whose: sample n has [offsets[n], offsets[n + 1]), or `tokens` each where offsets is null. What a
// sample adds is multiplied by `scale` and, where it is given, its weight.
struct Samples {
    int64_t count, tokens;
    const int64_t* offsets;
    const float* weight;
    float scale;
};

// A convolution of act[samples][channels][height][width]; pairs are (vertical, horizontal).
struct Conv {
    int64_t channels, height, width, out_channels, out_height, out_width, groups;
    int64_t kernel[2], stride[2], padding[2], dilation[2];
};

enum class Norm : int { layer, rms, none };

// A sample's row of a second moment: each of its tokens, their weighted mean, or their weighted sum.
enum class Rows : int { tokens, mean, sum };

// Many tensors of `numel` elements of `dtypes`: each list is one pointer per tensor.
struct Lists {
    int64_t count;
    const int64_t* numel;
    const Dtype* dtypes;
};

struct Kernels {
    const char* level;

    void (*gemm)(const Gemm& g, Dtype dtype, Parallel parallel);

    // packed[ceil(numel / 2)], absmax[ceil(numel / block_size)] from w[numel]; code has 16 finite entries in any order.
    void (*nf4_quantize)(const void* w, Dtype dtype, int64_t numel, int64_t block_size, const float* code,
                         uint8_t* packed, float* absmax, Parallel parallel);

    // q[n], scale[ceil(n / block_size)]: blockwise 8-bit codes of absmax - offset.
    void (*absmax_quantize)(const float* absmax, int64_t n, int64_t block_size, float offset, uint8_t* q, float* scale,
                            Parallel parallel);
    // The float64 mean of absmax[n], rounded once to float32.
    float (*absmax_mean)(const float* absmax, int64_t n);
    void (*absmax_dequantize)(const uint8_t* q, const float* scale, float offset, int64_t n, int64_t block_size,
                              float* absmax, Parallel parallel);

    // out[w.numel] = code[nibble] * absmax, rounded once to dtype.
    void (*nf4_dequantize)(const Nf4& w, void* out, Dtype dtype, Parallel parallel);

    // y[rows, out_features] = x[rows, in_features] W^T + bias; x and y contiguous, bias float32 or null.
    void (*nf4_linear)(const void* x, Dtype dtype, const Nf4& w, const float* bias, int64_t rows, int64_t out_features,
                       int64_t in_features, void* y, Parallel parallel);

    // grad_x[rows, in_features] = grad_y[rows, out_features] W.
    void (*nf4_linear_t)(const void* grad_y, Dtype dtype, const Nf4& w, int64_t rows, int64_t out_features,
                         int64_t in_features, void* grad_x, Parallel parallel);

    // out[n, embedding_dim] = rows of W; every index is in [0, w.numel / embedding_dim).
    void (*nf4_embedding)(const int64_t* indices, int64_t n, const Nf4& w, int64_t embedding_dim, void* out,
                          Dtype dtype, Parallel parallel);

    // y[rows][out] = x W^T + bias + s B^T and s[rows][rank] = scaling drop(x) A^T; bias float32 or null.
    void (*lora_linear)(const void* x, Dtype dtype, const Base& w, const float* bias, const Lora& lora, int64_t rows,
                        int64_t out_features, int64_t in_features, void* y, void* s, Parallel parallel);
    // ds[rows][rank] = scaling g B, grad_a[rank][in] = ds^T drop(x), grad_b[out][rank] = g^T s, the last two float32.
    void (*lora_grad_ab)(const void* g, const void* x, const void* s, Dtype dtype, const Lora& lora, int64_t rows,
                         int64_t out_features, int64_t in_features, void* ds, float* grad_a, float* grad_b,
                         Parallel parallel);
    // grad_x[rows][in] = g W + drop'(ds A); lora.b is not read.
    void (*lora_grad_x)(const void* g, Dtype dtype, const Base& w, const void* ds, const Lora& lora, int64_t rows,
                        int64_t out_features, int64_t in_features, void* grad_x, Parallel parallel);
    // mask[rows][cols] = 1 where kept, else 0.
    void (*lora_dropout_mask)(uint64_t seed, uint64_t offset, float p, int64_t rows, int64_t cols, uint8_t* mask,
                              Parallel parallel);

    // As lora_linear, with an adapter for each row; y may be null (s alone).
    void (*lora_linear_grouped)(const void* x, Dtype dtype, const void* w, const float* bias, const LoraGroup& group,
                                int64_t rows, int64_t out_features, int64_t in_features, void* y, void* s,
                                Parallel parallel);
    // y[row][0 .. out_features) += the row's update; rows of y are y_stride apart.
    void (*lora_grouped_delta)(const void* x, Dtype dtype, const LoraGroup& group, int64_t rows, int64_t out_features,
                               int64_t in_features, void* y, int64_t y_stride, Parallel parallel);
    // grad_a[adapters][rank][in], grad_b[adapters][out][rank], float32.
    void (*lora_grouped_grad)(const void* g, const void* x, const void* s, Dtype dtype, const LoraGroup& group,
                              int64_t rows, int64_t out_features, int64_t in_features, void* ds, float* grad_a,
                              float* grad_b, Parallel parallel);
    void (*lora_grouped_grad_x)(const void* g, Dtype dtype, const void* w, const void* ds, const LoraGroup& group,
                                int64_t rows, int64_t out_features, int64_t in_features, void* grad_x,
                                Parallel parallel);

    // norm[out_features] of the rows of W + scaling B A; a and b float32.
    void (*dora_weight_norm)(const Base& w, Dtype dtype, const float* a, const float* b, int64_t rank, float scaling,
                             int64_t out_features, int64_t in_features, float* norm, Parallel parallel);
    // weight[out_features][in_features] += scaling B A, rounded once; a and b float32.
    void (*lora_merge)(void* weight, Dtype dtype, const float* a, const float* b, int64_t rank, float scaling,
                       int64_t out_features, int64_t in_features, Parallel parallel);

    // Log-sum-exps of the rows and columns of logits (lse_col null: rows alone), and with labels also less the logit of
    // each row's label: nll_row[i] of row i, nll_col[i] of the label's column; 0 where there is no label.
    void (*sim_lse)(const Contrastive& logits, float* lse_row, float* lse_col, float* nll_row, float* nll_col,
                    Parallel parallel);
    // Gradients of sum of grad_row lse_row + sum of grad_col lse_col + sum of grad_pair (logit of the label), for sums
    // that may go on over other logits; grad_col and grad_pair may be null.
    void (*sim_lse_backward)(const Contrastive& logits, const float* lse_row, const float* lse_col,
                             const float* grad_row, const float* grad_col, const float* grad_pair,
                             const ContrastiveGrad& grad, Parallel parallel);
    // loss[n]: sums over rows of log(1 + e^z), at labels of log(1 + e^-z). With `grad` also the gradients of
    // sum of weights loss; weights null: 1.
    void (*sigmoid_contrastive)(const Contrastive& logits, const float* weights, float* loss, double* grad_bias,
                                const ContrastiveGrad* grad, Parallel parallel);

    // Sums of kernels over pairs: MMD^2.
    void (*mmd2)(const Mmd& problems, const MmdGrad& grad, Parallel parallel);
    // One problem of one layer without weights: its MMD^2 and that of random splits, null[splits], and the p-value.
    void (*mmd2_permutation)(const Mmd& problem, int64_t splits, uint64_t seed, double* stat, double* null,
                             double* pvalue, Parallel parallel);
    // The median of the squared distances of all pairs of the n + m >= 2 rows.
    double (*median_sqdist)(const void* x, const void* y, Dtype dtype, int64_t n, int64_t m, int64_t d,
                            Parallel parallel);
    // out[n][m]; y null: of x with itself.
    void (*pairwise_sqdist)(const void* x, const void* y, Dtype dtype, int64_t n, int64_t m, int64_t d, bool center,
                            float* out, Parallel parallel);
    // out[pairs][4] of rows 2 i and 2 i + 1, and its gradients.
    void (*paired_sqdist)(const void* x, const void* y, Dtype dtype, int64_t pairs, int64_t d, float* out,
                          Parallel parallel);
    void (*paired_sqdist_backward)(const void* x, const void* y, const float* grad, Dtype dtype, int64_t pairs,
                                   int64_t d, void* grad_x, void* grad_y, Parallel parallel);
    // out[d][d] of x[n][d]; weight[n] may be null.
    void (*covariance)(const void* x, Dtype dtype, const float* weight, int64_t n, int64_t d, double ddof, float* out,
                       Parallel parallel);
    // The squared Frobenius distance of the covariances of x[n][d] and y[m][d], and its gradients, float or null.
    void (*coral)(const void* x, const void* y, Dtype dtype, int64_t n, int64_t m, int64_t d, bool centered,
                  double* value, float* grad_x, float* grad_y, Parallel parallel);
    // counts[features][edge_count + 1] of x[n][features] between edges[features][edge_count], ascending.
    void (*feature_histogram)(const void* x, Dtype dtype, const float* edges, int64_t n, int64_t features,
                              int64_t edge_count, int64_t* counts, Parallel parallel);

    // f_w[out][in] += sum over samples of the square of the sum over tokens of grad act^T; f_b likewise; either may be
    // null.
    void (*diag_fisher_linear)(const void* act, const void* grad, Dtype dtype, const Samples& samples, int64_t out,
                               int64_t in, float* f_w, float* f_b, Parallel parallel);
    // samples.tokens and offsets are not read; f_w[out_channels][channels / groups][kernel]; f_b may be null.
    void (*diag_fisher_conv2d)(const void* act, const void* grad, Dtype dtype, const Samples& samples, const Conv& conv,
                               float* f_w, float* f_b, Parallel parallel);
    // Every index is a row of f_w[][d]; rows `padding` are left out (-1: none).
    void (*diag_fisher_embedding)(const int64_t* indices, const void* grad, Dtype dtype, const Samples& samples,
                                  int64_t d, int64_t padding, float* f_w, Parallel parallel);
    // Of the rows [d] of x, normalised; f_w or f_b may be null.
    void (*diag_fisher_norm)(const void* x, const void* grad, Dtype dtype, const Samples& samples, int64_t d, Norm norm,
                             float eps, float* f_w, float* f_b, Parallel parallel);
    // Of x[samples][channels][samples.tokens], less mean[channels], times rstd[channels].
    void (*diag_fisher_channel_norm)(const void* x, const void* grad, Dtype dtype, const Samples& samples,
                                     int64_t channels, const float* mean, const float* rstd, float* f_w, float* f_b,
                                     Parallel parallel);
    // out[samples]: squared Frobenius norms of the sums over tokens of grad act^T; weight and scale are not read.
    void (*per_sample_sqnorm)(const void* act, const void* grad, Dtype dtype, const Samples& samples, int64_t out,
                              int64_t in, float* norms, Parallel parallel);
    // moment[d + ones][d + ones] += scale * sum of weight x x^T over `rows`, with a one appended to x if `ones`;
    // samples.weight has one for each token, or is null.
    void (*second_moment)(const void* x, Dtype dtype, const Samples& samples, int64_t d, Rows rows, bool ones,
                          float* moment, Parallel parallel);

    // acc = decay acc + scale g^2 (or |g|)
    void (*importance_accum)(const Lists& lists, float* const* acc, const void* const* grads, bool absolute,
                             float decay, float scale, Parallel parallel);
    // omega += scale g delta
    void (*si_accum)(const Lists& lists, float* const* omega, const void* const* grads, const void* const* deltas,
                     float scale, Parallel parallel);
    // Returns half the sum of f (p - a)^2. Where `grads` is not null: += scale f (p - a), or = with `overwrite`.
    double (*quad_penalty)(const Lists& lists, const void* const* params, const void* const* anchors,
                           const float* const* importances, void* const* grads, bool overwrite, float scale,
                           Parallel parallel);

    // gram[tasks][tasks] of the rows grads[task * count + tensor], of which null ones are zeros.
    void (*task_gram)(const Lists& lists, int64_t tasks, const void* const* grads, double* gram, Parallel parallel);
    // out[result * count + tensor] (+)= sum over tasks of weights[result][task] grads[task * count + tensor]
    void (*task_combine)(const Lists& lists, int64_t tasks, int64_t results, const void* const* grads,
                         const float* weights, bool accumulate, void* const* out, Parallel parallel);

    // The machine's own ceilings, for the benchmarks: each runs `repeats` times over its data on the calling
    // thread; the caller takes the time. read/copy stream `bytes`; the arithmetic loops return flops done.
    void (*roofline_read)(const void* data, size_t bytes, int64_t repeats, float* sink);
    void (*roofline_copy)(void* out, const void* data, size_t bytes, int64_t repeats, bool streaming);
    double (*roofline_fma_fp32)(int64_t repeats, float* sink);
    double (*roofline_dot_bf16)(int64_t repeats, float* sink);  // 0 where the level has no bf16 dot product
};

// The 256-entry signed "dynamic" table of the 8-bit scales (Dettmers 2022), ascending.
extern const float* const dynamic_code;
// The 16 NF4 values (Dettmers 2023), ascending.
extern const float* const nf4_code;

// The table of the best level that this machine has, capped by TLKERNELS_CPU_ISA; chosen once.
const Kernels& kernels();
// Why that level was chosen, one sentence.
const char* kernels_reason();
// The table of one level, or null when this machine (or this build) does not have it. For tests.
const Kernels* kernels_for(const char* level);

}  // namespace tlk
