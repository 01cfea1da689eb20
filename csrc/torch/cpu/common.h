// What the torch bindings of the CPU kernels share: threads, memory, a 4-bit weight as the kernels take it.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <utility>

#include "cpu/kernels.h"
#include "torch/nf4_check.h"

namespace tlk {

using MaybeTensor = std::optional<Tensor>;

// torch's own threads, so that torch.set_num_threads holds.
inline const Parallel kTorchPool = {
    [](void*, int64_t n, int64_t grain, void (*body)(void*, int64_t, int64_t), void* ctx) {
        torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { body(ctx, begin, end); });
    },
    nullptr};

inline Dtype dtype_of(ScalarType t) {
    return t == ScalarType::Float ? Dtype::float32 : t == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

// New memory for a result. Large results cost more in page faults than in arithmetic, so the kernel of the operating
// system is asked for huge pages: a hint, ignored where they are off.
inline Tensor allocate(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
    constexpr size_t kWorthwhile = 4 << 20;
    Tensor out = torch::stable::new_empty(like, sizes, dtype);
    const size_t bytes = size_t(out.numel()) * out.element_size();
    if (bytes >= kWorthwhile) {
        const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(out.data_ptr());
        const uintptr_t first = (begin + page - 1) / page * page, last = (begin + bytes) / page * page;
        madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
    }
    return out;
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
    if (t.scalar_type() != like.scalar_type())
        fail(op, name, " has dtype ", name_of(t.scalar_type()), "; expected ", name_of(like.scalar_type()), ", like ",
             like_name);
}

template <class... Named>
inline void check_devices(const char* op, const Tensor& like, const Named&... named) {
    (check_device(op, named.first, named.second, like), ...);
}
inline void check_optional_device(const char* op, const char* name, const MaybeTensor& t, const Tensor& like) {
    if (t) check_device(op, name, *t, like);
}
inline std::pair<const char*, Tensor> named(const char* name, const Tensor& t) { return {name, t}; }

inline Tensor cast(const Tensor& t, ScalarType dtype) {
    return dense(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// The float64 results of the reference.
template <size_t Outputs, class... Args>
std::array<Tensor, Outputs> call_reference_for(const char* op, const Args&... args) {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    static_assert(sizeof...(Args) >= Outputs);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
    return [&]<size_t... I>(std::index_sequence<I...>) {
        return std::array<Tensor, Outputs>{torch::stable::detail::to<Tensor>(stack[I])...};
    }(std::make_index_sequence<Outputs>());
}

inline bool is_double(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }

inline const float* code_of(const char* op, const std::optional<Tensor>& code) {
    if (!code) return nf4_code;
    const auto* values = static_cast<const float*>(code->data_ptr());
    for (int i = 0; i < 16; ++i)
        if (!std::isfinite(values[i])) fail(op, "code has ", values[i], " at ", i, "; expected 16 finite values");
    return values;
}

inline Nf4 view(const char* op, const WeightArgs& w) {
    Nf4 view{};
    view.packed = static_cast<const uint8_t*>(w.packed.data_ptr());
    view.absmax_block_size = w.absmax_block_size;
    view.numel = w.numel;
    view.block_size = w.block_size;
    view.code = code_of(op, w.code);
    if (w.nested()) {
        view.absmax_q = static_cast<const uint8_t*>(w.absmax.data_ptr());
        view.absmax_scale = static_cast<const float*>(w.absmax_scale->data_ptr());
        view.absmax_offset = *static_cast<const float*>(w.absmax_offset->data_ptr());
    } else {
        view.absmax = static_cast<const float*>(w.absmax.data_ptr());
    }
    return view;
}

}  // namespace tlk
