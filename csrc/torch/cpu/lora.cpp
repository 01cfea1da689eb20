// torch bindings of the LoRA CPU kernels: check, allocate, launch. The sentences are those of tlkernels/ops/lora.py.
#include <tuple>

#include "torch/cpu/common.h"

namespace tlk {
namespace {

// ---- checks -------------------------------------------------------------------------------------------------------

int64_t last_of(const Tensor& t) { return t.dim() == 0 ? 0 : t.size(t.dim() - 1); }

Sizes with_last(const Tensor& like, int64_t last) {
    Sizes sizes = sizes_of(like);
    sizes.back() = last;
    return sizes;
}

int64_t rows_of(const Tensor& t) {
    int64_t rows = 1;
    for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
    return rows;
}

void check_rows(const char* op, const char* name, const Tensor& x, int64_t features, const std::string& why) {
    check_float(op, name, x.scalar_type());
    if (x.dim() == 0 || last_of(x) != features)
        fail(op, name, " has ", last_of(x), " features; expected ", features, ", ", why);
}

std::pair<int64_t, int64_t> check_dense(const char* op, const Tensor& weight) {
    check_float(op, "weight", weight.scalar_type());
    if (weight.dim() != 2)
        fail(op, "weight has shape ", shape_of(sizes_of(weight)), "; expected (out_features, in_features)");
    return {weight.size(0), weight.size(1)};
}

int64_t check_a(const char* op, const Tensor& lora_a, int64_t in_features) {
    check_float(op, "lora_a", lora_a.scalar_type());
    if (lora_a.dim() != 2 || lora_a.size(1) != in_features)
        fail(op, "lora_a has shape ", shape_of(sizes_of(lora_a)), "; expected (rank, ", in_features, ")");
    if (lora_a.size(0) < 1) fail(op, "lora_a has rank ", lora_a.size(0), "; expected at least 1");
    return lora_a.size(0);
}

int64_t check_factors(const char* op, const Tensor& lora_a, const Tensor& lora_b, int64_t out_features,
                      int64_t in_features) {
    check_float(op, "lora_a", lora_a.scalar_type());
    check_float(op, "lora_b", lora_b.scalar_type());
    const int64_t rank = check_a(op, lora_a, in_features);
    const Sizes want{out_features, rank};
    if (sizes_of(lora_b) != want)
        fail(op, "lora_b has shape ", shape_of(sizes_of(lora_b)), "; expected ", shape_of(want));
    return rank;
}

// As Python prints it: 1.0, not 1.
std::string text_of(double value) {
    std::ostringstream text;
    text << value;
    return text.str() + (value == std::floor(value) && std::abs(value) < 1e6 ? ".0" : "");
}

void check_dropout(const char* op, const MaybeTensor& rng, double dropout, const char* name = "dropout") {
    if (!(dropout >= 0.0 && dropout < 1.0)) fail(op, name, " is ", text_of(dropout), "; expected 0 <= ", name, " < 1");
    if (!rng) {
        if (dropout > 0.0)
            fail(op, "rng is None; expected int64 (2,), seed and offset, for dropout ", text_of(dropout));
    } else if (rng->scalar_type() != ScalarType::Long || sizes_of(*rng) != Sizes{2}) {
        fail(op, "rng has dtype ", name_of(rng->scalar_type()), " and shape ", shape_of(sizes_of(*rng)),
             "; expected int64 (2,), seed and offset");
    }
}

void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t last) {
    check_same_dtype(op, name, t, "x", x);
    const Sizes want = with_last(x, last);
    if (sizes_of(t) != want) fail(op, name, " has shape ", shape_of(sizes_of(t)), "; expected ", shape_of(want));
}

int64_t check_update(const char* op, const Tensor& grad_output, const Tensor& ds, const Tensor& lora_a,
                     int64_t in_features) {
    check_float(op, "lora_a", lora_a.scalar_type());
    check_same_dtype(op, "ds", ds, "grad_output", grad_output);
    const int64_t rank = check_a(op, lora_a, in_features);
    const Sizes want = with_last(grad_output, rank);
    if (sizes_of(ds) != want) fail(op, "ds has shape ", shape_of(sizes_of(ds)), "; expected ", shape_of(want));
    return rank;
}

std::string like_weight(int64_t out_features, int64_t in_features, bool nf4) {
    return std::string(nf4 ? "like the weight of shape " : "like weight of shape ") +
           shape_of({out_features, in_features});
}

// ---- arguments as the kernels take them ---------------------------------------------------------------------------

// An empty tensor has no memory, and null means a 4-bit weight.
Base dense_base(const Tensor& weight) {
    static const float empty = 0.f;
    const void* data = weight.data_ptr();
    return {data != nullptr ? data : &empty, {}};
}

// Factors with the activations' precision, and where the mask begins.
struct Factors {
    Tensor a, b;
    Lora lora{};
    Factors(const Tensor& lora_a, const Tensor& lora_b, const MaybeTensor& rng, double scaling, double dropout,
            ScalarType dtype)
        : a(cast(lora_a, dtype)), b(cast(lora_b, dtype)) {
        lora.a = a.data_ptr();
        lora.b = b.data_ptr();
        lora.rank = a.size(0);
        lora.scaling = float(scaling);
        if (rng && dropout > 0.0) {
            const Tensor values = dense(*rng);
            const auto* v = static_cast<const int64_t*>(values.data_ptr());
            lora.dropout = float(dropout);
            lora.seed = uint64_t(v[0]);
            lora.offset = uint64_t(v[1]);
        }
    }
};

const float* pointer(const MaybeTensor& t) { return t ? static_cast<const float*>(t->data_ptr()) : nullptr; }

void float_bias(MaybeTensor& bias) {
    if (bias) bias = cast(*bias, ScalarType::Float);
}

// ---- one adapter --------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> run_linear(const Tensor& x, const Base& base, MaybeTensor bias, const Factors& factors,
                                      int64_t out_features, int64_t in_features) {
    const Tensor rows = dense(x);
    float_bias(bias);
    Tensor y = allocate(with_last(x, out_features), x.scalar_type(), x);
    Tensor s = allocate(with_last(x, factors.lora.rank), x.scalar_type(), x);
    kernels().lora_linear(rows.data_ptr(), dtype_of(x.scalar_type()), base, pointer(bias), factors.lora, rows_of(x),
                          out_features, in_features, y.data_ptr(), s.data_ptr(), kTorchPool);
    return {y, s};
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight, MaybeTensor bias, Tensor lora_a, Tensor lora_b,
                                       MaybeTensor rng, double scaling, double dropout) {
    const char* op = "lora_linear";
    const auto [out_features, in_features] = check_dense(op, weight);
    check_rows(op, "x", x, in_features, like_weight(out_features, in_features, false));
    check_same_dtype(op, "weight", weight, "x", x);
    check_factors(op, lora_a, lora_b, out_features, in_features);
    check_bias(op, bias, out_features, x);
    check_dropout(op, rng, dropout);
    check_devices(op, x, named("weight", weight), named("lora_a", lora_a), named("lora_b", lora_b));
    check_optional_device(op, "rng", rng, x);
    if (is_double(x)) {
        const auto [y, s] = call_reference_for<2>("tlkernels_reference::lora_linear", x, weight, bias, lora_a, lora_b,
                                                  rng, scaling, dropout);
        return {y, s};
    }
    const Factors factors(lora_a, lora_b, rng, scaling, dropout, x.scalar_type());
    const Tensor w = dense(weight);
    return run_linear(x, dense_base(w), bias, factors, out_features, in_features);
}

