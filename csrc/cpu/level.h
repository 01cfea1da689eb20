// The entry points of this instruction-set level, in a namespace of its name (TLK_LEVEL, from the build), so that the
// same sources compiled for another level are other symbols.
#pragma once

#include "cpu/kernels.h"

namespace tlk::TLK_LEVEL {

template <class Pointer>
struct Pointee;
template <class R, class... Args>
struct Pointee<R (*)(Args...)> {
    using type = R(Args...);
};
template <class Pointer>
using Function = typename Pointee<Pointer>::type;

Function<decltype(Kernels::gemm)> gemm;
Function<decltype(Kernels::nf4_quantize)> nf4_quantize;
Function<decltype(Kernels::absmax_quantize)> absmax_quantize;
Function<decltype(Kernels::absmax_mean)> absmax_mean;
Function<decltype(Kernels::absmax_dequantize)> absmax_dequantize;
Function<decltype(Kernels::nf4_dequantize)> nf4_dequantize;
Function<decltype(Kernels::nf4_linear)> nf4_linear;
Function<decltype(Kernels::nf4_linear_t)> nf4_linear_t;
Function<decltype(Kernels::nf4_embedding)> nf4_embedding;
Function<decltype(Kernels::lora_linear)> lora_linear;
Function<decltype(Kernels::lora_grad_ab)> lora_grad_ab;
Function<decltype(Kernels::lora_grad_x)> lora_grad_x;
Function<decltype(Kernels::lora_dropout_mask)> lora_dropout_mask;
Function<decltype(Kernels::lora_linear_grouped)> lora_linear_grouped;
Function<decltype(Kernels::lora_grouped_delta)> lora_grouped_delta;
Function<decltype(Kernels::lora_grouped_grad)> lora_grouped_grad;
Function<decltype(Kernels::lora_grouped_grad_x)> lora_grouped_grad_x;
Function<decltype(Kernels::dora_weight_norm)> dora_weight_norm;
Function<decltype(Kernels::lora_merge)> lora_merge;
Function<decltype(Kernels::sim_lse)> sim_lse;
Function<decltype(Kernels::sim_lse_backward)> sim_lse_backward;
Function<decltype(Kernels::sigmoid_contrastive)> sigmoid_contrastive;
Function<decltype(Kernels::mmd2)> mmd2;
Function<decltype(Kernels::mmd2_permutation)> mmd2_permutation;
Function<decltype(Kernels::median_sqdist)> median_sqdist;
Function<decltype(Kernels::pairwise_sqdist)> pairwise_sqdist;
Function<decltype(Kernels::paired_sqdist)> paired_sqdist;
Function<decltype(Kernels::paired_sqdist_backward)> paired_sqdist_backward;
Function<decltype(Kernels::covariance)> covariance;
Function<decltype(Kernels::coral)> coral;
Function<decltype(Kernels::feature_histogram)> feature_histogram;
Function<decltype(Kernels::diag_fisher_linear)> diag_fisher_linear;
Function<decltype(Kernels::diag_fisher_conv2d)> diag_fisher_conv2d;
Function<decltype(Kernels::diag_fisher_embedding)> diag_fisher_embedding;
Function<decltype(Kernels::diag_fisher_norm)> diag_fisher_norm;
Function<decltype(Kernels::diag_fisher_channel_norm)> diag_fisher_channel_norm;
Function<decltype(Kernels::per_sample_sqnorm)> per_sample_sqnorm;
Function<decltype(Kernels::second_moment)> second_moment;
Function<decltype(Kernels::importance_accum)> importance_accum;
Function<decltype(Kernels::si_accum)> si_accum;
Function<decltype(Kernels::quad_penalty)> quad_penalty;
Function<decltype(Kernels::task_gram)> task_gram;
Function<decltype(Kernels::task_combine)> task_combine;
Function<decltype(Kernels::roofline_read)> roofline_read;
Function<decltype(Kernels::roofline_copy)> roofline_copy;
Function<decltype(Kernels::roofline_fma_fp32)> roofline_fma_fp32;
Function<decltype(Kernels::roofline_dot_bf16)> roofline_dot_bf16;

}  // namespace tlk::TLK_LEVEL
