// torch bindings of the gradgram CPU kernels. The sentences are those of tlkernels/ops/gradgram.py.
#include "torch/cpu/lists.h"

namespace tlk {
namespace {

// Gradients of `tasks` tasks, one task's after another; one without elements is none. `like`, or the first there is,
// says what a parameter's are. Returns one tensor for each parameter: of its size.
Tensors check_tasks(const char* op, const Tensors& grads, int64_t tasks, const Tensors* like) {
    if (tasks < 1 || int64_t(grads.size()) % tasks)
        fail(op, "grads has ", grads.size(), " tensors for ", tasks, " tasks; expected as many for each task");
    const size_t count = grads.size() / size_t(tasks);
    if (like != nullptr && like->size() != count)
        fail(op, "grads has ", count, " tensors a task; expected ", like->size(), ", like out");
    Tensors firsts;
    for (size_t p = 0; p < count; ++p) {
        const Tensor* first = like != nullptr ? &(*like)[p] : nullptr;
        for (size_t t = 0; t < size_t(tasks); ++t) {
            const Tensor& g = grads[t * count + p];
            const std::string name = "grads[" + std::to_string(t) + "][" + std::to_string(p) + "]";
            check_float(op, name.c_str(), g.scalar_type());
            if (g.numel() == 0) continue;
            if (first == nullptr) first = &g;
            if (sizes_of(g) != sizes_of(*first) || g.scalar_type() != first->scalar_type())
                fail(op, name, " has dtype ", name_of(g.scalar_type()), " and shape ", shape_of(sizes_of(g)),
                     "; expected ", name_of(first->scalar_type()), " ", shape_of(sizes_of(*first)),
                     ", like the other tasks' of this parameter");
            check_device(op, name.c_str(), g, *first);
        }
        firsts.push_back(first != nullptr ? *first : grads[p]);
    }
    return firsts;
}

void forget_empty(Read& read) {
    for (size_t i = 0; i < read.data.size(); ++i)
        if (read.dense_ones[i].numel() == 0) read.data[i] = nullptr;
}

Tensor task_gram(Tensors grads, int64_t tasks) {
    const char* op = "task_gram";
    const Tensors firsts = check_tasks(op, grads, tasks, nullptr);
    if (grads.empty() || any_double(grads)) return call_reference("tlkernels_reference::task_gram", "", grads, tasks);
    Tensor gram = allocate({tasks, tasks}, ScalarType::Double, grads[0]);
    const ListArgs args(firsts);
    Read read(grads);
    forget_empty(read);
    kernels().task_gram(args.lists(), tasks, read.data.data(), static_cast<double*>(gram.data_ptr()), kTorchPool);
    return gram;
}

void task_combine_(Tensors out, Tensors grads, Tensor weights, bool accumulate) {
    const char* op = "task_combine_";
    const bool known = weights.scalar_type() == ScalarType::Float || weights.scalar_type() == ScalarType::Double;
    if (weights.dim() != 2 || !known)
        fail(op, "weights has dtype ", name_of(weights.scalar_type()), " and shape ", shape_of(sizes_of(weights)),
             "; expected float32 or float64 (results, tasks)");
    const int64_t results = weights.size(0), tasks = weights.size(1);
    if (results < 1 || int64_t(out.size()) % results)
        fail(op, "out has ", out.size(), " tensors for ", results, " results; expected as many for each result");
    for (size_t i = 0; i < out.size(); ++i) check_float(op, at("out", i).c_str(), out[i].scalar_type());
    const size_t count = out.size() / size_t(results);
    const Tensors first(out.begin(), out.begin() + int64_t(count));
    for (size_t r = 1; r < size_t(results); ++r)
        check_tasks(op, Tensors(out.begin() + int64_t(r * count), out.begin() + int64_t((r + 1) * count)), 1, &first);
    check_tasks(op, grads, tasks, &first);
    if (out.empty()) return;
    check_device(op, "weights", weights, out[0]);
    if (any_double(out)) {
        call_reference_for<0>("tlkernels_reference::task_combine_", out, grads, weights, accumulate);
        return;
    }
    const Tensor w = cast(weights, ScalarType::Float);
    const ListArgs args(first);
    Read read(grads);
    forget_empty(read);
    Written written(out);
    kernels().task_combine(args.lists(), tasks, results, read.data.data(), static_cast<const float*>(w.data_ptr()),
                           accumulate, written.data.data(), kTorchPool);
    written.done();
}

}  // namespace
}  // namespace tlk

STABLE_TORCH_LIBRARY_IMPL(tlkernels, CPU, m) {
    m.impl("task_gram", TORCH_BOX(&tlk::task_gram));
    m.impl("task_combine_", TORCH_BOX(&tlk::task_combine_));
}