std::tuple<Tensor, Tensor> nf4_lora_linear(Tensor x, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale,
                                           MaybeTensor offset, MaybeTensor bias, Tensor lora_a, Tensor lora_b,
                                           MaybeTensor rng, int64_t out_features, int64_t in_features, double scaling,
                                           double dropout, int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_lora_linear";
    check_product(op, "x", x, out_features, in_features, false);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, out_features * in_features, block_size,
                                absmax_block_size, x);
    check_factors(op, lora_a, lora_b, out_features, in_features);
    check_bias(op, bias, out_features, x);
    check_dropout(op, rng, dropout);
    check_devices(op, x, named("lora_a", lora_a), named("lora_b", lora_b));
    check_optional_device(op, "rng", rng, x);
    if (is_double(x)) {
        const auto [y, s] = call_reference_for<2>("tlkernels_reference::nf4_lora_linear", x, packed, absmax, code,
                                                  scale, offset, bias, lora_a, lora_b, rng, out_features, in_features,
                                                  scaling, dropout, block_size, absmax_block_size);
        return {y, s};
    }
    const Factors factors(lora_a, lora_b, rng, scaling, dropout, x.scalar_type());
    return run_linear(x, Base{nullptr, view(op, w)}, bias, factors, out_features, in_features);
}

