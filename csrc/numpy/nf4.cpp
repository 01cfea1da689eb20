// NumPy bindings of the nf4 kernels: check, allocate, launch.
//
// Every size is checked here, before the kernel sees a pointer. Arguments stand in the order of the ops' schemas.
// NumPy has no bfloat16: such data is an array of uint16 with dtype="bfloat16".
#include <cmath>
#include <cstring>
#include <memory>

#include "numpy/binding.h"

namespace tlk::numpy {
namespace {

using Level = std::optional<std::string>;

constexpr int kUint8 = py::detail::npy_api::NPY_UBYTE_, kUint16 = py::detail::npy_api::NPY_USHORT_,
              kFloat32 = py::detail::npy_api::NPY_FLOAT_, kFloat16 = 23 /* NPY_HALF */;

struct Type {
    Dtype dtype;
    int numpy;
    const char* array;  // what an array of it is called in a sentence
    py::ssize_t size;
};

Type type_of(const char* op, const std::string& dtype) {
    if (dtype == "float32") return {Dtype::float32, kFloat32, "float32", 4};
    if (dtype == "float16") return {Dtype::float16, kFloat16, "float16", 2};
    if (dtype == "bfloat16") return {Dtype::bfloat16, kUint16, "uint16 (the bits of bfloat16)", 2};
    throw py::type_error(sentence(op, ": dtype is '", dtype, "'; expected 'float32', 'bfloat16' or 'float16'"));
}

py::dtype numpy_dtype(const Type& type) { return py::dtype(type.numpy); }

void check_block_size(const char* op, const char* name, int64_t block_size) {
    if (block_size < 32 || block_size > 4096 || (block_size & (block_size - 1)) != 0) {
        throw py::value_error(
            sentence(op, ": ", name, " is ", block_size, "; expected a power of two from 32 to 4096"));
    }
}

int64_t ceil_div(int64_t n, int64_t d) { return n / d + (n % d != 0); }

constexpr int64_t kTooMany = int64_t{1} << 62;

void check_size(const char* op, const char* name, int64_t size) {
    if (size < 0) throw py::value_error(sentence(op, ": ", name, " is ", size, "; expected >= 0"));
}

int64_t product(const char* op, const char* first_name, int64_t first, const char* second_name, int64_t second) {
    check_size(op, first_name, first);
    check_size(op, second_name, second);
    int64_t result = 0;
    if (__builtin_mul_overflow(first, second, &result) || result >= kTooMany) {
        throw py::value_error(sentence(op, ": ", first_name, " * ", second_name, " is ", first, " * ", second,
                                       "; expected less than 2**62"));
    }
    return result;
}

void check_length(const char* op, const char* name, const py::array& array, int64_t want, const std::string& why) {
    if (array.ndim() == 1 && array.size() == want) return;
    throw py::value_error(sentence(op, ": ", name, " has shape ", std::string(py::str(array.attr("shape"))),
                                   "; expected (", want, ",)", why));
}

std::string in_blocks(int64_t n, const char* what, int64_t block_size) {
    return sentence(": ", n, " ", what, " in blocks of ", block_size);
}

// A copy, aligned and beyond the reach of other threads.
struct Code {
    float values[16];

    Code(const char* op, const py::object& code) {
        if (code.is_none()) {
            std::memcpy(values, nf4_code, sizeof values);
            return;
        }
        const py::array array = contiguous(op, "code", code, kFloat32, "float32");
        check_length(op, "code", array, 16, "");
        std::memcpy(values, array.data(), sizeof values);
        for (float value : values) {
            if (!std::isfinite(value)) {
                throw py::value_error(
                    sentence(op, ": code has entries that are not finite; expected 16 finite values"));
            }
        }
    }
};

struct Nested {
    py::array scale;
    float offset;

