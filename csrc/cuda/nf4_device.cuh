// The arithmetic of the nf4 format, one element at a time, for host and device: tests compile this file for the host
// and compare it with NumPy, bit for bit.
//
// Roundings are named where they matter: a device compiler would otherwise contract table[q] * scale + offset into one
// fused multiply-add, which rounds once instead of twice.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "nf4_tables.h"

namespace tlk::cuda {

__host__ __device__ inline float mul_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

__host__ __device__ inline float add_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

__host__ __device__ inline float div_rn(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

__host__ __device__ inline uint32_t float_bits(float v) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(v);
#else
    return __builtin_bit_cast(uint32_t, v);
#endif
}

__host__ __device__ inline float float_of_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    return __builtin_bit_cast(float, bits);
#endif
}

// ---- tables ---------------------------------------------------------------------------------------------------------

// Device code cannot index a host constant, but may hold a copy of one.
__host__ __device__ inline float nf4_value(int i) {
    static constexpr Nf4Code table = kNf4Code;
    return table.value[i];
}

__host__ __device__ inline float dynamic_value(int i) {
    static constexpr DynamicCode table = kDynamicCode;
    return table.value[i];
}

// ---- encoding -------------------------------------------------------------------------------------------------------

// The place of code[i] among the 16 entries in ascending order: equal entries keep their order, NaN comes last.
__host__ __device__ inline int rank_of(const float* code, int i) {
    const auto less = [](float a, float b) { return a < b || (b != b && a == a); };
    int rank = 0;
    for (int j = 0; j < 16; ++j) rank += less(code[j], code[i]) || (j < i && !less(code[i], code[j]));
    return rank;
}

__host__ __device__ inline float midpoint(float a, float b) { return mul_rn(add_rn(a, b), 0.5f); }

// The number of midpoints m with NOT (v <= m), by bisection: the index of the nearest of kEntries ascending entries.
// NaN is above every midpoint.
template <int kEntries>
__host__ __device__ inline int count_below(float v, const float* midpoints) {
    int index = 0;
    for (int half = kEntries / 2; half > 0; half /= 2) {
        if (!(v <= midpoints[index + half - 1])) index += half;
    }
    return index;
}

// What encoding to 4 bits reads: the midpoints of the code in ascending order, and where each entry stood.
struct NibbleTable {
    float midpoints[15];
    uint8_t order[16];
};

// The part of it that is worth a thread's registers: the first two levels of the bisection.
struct NibbleLevels {
    float quarter, half, three_quarters;
    bool ascending;  // the code was in order

    __host__ __device__ explicit NibbleLevels(const NibbleTable& table)
        : quarter(table.midpoints[3]), half(table.midpoints[7]), three_quarters(table.midpoints[11]), ascending(true) {
        for (int i = 0; i < 16; ++i) ascending = ascending && table.order[i] == i;
    }

    __host__ __device__ uint32_t encode(const NibbleTable& table, float v) const {
        const bool upper = !(v <= half);
        const bool second = !(v <= (upper ? three_quarters : quarter));
        const int index = 8 * upper + 4 * second;
        const uint32_t rank = index + count_below<4>(v, table.midpoints + index);
        return ascending ? rank : table.order[rank];
    }
};

// One block's divisor. Below 1e-38 the reciprocal would overflow; NaN stays NaN.
struct Normalizer {
    float divisor;
    float reciprocal;
    bool short_block;  // the last block, when it is not full, divides; the others multiply by the reciprocal

    __host__ __device__ Normalizer(float absmax, bool short_block_)
        : divisor(absmax < 1e-38f ? 1e-38f : absmax), reciprocal(div_rn(1.0f, divisor)), short_block(short_block_) {}

    __host__ __device__ float operator()(float w) const {
        if (isinf(w)) return w > 0.0f ? 1.0f : -1.0f;
        return short_block ? div_rn(w, divisor) : mul_rn(w, reciprocal);
    }
};

// ---- decoding -------------------------------------------------------------------------------------------------------

// The 4-bit code of element j among those whose packed bytes fill `bits` from the lowest byte on.
__host__ __device__ inline uint32_t nibble(uint32_t bits, int j) { return bits >> (4 * (j ^ 1)) & 15u; }

// A double-quantized scale: two roundings.
__host__ __device__ inline float nested_scale(float table_value, float scale, float offset) {
    return add_rn(mul_rn(table_value, scale), offset);
}

__host__ __device__ inline float to_float(float v) { return v; }
__host__ __device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__host__ __device__ inline float to_float(__half v) { return __half2float(v); }

template <class T>
__host__ __device__ inline T round_to(float v) {
    if constexpr (sizeof(T) == 4) {
        return v;
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(v);
    } else {
        return __float2bfloat16_rn(v);
    }
}

// ---- the pair table of the tensor-core product ----------------------------------------------------------------------

// What the codes are multiplied by before they are rounded to 16 bits; the scales are divided by it. Found by search
// over [1, 2): with it NF4's 16 values, weighted as they occur in normal weights, lose 0.78e-3 instead of 1.36e-3 to
// bfloat16 and 0.80e-4 instead of 1.84e-4 to float16 (relative, root mean square).
template <class T>
__host__ __device__ constexpr float code_factor() {
    return std::is_same_v<T, __half> ? 1.3662f : 1.4367f;
}

// One packed byte indexes 256 pairs of 16-bit codes. Every lane has its own copy, one bank each, so that 32 different
// look-ups never meet: entry `byte` of lane `lane` lies at byte * 128 + lane * 4. This is the offset for byte
// `position` (0 to 3) of a packed word; `lane4` is lane * 4.
__host__ __device__ inline uint32_t pair_offset(uint32_t word, int position, uint32_t lane4) {
    const uint32_t shifted = position == 0 ? word << 7 : word >> (8 * position - 7);
    return (shifted & 0x7f80u) | lane4;
}

// The even element, in the high nibble, is the lower half of the pair.
template <class T>
__host__ __device__ inline uint32_t pair_of(float even, float odd) {
    const T a = round_to<T>(even), b = round_to<T>(odd);
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, __half>) {
        return __half_as_ushort(a) | static_cast<uint32_t>(__half_as_ushort(b)) << 16;
    } else {
        return __bfloat16_as_ushort(a) | static_cast<uint32_t>(__bfloat16_as_ushort(b)) << 16;
    }
#else
    return __builtin_bit_cast(uint16_t, a) | static_cast<uint32_t>(__builtin_bit_cast(uint16_t, b)) << 16;
#endif
}

// Which k of a group of 64 the element `odd` of byte `byte` (0 to 7) is that lane `t` of a quad holds: the 8 bytes of a
// lane are neighbours, and x is read in the same order, so that mma's own order of k does not matter.
__host__ __device__ inline int group_k(int t, int byte, int odd) { return 16 * t + 2 * byte + odd; }

}  // namespace tlk::cuda