std::tuple<Tensor, Tensor, Tensor> lora_grad_ab(Tensor grad_output, Tensor x, Tensor s, Tensor lora_a, Tensor lora_b,
                                                MaybeTensor rng, double scaling, double dropout) {
    const char* op = "lora_grad_ab";
    check_float(op, "grad_output", grad_output.scalar_type());
    check_float(op, "x", x.scalar_type());
    for (const auto& [name, t] : {named("grad_output", grad_output), named("x", x)})
        if (t.dim() == 0) fail(op, name, " has no dimensions; expected (..., features)");
    const int64_t out_features = last_of(grad_output), in_features = last_of(x);
    const int64_t rank = check_factors(op, lora_a, lora_b, out_features, in_features);
    check_like(op, "grad_output", grad_output, x, out_features);
    check_like(op, "s", s, x, rank);
    check_dropout(op, rng, dropout);
    check_devices(op, x, named("grad_output", grad_output), named("s", s), named("lora_a", lora_a),
                  named("lora_b", lora_b));
    check_optional_device(op, "rng", rng, x);
    if (is_double(x)) {
        const auto [ds, a, b] = call_reference_for<3>("tlkernels_reference::lora_grad_ab", grad_output, x, s, lora_a,
                                                      lora_b, rng, scaling, dropout);
        return {ds, a, b};
    }
    const Factors factors(lora_a, lora_b, rng, scaling, dropout, x.scalar_type());
    const Tensor g = dense(grad_output), rows = dense(x), down = dense(s);
    Tensor ds = allocate(sizes_of(s), x.scalar_type(), x);
    Tensor grad_a = allocate({rank, in_features}, ScalarType::Float, x);
    Tensor grad_b = allocate({out_features, rank}, ScalarType::Float, x);
    kernels().lora_grad_ab(g.data_ptr(), rows.data_ptr(), down.data_ptr(), dtype_of(x.scalar_type()), factors.lora,
                           rows_of(x), out_features, in_features, ds.data_ptr(), static_cast<float*>(grad_a.data_ptr()),
                           static_cast<float*>(grad_b.data_ptr()), kTorchPool);
    return {ds, cast(grad_a, lora_a.scalar_type()), cast(grad_b, lora_b.scalar_type())};
}

Tensor run_grad_x(const Tensor& grad_output, const Base& base, const Tensor& ds, const Factors& factors,
                  int64_t out_features, int64_t in_features) {
    const Tensor g = dense(grad_output), down = dense(ds);
    Tensor grad_x = allocate(with_last(grad_output, in_features), grad_output.scalar_type(), grad_output);
    kernels().lora_grad_x(g.data_ptr(), dtype_of(g.scalar_type()), base, down.data_ptr(), factors.lora, rows_of(g),
                          out_features, in_features, grad_x.data_ptr(), kTorchPool);
    return grad_x;
}

Tensor lora_grad_x(Tensor grad_output, Tensor weight, Tensor ds, Tensor lora_a, MaybeTensor rng, double dropout) {
    const char* op = "lora_grad_x";
    const auto [out_features, in_features] = check_dense(op, weight);
    check_rows(op, "grad_output", grad_output, out_features, like_weight(out_features, in_features, false));
    check_same_dtype(op, "weight", weight, "grad_output", grad_output);
    check_update(op, grad_output, ds, lora_a, in_features);
    check_dropout(op, rng, dropout);
    check_devices(op, grad_output, named("weight", weight), named("ds", ds), named("lora_a", lora_a));
    check_optional_device(op, "rng", rng, grad_output);
    if (is_double(grad_output))
        return call_reference("tlkernels_reference::lora_grad_x", "", grad_output, weight, ds, lora_a, rng, dropout);
    const Factors factors(lora_a, lora_a, rng, 1.0, dropout, grad_output.scalar_type());
    const Tensor w = dense(weight);
    return run_grad_x(grad_output, dense_base(w), ds, factors, out_features, in_features);
}

