// torch bindings of the NF4 CUDA kernels: check, allocate, launch on torch's current stream.
#include "cuda/nf4.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <bit>
#include <tuple>

#include "torch/nf4_check.h"

namespace tlk {
namespace {

using cuda::Bias;
using cuda::Dtype;
using cuda::LinearPlan;
using cuda::Nf4;
using MaybeTensor = std::optional<Tensor>;
using torch::stable::new_empty;

// The device of a tensor made current, and torch's stream on it.
struct Device {
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream = nullptr;

    explicit Device(const Tensor& t) : guard(t.get_device_index()) {
        void* current = nullptr;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
        stream = static_cast<cudaStream_t>(current);
    }
};

void check_cuda(const char* op, cudaError_t error) {
    if (error != cudaSuccess) fail(op, "CUDA says: ", cudaGetErrorString(error));
}

Dtype dtype_of(ScalarType t) {
    return t == ScalarType::Float ? Dtype::float32 : t == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

template <class T>
const T* data_of(const Tensor& t) {
    return static_cast<const T*>(t.data_ptr());
}

template <class T>
T* mutable_data_of(Tensor& t) {
    return static_cast<T*>(t.data_ptr());
}

int log2_of(int64_t power_of_two) { return std::countr_zero(static_cast<uint64_t>(power_of_two)); }

// An optional pointer; its entries stay on the device, so that nobody waits for them.
const float* floats_of(const MaybeTensor& t) { return t ? data_of<float>(*t) : nullptr; }

Nf4 view(const WeightArgs& w) {
    Nf4 view{};
    view.packed = data_of<uint8_t>(w.packed);
    if (w.nested()) {
        view.absmax_q = data_of<uint8_t>(w.absmax);
        view.absmax_scale = floats_of(w.absmax_scale);
        view.absmax_offset = floats_of(w.absmax_offset);
    } else {
        view.absmax = data_of<float>(w.absmax);
    }
    view.code = floats_of(w.code);
    view.numel = w.numel;
    view.block_shift = log2_of(w.block_size);
    view.absmax_block_shift = log2_of(w.absmax_block_size);
    return view;
}

std::tuple<Tensor, Tensor> nf4_quantize(Tensor w, MaybeTensor code, int64_t block_size) {
    const char* op = "nf4_quantize";
    check_float(op, "w", w.scalar_type());
    check_block_size(op, "block_size", block_size);
    check_code(op, code);
    if (code) {
        check_device(op, "code", *code, w);
        code = dense(*code);
    }
    const Device device(w);
    // float64 is quantized as float32
    const Tensor flat = dense(w.scalar_type() == ScalarType::Double ? torch::stable::to(w, ScalarType::Float) : w);
    const int64_t numel = flat.numel();
    Tensor packed = new_empty(w, {(numel + 1) / 2}, ScalarType::Byte);
    Tensor absmax = new_empty(w, {(numel + block_size - 1) / block_size}, ScalarType::Float);
    if (numel > 0) {
        check_cuda(op, cuda::nf4_quantize(flat.data_ptr(), dtype_of(flat.scalar_type()), numel, log2_of(block_size),
                                          floats_of(code), mutable_data_of<uint8_t>(packed),
                                          mutable_data_of<float>(absmax), device.stream));
    }
    return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> absmax_quantize(Tensor absmax, MaybeTensor offset, int64_t block_size) {
    const char* op = "absmax_quantize";
    check_vector(op, "absmax", absmax, ScalarType::Float);
    check_block_size(op, "block_size", block_size);
    const Device device(absmax);
    absmax = dense(absmax);
    const int64_t n = absmax.numel();
    Tensor q = new_empty(absmax, {n}, ScalarType::Byte);
    Tensor scale = new_empty(absmax, {(n + block_size - 1) / block_size}, ScalarType::Float);
    Tensor used = new_empty(absmax, {}, ScalarType::Float);
    if (offset) {
        if (offset->scalar_type() != ScalarType::Float || offset->numel() != 1) {
            fail(op, "offset has dtype ", name_of(offset->scalar_type()), " and ", offset->numel(),
                 " elements; expected 1 float32");
        }
        check_device(op, "offset", *offset, absmax);
        torch::stable::copy_(used, torch::stable::reshape(*offset, Sizes{}));
    } else if (n > 0) {
        Tensor partials = new_empty(absmax, {cuda::kMeanPartials}, ScalarType::Double);
        check_cuda(op, cuda::absmax_mean(data_of<float>(absmax), n, mutable_data_of<double>(partials),
                                         mutable_data_of<float>(used), device.stream));
    } else {
        torch::stable::zero_(used);
    }
    if (n > 0) {
        check_cuda(op,
                   cuda::absmax_quantize(data_of<float>(absmax), n, log2_of(block_size), data_of<float>(used),
                                         mutable_data_of<uint8_t>(q), mutable_data_of<float>(scale), device.stream));
    }
    return {q, scale, used};
}

Tensor absmax_dequantize(Tensor q, Tensor scale, Tensor offset, int64_t block_size) {
    const char* op = "absmax_dequantize";
    check_vector(op, "q", q, ScalarType::Byte);
    check_block_size(op, "block_size", block_size);
    check_nested(op, scale, offset, q.numel(), block_size);
    check_device(op, "scale", scale, q);
    check_device(op, "offset", offset, q);
    const Device device(q);
    q = dense(q), scale = dense(scale), offset = dense(offset);
    Tensor absmax = new_empty(q, {q.numel()}, ScalarType::Float);
    if (q.numel() > 0) {
        check_cuda(
            op, cuda::absmax_dequantize(data_of<uint8_t>(q), data_of<float>(scale), data_of<float>(offset), q.numel(),
                                        log2_of(block_size), mutable_data_of<float>(absmax), device.stream));
    }
    return absmax;
}

Tensor nf4_dequantize(Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                      Sizes shape, ScalarType dtype, int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_dequantize";
    const int64_t numel = checked_numel(op, shape);
    if (!is_float(dtype)) fail(op, "dtype is ", name_of(dtype), "; expected float32, bfloat16, float16 or float64");
    const Device device(packed);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, numel, block_size, absmax_block_size, packed);
    if (dtype == ScalarType::Double) {
        return call_reference("tlkernels_reference::nf4_dequantize", "", packed, absmax, code, scale, offset, shape,
                              dtype, block_size, absmax_block_size);
    }
    Tensor out = new_empty(packed, shape, dtype);
    if (numel > 0) check_cuda(op, cuda::nf4_dequantize(view(w), out.data_ptr(), dtype_of(dtype), device.stream));
    return out;
}

void nf4_dequantize_out(Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                        Sizes shape, int64_t block_size, int64_t absmax_block_size, Tensor out) {
    const char* op = "nf4_dequantize";
    const int64_t numel = checked_numel(op, shape);
    check_out(op, out, shape, packed);
    const Device device(packed);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, numel, block_size, absmax_block_size, packed);
    if (out.scalar_type() == ScalarType::Double) {
        torch::stable::copy_(out, nf4_dequantize(packed, absmax, code, scale, offset, shape, ScalarType::Double,
                                                 block_size, absmax_block_size));
    } else if (numel > 0) {
        check_cuda(op, cuda::nf4_dequantize(view(w), out.data_ptr(), dtype_of(out.scalar_type()), device.stream));
    }
}

Tensor nf4_linear(Tensor x, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                  MaybeTensor bias, int64_t out_features, int64_t in_features, int64_t block_size,
                  int64_t absmax_block_size) {
    const char* op = "nf4_linear";
    const Sizes sizes = check_product(op, "x", x, out_features, in_features, false);
    const Device device(x);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, out_features * in_features, block_size,
                                absmax_block_size, x);
    check_bias(op, bias, out_features, x);
    const ScalarType dtype = x.scalar_type();
    if (dtype == ScalarType::Double) {
        return call_reference("tlkernels_reference::nf4_linear", "", x, packed, absmax, code, scale, offset, bias,
                              out_features, in_features, block_size, absmax_block_size);
    }
    const int64_t rows = checked_numel(op, Sizes(sizes.begin(), sizes.end() - 1));
    if (rows > cuda::kFewRows) {
        return call_reference("tlkernels::nf4_linear_many", "", x, packed, absmax, code, scale, offset, bias,
                              out_features, in_features, block_size, absmax_block_size);
    }
    Tensor y = new_empty(x, sizes, dtype);
    if (y.numel() == 0) return y;
    if (bias)
        bias = dense(bias->scalar_type() == ScalarType::Double ? torch::stable::to(*bias, ScalarType::Float) : *bias);
    const Bias added = bias ? Bias{bias->data_ptr(), dtype_of(bias->scalar_type())} : Bias{};
    const Tensor matrix = dense(x);
    const Nf4 nf4 = view(w);
    LinearPlan plan;
    check_cuda(op,
               cuda::nf4_linear_plan(matrix.data_ptr(), dtype_of(dtype), nf4, rows, out_features, in_features, &plan));
    MaybeTensor workspace;
    if (plan.splits > 1) workspace = new_empty(x, {static_cast<int64_t>(plan.workspace_floats)}, ScalarType::Float);
    check_cuda(op,
               cuda::nf4_linear(plan, matrix.data_ptr(), dtype_of(dtype), nf4, added, rows, out_features, in_features,
                                workspace ? mutable_data_of<float>(*workspace) : nullptr, y.data_ptr(), device.stream));
    return y;
}

Tensor nf4_embedding(Tensor indices, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale,
                     MaybeTensor offset, int64_t num_embeddings, int64_t embedding_dim, ScalarType dtype,
                     int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_embedding";
    check_indices(op, indices, num_embeddings, embedding_dim);
    if (!is_float(dtype)) fail(op, "dtype is ", name_of(dtype), "; expected float32, bfloat16, float16 or float64");
    const Device device(indices);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, num_embeddings * embedding_dim, block_size,
                                absmax_block_size, indices);
    if (dtype == ScalarType::Double) {
        // the reference would index out of bounds where this kernel writes NaN; float32 values are exact in float64
        return torch::stable::to(nf4_embedding(indices, packed, absmax, code, scale, offset, num_embeddings,
                                               embedding_dim, ScalarType::Float, block_size, absmax_block_size),
                                 ScalarType::Double);
    }
    const Tensor list = dense(indices);
    Sizes sizes = sizes_of(indices);
    sizes.push_back(embedding_dim);
    Tensor out = new_empty(packed, sizes, dtype);
    if (out.numel() > 0) {
        check_cuda(op,
                   cuda::nf4_embedding(list.data_ptr(), list.scalar_type() == ScalarType::Long, list.numel(), view(w),
                                       num_embeddings, embedding_dim, out.data_ptr(), dtype_of(dtype), device.stream));
    }
    return out;
}

}  // namespace
}  // namespace tlk

STABLE_TORCH_LIBRARY_IMPL(tlkernels, CUDA, m) {
    m.impl("nf4_quantize", TORCH_BOX(&tlk::nf4_quantize));
    m.impl("absmax_quantize", TORCH_BOX(&tlk::absmax_quantize));
    m.impl("absmax_dequantize", TORCH_BOX(&tlk::absmax_dequantize));
    m.impl("nf4_dequantize", TORCH_BOX(&tlk::nf4_dequantize));
    m.impl("nf4_dequantize.out", TORCH_BOX(&tlk::nf4_dequantize_out));
    m.impl("nf4_linear", TORCH_BOX(&tlk::nf4_linear));
    m.impl("nf4_embedding", TORCH_BOX(&tlk::nf4_embedding));
}
