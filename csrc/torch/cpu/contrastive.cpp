// torch bindings of the contrastive CPU kernels: check, allocate, launch. The sentences are those of
// tlkernels/ops/contrastive.py.
#include <tuple>

#include "torch/cpu/common.h"

namespace tlk {
namespace {

// ---- checks -------------------------------------------------------------------------------------------------------

// N and M.
std::pair<int64_t, int64_t> check_features(const char* op, const Tensor& x, const MaybeTensor& y) {
    check_float(op, "x", x.scalar_type());
    if (x.dim() != 2) fail(op, "x has shape ", shape_of(sizes_of(x)), "; expected (N, D)");
    if (!y) return {x.size(0), x.size(0)};
    check_same_dtype(op, "y", *y, "x", x);
    if (y->dim() != 2 || y->size(1) != x.size(1))
        fail(op, "y has shape ", shape_of(sizes_of(*y)), "; expected (M, ", x.size(1), "), like x");
    return {x.size(0), y->size(0)};
}

void check_scalar(const char* op, const char* name, const MaybeTensor& t) {
    if (!t) return;
    check_float(op, name, t->scalar_type());
    if (t->numel() != 1) fail(op, name, " has shape ", shape_of(sizes_of(*t)), "; expected one element");
}

void check_index(const char* op, const char* name, const MaybeTensor& index, int64_t rows, int64_t columns) {
    if (!index) return;
    if (index->scalar_type() != ScalarType::Long || sizes_of(*index) != Sizes{rows})
        fail(op, name, " has dtype ", name_of(index->scalar_type()), " and shape ", shape_of(sizes_of(*index)),
             "; expected int64 (", rows, ",)");
    const Tensor entries = dense(*index);
    const auto* value = static_cast<const int64_t*>(entries.data_ptr());
    int64_t most = -1;
    for (int64_t i = 0; i < rows; ++i) most = std::max(most, value[i]);
    if (rows > 0 && most >= columns) fail(op, name, " has an entry ", most, "; expected less than ", columns);
}

void check_size(const char* op, const char* name, const MaybeTensor& t, int64_t size, ScalarType dtype) {
    if (t && (t->scalar_type() != dtype || sizes_of(*t) != Sizes{size}))
        fail(op, name, " has dtype ", name_of(t->scalar_type()), " and shape ", shape_of(sizes_of(*t)), "; expected ",
             name_of(dtype), " (", size, ",)");
}

ScalarType accumulator(const Tensor& x) { return is_double(x) ? ScalarType::Double : ScalarType::Float; }

// ---- arguments as the kernels take them ---------------------------------------------------------------------------

float value_of(const MaybeTensor& t) {
    if (!t) return 0.f;
    const Tensor one = cast(*t, ScalarType::Float);
    return *static_cast<const float*>(one.data_ptr());
}

Tensor zeros(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
    Tensor t = torch::stable::new_empty(like, sizes, dtype);
    torch::stable::zero_(t);
    return t;
}

// The features, contiguous; without any columns, one of zeros, so that every logit is still a sum.
struct Logits {
    Tensor x;
    MaybeTensor y, labels, exclude;
    Contrastive view{};

    Logits(const Tensor& x_, const MaybeTensor& y_, const Tensor& scale, const MaybeTensor& bias,
           const MaybeTensor& labels_, const MaybeTensor& exclude_)
        : x(features(x_)), labels(labels_), exclude(exclude_) {
        if (y_) y = features(*y_);
        if (labels) labels = dense(*labels);
        if (exclude) exclude = dense(*exclude);
        view.x = x.data_ptr();
        view.y = y ? y->data_ptr() : view.x;
        view.dtype = dtype_of(x.scalar_type());
        view.n = x.size(0);
        view.m = y ? y->size(0) : view.n;
        view.d = x.size(1);
        view.scale = value_of(scale);
        view.bias = value_of(bias);
        view.labels = labels ? static_cast<const int64_t*>(labels->data_ptr()) : nullptr;
        view.exclude = exclude ? static_cast<const int64_t*>(exclude->data_ptr()) : nullptr;
        view.itself = !y && only_itself_excluded();
    }