    Nested(const char* op, const char* scale_name, const py::object& scale_object, const char* offset_name,
           const py::object& offset_object, int64_t n, int64_t block_size)
        : scale(contiguous(op, scale_name, scale_object, kFloat32, "float32")) {
        check_length(op, scale_name, scale, ceil_div(n, block_size), in_blocks(n, "scales", block_size));
        const py::array array = contiguous(op, offset_name, offset_object, kFloat32, "float32");
        if (array.size() != 1) {
            throw py::value_error(sentence(op, ": ", offset_name, " has ", array.size(), " elements; expected 1"));
        }
        std::memcpy(&offset, array.data(), sizeof offset);
    }
};

// A weight whose parts fit together; keeps them alive.
class Weight {
  public:
    Nf4 nf4{};

    Weight(const char* op, const py::object& packed, const py::object& absmax, const py::object& code,
           const py::object& absmax_scale, const py::object& absmax_offset, int64_t numel, int64_t block_size,
           int64_t absmax_block_size)
        : code_(op, code) {
        check_block_size(op, "block_size", block_size);
        check_block_size(op, "absmax_block_size", absmax_block_size);
        packed_ = contiguous(op, "packed", packed, kUint8, "uint8");
        if (packed_.size() != numel / 2 + numel % 2) {
            throw py::value_error(sentence(op, ": packed holds ", packed_.size(), " bytes; expected ",
                                           numel / 2 + numel % 2, " for ", numel, " elements of 4 bits"));
        }
        const bool nested =
            py::isinstance<py::array>(absmax) && py::reinterpret_borrow<py::array>(absmax).dtype().num() == kUint8;
        absmax_ = contiguous(op, "absmax", absmax, nested ? kUint8 : kFloat32, "float32, or uint8 (double-quantized)");
        const int64_t blocks = ceil_div(numel, block_size);
        check_length(op, "absmax", absmax_, blocks, in_blocks(numel, "elements", block_size));
        nf4 = {.packed = static_cast<const uint8_t*>(packed_.data()),
               .absmax = nullptr,
               .absmax_q = nullptr,
               .absmax_scale = nullptr,
               .absmax_offset = 0.0f,
               .absmax_block_size = absmax_block_size,
               .numel = numel,
               .block_size = block_size,
               .code = code_.values};
        if (!nested) {
            if (!absmax_scale.is_none() || !absmax_offset.is_none()) {
                throw py::type_error(
                    sentence(op, ": absmax_scale and absmax_offset go with a uint8 absmax; absmax has dtype float32"));
            }
            nf4.absmax = static_cast<const float*>(absmax_.data());
            return;
        }
        if (absmax_scale.is_none() || absmax_offset.is_none()) {
            throw py::value_error(
                sentence(op, ": absmax has dtype uint8 (double-quantized); expected absmax_scale and absmax_offset"));
        }
        nested_.emplace(op, "absmax_scale", absmax_scale, "absmax_offset", absmax_offset, blocks, absmax_block_size);
        nf4.absmax_q = static_cast<const uint8_t*>(absmax_.data());
        nf4.absmax_scale = static_cast<const float*>(nested_->scale.data());
        nf4.absmax_offset = nested_->offset;
    }

    Weight(const Weight&) = delete;
    Weight& operator=(const Weight&) = delete;

