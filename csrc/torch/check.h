// What the torch bindings of every family and device share: errors as sentences, sizes, the way to the reference.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace tlk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Throws "<op>: <parts...>", which Python sees as a RuntimeError.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
    std::ostringstream text;
    text << op << ": ";
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

// The name that a Python user knows.
inline const char* name_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Byte:
            return "uint8";
        case ScalarType::Char:
            return "int8";
        case ScalarType::Short:
            return "int16";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Half:
            return "float16";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Float:
            return "float32";
        case ScalarType::Double:
            return "float64";
        case ScalarType::Bool:
            return "bool";
        case ScalarType::ComplexHalf:
            return "complex32";
        case ScalarType::ComplexFloat:
            return "complex64";
        case ScalarType::ComplexDouble:
            return "complex128";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline std::string shape_of(const Sizes& sizes) {
    std::string text = "(";
    for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + (sizes.size() == 1 ? ",)" : ")");
}
inline Sizes sizes_of(const Tensor& t) {
    const auto sizes = t.sizes();
    return Sizes(sizes.begin(), sizes.end());
}

inline bool is_float(ScalarType t) {
    return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

inline void check_float(const char* op, const char* name, ScalarType dtype) {
    if (!is_float(dtype)) {
        fail(op, name, " has dtype ", name_of(dtype), "; expected float32, bfloat16, float16 or float64");
    }
}

inline void check_block_size(const char* op, const char* name, int64_t block_size) {
    if (block_size < 32 || block_size > 4096 || (block_size & (block_size - 1)) != 0) {
        fail(op, name, " is ", block_size, "; expected a power of two from 32 to 4096");
    }
}

// The product of sizes, none negative, below 2^62.
inline int64_t checked_numel(const char* op, const Sizes& sizes) {
    int64_t numel = 1;
    bool overflow = false, empty = false;
    for (const int64_t size : sizes) {
        if (size < 0) fail(op, "shape is ", shape_of(sizes), "; expected sizes >= 0");
        empty = empty || size == 0;
        overflow = overflow || __builtin_mul_overflow(numel, size, &numel);
    }
    if (empty) return 0;
    if (overflow || numel >= int64_t(1) << 62) {
        fail(op, "shape ", shape_of(sizes), " has too many elements; expected fewer than 2**62");
    }
    return numel;
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The same op with nothing but its reference kernel (tlkernels/ops/_registry.py): what float64 runs.
template <class... Args>
Tensor call_reference(const char* op, const char* overload, const Args&... args) {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace tlk
