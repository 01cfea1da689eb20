// Lists of tensors as the kernels take them.
#pragma once

#include "torch/cpu/common.h"

namespace tlk {

using Tensors = std::vector<Tensor>;

// Sizes and dtypes of contiguous tensors.
struct ListArgs {
    std::vector<int64_t> numel;
    std::vector<Dtype> dtypes;
    explicit ListArgs(const Tensors& like) {
        for (const Tensor& t : like) {
            numel.push_back(t.numel());
            dtypes.push_back(dtype_of(t.scalar_type()));
        }
    }
    Lists lists() const { return {int64_t(numel.size()), numel.data(), dtypes.data()}; }
};

inline bool any_double(const Tensors& tensors) {
    for (const Tensor& t : tensors)
        if (is_double(t)) return true;
    return false;
}

// The tensors' memory, of copies where they are not contiguous.
struct Read {
    Tensors dense_ones;
    std::vector<const void*> data;
    explicit Read(const Tensors& tensors) {
        for (const Tensor& t : tensors) {
            dense_ones.push_back(dense(t));
            data.push_back(dense_ones.back().data_ptr());
        }
    }
};

// The same for tensors that are written: `done` copies back what is not contiguous.
struct Written {
    const Tensors& tensors;
    Tensors dense_ones;
    std::vector<void*> data;
    explicit Written(const Tensors& all) : tensors(all) {
        for (const Tensor& t : all) {
            dense_ones.push_back(dense(t));
            data.push_back(dense_ones.back().data_ptr());
        }
    }
    void done() {
        for (size_t i = 0; i < tensors.size(); ++i)
            if (!tensors[i].is_contiguous()) torch::stable::copy_(const_cast<Tensor&>(tensors[i]), dense_ones[i]);
    }
};

inline std::string at(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// `tensors` has the length, shapes and device of `like`, and its dtypes, or (`wide`) their accumulators'.
enum class OfDtype { any, same, wide };
inline void check_list(const char* op, const char* name, const Tensors& tensors, const char* like_name,
                       const Tensors& like, OfDtype of) {
    if (tensors.size() != like.size())
        fail(op, name, " has ", tensors.size(), " tensors; expected ", like.size(), ", like ", like_name);
    for (size_t i = 0; i < tensors.size(); ++i) {
        const Tensor &t = tensors[i], &l = like[i];
        check_float(op, at(name, i).c_str(), t.scalar_type());
        if (sizes_of(t) != sizes_of(l))
            fail(op, at(name, i), " has shape ", shape_of(sizes_of(t)), "; expected ", shape_of(sizes_of(l)), ", like ",
                 like_name);
        check_device(op, at(name, i).c_str(), t, l);
        if (of == OfDtype::same && t.scalar_type() != l.scalar_type())
            fail(op, at(name, i), " has dtype ", name_of(t.scalar_type()), "; expected ", name_of(l.scalar_type()),
                 ", like ", at(like_name, i));
        const ScalarType acc = is_double(l) ? ScalarType::Double : ScalarType::Float;
        if (of == OfDtype::wide && t.scalar_type() != acc)
            fail(op, at(name, i), " has dtype ", name_of(t.scalar_type()), "; expected ", name_of(acc),
                 ": sums of many small numbers");
    }
}

}  // namespace tlk