Tensor nf4_lora_grad_x(Tensor grad_output, Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale,
                       MaybeTensor offset, Tensor ds, Tensor lora_a, MaybeTensor rng, int64_t out_features,
                       int64_t in_features, double dropout, int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_lora_grad_x";
    check_product(op, "grad_output", grad_output, out_features, in_features, true);
    const auto w = check_weight(op, packed, absmax, code, scale, offset, out_features * in_features, block_size,
                                absmax_block_size, grad_output);
    check_update(op, grad_output, ds, lora_a, in_features);
    check_dropout(op, rng, dropout);
    check_devices(op, grad_output, named("ds", ds), named("lora_a", lora_a));
    check_optional_device(op, "rng", rng, grad_output);
    if (is_double(grad_output))
        return call_reference("tlkernels_reference::nf4_lora_grad_x", "", grad_output, packed, absmax, code, scale,
                              offset, ds, lora_a, rng, out_features, in_features, dropout, block_size,
                              absmax_block_size);
    const Factors factors(lora_a, lora_a, rng, 1.0, dropout, grad_output.scalar_type());
    return run_grad_x(grad_output, Base{nullptr, view(op, w)}, ds, factors, out_features, in_features);
}

Tensor lora_dropout_mask(Tensor rng, int64_t rows, int64_t cols, double p) {
    const char* op = "lora_dropout_mask";
    for (const auto& [name, value] : {std::pair{"rows", rows}, std::pair{"cols", cols}})
        if (value < 0) fail(op, name, " is ", value, "; expected >= 0");
    checked_numel(op, {rows, cols});
    if (rows >= int64_t(1) << 32) fail(op, "rows is ", rows, "; expected fewer than 2**32");
    check_dropout(op, rng, p, "p");
    const Tensor values = dense(rng);
    const auto* v = static_cast<const int64_t*>(values.data_ptr());
    Tensor mask = allocate({rows, cols}, ScalarType::Bool, rng);
    kernels().lora_dropout_mask(uint64_t(v[0]), uint64_t(v[1]), float(p), rows, cols,
                                static_cast<uint8_t*>(mask.data_ptr()), kTorchPool);
    return mask;
}

// ---- many adapters ------------------------------------------------------------------------------------------------

// The rows in the order of their adapters, and everything else that the kernels take.
struct GroupArgs {
    Tensor a, b, scalings;
    std::vector<int64_t> order, offsets, ranks;
    LoraGroup group{};

    GroupArgs(const char* op, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& adapter_ids,
              const Tensor& scale, const MaybeTensor& rank_of)
        : a(lora_a), b(lora_b), scalings(scale) {
        check_float(op, "x", x.scalar_type());
        check_float(op, "lora_a", lora_a.scalar_type());
        check_float(op, "lora_b", lora_b.scalar_type());
        const int64_t in_features = last_of(x);
        if (lora_a.dim() != 3 || lora_a.size(2) != in_features || lora_a.size(1) < 1)
            fail(op, "lora_a has shape ", shape_of(sizes_of(lora_a)), "; expected (adapters, rank, ", in_features, ")");
        const int64_t adapters = lora_a.size(0), rank = lora_a.size(1);
        if (lora_b.dim() != 3 || lora_b.size(0) != adapters || lora_b.size(2) != rank)
            fail(op, "lora_b has shape ", shape_of(sizes_of(lora_b)), "; expected (", adapters, ", out_features, ",
                 rank, ")");
        check_ids(op, adapter_ids, adapters, x);
        if (scale.scalar_type() != ScalarType::Float || sizes_of(scale) != Sizes{adapters})
            fail(op, "scalings has dtype ", name_of(scale.scalar_type()), " and shape ", shape_of(sizes_of(scale)),
                 "; expected float32 (", adapters, ",)");
        check_devices(op, x, named("lora_a", lora_a), named("lora_b", lora_b), named("scalings", scale));
        scalings = dense(scale);
        check_ranks(op, rank_of, adapters, rank, x);
        const ScalarType dtype = x.scalar_type() == ScalarType::Double ? ScalarType::Float : x.scalar_type();
        a = cast(lora_a, dtype);
        b = cast(lora_b, dtype);
        group.a = a.data_ptr();
        group.b = b.data_ptr();
        group.adapters = adapters;
        group.rank = rank;
        group.order = order.data();
        group.offsets = offsets.data();
        group.scalings = static_cast<const float*>(scalings.data_ptr());
        group.ranks = ranks.data();
    }