  private:
    Code code_;
    py::array packed_, absmax_;
    std::optional<Nested> nested_;
};

// Rows of features, as the products take and give them.
py::array rows_of(const char* op, const char* name, const py::object& object, const Type& type, int64_t features) {
    py::array x = contiguous(op, name, object, type.numpy, type.array);
    if (x.ndim() != 2 || x.shape(1) != features) {
        throw py::value_error(sentence(op, ": ", name, " has shape ", std::string(py::str(x.attr("shape"))),
                                       "; expected (rows, ", features, ")"));
    }
    return x;
}

py::array matrix(const Type& type, int64_t rows, int64_t columns) {
    return py::array(numpy_dtype(type), std::vector<py::ssize_t>{rows, columns});
}

// ---- quantize -------------------------------------------------------------------------------------------------------

py::tuple nf4_quantize(const py::object& w_object, const py::object& code_object, int64_t block_size,
                       const std::string& dtype, const Level& level) {
    const char* op = "nf4_quantize";
    const Kernels& k = table(level);
    const Type type = type_of(op, dtype);
    const py::array w = contiguous(op, "w", w_object, type.numpy, type.array);
    check_block_size(op, "block_size", block_size);
    const Code code(op, code_object);
    const int64_t numel = w.size();
    auto packed = fresh<uint8_t>(numel / 2 + numel % 2);
    auto absmax = fresh<float>(ceil_div(numel, block_size));
    uint8_t* out = packed.mutable_data();
    float* scales = absmax.mutable_data();
    launch([&](Parallel p) { k.nf4_quantize(w.data(), type.dtype, numel, block_size, code.values, out, scales, p); });
    return py::make_tuple(packed, absmax);
}

py::array scales_of(const char* op, const py::object& object) {
    py::array absmax = contiguous(op, "absmax", object, kFloat32, "float32");
    if (absmax.ndim() != 1) {
        throw py::value_error(
            sentence(op, ": absmax has shape ", std::string(py::str(absmax.attr("shape"))), "; expected (n,)"));
    }
    return absmax;
}

py::tuple absmax_quantize(const py::object& absmax_object, const py::object& offset_object, int64_t block_size,
                          const Level& level) {
    const char* op = "absmax_quantize";
    const Kernels& k = table(level);
    const py::array absmax = scales_of(op, absmax_object);
    check_block_size(op, "block_size", block_size);
    const auto* data = static_cast<const float*>(absmax.data());
    const int64_t n = absmax.size();
    float offset = 0.0f;
    if (!offset_object.is_none()) {
        const py::array given = contiguous(op, "offset", offset_object, kFloat32, "float32");
        if (given.size() != 1) {
            throw py::value_error(sentence(op, ": offset has ", given.size(), " elements; expected 1"));
        }
        std::memcpy(&offset, given.data(), sizeof offset);
    }
    auto q = fresh<uint8_t>(n);
    auto scale = fresh<float>(ceil_div(n, block_size));
    uint8_t* codes = q.mutable_data();
    float* scales = scale.mutable_data();
    launch([&](Parallel p) {
        if (offset_object.is_none() && n > 0) offset = k.absmax_mean(data, n);
        k.absmax_quantize(data, n, block_size, offset, codes, scales, p);
    });
    py::array_t<float> mean(std::vector<py::ssize_t>{});
    *mean.mutable_data() = offset;
    return py::make_tuple(q, scale, mean);
}

// ---- decode ---------------------------------------------------------------------------------------------------------

py::array absmax_dequantize(const py::object& q_object, const py::object& scale, const py::object& offset,
                            int64_t block_size, const Level& level) {
    const char* op = "absmax_dequantize";
    const Kernels& k = table(level);
    const py::array q = contiguous(op, "q", q_object, kUint8, "uint8");
    check_length(op, "q", q, q.size(), "");
    check_block_size(op, "block_size", block_size);
    const int64_t n = q.size();
    const Nested nested(op, "scale", scale, "offset", offset, n, block_size);
    auto absmax = fresh<float>(n);
    float* out = absmax.mutable_data();
    launch([&](Parallel p) {
        k.absmax_dequantize(static_cast<const uint8_t*>(q.data()), static_cast<const float*>(nested.scale.data()),
                            nested.offset, n, block_size, out, p);
    });
    return absmax;
}

// Where the result goes: new memory, or the caller's own.
py::array output(const char* op, const py::object& out, const Type& type, int64_t numel,
                 std::initializer_list<py::object> inputs) {
    if (out.is_none()) return py::array(numpy_dtype(type), std::vector<py::ssize_t>{numel});
    py::array array = contiguous(op, "out", out, type.numpy, type.array);
    if (array.size() != numel) {
        throw py::value_error(sentence(op, ": out has ", array.size(), " elements; expected ", numel));
    }
    if (!array.writeable()) throw py::value_error(sentence(op, ": out is read-only; expected a writable array"));
    const auto begin = reinterpret_cast<uintptr_t>(array.data()), end = begin + static_cast<uintptr_t>(array.nbytes());
    for (const py::object& input : inputs) {
        if (!py::isinstance<py::array>(input)) continue;
        const auto other = py::reinterpret_borrow<py::array>(input);
        const auto first = reinterpret_cast<uintptr_t>(other.data());
        if (first < end && begin < first + static_cast<uintptr_t>(other.nbytes())) {
            throw py::value_error(sentence(op, ": out shares memory with an input; expected memory of its own"));
        }
    }
    return array;
}

py::array nf4_dequantize(const py::object& packed, const py::object& absmax, const py::object& code,
                         const py::object& absmax_scale, const py::object& absmax_offset, int64_t numel,
                         const std::string& dtype, int64_t block_size, int64_t absmax_block_size, const py::object& out,
                         const Level& level) {
    const char* op = "nf4_dequantize";
    const Kernels& k = table(level);
    const Type type = type_of(op, dtype);
    check_size(op, "numel", numel);
    if (numel >= kTooMany) throw py::value_error(sentence(op, ": numel is ", numel, "; expected less than 2**62"));
    const Weight w(op, packed, absmax, code, absmax_scale, absmax_offset, numel, block_size, absmax_block_size);
    py::array result = output(op, out, type, numel, {packed, absmax, absmax_scale});
    void* data = result.mutable_data();
    launch([&](Parallel p) { k.nf4_dequantize(w.nf4, data, type.dtype, p); });
    return result;
}

py::array nf4_embedding(const py::object& indices_object, const py::object& packed, const py::object& absmax,
                        const py::object& code, const py::object& absmax_scale, const py::object& absmax_offset,
                        int64_t num_embeddings, int64_t embedding_dim, const std::string& dtype, int64_t block_size,
                        int64_t absmax_block_size, const Level& level) {
    const char* op = "nf4_embedding";
    const Kernels& k = table(level);
    const Type type = type_of(op, dtype);
    const int64_t numel = product(op, "num_embeddings", num_embeddings, "embedding_dim", embedding_dim);
    const Weight w(op, packed, absmax, code, absmax_scale, absmax_offset, numel, block_size, absmax_block_size);
    const py::array given = contiguous(op, "indices", indices_object, py::dtype::of<int64_t>().num(), "int64");
    check_length(op, "indices", given, given.size(), "");
    // Checked in a copy: another thread may write to the array while the kernel reads.
    std::vector<int64_t> indices(static_cast<size_t>(given.size()));
    if (!indices.empty()) std::memcpy(indices.data(), given.data(), indices.size() * sizeof(int64_t));
    for (int64_t index : indices) {
        if (index < 0 || index >= num_embeddings) {
            throw py::index_error(
                sentence(op, ": indices has an entry ", index, "; expected 0 <= index < ", num_embeddings));
        }
    }
    py::array out = matrix(type, given.size(), embedding_dim);
    void* data = out.mutable_data();
    launch([&](Parallel p) {
        k.nf4_embedding(indices.data(), static_cast<int64_t>(indices.size()), w.nf4, embedding_dim, data, type.dtype,
                        p);
    });
    return out;
}

// ---- products -------------------------------------------------------------------------------------------------------

py::array nf4_linear(const py::object& x_object, const py::object& packed, const py::object& absmax,
                     const py::object& code, const py::object& absmax_scale, const py::object& absmax_offset,
                     const py::object& bias_object, int64_t out_features, int64_t in_features, const std::string& dtype,
                     int64_t block_size, int64_t absmax_block_size, const Level& level) {
    const char* op = "nf4_linear";
    const Kernels& k = table(level);
    const Type type = type_of(op, dtype);
    const int64_t numel = product(op, "out_features", out_features, "in_features", in_features);
    const py::array x = rows_of(op, "x", x_object, type, in_features);
    const Weight w(op, packed, absmax, code, absmax_scale, absmax_offset, numel, block_size, absmax_block_size);
    std::optional<py::array> bias;
    if (!bias_object.is_none()) {
        bias = contiguous(op, "bias", bias_object, kFloat32, "float32");
        check_length(op, "bias", *bias, out_features, "");
    }
    const int64_t rows = x.shape(0);
    py::array y = matrix(type, rows, out_features);
    void* data = y.mutable_data();
    const float* b = bias ? static_cast<const float*>(bias->data()) : nullptr;
    launch([&](Parallel p) { k.nf4_linear(x.data(), type.dtype, w.nf4, b, rows, out_features, in_features, data, p); });
    return y;
}

py::array nf4_linear_t(const py::object& grad_object, const py::object& packed, const py::object& absmax,
                       const py::object& code, const py::object& absmax_scale, const py::object& absmax_offset,
                       int64_t out_features, int64_t in_features, const std::string& dtype, int64_t block_size,
                       int64_t absmax_block_size, const Level& level) {
    const char* op = "nf4_linear_t";
    const Kernels& k = table(level);
    const Type type = type_of(op, dtype);
    const int64_t numel = product(op, "out_features", out_features, "in_features", in_features);
    const py::array grad = rows_of(op, "grad_output", grad_object, type, out_features);
    const Weight w(op, packed, absmax, code, absmax_scale, absmax_offset, numel, block_size, absmax_block_size);
    const int64_t rows = grad.shape(0);
    py::array out = matrix(type, rows, in_features);
    void* data = out.mutable_data();
    launch(
        [&](Parallel p) { k.nf4_linear_t(grad.data(), type.dtype, w.nf4, rows, out_features, in_features, data, p); });
    return out;
}

}  // namespace

void bind_nf4(py::module_& m) {
    using py::arg;
    const auto none = py::none();
    m.def("nf4_quantize", &nf4_quantize, arg("w"), arg("code") = none, py::kw_only(), arg("block_size") = 64,
          arg("dtype") = "float32", arg("level") = none);
    m.def("absmax_quantize", &absmax_quantize, arg("absmax"), arg("offset") = none, py::kw_only(),
          arg("block_size") = 256, arg("level") = none);
    m.def("absmax_dequantize", &absmax_dequantize, arg("q"), arg("scale"), arg("offset"), py::kw_only(),
          arg("block_size") = 256, arg("level") = none);
    m.def("nf4_dequantize", &nf4_dequantize, arg("packed"), arg("absmax"), arg("code"), arg("absmax_scale"),
          arg("absmax_offset"), arg("numel"), py::kw_only(), arg("dtype") = "float32", arg("block_size") = 64,
          arg("absmax_block_size") = 256, arg("out") = none, arg("level") = none);
    m.def("nf4_embedding", &nf4_embedding, arg("indices"), arg("packed"), arg("absmax"), arg("code"),
          arg("absmax_scale"), arg("absmax_offset"), arg("num_embeddings"), arg("embedding_dim"), py::kw_only(),
          arg("dtype") = "float32", arg("block_size") = 64, arg("absmax_block_size") = 256, arg("level") = none);
    m.def("nf4_linear", &nf4_linear, arg("x"), arg("packed"), arg("absmax"), arg("code"), arg("absmax_scale"),
          arg("absmax_offset"), arg("bias"), arg("out_features"), arg("in_features"), py::kw_only(),
          arg("dtype") = "float32", arg("block_size") = 64, arg("absmax_block_size") = 256, arg("level") = none);
    m.def("nf4_linear_t", &nf4_linear_t, arg("grad_output"), arg("packed"), arg("absmax"), arg("code"),
          arg("absmax_scale"), arg("absmax_offset"), arg("out_features"), arg("in_features"), py::kw_only(),
          arg("dtype") = "float32", arg("block_size") = 64, arg("absmax_block_size") = 256, arg("level") = none);
}

}  // namespace tlk::numpy
