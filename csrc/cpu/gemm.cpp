// The tile engine on its own: C = A B^T for dense A and B, single, symmetric, batched or ragged.
//
// What the families reach through their own kernels, without anything around it: for the benchmark of the engine and
// for tests of every way an operand can be packed.
#include "cpu/gemm.h"

#include "cpu/level.h"

namespace tlk {
namespace {

template <class In>
struct StoreLower {
    StoreRows<In> store;
    // Every element on or below the diagonal, and its mirror image.
    void operator()(int64_t i, int64_t rows, int64_t j, int64_t cols, float* c, int64_t width) const {
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t row = i + r;
            for (int64_t l = 0; l < cols && j + l <= row; ++l) {
                In value;
                convert(c[r * width + l], value);
                store.out[row * store.stride + j + l] = value;
                store.out[(j + l) * store.stride + row] = value;
            }
        }
    }
};

template <class T, class In, class A, class B>
void one(const Gemm& g, const A& a, const B& b, Parallel parallel) {
    product_narrow<T>(g.m, g.n, parallel, Term{g.k, a, b, StoreRows<In>{static_cast<In*>(g.c), g.n}});
}

// Symmetric, batched and ragged ones, for operands of the same layout.
template <class T, class In, class Operand>
void some(const Gemm& g, const Operand& a, const Operand& b, Parallel parallel) {
    auto* c = static_cast<In*>(g.c);
    if (g.symmetric) return product_lower<T>(g.n, 0, parallel, Term{g.k, a, b, StoreLower<In>{{c, g.n}}});
    if (g.batch == 1 && g.offsets == nullptr) return one<T, In>(g, a, b, parallel);
    product_batch<T>(g.batch, parallel, [&](int64_t i) {
        const int64_t first = g.offsets != nullptr ? g.offsets[i] : i * g.m;
        const int64_t last = g.offsets != nullptr ? g.offsets[i + 1] : first + g.m;
        Operand ai = a, bi = b;
        ai.data += g.offsets != nullptr ? first * g.a_stride : i * g.m * g.k;
        bi.data += i * g.n * g.k;
        return Problem{last - first, g.n, Term{g.k, ai, bi, StoreRows<In>{c + first * g.n, g.n}}};
    });
}

template <class T, class In, class Map>
void same_layout(const Gemm& g, Map map, Parallel parallel) {
    const auto *a = static_cast<const In*>(g.a), *b = static_cast<const In*>(g.b);
    if (g.a_across)
        some<T, In>(g, AcrossK<T, In, Map>{a, g.a_stride, nullptr, map},
                    AcrossK<T, In, Map>{b, g.b_stride, nullptr, map}, parallel);
    else
        some<T, In>(g, AlongK<T, In, Map>{a, g.a_stride, nullptr, map}, AlongK<T, In, Map>{b, g.b_stride, nullptr, map},
                    parallel);
}

template <class In>
void plain(const Gemm& g, Parallel parallel) {
    using T = typename Arithmetic<In>::type;
    const auto *a = static_cast<const In*>(g.a), *b = static_cast<const In*>(g.b);
    if (g.k == 0) {
        const int64_t rows = g.offsets != nullptr ? g.offsets[g.batch] : g.batch * g.m;
        clear(static_cast<In*>(g.c), rows * g.n);
    } else if (g.a_across == g.b_across) {
        same_layout<T, In>(g, Plain{}, parallel);
    } else if (g.a_across) {
        one<T, In>(g, AcrossK<T, In>{a, g.a_stride}, AlongK<T, In>{b, g.b_stride}, parallel);
    } else {
        one<T, In>(g, AlongK<T, In>{a, g.a_stride}, AcrossK<T, In>{b, g.b_stride}, parallel);
    }
}

}  // namespace

void TLK_LEVEL::gemm(const Gemm& g, Dtype dtype, Parallel parallel) {
    switch (dtype) {
        case Dtype::bfloat16:
            return plain<bf16>(g, parallel);
        case Dtype::float16:
            return plain<f16>(g, parallel);
        case Dtype::float32:
            break;
    }
    if (g.map == Gemm::plain || g.k == 0) return plain<float>(g, parallel);
    if (g.map == Gemm::squared) return same_layout<Fp32, float>(g, Squared{}, parallel);
    if (g.map == Gemm::scaled) return same_layout<Fp32, float>(g, Scaled{g.factor}, parallel);
    same_layout<Fp32, float>(g, Shifted{g.mean}, parallel);
}

}  // namespace tlk