  private:
    static Tensor features(const Tensor& t) {
        return t.size(1) > 0 ? dense(t) : zeros({t.size(0), 1}, t.scalar_type(), t);
    }
    // Of a symmetric matrix half is enough, unless rows leave out others.
    bool only_itself_excluded() const {
        for (int64_t i = 0; view.exclude != nullptr && i < view.n; ++i)
            if (view.exclude[i] >= 0 && view.exclude[i] != i) return false;
        return true;
    }
};

float* floats(const MaybeTensor& t) { return t ? static_cast<float*>(t->data_ptr()) : nullptr; }

// Where gradients are summed in float, and the gradients.
struct Gradients {
    Tensor grad_x, grad_y, grad_scale;
    MaybeTensor sums_x, sums_y;
    double scale = 0;
    ContrastiveGrad view{};

    Gradients(const Tensor& x, const MaybeTensor& y, const Logits& logits, bool need_x, bool need_y)
        : grad_x(allocate(need_x ? sizes_of(x) : Sizes{0}, x.scalar_type(), x)),
          grad_y(allocate(need_y && y ? sizes_of(*y) : Sizes{0}, x.scalar_type(), x)),
          grad_scale(torch::stable::new_empty(x, Sizes{}, ScalarType::Float)) {
        need_y = need_y && y;
        if (x.size(1) > 0) {
            if (need_x) sums_x = sums(grad_x);
            if (need_y) sums_y = sums(grad_y);
            view.sums_x = floats(sums_x);
            view.sums_y = y ? floats(sums_y) : logits.view.itself ? nullptr : view.sums_x;
            view.grad_x = grad_x.data_ptr();
            view.grad_y = grad_y.data_ptr();
        }
        view.grad_scale = &scale;
    }
    void done() { *static_cast<float*>(grad_scale.data_ptr()) = float(scale); }

