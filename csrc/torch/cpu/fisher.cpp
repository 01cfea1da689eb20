// torch bindings of the fisher CPU kernels: check, launch. The sentences are those of tlkernels/ops/fisher.py.
#include "torch/cpu/lists.h"

namespace tlk {
namespace {

using Ints = std::vector<int64_t>;

ScalarType accumulator(const Tensor& like) { return is_double(like) ? ScalarType::Double : ScalarType::Float; }

std::string list_of(const Ints& values) {
    std::string text = "[";
    for (size_t i = 0; i < values.size() && i < 8; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + "]";
}

void check_accumulator(const char* op, const char* name, const MaybeTensor& t, const Sizes& shape, const Tensor& like) {
    if (!t) return;
    if (t->scalar_type() != accumulator(like))
        fail(op, name, " has dtype ", name_of(t->scalar_type()), "; expected ", name_of(accumulator(like)),
             ": sums of many small squares");
    if (sizes_of(*t) != shape) fail(op, name, " has shape ", shape_of(sizes_of(*t)), "; expected ", shape_of(shape));
    check_device(op, name, *t, like);
}

void check_offsets(const char* op, const Ints& offsets, int64_t tokens) {
    if (offsets.size() < 2 || offsets.front() != 0 || offsets.back() != tokens)
        fail(op, "sample_offsets is ", list_of(offsets), "; expected bounds from 0 to ", tokens, ", the tokens");
    for (size_t i = 1; i < offsets.size(); ++i)
        if (offsets[i] < offsets[i - 1])
            fail(op, "sample_offsets goes from ", offsets[i - 1], " to ", offsets[i], "; expected ascending bounds");
}

// x and grad_out are [samples][tokens][...], or [tokens][...] with offsets
Samples check_tokens(const char* op, const char* x_name, const Tensor& x, const Tensor& grad_out, const Ints& offsets,
                     bool indices = false) {
    const bool ragged = !offsets.empty();
    const int64_t dims = ragged ? 2 : 3;
    const char* want = ragged ? "(tokens, features) with sample_offsets" : "(samples, tokens, features)";
    if (!indices && x.dim() != dims) fail(op, x_name, " has shape ", shape_of(sizes_of(x)), "; expected ", want);
    if (grad_out.dim() != dims) fail(op, "grad_out has shape ", shape_of(sizes_of(grad_out)), "; expected ", want);
    Sizes before = sizes_of(x), of_grad = sizes_of(grad_out);
    if (!indices) before.pop_back();
    of_grad.pop_back();
    if (before != of_grad)
        fail(op, "grad_out has shape ", shape_of(sizes_of(grad_out)), "; expected ", shape_of(before),
             " before the last, like ", x_name);
    check_device(op, x_name, x, grad_out);
    if (!ragged) return {x.size(0), x.size(1), nullptr, nullptr, 1.f};
    check_offsets(op, offsets, x.size(0));
    return {int64_t(offsets.size()) - 1, 0, offsets.data(), nullptr, 1.f};
}

void check_weight(const char* op, const MaybeTensor& weight, int64_t samples, const Tensor& like) {
    if (!weight) return;
    if (weight->scalar_type() != accumulator(like) || sizes_of(*weight) != Sizes{samples})
        fail(op, "sample_weight has dtype ", name_of(weight->scalar_type()), " and shape ", shape_of(sizes_of(*weight)),
             "; expected ", name_of(accumulator(like)), " (", samples, ",)");
    check_device(op, "sample_weight", *weight, like);
}

// What a kernel adds to: the tensor's memory, or a copy's that `done` writes back.
struct Sum {
    MaybeTensor tensor, memory;
    explicit Sum(const MaybeTensor& t) : tensor(t) {
        if (t) memory = dense(*t);
    }
    float* data() const { return memory ? static_cast<float*>(memory->data_ptr()) : nullptr; }
    void done() {
        if (tensor && !tensor->is_contiguous()) torch::stable::copy_(*tensor, *memory);
    }
};

// A weight and its memory, as the kernels take it.
struct Weight {
    MaybeTensor memory;
    Weight(const MaybeTensor& weight, double scale, Samples& samples) {
        if (weight) {
            memory = dense(*weight);
            samples.weight = static_cast<const float*>(memory->data_ptr());
        }
        samples.scale = float(scale);
    }
};

void diag_fisher_linear_(MaybeTensor f_w, MaybeTensor f_b, Tensor act, Tensor grad_out, Ints sample_offsets,
                         double scale, MaybeTensor sample_weight) {
    const char* op = "diag_fisher_linear_";
    check_float(op, "act", act.scalar_type());
    check_same_dtype(op, "grad_out", grad_out, "act", act);
    Samples samples = check_tokens(op, "act", act, grad_out, sample_offsets);
    const int64_t in = act.size(act.dim() - 1), out = grad_out.size(grad_out.dim() - 1);
    check_accumulator(op, "f_w", f_w, {out, in}, act);
    check_accumulator(op, "f_b", f_b, {out}, act);
    check_weight(op, sample_weight, samples.count, act);
    if (is_double(act)) {
        call_reference_for<0>("tlkernels_reference::diag_fisher_linear_", f_w, f_b, act, grad_out, sample_offsets,
                              scale, sample_weight);
        return;
    }
    act = dense(act);
    grad_out = dense(grad_out);
    const Weight weight(sample_weight, scale, samples);
    Sum w(f_w), b(f_b);
    kernels().diag_fisher_linear(act.data_ptr(), grad_out.data_ptr(), dtype_of(act.scalar_type()), samples, out, in,
                                 w.data(), b.data(), kTorchPool);
    w.done();
    b.done();
}

void check_pair(const char* op, const char* name, const Ints& pair, int64_t least) {
    if (pair.size() != 2 || pair[0] < least || pair[1] < least)
        fail(op, name, " is ", list_of(pair), "; expected two numbers >= ", least);
}

void diag_fisher_conv2d_(Tensor f_w, MaybeTensor f_b, Tensor act, Tensor grad_out, Ints stride, Ints padding,
                         Ints dilation, int64_t groups, double scale, MaybeTensor sample_weight) {
    const char* op = "diag_fisher_conv2d_";
    check_float(op, "act", act.scalar_type());
    check_same_dtype(op, "grad_out", grad_out, "act", act);
    for (const auto& [name, t] : {named("act", act), named("grad_out", grad_out), named("f_w", f_w)})
        if (t.dim() != 4) fail(op, name, " has shape ", shape_of(sizes_of(t)), "; expected four dimensions");
    check_pair(op, "stride", stride, 1);
    check_pair(op, "padding", padding, 0);
    check_pair(op, "dilation", dilation, 1);
    const int64_t count = act.size(0), channels = act.size(1), outs = grad_out.size(1);
    if (groups < 1 || channels % groups || outs % groups)
        fail(op, "groups is ", groups, "; expected a divisor of the channels, ", channels, " of act and ", outs,
             " of grad_out");
    Conv conv{channels, act.size(2), act.size(3), outs, 0, 0, groups, {}, {}, {}, {}};
    int64_t size[2];
    for (int i = 0; i < 2; ++i) {
        conv.kernel[i] = f_w.size(2 + i);
        conv.stride[i] = stride[size_t(i)];
        conv.padding[i] = padding[size_t(i)];
        conv.dilation[i] = dilation[size_t(i)];
        const int64_t free = act.size(2 + i) + 2 * conv.padding[i] - conv.dilation[i] * (conv.kernel[i] - 1) - 1;
        size[i] = free < 0 ? 0 : free / conv.stride[i] + 1;
    }
    const Sizes want{count, outs, size[0], size[1]};
    if (sizes_of(grad_out) != want || size[0] < 1 || size[1] < 1)
        fail(op, "grad_out has shape ", shape_of(sizes_of(grad_out)), "; expected ", shape_of(want),
             ", the result of this convolution of act");
    conv.out_height = size[0];
    conv.out_width = size[1];
    check_device(op, "grad_out", grad_out, act);
    check_accumulator(op, "f_w", f_w, {outs, channels / groups, conv.kernel[0], conv.kernel[1]}, act);
    check_accumulator(op, "f_b", f_b, {outs}, act);
    check_weight(op, sample_weight, count, act);
    if (is_double(act)) {
        call_reference_for<0>("tlkernels_reference::diag_fisher_conv2d_", f_w, f_b, act, grad_out, stride, padding,
                              dilation, groups, scale, sample_weight);
        return;
    }
    act = dense(act);
    grad_out = dense(grad_out);
    Samples samples{count, size[0] * size[1], nullptr, nullptr, 1.f};
    const Weight weight(sample_weight, scale, samples);
    Sum w{MaybeTensor(f_w)}, b(f_b);
    kernels().diag_fisher_conv2d(act.data_ptr(), grad_out.data_ptr(), dtype_of(act.scalar_type()), samples, conv,
                                 w.data(), b.data(), kTorchPool);
    w.done();
    b.done();
}

void diag_fisher_embedding_(Tensor f_w, Tensor indices, Tensor grad_out, int64_t padding_idx, Ints sample_offsets,
                            double scale, MaybeTensor sample_weight) {
    const char* op = "diag_fisher_embedding_";
    check_float(op, "grad_out", grad_out.scalar_type());
    if (indices.scalar_type() != ScalarType::Long)
        fail(op, "indices has dtype ", name_of(indices.scalar_type()), "; expected int64");
    const bool ragged = !sample_offsets.empty();
    if (indices.dim() != (ragged ? 1 : 2))
        fail(op, "indices has shape ", shape_of(sizes_of(indices)), "; expected ",
             ragged ? "(tokens,) with sample_offsets" : "(samples, tokens)");
    Samples samples = check_tokens(op, "indices", indices, grad_out, sample_offsets, true);
    if (f_w.dim() != 2) fail(op, "f_w has shape ", shape_of(sizes_of(f_w)), "; expected (embeddings, features)");
    const int64_t rows = f_w.size(0), d = grad_out.size(grad_out.dim() - 1);
    check_accumulator(op, "f_w", f_w, {rows, d}, grad_out);
    check_weight(op, sample_weight, samples.count, grad_out);
    if (padding_idx < -1 || padding_idx >= rows)
        fail(op, "padding_idx is ", padding_idx, "; expected -1 (none) or an index below ", rows);
    indices = dense(indices);
    const auto* index = static_cast<const int64_t*>(indices.data_ptr());
    int64_t low = 0, high = -1;
    for (int64_t i = 0; i < indices.numel(); ++i) {
        low = index[i] < low ? index[i] : low;
        high = index[i] > high ? index[i] : high;
    }
    if (low < 0 || high >= rows)
        fail(op, "indices holds ", low < 0 ? low : high, "; expected 0 <= index < ", rows, ", the embeddings");
    if (is_double(grad_out)) {
        call_reference_for<0>("tlkernels_reference::diag_fisher_embedding_", f_w, indices, grad_out, padding_idx,
                              sample_offsets, scale, sample_weight);
        return;
    }
    grad_out = dense(grad_out);
    const Weight weight(sample_weight, scale, samples);
    Sum w{MaybeTensor(f_w)};
    kernels().diag_fisher_embedding(index, grad_out.data_ptr(), dtype_of(grad_out.scalar_type()), samples, d,
                                    padding_idx, w.data(), kTorchPool);
    w.done();
}

void diag_fisher_norm_(MaybeTensor f_w, MaybeTensor f_b, Tensor x, Tensor grad_out, std::string norm, double eps,
                       Ints sample_offsets, double scale, MaybeTensor sample_weight) {
    const char* op = "diag_fisher_norm_";
    check_float(op, "x", x.scalar_type());
    if (norm != "layer" && norm != "rms" && norm != "none")
        fail(op, "norm is '", norm, "'; expected one of 'layer', 'rms', 'none'");
    if (!(eps >= 0)) fail(op, "eps is ", eps, "; expected >= 0");
    check_same_dtype(op, "grad_out", grad_out, "x", x);
    Samples samples = check_tokens(op, "x", x, grad_out, sample_offsets);
    if (sizes_of(grad_out) != sizes_of(x))
        fail(op, "grad_out has shape ", shape_of(sizes_of(grad_out)), "; expected ", shape_of(sizes_of(x)), ", like x");
    const int64_t d = x.size(x.dim() - 1);
    check_accumulator(op, "f_w", f_w, {d}, x);
    check_accumulator(op, "f_b", f_b, {d}, x);
    check_weight(op, sample_weight, samples.count, x);
    if (is_double(x)) {
        call_reference_for<0>("tlkernels_reference::diag_fisher_norm_", f_w, f_b, x, grad_out, norm, eps,
                              sample_offsets, scale, sample_weight);
        return;
    }
    x = dense(x);
    grad_out = dense(grad_out);
    const Weight weight(sample_weight, scale, samples);
    Sum w(f_w), b(f_b);
    kernels().diag_fisher_norm(x.data_ptr(), grad_out.data_ptr(), dtype_of(x.scalar_type()), samples, d,
                               norm == "layer" ? Norm::layer
                               : norm == "rms" ? Norm::rms
                                               : Norm::none,
                               float(eps), w.data(), b.data(), kTorchPool);
    w.done();
    b.done();
}

void diag_fisher_channel_norm_(MaybeTensor f_w, MaybeTensor f_b, Tensor x, Tensor grad_out, Tensor mean, Tensor rstd,
                               double scale, MaybeTensor sample_weight) {
    const char* op = "diag_fisher_channel_norm_";
    check_float(op, "x", x.scalar_type());
    check_same_dtype(op, "grad_out", grad_out, "x", x);
    if (x.dim() != 3) fail(op, "x has shape ", shape_of(sizes_of(x)), "; expected (samples, channels, positions)");
    if (sizes_of(grad_out) != sizes_of(x))
        fail(op, "grad_out has shape ", shape_of(sizes_of(grad_out)), "; expected ", shape_of(sizes_of(x)), ", like x");
    check_device(op, "grad_out", grad_out, x);
    const int64_t channels = x.size(1);
    check_accumulator(op, "f_w", f_w, {channels}, x);
    check_accumulator(op, "f_b", f_b, {channels}, x);
    check_accumulator(op, "mean", mean, {channels}, x);
    check_accumulator(op, "rstd", rstd, {channels}, x);
    check_weight(op, sample_weight, x.size(0), x);
    if (is_double(x)) {
        call_reference_for<0>("tlkernels_reference::diag_fisher_channel_norm_", f_w, f_b, x, grad_out, mean, rstd,
                              scale, sample_weight);
        return;
    }
    x = dense(x);
    grad_out = dense(grad_out);
    mean = dense(mean);
    rstd = dense(rstd);
    Samples samples{x.size(0), x.size(2), nullptr, nullptr, 1.f};
    const Weight weight(sample_weight, scale, samples);
    Sum w(f_w), b(f_b);
    kernels().diag_fisher_channel_norm(x.data_ptr(), grad_out.data_ptr(), dtype_of(x.scalar_type()), samples, channels,
                                       static_cast<const float*>(mean.data_ptr()),
                                       static_cast<const float*>(rstd.data_ptr()), w.data(), b.data(), kTorchPool);
    w.done();
    b.done();
}

Tensor per_sample_sqnorm_linear(Tensor act, Tensor grad_out, Ints sample_offsets) {
    const char* op = "per_sample_sqnorm_linear";
    check_float(op, "act", act.scalar_type());
    check_same_dtype(op, "grad_out", grad_out, "act", act);
    const Samples samples = check_tokens(op, "act", act, grad_out, sample_offsets);
    if (is_double(act))
        return call_reference("tlkernels_reference::per_sample_sqnorm_linear", "", act, grad_out, sample_offsets);
    act = dense(act);
    grad_out = dense(grad_out);
    Tensor norms = allocate({samples.count}, ScalarType::Float, act);
    kernels().per_sample_sqnorm(act.data_ptr(), grad_out.data_ptr(), dtype_of(act.scalar_type()), samples,
                                grad_out.size(grad_out.dim() - 1), act.size(act.dim() - 1),
                                static_cast<float*>(norms.data_ptr()), kTorchPool);
    return norms;
}

void kfac_factors_linear_(MaybeTensor A, MaybeTensor G, Tensor act, Tensor grad_out, bool bias, std::string approx,
                          Ints sample_offsets, MaybeTensor token_weight, double scale_a, double scale_g) {
    const char* op = "kfac_factors_linear_";
    check_float(op, "act", act.scalar_type());
    if (approx != "expand" && approx != "reduce")
        fail(op, "approx is '", approx, "'; expected one of 'expand', 'reduce'");
    check_same_dtype(op, "grad_out", grad_out, "act", act);
    Samples samples = check_tokens(op, "act", act, grad_out, sample_offsets);
    const int64_t in = act.size(act.dim() - 1), out = grad_out.size(grad_out.dim() - 1);
    check_accumulator(op, "A", A, {in + bias, in + bias}, act);
    check_accumulator(op, "G", G, {out, out}, act);
    Sizes tokens = sizes_of(act);
    tokens.pop_back();
    check_accumulator(op, "token_weight", token_weight, tokens, act);
    if (is_double(act)) {
        call_reference_for<0>("tlkernels_reference::kfac_factors_linear_", A, G, act, grad_out, bias, approx,
                              sample_offsets, token_weight, scale_a, scale_g);
        return;
    }
    act = dense(act);
    grad_out = dense(grad_out);
    const bool expand = approx == "expand";
    const Dtype dtype = dtype_of(act.scalar_type());
    Sum a(A), g(G);
    if (A) {
        const Weight weight(token_weight, scale_a, samples);
        kernels().second_moment(act.data_ptr(), dtype, samples, in, expand ? Rows::tokens : Rows::mean, bias, a.data(),
                                kTorchPool);
    }
    if (G) {
        const Weight weight(token_weight, scale_g, samples);
        kernels().second_moment(grad_out.data_ptr(), dtype, samples, out, expand ? Rows::tokens : Rows::sum, false,
                                g.data(), kTorchPool);
    }
    a.done();
    g.done();
}

// ---- sweeps --------------------------------------------------------------------------------------------------------

void importance_accum_(Tensors acc, Tensors grads, std::string kind, double decay, double scale) {
    const char* op = "importance_accum_";
    if (kind != "sq" && kind != "abs") fail(op, "mode is '", kind, "'; expected one of 'sq', 'abs'");
    check_list(op, "grads", grads, "grads", grads, OfDtype::any);
    check_list(op, "acc", acc, "grads", grads, OfDtype::wide);
    if (any_double(grads)) {
        call_reference_for<0>("tlkernels_reference::importance_accum_", acc, grads, kind, decay, scale);
        return;
    }
    const ListArgs args(grads);
    Read read(grads);
    Written written(acc);
    kernels().importance_accum(args.lists(), reinterpret_cast<float* const*>(written.data.data()), read.data.data(),
                               kind == "abs", float(decay), float(scale), kTorchPool);
    written.done();
}

void si_accum_(Tensors omega, Tensors grads, Tensors deltas, double scale) {
    const char* op = "si_accum_";
    check_list(op, "grads", grads, "grads", grads, OfDtype::any);
    check_list(op, "deltas", deltas, "grads", grads, OfDtype::same);
    check_list(op, "omega", omega, "grads", grads, OfDtype::wide);
    if (any_double(grads)) {
        call_reference_for<0>("tlkernels_reference::si_accum_", omega, grads, deltas, scale);
        return;
    }
    const ListArgs args(grads);
    Read read(grads), steps(deltas);
    Written written(omega);
    kernels().si_accum(args.lists(), reinterpret_cast<float* const*>(written.data.data()), read.data.data(),
                       steps.data.data(), float(scale), kTorchPool);
    written.done();
}

void check_penalty(const char* op, const Tensors& params, const Tensors& anchors, const Tensors& importances) {
    check_list(op, "params", params, "params", params, OfDtype::any);
    check_list(op, "anchors", anchors, "params", params, OfDtype::same);
    check_list(op, "importances", importances, "params", params, OfDtype::wide);
}

Tensor scalar(double value, const Tensor& like) {
    Tensor out = torch::stable::new_empty(like, {}, ScalarType::Float);
    *static_cast<float*>(out.data_ptr()) = float(value);
    return out;
}

Tensor quad_penalty(Tensors params, Tensors anchors, Tensors importances) {
    check_penalty("quad_penalty", params, anchors, importances);
    if (params.empty() || any_double(params))
        return call_reference("tlkernels_reference::quad_penalty", "", params, anchors, importances);
    const ListArgs args(params);
    const Read p(params), a(anchors), f(importances);
    const double value =
        kernels().quad_penalty(args.lists(), p.data.data(), a.data.data(),
                               reinterpret_cast<const float* const*>(f.data.data()), nullptr, false, 0.f, kTorchPool);
    return scalar(value, params[0]);
}

Tensors quad_penalty_backward(Tensor grad, Tensors params, Tensors anchors, Tensors importances) {
    const char* op = "quad_penalty_backward";
    check_penalty(op, params, anchors, importances);
    const ScalarType want = any_double(params) ? ScalarType::Double : ScalarType::Float;
    if (grad.dim() != 0 || grad.scalar_type() != want)
        fail(op, "grad has dtype ", name_of(grad.scalar_type()), " and shape ", shape_of(sizes_of(grad)), "; expected ",
             name_of(want), " ()");
    if (any_double(params)) {
        std::array<StableIValue, 4> stack{torch::stable::detail::from(grad), torch::stable::detail::from(params),
                                          torch::stable::detail::from(anchors),
                                          torch::stable::detail::from(importances)};
        STABLE_TORCH_ERROR_CODE_CHECK(
            torch_call_dispatcher("tlkernels_reference::quad_penalty_backward", "", stack.data(), TORCH_ABI_VERSION));
        return torch::stable::detail::to<Tensors>(stack[0]);
    }
    const ListArgs args(params);
    const Read p(params), a(anchors), f(importances);
    Tensors grads;
    std::vector<void*> data;
    for (const Tensor& t : params) {
        grads.push_back(allocate(sizes_of(t), t.scalar_type(), t));
        data.push_back(grads.back().data_ptr());
    }
    if (!params.empty())
        kernels().quad_penalty(args.lists(), p.data.data(), a.data.data(),
                               reinterpret_cast<const float* const*>(f.data.data()), data.data(), true,
                               *static_cast<const float*>(grad.data_ptr()), kTorchPool);
    return grads;
}

Tensor quad_penalty_grad_(Tensors grads, Tensors params, Tensors anchors, Tensors importances, double scale) {
    const char* op = "quad_penalty_grad_";
    check_list(op, "params", params, "params", params, OfDtype::any);
    check_list(op, "grads", grads, "params", params, OfDtype::same);
    check_penalty(op, params, anchors, importances);
    if (params.empty() || any_double(params))
        return call_reference("tlkernels_reference::quad_penalty_grad_", "", grads, params, anchors, importances,
                              scale);
    const ListArgs args(params);
    const Read p(params), a(anchors), f(importances);
    Written written(grads);
    const double value = kernels().quad_penalty(args.lists(), p.data.data(), a.data.data(),
                                                reinterpret_cast<const float* const*>(f.data.data()),
                                                written.data.data(), false, float(scale), kTorchPool);
    written.done();
    return scalar(value * scale, params[0]);
}

}  // namespace
}  // namespace tlk

STABLE_TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
    m.impl("diag_fisher_linear_", TORCH_BOX(&tlk::diag_fisher_linear_));
    m.impl("diag_fisher_conv2d_", TORCH_BOX(&tlk::diag_fisher_conv2d_));
    m.impl("diag_fisher_embedding_", TORCH_BOX(&tlk::diag_fisher_embedding_));
    m.impl("diag_fisher_norm_", TORCH_BOX(&tlk::diag_fisher_norm_));
    m.impl("diag_fisher_channel_norm_", TORCH_BOX(&tlk::diag_fisher_channel_norm_));
    m.impl("per_sample_sqnorm_linear", TORCH_BOX(&tlk::per_sample_sqnorm_linear));
    m.impl("kfac_factors_linear_", TORCH_BOX(&tlk::kfac_factors_linear_));
    m.impl("importance_accum_", TORCH_BOX(&tlk::importance_accum_));
    m.impl("si_accum_", TORCH_BOX(&tlk::si_accum_));
    m.impl("quad_penalty", TORCH_BOX(&tlk::quad_penalty));
    m.impl("quad_penalty_backward", TORCH_BOX(&tlk::quad_penalty_backward));
    m.impl("quad_penalty_grad_", TORCH_BOX(&tlk::quad_penalty_grad_));
}