  private:
    void check_ids(const char* op, const Tensor& adapter_ids, int64_t adapters, const Tensor& x) {
        if (adapter_ids.scalar_type() != ScalarType::Long && adapter_ids.scalar_type() != ScalarType::Int)
            fail(op, "adapter_ids has dtype ", name_of(adapter_ids.scalar_type()), "; expected int64 or int32");
        Sizes want = sizes_of(x);
        want.pop_back();
        if (sizes_of(adapter_ids) != want)
            fail(op, "adapter_ids has shape ", shape_of(sizes_of(adapter_ids)), "; expected ", shape_of(want),
                 ", one for each row of x");
        check_device(op, "adapter_ids", adapter_ids, x);
        const Tensor wide = cast(adapter_ids, ScalarType::Long);
        const auto* id = static_cast<const int64_t*>(wide.data_ptr());
        const int64_t rows = wide.numel();
        offsets.assign(size_t(adapters) + 1, 0);
        for (int64_t i = 0; i < rows; ++i) {
            if (id[i] < -1 || id[i] >= adapters)
                fail(op, "adapter_ids has an entry ", id[i], "; expected -1 <= id < ", adapters);
            if (id[i] >= 0) ++offsets[size_t(id[i]) + 1];
        }
        for (size_t l = 0; l < size_t(adapters); ++l) offsets[l + 1] += offsets[l];
        order.resize(size_t(offsets[size_t(adapters)]) + 1);
        std::vector<int64_t> next(offsets);
        for (int64_t i = 0; i < rows; ++i)
            if (id[i] >= 0) order[size_t(next[size_t(id[i])]++)] = i;
    }
    void check_ranks(const char* op, const MaybeTensor& rank_of, int64_t adapters, int64_t rank, const Tensor& x) {
        ranks.assign(size_t(adapters), rank);
        if (!rank_of) return;
        if ((rank_of->scalar_type() != ScalarType::Long && rank_of->scalar_type() != ScalarType::Int) ||
            sizes_of(*rank_of) != Sizes{adapters})
            fail(op, "ranks has dtype ", name_of(rank_of->scalar_type()), " and shape ", shape_of(sizes_of(*rank_of)),
                 "; expected int64 (", adapters, ",)");
        check_device(op, "ranks", *rank_of, x);
        const Tensor wide = cast(*rank_of, ScalarType::Long);
        const auto* value = static_cast<const int64_t*>(wide.data_ptr());
        for (int64_t l = 0; l < adapters; ++l) {
            if (value[l] < 0 || value[l] > rank)
                fail(op, "ranks has an entry ", value[l], "; expected 0 <= rank <= ", rank);
            ranks[size_t(l)] = value[l];
        }
    }
};

