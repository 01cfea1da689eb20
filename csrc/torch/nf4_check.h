// The checks of an NF4 weight, for the bindings of every device. The sentences are those of tlkernels/ops/nf4.py.
#pragma once

#include "torch/check.h"

namespace tlk {

// A 4-bit weight as the ops take it, checked and contiguous. It keeps the tensors alive that its pointers are into.
struct WeightArgs {
    Tensor packed, absmax;
    std::optional<Tensor> code, absmax_scale, absmax_offset;
    int64_t numel, block_size, absmax_block_size;

    bool nested() const { return absmax.scalar_type() == ScalarType::Byte; }
};

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
    if (t.device() != like.device()) fail(op, name, " is on another device; expected all arguments on one device");
}

// `code` has the shape and dtype of a table; that its entries are finite is for the device's own code to see.
inline void check_code(const char* op, const std::optional<Tensor>& code) {
    if (!code) return;
    if (code->scalar_type() != ScalarType::Float)
        fail(op, "code has dtype ", name_of(code->scalar_type()), "; expected float32");
    if (code->dim() != 1 || code->numel() != 16)
        fail(op, "code has shape ", shape_of(sizes_of(*code)), "; expected (16,)");
}

inline void check_nested(const char* op, const std::optional<Tensor>& scale, const std::optional<Tensor>& offset,
                         int64_t blocks, int64_t block_size) {
    if (!scale || !offset) {
        fail(op, "absmax has dtype uint8 (double-quantized); expected absmax_scale and absmax_offset");
    }
    if (scale->scalar_type() != ScalarType::Float || offset->scalar_type() != ScalarType::Float) {
        fail(op, "absmax_scale and absmax_offset have dtypes ", name_of(scale->scalar_type()), " and ",
             name_of(offset->scalar_type()), "; expected float32");
    }
    const int64_t want = (blocks + block_size - 1) / block_size;
    if (scale->dim() != 1 || scale->numel() != want) {
        fail(op, "absmax_scale has shape ", shape_of(sizes_of(*scale)), "; expected (", want, ",): ", blocks,
             " scales in blocks of ", block_size);
    }
    if (offset->numel() != 1) fail(op, "absmax_offset has ", offset->numel(), " elements; expected 1");
}

inline WeightArgs check_weight(const char* op, const Tensor& packed, const Tensor& absmax,
                               const std::optional<Tensor>& code, const std::optional<Tensor>& absmax_scale,
                               const std::optional<Tensor>& absmax_offset, int64_t numel, int64_t block_size,
                               int64_t absmax_block_size, const Tensor& like) {
    check_block_size(op, "block_size", block_size);
    check_block_size(op, "absmax_block_size", absmax_block_size);
    check_code(op, code);
    const ScalarType storage = packed.scalar_type();
    if (storage != ScalarType::Byte && storage != ScalarType::BFloat16 && storage != ScalarType::Half &&
        storage != ScalarType::Float) {
        fail(op, "packed has dtype ", name_of(storage), "; expected uint8 (or a float view of the bytes)");
    }
    const int64_t bytes = packed.numel() * int64_t(packed.element_size()), want = (numel + 1) / 2;
    if (bytes != want)
        fail(op, "packed holds ", bytes, " bytes; expected ", want, " for ", numel, " elements of 4 bits");
    const int64_t blocks = (numel + block_size - 1) / block_size;
    if (absmax.dim() != 1 || absmax.numel() != blocks) {
        fail(op, "absmax has shape ", shape_of(sizes_of(absmax)), "; expected (", blocks, ",): ", numel,
             " elements in blocks of ", block_size);
    }
    if (absmax.scalar_type() == ScalarType::Byte) {
        check_nested(op, absmax_scale, absmax_offset, blocks, absmax_block_size);
    } else if (absmax.scalar_type() != ScalarType::Float) {
        fail(op, "absmax has dtype ", name_of(absmax.scalar_type()), "; expected float32, or uint8 (double-quantized)");
    } else if (absmax_scale || absmax_offset) {
        fail(op, "absmax_scale and absmax_offset go with a uint8 absmax; absmax has dtype float32");
    }
    check_device(op, "packed", packed, like);
    check_device(op, "absmax", absmax, like);
    if (code) check_device(op, "code", *code, like);
    if (absmax_scale) check_device(op, "absmax_scale", *absmax_scale, like);
    if (absmax_offset) check_device(op, "absmax_offset", *absmax_offset, like);

    WeightArgs w{dense(packed), dense(absmax), {}, {}, {}, numel, block_size, absmax_block_size};
    if (code) w.code = dense(*code);
    if (absmax_scale) w.absmax_scale = dense(*absmax_scale);
    if (absmax_offset) w.absmax_offset = dense(*absmax_offset);
    return w;
}

// Checks of nf4_linear (features of x are the weight's input) and nf4_linear_t (its output). Returns the other shape.
inline Sizes check_product(const char* op, const char* name, const Tensor& x, int64_t out_features, int64_t in_features,
                           bool transposed) {
    check_float(op, name, x.scalar_type());
    for (const auto& [which, value] : {std::pair{"out_features", out_features}, std::pair{"in_features", in_features}})
        if (value < 0) fail(op, which, " is ", value, "; expected >= 0");
    checked_numel(op, {out_features, in_features});
    const int64_t want = transposed ? out_features : in_features, got = x.dim() == 0 ? 0 : x.size(x.dim() - 1);
    if (x.dim() == 0 || got != want) {
        fail(op, name, " has ", got, " features, but the weight was quantized from shape (", out_features, ", ",
             in_features, "); expected ", name, ".shape[-1] == ", want);
    }
    Sizes sizes = sizes_of(x);
    sizes.back() = transposed ? in_features : out_features;
    return sizes;
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t out_features, const Tensor& like) {
    if (!bias) return;
    check_float(op, "bias", bias->scalar_type());
    if (bias->dim() != 1 || bias->numel() != out_features) {
        fail(op, "bias has shape ", shape_of(sizes_of(*bias)), "; expected (", out_features, ",)");
    }
    check_device(op, "bias", *bias, like);
}

inline void check_indices(const char* op, const Tensor& indices, int64_t num_embeddings, int64_t embedding_dim) {
    const ScalarType dtype = indices.scalar_type();
    if (dtype != ScalarType::Long && dtype != ScalarType::Int) {
        fail(op, "indices has dtype ", name_of(dtype), "; expected int64 or int32");
    }
    for (const auto& [which, value] :
         {std::pair{"num_embeddings", num_embeddings}, std::pair{"embedding_dim", embedding_dim}})
        if (value < 0) fail(op, which, " is ", value, "; expected >= 0");
    checked_numel(op, {num_embeddings, embedding_dim});
}

inline void check_out(const char* op, const Tensor& out, const Sizes& shape, const Tensor& like) {
    if (sizes_of(out) != shape) fail(op, "out has shape ", shape_of(sizes_of(out)), "; expected ", shape_of(shape));
    check_float(op, "out", out.scalar_type());
    if (!out.is_contiguous()) {
        const auto strides = out.strides();
        fail(op, "out has strides ", shape_of(Sizes(strides.begin(), strides.end())), "; expected a contiguous tensor");
    }
    check_device(op, "out", out, like);
}

inline void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype) {
    if (t.scalar_type() != dtype || t.dim() != 1) {
        fail(op, name, " has dtype ", name_of(t.scalar_type()), " and shape ", shape_of(sizes_of(t)), "; expected ",
             name_of(dtype), " [n]");
    }
}

}  // namespace tlk
