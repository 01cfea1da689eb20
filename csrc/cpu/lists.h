// Sweeps over lists of tensors: what each parameter, its gradient, its anchor ... is in one pass, in pieces of fixed
// length, whatever the number of threads.
#pragma once

#include "cpu/simd.h"

namespace tlk {
namespace {

constexpr int64_t kPiece = 1 << 14;  // elements: enough to be worth a call, few enough to share among threads

// The pieces of all tensors, in order.
struct Pieces {
    const Lists& lists;
    int64_t length;
    Scratch<int64_t> begin;  // of each tensor's pieces
    explicit Pieces(const Lists& all, int64_t piece = kPiece) : lists(all), length(piece), begin(all.count + 1) {
        begin[0] = 0;
        for (int64_t i = 0; i < all.count; ++i) begin[i + 1] = begin[i] + ceil_div(all.numel[i], piece);
    }
    int64_t count() { return begin[lists.count]; }

    // f(piece, tensor, first element, elements) for the pieces [first, last)
    template <class F>
    void each(int64_t first, int64_t last, const F& f) {
        int64_t tensor = 0;
        for (int64_t step = int64_t(1) << 62; step > 0; step >>= 1)  // the last that begins at or before `first`
            if (tensor + step < lists.count && begin[tensor + step] <= first) tensor += step;
        for (int64_t piece = first; piece < last; ++piece) {
            while (begin[tensor + 1] <= piece) ++tensor;
            const int64_t at = (piece - begin[tensor]) * length;
            f(piece, tensor, at, min(length, lists.numel[tensor] - at));
        }
    }
    template <class F>
    void run(Parallel parallel, const F& f) {
        parallel_for(parallel, count(), ceil_div(kSmallWork / 2, length),
                     [&](int64_t first, int64_t last) { each(first, last, f); });
    }

    static constexpr int64_t kSmallWork = 1 << 16;  // elements below which a thread is not worth waking
};

}  // namespace
}  // namespace tlk