  private:
    static Tensor sums(const Tensor& grad) {
        if (grad.scalar_type() == ScalarType::Float) return grad;
        return allocate(sizes_of(grad), ScalarType::Float, grad);
    }
};

// ---- softmax ------------------------------------------------------------------------------------------------------

void check_logits(const char* op, const Tensor& x, const MaybeTensor& y, const Tensor& logit_scale,
                  const MaybeTensor& logit_bias, const MaybeTensor& labels, const MaybeTensor& exclude) {
    const auto [rows, columns] = check_features(op, x, y);
    check_scalar(op, "logit_scale", logit_scale);
    check_scalar(op, "logit_bias", logit_bias);
    check_index(op, "labels", labels, rows, columns);
    check_index(op, "exclude", exclude, rows, columns);
}

void check_logit_devices(const char* op, const Tensor& x, const MaybeTensor& y, const Tensor& logit_scale,
                         const MaybeTensor& logit_bias, const MaybeTensor& labels, const MaybeTensor& exclude) {
    check_optional_device(op, "y", y, x);
    check_device(op, "logit_scale", logit_scale, x);
    check_optional_device(op, "logit_bias", logit_bias, x);
    check_optional_device(op, "labels", labels, x);
    check_optional_device(op, "exclude", exclude, x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sim_lse(Tensor x, MaybeTensor y, Tensor logit_scale, MaybeTensor logit_bias,
                                                   MaybeTensor labels, MaybeTensor exclude, bool cols) {
    const char* op = "sim_lse";
    check_logits(op, x, y, logit_scale, logit_bias, labels, exclude);
    check_logit_devices(op, x, y, logit_scale, logit_bias, labels, exclude);
    if (is_double(x)) {
        const auto [row, col, nll_row, nll_col] =
            call_reference_for<4>("tlkernels_reference::sim_lse", x, y, logit_scale, logit_bias, labels, exclude, cols);
        return {row, col, nll_row, nll_col};
    }
    const Logits logits(x, y, logit_scale, logit_bias, labels, exclude);
    cols = cols && y;
    const auto vector = [&](bool wanted, int64_t size) { return allocate({wanted ? size : 0}, ScalarType::Float, x); };
    Tensor row = vector(true, logits.view.n), col = vector(cols, logits.view.m);
    Tensor nll_row = vector(bool(labels), logits.view.n), nll_col = vector(labels && cols, logits.view.n);
    kernels().sim_lse(logits.view, floats(row), cols ? floats(col) : nullptr, labels ? floats(nll_row) : nullptr,
                      labels && cols ? floats(nll_col) : nullptr, kTorchPool);
    return {row, col, nll_row, nll_col};
}

std::tuple<Tensor, Tensor, Tensor> sim_lse_backward(Tensor x, MaybeTensor y, Tensor logit_scale, MaybeTensor logit_bias,
                                                    MaybeTensor labels, MaybeTensor exclude, Tensor lse_row,
                                                    MaybeTensor lse_col, Tensor grad_row, MaybeTensor grad_col,
                                                    MaybeTensor grad_pair, bool need_x, bool need_y) {
    const char* op = "sim_lse_backward";
    check_logits(op, x, y, logit_scale, logit_bias, labels, exclude);
    const int64_t rows = x.size(0), columns = y ? y->size(0) : rows;
    const ScalarType acc = accumulator(x);
    check_size(op, "lse_row", lse_row, rows, acc);
    check_size(op, "grad_row", grad_row, rows, acc);
    if (!y && (lse_col || grad_col))
        fail(op, "lse_col and grad_col are given without y; expected None, the matrix is symmetric");
    if (bool(lse_col) != bool(grad_col)) fail(op, "one of lse_col and grad_col is None; expected both or neither");
    check_size(op, "lse_col", lse_col, columns, acc);
    check_size(op, "grad_col", grad_col, columns, acc);
    if (bool(labels) != bool(grad_pair)) fail(op, "one of labels and grad_pair is None; expected both or neither");
    check_size(op, "grad_pair", grad_pair, rows, acc);
    check_logit_devices(op, x, y, logit_scale, logit_bias, labels, exclude);
    check_device(op, "lse_row", lse_row, x);
    check_optional_device(op, "lse_col", lse_col, x);
    check_device(op, "grad_row", grad_row, x);
    check_optional_device(op, "grad_col", grad_col, x);
    check_optional_device(op, "grad_pair", grad_pair, x);
    if (is_double(x)) {
        const auto [gx, gy, gs] =
            call_reference_for<3>("tlkernels_reference::sim_lse_backward", x, y, logit_scale, logit_bias, labels,
                                  exclude, lse_row, lse_col, grad_row, grad_col, grad_pair, need_x, need_y);
        return {gx, gy, gs};
    }
    const Logits logits(x, y, logit_scale, logit_bias, labels, exclude);
    for (MaybeTensor* t : {&lse_col, &grad_col, &grad_pair})
        if (*t) *t = dense(**t);
    lse_row = dense(lse_row);
    grad_row = dense(grad_row);
    Gradients grads(x, y, logits, need_x || !y, need_y);
    kernels().sim_lse_backward(logits.view, floats(lse_row), floats(lse_col), floats(grad_row), floats(grad_col),
                               floats(grad_pair), grads.view, kTorchPool);
    grads.done();
    return {grads.grad_x, grads.grad_y, grads.grad_scale};
}

// ---- sigmoid ------------------------------------------------------------------------------------------------------

void check_sigmoid(const char* op, const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                   const Tensor& logit_bias, const MaybeTensor& labels) {
    check_logits(op, x, y, logit_scale, logit_bias, labels, {});
    check_logit_devices(op, x, y, logit_scale, logit_bias, labels, {});
}

Tensor sigmoid_contrastive(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias, MaybeTensor labels) {
    const char* op = "sigmoid_contrastive";
    check_sigmoid(op, x, y, logit_scale, logit_bias, labels);
    if (is_double(x))
        return call_reference("tlkernels_reference::sigmoid_contrastive", "", x, y, logit_scale, logit_bias, labels);
    const Logits logits(x, y, logit_scale, logit_bias, labels, {});
    Tensor loss = allocate({logits.view.n}, ScalarType::Float, x);
    kernels().sigmoid_contrastive(logits.view, nullptr, floats(loss), nullptr, nullptr, kTorchPool);
    return loss;
}

struct Sigmoid {
    Tensor loss, grad_x, grad_y, grad_scale, grad_bias;
};

Sigmoid sigmoid_gradients(const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias,
                          const MaybeTensor& labels, const MaybeTensor& weights, bool need_x, bool need_y) {
    const Logits logits(x, y, logit_scale, logit_bias, labels, {});
    Gradients grads(x, y, logits, need_x, need_y);
    Tensor loss = allocate({logits.view.n}, ScalarType::Float, x);
    Tensor grad_bias = torch::stable::new_empty(x, Sizes{}, ScalarType::Float);
    double bias = 0;
    kernels().sigmoid_contrastive(logits.view, floats(weights), floats(loss), &bias, &grads.view, kTorchPool);
    grads.done();
    *static_cast<float*>(grad_bias.data_ptr()) = float(bias);
    return {loss, grads.grad_x, grads.grad_y, grads.grad_scale, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sigmoid_contrastive_backward(Tensor x, Tensor y, Tensor logit_scale,
                                                                        Tensor logit_bias, MaybeTensor labels,
                                                                        Tensor grad_loss, bool need_x, bool need_y) {
    const char* op = "sigmoid_contrastive_backward";
    check_features(op, x, y);
    check_size(op, "grad_loss", grad_loss, x.size(0), accumulator(x));
    check_device(op, "grad_loss", grad_loss, x);
    check_sigmoid(op, x, y, logit_scale, logit_bias, labels);
    if (is_double(x)) {
        const auto [gx, gy, gs, gb] = call_reference_for<4>("tlkernels_reference::sigmoid_contrastive_backward", x, y,
                                                            logit_scale, logit_bias, labels, grad_loss, need_x, need_y);
        return {gx, gy, gs, gb};
    }
    const Sigmoid s = sigmoid_gradients(x, y, logit_scale, logit_bias, labels, dense(grad_loss), need_x, need_y);
    return {s.grad_x, s.grad_y, s.grad_scale, s.grad_bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_contrastive_sum(Tensor x, Tensor y, Tensor logit_scale,
                                                                           Tensor logit_bias, MaybeTensor labels,
                                                                           bool need_x, bool need_y) {
    const char* op = "sigmoid_contrastive_sum";
    check_sigmoid(op, x, y, logit_scale, logit_bias, labels);
    if (is_double(x)) {
        const auto [loss, gx, gy, gs, gb] = call_reference_for<5>("tlkernels_reference::sigmoid_contrastive_sum", x, y,
                                                                  logit_scale, logit_bias, labels, need_x, need_y);
        return {loss, gx, gy, gs, gb};
    }
    const Sigmoid s = sigmoid_gradients(x, y, logit_scale, logit_bias, labels, {}, need_x, need_y);
    Tensor loss = torch::stable::new_empty(x, Sizes{}, ScalarType::Float);
    double total = 0;
    for (int64_t i = 0; i < s.loss.numel(); ++i) total += static_cast<const float*>(s.loss.data_ptr())[i];
    *static_cast<float*>(loss.data_ptr()) = float(total);
    return {loss, s.grad_x, s.grad_y, s.grad_scale, s.grad_bias};
}

}  // namespace
}  // namespace tlk

STABLE_TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
    m.impl("sim_lse", TORCH_BOX(&tlk::sim_lse));
    m.impl("sim_lse_backward", TORCH_BOX(&tlk::sim_lse_backward));
    m.impl("sigmoid_contrastive", TORCH_BOX(&tlk::sigmoid_contrastive));
    m.impl("sigmoid_contrastive_backward", TORCH_BOX(&tlk::sigmoid_contrastive_backward));
    m.impl("sigmoid_contrastive_sum", TORCH_BOX(&tlk::sigmoid_contrastive_sum));
}
