// Launchers of the CUDA kernels of the nf4 family: all that a caller may include.
//
// They know neither torch nor Python: raw device pointers, sizes, a stream. Nothing here checks its arguments: the
// bindings do, before they call. Every launcher queues work on the stream of the current device and returns what
// cudaGetLastError says; none synchronizes, none allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace tlk::cuda {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A tensor in 4-bit storage, in device memory. Blocks run over the flat tensor; the even element of a pair is in the
// high nibble. The scales are float32 (`absmax`), or, double-quantized, 8-bit (`absmax_q`, and then
// absmax[i] = dynamic_code[absmax_q[i]] * absmax_scale[i >> absmax_block_shift] + *absmax_offset).
struct Nf4 {
    const uint8_t* packed;
    const float* absmax;         // null when double-quantized
    const uint8_t* absmax_q;     // null when not
    const float* absmax_scale;   // null when not
    const float* absmax_offset;  // null when not
    const float* code;           // 16 entries, or null for NF4
    int64_t numel;
    int block_shift;  // log2 of the block size: 5 to 12
    int absmax_block_shift;
};

// A float vector of any of the three dtypes.
struct Bias {
    const void* data;  // null for none
    Dtype dtype;
};

// packed[ceil(numel / 2)] (aligned to 4 bytes), absmax[ceil(numel >> block_shift)] from w[numel]; code has 16 entries
// in any order, or is null.
cudaError_t nf4_quantize(const void* w, Dtype dtype, int64_t numel, int block_shift, const float* code, uint8_t* packed,
                         float* absmax, cudaStream_t stream);

// out[w.numel] = code[nibble] * absmax, rounded once to dtype.
cudaError_t nf4_dequantize(const Nf4& w, void* out, Dtype dtype, cudaStream_t stream);

// How many doubles of scratch absmax_mean needs.
constexpr int kMeanPartials = 256;
// *mean = the float64 mean of absmax[n], rounded once to float32; n > 0.
cudaError_t absmax_mean(const float* absmax, int64_t n, double* partials, float* mean, cudaStream_t stream);

// q[n] (aligned to 8 bytes), scale[ceil(n >> block_shift)]: blockwise 8-bit codes of absmax - *offset.
cudaError_t absmax_quantize(const float* absmax, int64_t n, int block_shift, const float* offset, uint8_t* q,
                            float* scale, cudaStream_t stream);
cudaError_t absmax_dequantize(const uint8_t* q, const float* scale, const float* offset, int64_t n, int block_shift,
                              float* absmax, cudaStream_t stream);

// out[n, embedding_dim] = rows of W; the row of an index outside [0, num_embeddings) is NaN. Indices are int64, or
// int32.
cudaError_t nf4_embedding(const void* indices, bool int64_indices, int64_t n, const Nf4& w, int64_t num_embeddings,
                          int64_t embedding_dim, void* out, Dtype dtype, cudaStream_t stream);

// More rows than this are the business of another kernel.
constexpr int64_t kFewRows = 16;

// How nf4_linear cuts one problem; see nf4_cut.h.
struct LinearPlan {
    bool tensor_cores;
    int k_warps_shift;  // log2 of the warps that share one strip's sum over k
    int ctas;           // thread blocks a split
    int splits;         // slices of k in different thread blocks
    int64_t split_k;    // elements of k a slice
    size_t shared_bytes;
    size_t workspace_floats;  // scratch that the caller brings
};

// x[rows, in_features] and W[out_features, in_features], rows <= kFewRows, for the current device.
cudaError_t nf4_linear_plan(const void* x, Dtype dtype, const Nf4& w, int64_t rows, int64_t out_features,
                            int64_t in_features, LinearPlan* plan);

// y[rows, out_features] = x W^T + bias by that plan; x and y contiguous.
cudaError_t nf4_linear(const LinearPlan& plan, const void* x, Dtype dtype, const Nf4& w, Bias bias, int64_t rows,
                       int64_t out_features, int64_t in_features, float* workspace, void* y, cudaStream_t stream);

}  // namespace tlk::cuda
