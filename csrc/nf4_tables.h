// The number tables of the NF4 format, for every compiled backend. Plain C++: the CPU kernels and nvcc both include it.
#pragma once

namespace tlk {

// The 16 NF4 values (Dettmers 2023), ascending.
struct Nf4Code {
    float value[16];
};
constexpr Nf4Code kNf4Code{{-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
                            -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
                            0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
                            0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f}};

struct DynamicCode {
    float value[256];
};

// The signed 8-bit "dynamic" table (Dettmers 2022), ascending. Decade i (0..6) holds the centres of 2^i equal parts of
// [0.1, 1], times 10^(i-6), with both signs; and 0 and 1. Each half of the edges counts from its own end, one rounding
// an edge: the bits that torch.linspace gives.
constexpr DynamicCode make_dynamic_code() {
    constexpr float decade[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
    DynamicCode table{};
    int at = 128;  // 127 negative values and 0 lie below
    table.value[127] = 0.0f;
    for (int i = 0; i < 7; ++i) {
        const int steps = 1 << i;
        const float step = (1.0f - 0.1f) / static_cast<float>(steps);
        float edges[65]{};
        for (int j = 0; j <= steps; ++j) {
            const double up = static_cast<double>(0.1f) + static_cast<double>(step) * j;
            const double down = 1.0 - static_cast<double>(step) * (steps - j);
            edges[j] = static_cast<float>(j < (steps + 1) / 2 ? up : down);
        }
        for (int j = 0; j < steps; ++j, ++at) {
            table.value[at] = (edges[j] + edges[j + 1]) / 2.0f * decade[i];
            table.value[254 - at] = -table.value[at];
        }
    }
    table.value[255] = 1.0f;
    return table;
}

constexpr DynamicCode kDynamicCode = make_dynamic_code();

}  // namespace tlk