std::tuple<Tensor, Tensor> lora_linear_grouped(Tensor x, Tensor weight, MaybeTensor bias, Tensor lora_a, Tensor lora_b,
                                               Tensor adapter_ids, Tensor scalings, MaybeTensor ranks) {
    const char* op = "lora_linear_grouped";
    const auto [out_features, in_features] = check_dense(op, weight);
    check_rows(op, "x", x, in_features, like_weight(out_features, in_features, false));
    check_same_dtype(op, "weight", weight, "x", x);
    const GroupArgs args(op, x, lora_a, lora_b, adapter_ids, scalings, ranks);
    const Sizes want{args.group.adapters, out_features, args.group.rank};
    if (sizes_of(lora_b) != want)
        fail(op, "lora_b has shape ", shape_of(sizes_of(lora_b)), "; expected ", shape_of(want));
    check_bias(op, bias, out_features, x);
    check_device(op, "weight", weight, x);
    if (is_double(x)) {
        const auto [y, s] = call_reference_for<2>("tlkernels_reference::lora_linear_grouped", x, weight, bias, lora_a,
                                                  lora_b, adapter_ids, scalings, ranks);
        return {y, s};
    }
    const Tensor rows = dense(x), w = dense(weight);
    float_bias(bias);
    Tensor y = allocate(with_last(x, out_features), x.scalar_type(), x);
    Tensor s = allocate(with_last(x, args.group.rank), x.scalar_type(), x);
    kernels().lora_linear_grouped(rows.data_ptr(), dtype_of(x.scalar_type()), w.data_ptr(), pointer(bias), args.group,
                                  rows_of(x), out_features, in_features, y.data_ptr(), s.data_ptr(), kTorchPool);
    return {y, s};
}

void lora_grouped_delta_(Tensor y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor adapter_ids, Tensor scalings,
                         MaybeTensor ranks, int64_t start) {
    const char* op = "lora_grouped_delta_";
    const GroupArgs args(op, x, lora_a, lora_b, adapter_ids, scalings, ranks);
    check_same_dtype(op, "y", y, "x", x);
    check_device(op, "y", y, x);
    const int64_t out_features = lora_b.size(1), columns = last_of(y);
    if (y.dim() == 0 || sizes_of(y) != with_last(x, columns)) {
        fail(op, "y has shape ", shape_of(sizes_of(y)), "; expected the rows of x, ", shape_of(sizes_of(x)));
    }
    if (start < 0 || start > columns - out_features)
        fail(op, "start is ", start, " for ", out_features, " columns of y, which has ", columns,
             "; expected 0 <= start <= ", columns - out_features);
    if (is_double(x)) {
        std::array<StableIValue, 8> stack{
            torch::stable::detail::from(y),           torch::stable::detail::from(x),
            torch::stable::detail::from(lora_a),      torch::stable::detail::from(lora_b),
            torch::stable::detail::from(adapter_ids), torch::stable::detail::from(scalings),
            torch::stable::detail::from(ranks),       torch::stable::detail::from(start)};
        STABLE_TORCH_ERROR_CODE_CHECK(
            torch_call_dispatcher("tlkernels_reference::lora_grouped_delta_", "", stack.data(), TORCH_ABI_VERSION));
        return;
    }
    const Tensor rows = dense(x), target = dense(y);
    const size_t skip = size_t(start) * target.element_size();
    kernels().lora_grouped_delta(rows.data_ptr(), dtype_of(x.scalar_type()), args.group, rows_of(x), out_features,
                                 last_of(x), static_cast<char*>(target.data_ptr()) + skip, columns, kTorchPool);
    if (!y.is_contiguous()) torch::stable::copy_(y, target);
}

std::tuple<Tensor, Tensor, Tensor> lora_grouped_grad(Tensor grad_output, Tensor x, Tensor s, Tensor lora_a,
                                                     Tensor lora_b, Tensor adapter_ids, Tensor scalings,
                                                     MaybeTensor ranks) {
    const char* op = "lora_grouped_grad";
    const GroupArgs args(op, x, lora_a, lora_b, adapter_ids, scalings, ranks);
    const int64_t adapters = args.group.adapters, rank = args.group.rank;
    const int64_t out_features = lora_b.size(1), in_features = last_of(x);
    check_like(op, "grad_output", grad_output, x, out_features);
    check_like(op, "s", s, x, rank);
    check_devices(op, x, named("grad_output", grad_output), named("s", s));
    if (is_double(x)) {
        const auto [ds, ga, gb] = call_reference_for<3>("tlkernels_reference::lora_grouped_grad", grad_output, x, s,
                                                        lora_a, lora_b, adapter_ids, scalings, ranks);
        return {ds, ga, gb};
    }
    const Tensor g = dense(grad_output), rows = dense(x), down = dense(s);
    Tensor ds = allocate(sizes_of(s), x.scalar_type(), x);
    Tensor grad_a = allocate({adapters, rank, in_features}, ScalarType::Float, x);
    Tensor grad_b = allocate({adapters, out_features, rank}, ScalarType::Float, x);
    kernels().lora_grouped_grad(g.data_ptr(), rows.data_ptr(), down.data_ptr(), dtype_of(x.scalar_type()), args.group,
                                rows_of(x), out_features, in_features, ds.data_ptr(),
                                static_cast<float*>(grad_a.data_ptr()), static_cast<float*>(grad_b.data_ptr()),
                                kTorchPool);
    return {ds, cast(grad_a, lora_a.scalar_type()), cast(grad_b, lora_b.scalar_type())};
}

