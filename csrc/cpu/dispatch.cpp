// Chooses the instruction-set level, once. Compiled with baseline flags only.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.h"
#include "nf4_tables.h"

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
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
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
        return {level.table,
                capped ? std::string("capped by TLKERNELS_CPU_ISA=") + cap : "the best this processor has"};
    }
    return {&kernels_scalar, "nothing better is supported"};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

const float* const dynamic_code = kDynamicCode.value;
const float* const nf4_code = kNf4Code.value;

const Kernels& kernels() { return *choice().table; }
const char* kernels_reason() { return choice().reason.c_str(); }

const Kernels* kernels_for(const char* level) {
    for (const Level& l : kLevels)
        if (std::strcmp(level, l.table->level) == 0 && l.supported()) return l.table;
    return nullptr;
}

}  // namespace tlk
