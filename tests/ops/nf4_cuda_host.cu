// The arithmetic of csrc/cuda on the host, for test_nf4_cuda.py: the functions that the kernels are made of, called by
// loops instead of threads. Nothing here needs a GPU.
#include <vector>

#include "cuda/nf4_cut.h"
#include "cuda/nf4_device.cuh"

using namespace tlk::cuda;

namespace {

template <class T>
void dequantize(const uint8_t* packed, const float* absmax, int64_t numel, int64_t block_size, const float* code,
                T* out) {
    for (int64_t e = 0; e < numel; ++e) {
        out[e] = round_to<T>(mul_rn(code[nibble(packed[e / 2], static_cast<int>(e % 2))], absmax[e / block_size]));
    }
}

// One strip of 16 features by 8 rows as linear_mma_kernel computes it, warp instruction by warp instruction: every
// lane's fragments as the kernel loads them, multiplied by the layout that PTX states for mma.m16n8k16. Returns the
// unscaled sums of one group of 64.
template <class T>
void multiply_group(const uint8_t* packed, int64_t in_features, int64_t k, const float* code, const T* x, float* y) {
    std::vector<uint32_t> pairs(kPairTable);
    for (int i = 0; i < kPairTable; ++i) {
        const int byte = i / 32;
        pairs[i] = pair_of<T>(code[byte >> 4] * code_factor<T>(), code[byte & 15] * code_factor<T>());
    }
    const auto half = [](uint32_t pair, int which) {
        return to_float(__builtin_bit_cast(T, static_cast<uint16_t>(pair >> (16 * which))));
    };
    std::vector<double> sum(16 * 8);
    for (int step = 0; step < 4; ++step) {
        float a[16][16], b[16][8];  // [feature][k], [k][row]
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) {
                const int64_t feature = g + 8 * (i % 2);
                const uint8_t* const address = packed + ((feature * in_features + k) >> 1) + 8 * t;
                const int byte = 2 * step + i / 2;
                uint32_t word = 0;
                for (int j = 0; j < 4; ++j) word |= static_cast<uint32_t>(address[byte / 4 * 4 + j]) << (8 * j);
                const uint32_t offset = pair_offset(word, byte % 4, lane * 4);
                if (offset / 4 % 32 != static_cast<uint32_t>(lane)) return;  // not the lane's own bank: y stays NaN
                for (int odd = 0; odd < 2; ++odd) a[feature][2 * t + odd + 8 * (i / 2)] = half(pairs[offset / 4], odd);
            }
            for (int i = 0; i < 2; ++i) {
                for (int odd = 0; odd < 2; ++odd) {
                    b[2 * t + odd + 8 * i][g] = to_float(x[g * in_features + k + group_k(t, 2 * step + i, odd)]);
                }
            }
        }
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 8; ++n)
                for (int c = 0; c < 16; ++c) sum[m * 8 + n] += static_cast<double>(a[m][c]) * b[c][n];
    }
    for (int i = 0; i < 16 * 8; ++i) y[i] = static_cast<float>(sum[i] / code_factor<T>());
}

}  // namespace

extern "C" {

void host_nf4_quantize(const float* w, int64_t numel, int64_t block_size, const float* code, uint8_t* packed,
                       float* absmax) {
    float sorted[16];
    NibbleTable table{};
    for (int i = 0; i < 16; ++i) {
        sorted[rank_of(code, i)] = code[i];
        table.order[rank_of(code, i)] = static_cast<uint8_t>(i);
    }
    for (int i = 0; i < 15; ++i) table.midpoints[i] = midpoint(sorted[i], sorted[i + 1]);
    const NibbleLevels levels(table);
    for (int64_t begin = 0; begin < numel; begin += block_size) {
        const int64_t end = std::min(numel, begin + block_size);
        uint32_t largest = 0;
        for (int64_t e = begin; e < end; ++e) largest = std::max(largest, float_bits(w[e]) & 0x7fffffffu);
        absmax[begin / block_size] = float_of_bits(largest);
        const Normalizer normalize(float_of_bits(largest), begin + block_size > numel);
        for (int64_t e = begin; e < end + (end & 1); ++e) {
            const uint32_t q = levels.encode(table, e < end ? normalize(w[e]) : 0.0f);
            packed[e / 2] = static_cast<uint8_t>(e % 2 ? packed[e / 2] | q : q << 4);
        }
    }
}

void host_nf4_dequantize(const uint8_t* packed, const float* absmax, int64_t numel, int64_t block_size,
                         const float* code, int dtype, void* out) {
    switch (static_cast<Dtype>(dtype)) {
        case Dtype::float32:
            return dequantize(packed, absmax, numel, block_size, code, static_cast<float*>(out));
        case Dtype::bfloat16:
            return dequantize(packed, absmax, numel, block_size, code, static_cast<__nv_bfloat16*>(out));
        case Dtype::float16:
            return dequantize(packed, absmax, numel, block_size, code, static_cast<__half*>(out));
    }
}

void host_absmax_quantize(const float* absmax, int64_t n, int64_t block_size, float offset, uint8_t* q, float* scale) {
    float midpoints[255];
    for (int i = 0; i < 255; ++i) midpoints[i] = midpoint(dynamic_value(i), dynamic_value(i + 1));
    for (int64_t begin = 0; begin < n; begin += block_size) {
        const int64_t end = std::min(n, begin + block_size);
        uint32_t largest = 0;
        for (int64_t i = begin; i < end; ++i) largest = std::max(largest, float_bits(absmax[i] - offset) & 0x7fffffffu);
        scale[begin / block_size] = float_of_bits(largest);
        const Normalizer normalize(float_of_bits(largest), begin + block_size > n);
        for (int64_t i = begin; i < end; ++i) {
            q[i] = static_cast<uint8_t>(count_below<256>(normalize(absmax[i] - offset), midpoints));
        }
    }
}

void host_absmax_dequantize(const uint8_t* q, const float* scale, float offset, int64_t n, int64_t block_size,
                            float* absmax) {
    for (int64_t i = 0; i < n; ++i) absmax[i] = nested_scale(dynamic_value(q[i]), scale[i / block_size], offset);
}

void host_tables(float* nf4, float* dynamic) {
    for (int i = 0; i < 16; ++i) nf4[i] = nf4_value(i);
    for (int i = 0; i < 256; ++i) dynamic[i] = dynamic_value(i);
}

void host_multiply_group(const uint8_t* packed, int64_t in_features, int64_t k, const float* code, const void* x,
                         int dtype, float* y) {
    if (static_cast<Dtype>(dtype) == Dtype::bfloat16) {
        multiply_group(packed, in_features, k, code, static_cast<const __nv_bfloat16*>(x), y);
    } else {
        multiply_group(packed, in_features, k, code, static_cast<const __half*>(x), y);
    }
}

void host_linear_cut(int64_t rows, int64_t out_features, int64_t in_features, int multiprocessors, int64_t shared_bytes,
                     int64_t* cut) {
    const LinearPlan plan =
        nf4_linear_cut(rows, out_features, in_features, multiprocessors, static_cast<size_t>(shared_bytes));
    cut[0] = plan.tensor_cores;
    cut[1] = plan.k_warps_shift;
    cut[2] = plan.ctas;
    cut[3] = plan.splits;
    cut[4] = plan.split_k;
    cut[5] = static_cast<int64_t>(plan.shared_bytes);
    cut[6] = static_cast<int64_t>(plan.workspace_floats);
}

}  // extern "C"