Tensor lora_grouped_grad_x(Tensor grad_output, Tensor weight, Tensor ds, Tensor lora_a, Tensor adapter_ids,
                           MaybeTensor ranks) {
    const char* op = "lora_grouped_grad_x";
    const auto [out_features, in_features] = check_dense(op, weight);
    check_rows(op, "grad_output", grad_output, out_features, like_weight(out_features, in_features, false));
    check_same_dtype(op, "weight", weight, "grad_output", grad_output);
    check_same_dtype(op, "ds", ds, "grad_output", grad_output);
    check_float(op, "lora_a", lora_a.scalar_type());
    if (lora_a.dim() != 3 || lora_a.size(2) != in_features || lora_a.size(1) < 1)
        fail(op, "lora_a has shape ", shape_of(sizes_of(lora_a)), "; expected (adapters, rank, ", in_features, ")");
    const int64_t adapters = lora_a.size(0), rank = lora_a.size(1);
    const Sizes want = with_last(grad_output, rank);
    if (sizes_of(ds) != want) fail(op, "ds has shape ", shape_of(sizes_of(ds)), "; expected ", shape_of(want));
    check_devices(op, grad_output, named("weight", weight), named("ds", ds), named("lora_a", lora_a));
    // The factors' shapes are those of a group whose other factor is not read.
    const Tensor scalings = torch::stable::new_zeros(grad_output, {adapters}, ScalarType::Float);
    const Tensor other = torch::stable::new_empty(grad_output, {adapters, 0, rank}, ScalarType::Float);
    const Tensor like = torch::stable::new_empty(grad_output, with_last(grad_output, in_features));
    const GroupArgs args(op, like, lora_a, other, adapter_ids, scalings, ranks);
    if (is_double(grad_output))
        return call_reference("tlkernels_reference::lora_grouped_grad_x", "", grad_output, weight, ds, lora_a,
                              adapter_ids, ranks);
    const Tensor g = dense(grad_output), down = dense(ds), w = dense(weight);
    Tensor grad_x = allocate(with_last(grad_output, in_features), grad_output.scalar_type(), grad_output);
    kernels().lora_grouped_grad_x(g.data_ptr(), dtype_of(g.scalar_type()), w.data_ptr(), down.data_ptr(), args.group,
                                  rows_of(g), out_features, in_features, grad_x.data_ptr(), kTorchPool);
    return grad_x;
}

// ---- norms and merging --------------------------------------------------------------------------------------------

Tensor run_norm(const Base& base, Dtype dtype, const Tensor& like, const Tensor& lora_a, const Tensor& lora_b,
                double scaling, int64_t out_features, int64_t in_features) {
    const Tensor a = cast(lora_a, ScalarType::Float), b = cast(lora_b, ScalarType::Float);
    Tensor norm = allocate({out_features}, ScalarType::Float, like);
    kernels().dora_weight_norm(base, dtype, static_cast<const float*>(a.data_ptr()),
                               static_cast<const float*>(b.data_ptr()), a.size(0), float(scaling), out_features,
                               in_features, static_cast<float*>(norm.data_ptr()), kTorchPool);
    return norm;
}

