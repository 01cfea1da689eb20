// The Gram matrix of the tasks' gradients in one read, and their weighted sums in another: both at the speed of memory.
#include "cpu/level.h"
#include "cpu/lists.h"

namespace tlk {
namespace {

constexpr int kSide = 4;                   // tasks a tile of inner products has on each side
constexpr int64_t kRun = 128 * Vec::size;  // elements summed in float: of 8 tasks 64 KiB, between L1 and L2
constexpr int64_t kGroups = 64;            // shares of the work, whatever the number of threads

// out[a][b] = <x_a, y_b>
template <class In>
void tile_of_products(const In* const* x, const In* const* y, int64_t n, double (&out)[kSide][kSide]) {
    Vec sums[kSide][kSide];
    for (auto& row : sums)
        for (Vec& s : row) s = zero();
    int64_t i = 0;
    for (; i + Vec::size <= n; i += Vec::size) {
        Vec column[kSide];
        for (int b = 0; b < kSide; ++b) column[b] = load(y[b] + i);
        for (int a = 0; a < kSide; ++a) {
            const Vec v = load(x[a] + i);
            for (int b = 0; b < kSide; ++b) sums[a][b] = fma(v, column[b], sums[a][b]);
        }
    }
    for (int a = 0; a < kSide; ++a)
        for (int b = 0; b < kSide; ++b) {
            double total = double(sum(sums[a][b]));
            for (int64_t r = i; r < n; ++r) total += double(to_float(x[a][r])) * double(to_float(y[b][r]));
            out[a][b] = total;
        }
}

}  // namespace

void TLK_LEVEL::task_gram(const Lists& lists, int64_t tasks, const void* const* grads, double* gram,
                          Parallel parallel) {
    Pieces pieces(lists, kRun);
    const int64_t count = pieces.count(), groups = min(kGroups, count), square = tasks * tasks;
    clear(gram, square);
    Scratch<double> partial(groups * square);
    parallel_for(parallel, groups, ceil_div(Pieces::kSmallWork * groups, count * kRun * tasks + 1),
                 [&](int64_t first, int64_t last) {
                     Scratch<const void*> rows(tasks);
                     Scratch<int64_t> who(tasks);
                     for (int64_t group = first; group < last; ++group) {
                         double* part = partial + group * square;
                         clear(part, square);
                         const auto piece = [&](int64_t, int64_t tensor, int64_t at, int64_t n) {
                             int64_t used = 0;
                             for (int64_t t = 0; t < tasks; ++t) {
                                 rows[used] = grads[t * lists.count + tensor];
                                 who[used] = t;
                                 used += rows[used] != nullptr;
                             }
                             by_dtype(lists.dtypes[tensor], [&]<class In>(In) {
                                 for (int64_t a = 0; a < used; a += kSide)
                                     for (int64_t b = 0; b <= a; b += kSide) {
                                         const In *x[kSide], *y[kSide];
                                         for (int64_t k = 0; k < kSide; ++k) {  // the last again, where there are fewer
                                             x[k] = typed<In>(rows[min(a + k, used - 1)]) + at;
                                             y[k] = typed<In>(rows[min(b + k, used - 1)]) + at;
                                         }
                                         double out[kSide][kSide];
                                         tile_of_products(x, y, n, out);
                                         for (int64_t i = a; i < min(a + kSide, used); ++i)
                                             for (int64_t j = b; j < min(b + kSide, i + 1); ++j)
                                                 part[who[i] * tasks + who[j]] += out[i - a][j - b];
                                     }
                             });
                         };
                         pieces.each(count * group / groups, count * (group + 1) / groups, piece);
                     }
                 });
    for (int64_t group = 0; group < groups; ++group)
        for (int64_t i = 0; i < tasks; ++i)
            for (int64_t j = 0; j <= i; ++j) gram[i * tasks + j] += partial[group * square + i * tasks + j];
    for (int64_t i = 0; i < tasks; ++i)
        for (int64_t j = 0; j < i; ++j) gram[j * tasks + i] = gram[i * tasks + j];
}

void TLK_LEVEL::task_combine(const Lists& lists, int64_t tasks, int64_t results, const void* const* grads,
                             const float* weights, bool accumulate, void* const* out, Parallel parallel) {
    Pieces pieces(lists, results == 1 ? kPiece : kRun);
    pieces.run(parallel, [&](int64_t, int64_t tensor, int64_t at, int64_t n) {
        by_dtype(lists.dtypes[tensor], [&]<class In>(In) {
            for (int64_t r = 0; r < results; ++r) {
                In* to = static_cast<In*>(out[r * lists.count + tensor]) + at;
                const float* w = weights + r * tasks;
                constexpr int unroll = 2;
                int64_t i = 0;
                for (; i + unroll * Vec::size <= n; i += unroll * Vec::size) {
                    Vec sums[unroll];
                    for (int v = 0; v < unroll; ++v) sums[v] = accumulate ? load(to + i + v * Vec::size) : zero();
                    for (int64_t t = 0; t < tasks; ++t) {
                        const void* row = grads[t * lists.count + tensor];
                        if (row == nullptr) continue;
                        const Vec factor = splat(w[t]);
                        for (int v = 0; v < unroll; ++v)
                            sums[v] = fma(load(typed<In>(row) + at + i + v * Vec::size), factor, sums[v]);
                    }
                    for (int v = 0; v < unroll; ++v) store(to + i + v * Vec::size, sums[v]);
                }
                for (; i < n; ++i) {
                    float total = accumulate ? to_float(to[i]) : 0.f;
                    for (int64_t t = 0; t < tasks; ++t) {
                        const void* row = grads[t * lists.count + tensor];
                        if (row != nullptr) total += to_float(typed<In>(row)[at + i]) * w[t];
                    }
                    convert(total, to[i]);
                }
            }
        });
    });
}

}  // namespace tlk
