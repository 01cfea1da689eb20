// The machine's ceilings, measured by loops as simple as they can be: what a kernel's rate is a fraction of.
//
//   read   every 64-byte line loaded once, summed into independent accumulators; bytes = bytes read
//   copy   one load and one store (or streaming store) a vector; bytes read + bytes written
//   fma    independent chains of fused multiply-adds in registers: enough to hide their latency on two pipes
//   dot    the same with bfloat16 pair products
#include "cpu/level.h"
#include "cpu/simd.h"

namespace tlk {
namespace {

#if defined(__AVX512F__)
constexpr int kChains = 16;
#else
constexpr int kChains = 12;  // with the two operands they must fit in 16 registers
#endif

}  // namespace

void TLK_LEVEL::roofline_read(const void* data, size_t bytes, int64_t repeats, float* sink) {
    const auto* p = static_cast<const float*>(data);
    const int64_t n = int64_t(bytes / sizeof(float)), step = 8 * Vec::size;
    Vec acc[8] = {};
    for (int64_t r = 0; r < repeats; ++r)
        for (int64_t i = 0; i + step <= n; i += step)
            for (int v = 0; v < 8; ++v) acc[v] = acc[v] + load(p + i + v * Vec::size);
    for (int v = 1; v < 8; ++v) acc[0] = acc[0] + acc[v];
    *sink = sum(acc[0]);
}

void TLK_LEVEL::roofline_copy(void* out, const void* data, size_t bytes, int64_t repeats,
                              [[maybe_unused]] bool streaming) {
    const auto* p = static_cast<const float*>(data);
    auto* q = static_cast<float*>(out);
    const int64_t n = int64_t(bytes / sizeof(float)) / Vec::size * Vec::size;
    for (int64_t r = 0; r < repeats; ++r) {
#if defined(__AVX512F__)
        if (streaming && reinterpret_cast<uintptr_t>(out) % 64 == 0) {
            for (int64_t i = 0; i < n; i += Vec::size) _mm512_stream_ps(q + i, _mm512_loadu_ps(p + i));
            _mm_sfence();
            continue;
        }
#elif defined(__AVX2__)
        if (streaming && reinterpret_cast<uintptr_t>(out) % 32 == 0) {
            for (int64_t i = 0; i < n; i += Vec::size) _mm256_stream_ps(q + i, _mm256_loadu_ps(p + i));
            _mm_sfence();
            continue;
        }
#endif
        for (int64_t i = 0; i < n; i += Vec::size) store(q + i, load(p + i));
        asm volatile("" ::: "memory");  // each repeat really writes
    }
}

double TLK_LEVEL::roofline_fma_fp32(int64_t repeats, float* sink) {
    Vec acc[kChains];
    for (int c = 0; c < kChains; ++c) acc[c] = splat(float(c));
    const Vec a = splat(0.999f), b = splat(0.001f);
    for (int64_t r = 0; r < repeats; ++r)
        for (int c = 0; c < kChains; ++c) acc[c] = fma(acc[c], a, b);
    for (int c = 1; c < kChains; ++c) acc[0] = acc[0] + acc[c];
    *sink = sum(acc[0]);
    return 2.0 * kChains * Vec::size * double(repeats);
}

double TLK_LEVEL::roofline_dot_bf16(int64_t repeats, float* sink) {
#if defined(__AVX512BF16__)
    __m512 acc[kChains];
    for (int c = 0; c < kChains; ++c) acc[c] = _mm512_set1_ps(float(c));
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f003f00), b = (__m512bh)_mm512_set1_epi32(0x3a003a00);
    for (int64_t r = 0; r < repeats; ++r)
        for (int c = 0; c < kChains; ++c) acc[c] = _mm512_dpbf16_ps(acc[c], a, b);
    for (int c = 1; c < kChains; ++c) acc[0] = _mm512_add_ps(acc[0], acc[c]);
    *sink = _mm512_reduce_add_ps(acc[0]);
    return 4.0 * kChains * 16 * double(repeats);
#else
    (void)repeats;
    *sink = 0.f;
    return 0.0;
#endif
}

}  // namespace tlk
