// Chooses the instruction-set level, once. Compiled with baseline flags only.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace tlk {

#define TLK_LEVEL(name) extern const Kernels kernels_##name;
TLK_LEVEL(scalar)
#if defined(TLK_X86)
TLK_LEVEL(avx2)
TLK_LEVEL(avx512)
TLK_LEVEL(avx512_bf16)
#endif
#undef TLK_LEVEL

namespace {

struct Level {
    const Kernels* table;
    bool (*supported)();
};

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
const Level kLevels[] = {
#if defined(TLK_X86)
    {&kernels_avx512_bf16,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
    {&kernels_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
    {&kernels_avx2,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
     }},
#endif
    {&kernels_scalar, [] { return true; }},
};

struct Choice {
    const Kernels* table;
    std::string reason;
};

Choice choose() {
    const char* cap = std::getenv("TLKERNELS_CPU_ISA");
    const bool capped = cap != nullptr && *cap != '\0';
    bool known = !capped;
    for (const Level& level : kLevels) known = known || std::strcmp(cap, level.table->level) == 0;
    bool below_cap = !capped || !known;
    for (const Level& level : kLevels) {
        below_cap = below_cap || std::strcmp(cap, level.table->level) == 0;
        if (!below_cap || !level.supported()) continue;
        if (!known) {
            return {level.table, std::string("the best this processor has (TLKERNELS_CPU_ISA=") + cap +
                                     " is not a level of this build and was ignored)"};
        }
        return {level.table, capped ? std::string("capped by TLKERNELS_CPU_ISA=") + cap : "the best this processor has"};
    }
    return {&kernels_scalar, "nothing better is supported"};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

struct DynamicCode {
    float value[256];
};

// Decade i (0..6) holds the centres of 2^i equal parts of [0.1, 1], times 10^(i-6), with both signs; and 0 and 1.
// Each half of the edges counts from its own end, one rounding an edge: the bits that torch.linspace gives.
constexpr DynamicCode make_dynamic_code() {
    constexpr float decade[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.f};
    DynamicCode table{};
    int at = 128;  // 127 negative values and 0 lie below
    table.value[127] = 0.f;
    for (int i = 0; i < 7; ++i) {
        const int steps = 1 << i;
        const float step = (1.f - 0.1f) / float(steps);
        float edges[65]{};
        for (int j = 0; j <= steps; ++j) {
            const double up = double(0.1f) + double(step) * j, down = 1.0 - double(step) * (steps - j);
            edges[j] = float(j < (steps + 1) / 2 ? up : down);
        }
        for (int j = 0; j < steps; ++j, ++at) {
            table.value[at] = (edges[j] + edges[j + 1]) / 2.f * decade[i];
            table.value[254 - at] = -table.value[at];
        }
    }
    table.value[255] = 1.f;
    return table;
}

constexpr DynamicCode kDynamic = make_dynamic_code();

}  // namespace

const float* const dynamic_code = kDynamic.value;

const float nf4_code[16] = {-1.f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.f};

const Kernels& kernels() { return *choice().table; }
const char* kernels_reason() { return choice().reason.c_str(); }

const Kernels* kernels_for(const char* level) {
    for (const Level& l : kLevels)
        if (std::strcmp(level, l.table->level) == 0 && l.supported()) return l.table;
    return nullptr;
}

}  // namespace tlk
