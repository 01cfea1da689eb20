// This level's table of entry points: addresses only, so that nothing of this level runs before it is chosen.
#include "cpu/level.h"

namespace tlk {

using namespace TLK_LEVEL;

extern const Kernels TLK_TABLE;
const Kernels TLK_TABLE = {
    .level = TLK_LEVEL_NAME,
    .gemm = gemm,
    .nf4_quantize = nf4_quantize,
    .absmax_quantize = absmax_quantize,
    .absmax_mean = absmax_mean,
    .absmax_dequantize = absmax_dequantize,
    .nf4_dequantize = nf4_dequantize,
    .nf4_linear = nf4_linear,
    .nf4_linear_t = nf4_linear_t,
    .nf4_embedding = nf4_embedding,
    .lora_linear = lora_linear,
    .lora_grad_ab = lora_grad_ab,
    .lora_grad_x = lora_grad_x,
    .lora_dropout_mask = lora_dropout_mask,
    .lora_linear_grouped = lora_linear_grouped,
    .lora_grouped_delta = lora_grouped_delta,
    .lora_grouped_grad = lora_grouped_grad,
    .lora_grouped_grad_x = lora_grouped_grad_x,
    .dora_weight_norm = dora_weight_norm,
    .lora_merge = lora_merge,
    .sim_lse = sim_lse,
    .sim_lse_backward = sim_lse_backward,
    .sigmoid_contrastive = sigmoid_contrastive,
    .mmd2 = mmd2,
    .mmd2_permutation = mmd2_permutation,
    .median_sqdist = median_sqdist,
    .pairwise_sqdist = pairwise_sqdist,
    .paired_sqdist = paired_sqdist,
    .paired_sqdist_backward = paired_sqdist_backward,
    .covariance = covariance,
    .coral = coral,
    .feature_histogram = feature_histogram,
    .diag_fisher_linear = diag_fisher_linear,
    .diag_fisher_conv2d = diag_fisher_conv2d,
    .diag_fisher_embedding = diag_fisher_embedding,
    .diag_fisher_norm = diag_fisher_norm,
    .diag_fisher_channel_norm = diag_fisher_channel_norm,
    .per_sample_sqnorm = per_sample_sqnorm,
    .second_moment = second_moment,
    .importance_accum = importance_accum,
    .si_accum = si_accum,
    .quad_penalty = quad_penalty,
    .task_gram = task_gram,
    .task_combine = task_combine,
    .roofline_read = roofline_read,
    .roofline_copy = roofline_copy,
    .roofline_fma_fp32 = roofline_fma_fp32,
    .roofline_dot_bf16 = roofline_dot_bf16,
};

}  // namespace tlk
