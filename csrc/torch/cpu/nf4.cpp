// torch bindings of the NF4 CPU kernels: check, allocate, launch.
#include <tuple>

#include "torch/cpu/common.h"

namespace tlk {
namespace {

std::tuple<Tensor, Tensor> nf4_quantize(Tensor w, MaybeTensor code, int64_t block_size) {
    const char* op = "nf4_quantize";
    check_float(op, "w", w.scalar_type());
    check_block_size(op, "block_size", block_size);
    check_code(op, code);
    if (code) {
        check_device(op, "code", *code, w);
        code = dense(*code);
    }
    const float* table = code_of(op, code);
    // float64 is quantized as float32
    const Tensor flat = dense(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w);
    const int64_t numel = flat.numel();
    Tensor packed = allocate({(numel + 1) / 2}, ScalarType::Byte, w);
    Tensor absmax = allocate({(numel + block_size - 1) / block_size}, ScalarType::Float, w);
    kernels().nf4_quantize(flat.data_ptr(), dtype_of(flat.scalar_type()), numel, block_size, table,
                           static_cast<uint8_t*>(packed.data_ptr()), static_cast<float*>(absmax.data_ptr()),
                           kTorchPool);
    return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> absmax_quantize(Tensor absmax, MaybeTensor offset, int64_t block_size) {
    const char* op = "absmax_quantize";
    check_vector(op, "absmax", absmax, ScalarType::Float);
    check_block_size(op, "block_size", block_size);
    absmax = dense(absmax);
    const int64_t n = absmax.numel();
    const auto* values = static_cast<const float*>(absmax.data_ptr());
    float o = n > 0 && !offset ? kernels().absmax_mean(values, n) : 0.f;
    if (offset) {
        if (offset->scalar_type() != ScalarType::Float || offset->numel() != 1) {
            fail(op, "offset has dtype ", name_of(offset->scalar_type()), " and ", offset->numel(),
                 " elements; expected 1 float32");
        }
        check_device(op, "offset", *offset, absmax);
        o = *static_cast<const float*>(offset->data_ptr());
    }
    Tensor q = allocate({n}, ScalarType::Byte, absmax);
    Tensor scale = allocate({(n + block_size - 1) / block_size}, ScalarType::Float, absmax);
    Tensor used = allocate({}, ScalarType::Float, absmax);
    *static_cast<float*>(used.data_ptr()) = o;
    kernels().absmax_quantize(values, n, block_size, o, static_cast<uint8_t*>(q.data_ptr()),
                              static_cast<float*>(scale.data_ptr()), kTorchPool);
    return {q, scale, used};
}

Tensor absmax_dequantize(Tensor q, Tensor scale, Tensor offset, int64_t block_size) {
    const char* op = "absmax_dequantize";
    check_vector(op, "q", q, ScalarType::Byte);
    check_block_size(op, "block_size", block_size);
    check_nested(op, scale, offset, q.numel(), block_size);
    check_device(op, "scale", scale, q);
    check_device(op, "offset", offset, q);
    q = dense(q), scale = dense(scale);
    Tensor absmax = allocate({q.numel()}, ScalarType::Float, q);
    kernels().absmax_dequantize(static_cast<const uint8_t*>(q.data_ptr()), static_cast<const float*>(scale.data_ptr()),
                                *static_cast<const float*>(offset.data_ptr()), q.numel(), block_size,
                                static_cast<float*>(absmax.data_ptr()), kTorchPool);
    return absmax;
}

Tensor nf4_dequantize(Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                      Sizes shape, ScalarType dtype, int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_dequantize";
    const int64_t numel = checked_numel(op, shape);
    if (!is_float(dtype)) fail(op, "dtype is ", name_of(dtype), "; expected float32, bfloat16, float16 or float64");
    const auto w = check_weight(op, packed, absmax, code, scale, offset, numel, block_size, absmax_block_size, packed);
    if (dtype == ScalarType::Double) {
        return call_reference("tlkernels_reference::nf4_dequantize", "", packed, absmax, code, scale, offset, shape,
                              dtype, block_size, absmax_block_size);
    }
    const Nf4 nf4 = view(op, w);
    Tensor out = allocate(shape, dtype, packed);
    kernels().nf4_dequantize(nf4, out.data_ptr(), dtype_of(dtype), kTorchPool);
    return out;
}

void nf4_dequantize_out(Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                        Sizes shape, int64_t block_size, int64_t absmax_block_size, Tensor out) {
    const char* op = "nf4_dequantize";
    const int64_t numel = checked_numel(op, shape);
    check_out(op, out, shape, packed);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, numel, block_size, absmax_block_size, packed);
    if (out.scalar_type() == ScalarType::Double) {
        torch::stable::copy_(out, nf4_dequantize(packed, absmax, code, scale, offset, shape, ScalarType::Double,
                                                 block_size, absmax_block_size));
        return;
    }
    kernels().nf4_dequantize(view(op, w), out.data_ptr(), dtype_of(out.scalar_type()), kTorchPool);
}

Tensor nf4_linear(Tensor x, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                  MaybeTensor bias, int64_t out_features, int64_t in_features, int64_t block_size,
                  int64_t absmax_block_size) {
    const char* op = "nf4_linear";
    const Sizes sizes = check_product(op, "x", x, out_features, in_features, false);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, out_features * in_features, block_size,
                                absmax_block_size, x);
    check_bias(op, bias, out_features, x);
    if (x.scalar_type() == ScalarType::Double) {
        return call_reference("tlkernels_reference::nf4_linear", "", x, packed, absmax, code, scale, offset, bias,
                              out_features, in_features, block_size, absmax_block_size);
    }
    const Nf4 nf4 = view(op, w);
    if (bias) bias = dense(torch::stable::to(*bias, ScalarType::Float));
    const Tensor rows = dense(x);
    Tensor y = allocate(sizes, x.scalar_type(), x);
    kernels().nf4_linear(
        rows.data_ptr(), dtype_of(x.scalar_type()), nf4, bias ? static_cast<const float*>(bias->data_ptr()) : nullptr,
        out_features == 0 ? 0 : y.numel() / out_features, out_features, in_features, y.data_ptr(), kTorchPool);
    return y;
}

Tensor nf4_linear_t(Tensor grad_output, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale,
                    MaybeTensor offset, int64_t out_features, int64_t in_features, int64_t block_size,
                    int64_t absmax_block_size) {
    const char* op = "nf4_linear_t";
    const Sizes sizes = check_product(op, "grad_output", grad_output, out_features, in_features, true);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, out_features * in_features, block_size,
                                absmax_block_size, grad_output);
    if (grad_output.scalar_type() == ScalarType::Double) {
        return call_reference("tlkernels_reference::nf4_linear_t", "", grad_output, packed, absmax, code, scale, offset,
                              out_features, in_features, block_size, absmax_block_size);
    }
    const Nf4 nf4 = view(op, w);
    const Tensor rows = dense(grad_output);
    Tensor grad_x = allocate(sizes, grad_output.scalar_type(), grad_output);
    kernels().nf4_linear_t(rows.data_ptr(), dtype_of(rows.scalar_type()), nf4,
                           in_features == 0 ? 0 : grad_x.numel() / in_features, out_features, in_features,
                           grad_x.data_ptr(), kTorchPool);
    return grad_x;
}

