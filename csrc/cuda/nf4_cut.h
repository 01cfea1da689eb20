// How the tensor-core kernel of nf4_linear cuts a problem: its constants, and a plan that any machine can compute.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/nf4.h"

namespace tlk::cuda {

constexpr int kWarps = 16;  // a thread block of 512 threads: 128 registers each
constexpr int kStrip = 16;  // output features of a warp: the m of mma
constexpr int kGroup = 64;  // k that shares one scale; 16 k, 8 bytes of codes, a lane
constexpr int kGroups = 4;  // groups a batch: lane t of a quad fetches the scale of group t
constexpr int kBatch = kGroup * kGroups;
constexpr int kPairTable = 256 * 32;  // words: 32 KB
constexpr int kPadding = 8;           // elements between rows of x in shared memory: 16 bytes shift the banks
constexpr int kSumStride = 20;        // floats between rows of partial sums: 2 x 20 t mod 32 = 8 t, no conflicts

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The pair table, the dynamic table, the warps' partial sums, and x.
inline size_t linear_shared_bytes(int64_t rows, int64_t split_k) {
    const int64_t tiles = rows > 8 ? 2 : 1;
    return static_cast<size_t>(4 * (kPairTable + 256 + kWarps * tiles * 8 * kSumStride) +
                               2 * rows * (split_k + kPadding));
}

// The plan with the shortest longest thread block, in batches of one warp.
inline LinearPlan nf4_linear_cut(int64_t rows, int64_t out_features, int64_t in_features, int multiprocessors,
                                 size_t shared_bytes_available) {
    // A batch of a warp is the unit of time. A second kernel, for slices of k, costs about two.
    constexpr int64_t kSecondKernel = 2;
    const int64_t batches = ceil_div(in_features, kBatch), strips = ceil_div(out_features, kStrip);
    LinearPlan best{};
    int64_t best_cost = INT64_MAX;
    int64_t splits = 1;
    const auto fits = [&](int64_t per_split) {
        return linear_shared_bytes(rows, per_split * kBatch) <= shared_bytes_available;
    };
    while (splits < batches && !fits(ceil_div(batches, splits))) ++splits;
    for (int64_t tried = 0; tried < 8 && splits <= batches; ++tried, ++splits) {
        const int64_t per_split = ceil_div(batches, splits), used = ceil_div(batches, per_split);
        const int64_t ctas = std::max<int64_t>(1, multiprocessors / used);
        for (int shift = 4; shift >= 0; --shift) {
            const int64_t strip_sets = ceil_div(strips, kWarps >> shift);
            const int64_t cost =
                ceil_div(strip_sets, ctas) * ceil_div(per_split, int64_t{1} << shift) + (used > 1 ? kSecondKernel : 0);
            if (cost >= best_cost) continue;
            best_cost = cost;
            best.tensor_cores = true;
            best.k_warps_shift = shift;
            best.ctas = static_cast<int>(std::min(ctas, strip_sets));
            best.splits = static_cast<int>(used);
            best.split_k = per_split * kBatch;
            best.shared_bytes = linear_shared_bytes(rows, best.split_k);
            best.workspace_floats = used > 1 ? static_cast<size_t>(used * rows * out_features) : 0;
        }
    }
    return best;
}

}  // namespace tlk::cuda