Tensor dora_weight_norm(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling) {
    const char* op = "dora_weight_norm";
    const auto [out_features, in_features] = check_dense(op, weight);
    check_factors(op, lora_a, lora_b, out_features, in_features);
    check_devices(op, weight, named("lora_a", lora_a), named("lora_b", lora_b));
    if (is_double(weight))
        return call_reference("tlkernels_reference::dora_weight_norm", "", weight, lora_a, lora_b, scaling);
    const Tensor w = dense(weight);
    return run_norm(dense_base(w), dtype_of(weight.scalar_type()), weight, lora_a, lora_b, scaling, out_features,
                    in_features);
}

Tensor nf4_dora_weight_norm(Tensor packed, Tensor absmax, MaybeTensor code, MaybeTensor scale, MaybeTensor offset,
                            Tensor lora_a, Tensor lora_b, int64_t out_features, int64_t in_features, double scaling,
                            int64_t block_size, int64_t absmax_block_size) {
    const char* op = "nf4_dora_weight_norm";
    for (const auto& [name, value] : {std::pair{"out_features", out_features}, std::pair{"in_features", in_features}})
        if (value < 0) fail(op, name, " is ", value, "; expected >= 0");
    checked_numel(op, {out_features, in_features});
    const auto w = check_weight(op, packed, absmax, code, scale, offset, out_features * in_features, block_size,
                                absmax_block_size, packed);
    check_factors(op, lora_a, lora_b, out_features, in_features);
    check_devices(op, packed, named("lora_a", lora_a), named("lora_b", lora_b));
    return run_norm(Base{nullptr, view(op, w)}, Dtype::float32, packed, lora_a, lora_b, scaling, out_features,
                    in_features);
}

void lora_merge_(Tensor weight, Tensor lora_a, Tensor lora_b, double scaling) {
    const char* op = "lora_merge_";
    const auto [out_features, in_features] = check_dense(op, weight);
    const int64_t rank = check_factors(op, lora_a, lora_b, out_features, in_features);
    check_devices(op, weight, named("lora_a", lora_a), named("lora_b", lora_b));
    if (is_double(weight)) {
        std::array<StableIValue, 4> stack{torch::stable::detail::from(weight), torch::stable::detail::from(lora_a),
                                          torch::stable::detail::from(lora_b), torch::stable::detail::from(scaling)};
        STABLE_TORCH_ERROR_CODE_CHECK(
            torch_call_dispatcher("tlkernels_reference::lora_merge_", "", stack.data(), TORCH_ABI_VERSION));
        return;
    }
    const Tensor a = cast(lora_a, ScalarType::Float), b = cast(lora_b, ScalarType::Float), w = dense(weight);
    kernels().lora_merge(w.data_ptr(), dtype_of(weight.scalar_type()), static_cast<const float*>(a.data_ptr()),
                         static_cast<const float*>(b.data_ptr()), rank, float(scaling), out_features, in_features,
                         kTorchPool);
    if (!weight.is_contiguous()) torch::stable::copy_(weight, w);
}

}  // namespace
}  // namespace tlk

STABLE_TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
    m.impl("lora_linear", TORCH_BOX(&tlk::lora_linear));
    m.impl("nf4_lora_linear", TORCH_BOX(&tlk::nf4_lora_linear));
    m.impl("lora_grad_ab", TORCH_BOX(&tlk::lora_grad_ab));
    m.impl("lora_grad_x", TORCH_BOX(&tlk::lora_grad_x));
    m.impl("nf4_lora_grad_x", TORCH_BOX(&tlk::nf4_lora_grad_x));
    m.impl("lora_dropout_mask", TORCH_BOX(&tlk::lora_dropout_mask));
    m.impl("lora_linear_grouped", TORCH_BOX(&tlk::lora_linear_grouped));
    m.impl("lora_grouped_delta_", TORCH_BOX(&tlk::lora_grouped_delta_));
    m.impl("lora_grouped_grad", TORCH_BOX(&tlk::lora_grouped_grad));
    m.impl("lora_grouped_grad_x", TORCH_BOX(&tlk::lora_grouped_grad_x));
    m.impl("dora_weight_norm", TORCH_BOX(&tlk::dora_weight_norm));
    m.impl("nf4_dora_weight_norm", TORCH_BOX(&tlk::nf4_dora_weight_norm));
    m.impl("lora_merge_", TORCH_BOX(&tlk::lora_merge_));
}