Tensor nf4_embedding(Tensor indices, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale,
                     MaybeTensor offset, int64_t num_embeddings, int64_t embedding_dim, ScalarType dtype,
                     int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_embedding";
    check_indices(op, indices, num_embeddings, embedding_dim);
    if (!is_float(dtype)) fail(op, "dtype is ", name_of(dtype), "; expected float32, bfloat16, float16 or float64");
    const auto w = check_weight(op, packed, absmax, code, scale, offset, num_embeddings * embedding_dim, block_size,
                                absmax_block_size, indices);
    const Tensor wide = dense(torch::stable::to(indices, ScalarType::Long));
    const auto* index = static_cast<const int64_t*>(wide.data_ptr());
    for (int64_t i = 0; i < wide.numel(); ++i) {
        if (index[i] < 0 || index[i] >= num_embeddings) {
            fail(op, "indices has an entry ", index[i], "; expected 0 <= index < ", num_embeddings);
        }
    }
    if (dtype == ScalarType::Double) {
        return call_reference("tlkernels_reference::nf4_embedding", "", indices, packed, absmax, code, scale, offset,
                              num_embeddings, embedding_dim, dtype, block_size, absmax_block_size);
    }
    const Nf4 nf4 = view(op, w);
    Sizes sizes = sizes_of(indices);
    sizes.push_back(embedding_dim);
    Tensor out = allocate(sizes, dtype, packed);
    kernels().nf4_embedding(index, wide.numel(), nf4, embedding_dim, out.data_ptr(), dtype_of(dtype), kTorchPool);
    return out;
}

}  // namespace
}  // namespace tlk

STABLE_TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
    m.impl("nf4_quantize", TORCH_BOX(&tlk::nf4_quantize));
    m.impl("absmax_quantize", TORCH_BOX(&tlk::absmax_quantize));
    m.impl("absmax_dequantize", TORCH_BOX(&tlk::absmax_dequantize));
    m.impl("nf4_dequantize", TORCH_BOX(&tlk::nf4_dequantize));
    m.impl("nf4_dequantize.out", TORCH_BOX(&tlk::nf4_dequantize_out));
    m.impl("nf4_linear", TORCH_BOX(&tlk::nf4_linear));
    m.impl("nf4_linear_many", TORCH_BOX(&tlk::nf4_linear));
    m.impl("nf4_linear_t", TORCH_BOX(&tlk::nf4_linear_t));
    m.impl("nf4_embedding", TORCH_BOX(&tlk::nf4_embedding));
}
