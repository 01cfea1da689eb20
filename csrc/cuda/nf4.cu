// The nf4 family on CUDA devices: quantize, dequantize, embedding, double quantization, and the linear layer for few
// rows. Not yet measured on a GPU: the floors below are bytes over the 4.8 TB/s of an H200's data sheet (a copy reaches
// about 4.3). No float atomics, sums in a fixed order: the same device gives the same bits every time. All indices
// are 64-bit.
//
// Quantize. Reads w once (4 or 2 bytes), writes 0.5 byte and 4 / block_size: for bfloat16 and blocks of 64, 2.56 bytes
// an element, floor 0.53 ns per 1000, 31 us for 14336 x 4096. A thread holds 8 neighbours in registers (one or two
// 16-byte loads, one 4-byte store); the block's absmax is a maximum over the lanes that share it, taken on the *bits*
// of |w|, whose integer order puts NaN above infinity, so NaN propagates. Blocks above 256 elements belong to one warp,
// which reads them twice, the second time from L1 or L2. The code is a bisection over 15 midpoints: two levels
// from registers, two from shared memory (16 words: no bank conflict). About 12 instructions an element, near the issue
// rate: expect 80 % of the floor rather than 95.
//
// Dequantize. Reads 0.5 byte and 4 / block_size (nested: 1 / block_size), writes 2 or 4 bytes: the same 2.56 bytes, 31
// us. A thread makes 16 bytes of output from 4 (or, for float32, 2) bytes of codes, so that a warp's loads and stores
// are both contiguous; four such pieces are loaded before the first is used. One conflict-free shared look-up, one
// multiply and half a conversion an element: 7 elements a cycle and multiprocessor are needed, 20 or so possible.
// Nested scales are decoded where they are read. Embedding is the same, row by row.
//
// Linear, up to 16 rows, 16-bit x. Bytes: 0.5 a weight, plus scales: 33 MB for 14336 x 4096 with blocks of 64,
// floor 6.9 us (30 MB and 6.3 us nested). To stay near it a multiprocessor must take 30 weights a cycle, 4 issue
// slots each, so:
// - decode by byte: one shared look-up gives two codes as a 16-bit pair, ready as an mma operand. The table
//   (256 pairs) is there 32 times, once per bank: no conflicts. Shift, mask, look-up: 1.5 instructions a weight.
// - the products run on the tensor cores (mma.sync m16n8k16, float32 sums): 16 features x 16 k by 8 rows of x, two of
//   these for 9 to 16 rows. Rows that are not there cost nothing that is scarce.
// - the codes stay unscaled (the table is rounded to x's dtype: relative error 0.8e-3 in bfloat16, 0.8e-4 in float16);
//   the float32 scale multiplies the sum of each group of 64. A group never crosses a block: in_features is a multiple
//   of 64, blocks are too.
// - one persistent thread block of 16 warps a multiprocessor. x lies in shared memory, converted by nobody: it is
//   copied while the first codes are on their way. A warp owns a strip of 16 features and every (1 << k_warps_shift)th
//   batch of 256 k; a lane holds the codes of two batches in registers (128 bytes) and fetches a group's successor as
//   soon as it has used it, so 60 KB a multiprocessor are in flight (4.8 TB/s times 0.8 us of latency need 29).
// - the warps of a strip add their sums through shared memory, in order. When x does not fit, or strips are few, k is
//   cut between thread blocks too, and a second kernel adds the slices.
// - a scale that is infinite or NaN multiplies the codes instead, so that 0 * inf is NaN as in the dense product.
// Sums within a block are taken before its scale: |x| above 5e36 can overflow there where the dense product would not.
//
// Linear, everything else (float32 x, rows that do not begin on a multiple of 64, blocks of 32, odd pointers): decode
// to float32 exactly as dequantize does, float32 FMA. A thread block owns 4 features and cuts k between 256 threads;
// x comes through L1. With 4 rows of x in registers a weight costs 1.5 + rows instructions.
#include <algorithm>

#include "cuda/nf4.h"
#include "cuda/nf4_cut.h"
#include "cuda/nf4_device.cuh"

namespace tlk::cuda {
namespace {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int kThreads = 256;    // thread block of the streaming kernels
constexpr int kBlocksPerSm = 8;  // 8 x 256 threads fill a multiprocessor of 2048
constexpr int kChunk = 8;        // elements a thread quantizes or multiplies at a time: 16 bytes of 16-bit values
constexpr int kWarpTile = 32 * kChunk;

// ---- pieces shared by the kernels -----------------------------------------------------------------------------------

template <class T>
bool aligned_to(const void* p) {
    return reinterpret_cast<uintptr_t>(p) % sizeof(T) == 0;
}

int multiprocessors() {
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// A grid for `work` thread blocks' worth of work: no more than fill the device; the kernels loop over the rest.
int persistent_grid(int64_t work) {
    return static_cast<int>(std::clamp<int64_t>(work, 1, static_cast<int64_t>(multiprocessors()) * kBlocksPerSm));
}

// The tables that decoding reads, in shared memory.
struct DecodeTables {
    float code[16];
    float dynamic[256];  // filled when the scales are nested

    __device__ void fill(const Nf4& w) {
        if (threadIdx.x < 16) code[threadIdx.x] = w.code ? w.code[threadIdx.x] : nf4_value(threadIdx.x);
        if (w.absmax_q) {
            for (int i = threadIdx.x; i < 256; i += blockDim.x) dynamic[i] = dynamic_value(i);
        }
        __syncthreads();
    }
};

__device__ float block_scale(const Nf4& w, const float* dynamic, int64_t block) {
    if (w.absmax) return __ldg(w.absmax + block);
    return nested_scale(dynamic[__ldg(w.absmax_q + block)], __ldg(w.absmax_scale + (block >> w.absmax_block_shift)),
                        __ldg(w.absmax_offset));
}

// Element `e` of the flat tensor, wherever it lies.
__device__ float decode_element(const Nf4& w, const DecodeTables& tables, int64_t e) {
    const uint32_t byte = __ldg(w.packed + (e >> 1));
    return mul_rn(tables.code[nibble(byte, static_cast<int>(e & 1))],
                  block_scale(w, tables.dynamic, e >> w.block_shift));
}

// The packed bytes of kElements elements, lowest first; `p` is aligned to as many bytes.
template <int kElements>
__device__ uint32_t load_codes(const uint8_t* p) {
    if constexpr (kElements == 8) {
        return __ldg(reinterpret_cast<const uint32_t*>(p));
    } else {
        static_assert(kElements == 4);
        return __ldg(reinterpret_cast<const uint16_t*>(p));
    }
}

// 16 bytes of output.
__device__ void store_chunk(float* out, const float (&v)[4]) {
    *reinterpret_cast<float4*>(out) = make_float4(v[0], v[1], v[2], v[3]);
}

template <class T>
__device__ void store_chunk(T* out, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(out) =
        make_uint4(pair_of<T>(v[0], v[1]), pair_of<T>(v[2], v[3]), pair_of<T>(v[4], v[5]), pair_of<T>(v[6], v[7]));
}

// 8 elements as float from an address aligned to 16 bytes.
__device__ void load_chunk(const float* p, float (&v)[kChunk]) {
    const float4 a = __ldg(reinterpret_cast<const float4*>(p)), b = __ldg(reinterpret_cast<const float4*>(p) + 1);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ float2 widen_pair(__nv_bfloat162 p) { return __bfloat1622float2(p); }
__device__ float2 widen_pair(__half2 p) { return __half22float2(p); }

template <class T>
__device__ void load_chunk(const T* p, float (&v)[kChunk]) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const uint4 raw = __ldg(reinterpret_cast<const uint4*>(p));
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 pair = widen_pair(*reinterpret_cast<const Pair*>(&words[i]));
        v[2 * i] = pair.x;
        v[2 * i + 1] = pair.y;
    }
}

__device__ float load_float(const void* p, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::float32:
            return static_cast<const float*>(p)[i];
        case Dtype::bfloat16:
            return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
        default:
            return to_float(static_cast<const __half*>(p)[i]);
    }
}

// Calls f with a null pointer of the element type.
template <class F>
cudaError_t with_type(Dtype dtype, F f) {
    switch (dtype) {
        case Dtype::float32:
            f(static_cast<float*>(nullptr));
            break;
        case Dtype::bfloat16:
            f(static_cast<__nv_bfloat16*>(nullptr));
            break;
        case Dtype::float16:
            f(static_cast<__half*>(nullptr));
            break;
    }
    return cudaGetLastError();
}

// ---- quantize -------------------------------------------------------------------------------------------------------

// Where a thread's 8 values come from: a tensor, or scales minus their offset.
template <class T>
struct TensorSource {
    const T* data;
    bool vector;  // data is aligned to 16 bytes

    __device__ void load(int64_t e, int64_t numel, float (&v)[kChunk]) const {
        if (vector && e + kChunk <= numel) {
            load_chunk(data + e, v);
        } else {
#pragma unroll
            for (int i = 0; i < kChunk; ++i) v[i] = e + i < numel ? to_float(data[e + i]) : 0.0f;
        }
    }
};

struct AbsmaxSource {
    const float* absmax;
    const float* offset;

    __device__ void load(int64_t e, int64_t numel, float (&v)[kChunk]) const {
        const float o = __ldg(offset);
#pragma unroll
        for (int i = 0; i < kChunk; ++i) v[i] = e + i < numel ? __fsub_rn(__ldg(absmax + e + i), o) : 0.0f;
    }
};

// Where its 8 codes go. `begin` fills shared memory and returns what a thread keeps in registers.
struct NibbleTarget {
    uint8_t* packed;
    const float* code;

    struct Shared {
        float code[16], sorted[16];
        NibbleTable table;
    };

    __device__ NibbleLevels begin(Shared& s) const {
        const int i = threadIdx.x;
        if (i < 16) s.code[i] = code ? code[i] : nf4_value(i);
        __syncthreads();
        if (i < 16) {
            const int rank = rank_of(s.code, i);
            s.sorted[rank] = s.code[i];
            s.table.order[rank] = static_cast<uint8_t>(i);
        }
        __syncthreads();
        if (i < 15) s.table.midpoints[i] = midpoint(s.sorted[i], s.sorted[i + 1]);
        __syncthreads();
        return NibbleLevels(s.table);
    }

    // An odd tensor's last byte has a spare nibble: v is 0 there.
    __device__ void store(const Shared& s, const NibbleLevels& levels, int64_t e, int64_t numel,
                          const float (&v)[kChunk]) const {
        uint32_t word = 0;
#pragma unroll
        for (int i = 0; i < kChunk; ++i) word |= levels.encode(s.table, v[i]) << (4 * (i ^ 1));
        if (e + kChunk <= numel) {
            *reinterpret_cast<uint32_t*>(packed + e / 2) = word;
        } else {
            for (int i = 0; e + i < numel; i += 2) packed[(e + i) / 2] = static_cast<uint8_t>(word >> (4 * i));
        }
    }
};

struct ByteTarget {
    uint8_t* q;

    struct Shared {
        float code[256], midpoints[255];
    };
    struct Nothing {};

    __device__ Nothing begin(Shared& s) const {
        const int i = threadIdx.x;
        static_assert(kThreads == 256);
        s.code[i] = dynamic_value(i);
        __syncthreads();
        if (i < 255) s.midpoints[i] = midpoint(s.code[i], s.code[i + 1]);
        __syncthreads();
        return {};
    }

    __device__ void store(const Shared& s, Nothing, int64_t e, int64_t numel, const float (&v)[kChunk]) const {
        uint32_t word[2] = {};
#pragma unroll
        for (int i = 0; i < kChunk; ++i) word[i / 4] |= count_below<256>(v[i], s.midpoints) << (8 * (i % 4));
        if (e + kChunk <= numel) {
            *reinterpret_cast<uint2*>(q + e) = make_uint2(word[0], word[1]);
        } else {
            for (int i = 0; e + i < numel; ++i) q[e + i] = static_cast<uint8_t>(word[i / 4] >> (8 * (i % 4)));
        }
    }
};

// A unit of work is a warp's: one block, or as many as make 256 elements.
template <class Source, class Target>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(Source source, Target target, float* __restrict__ absmax, int64_t numel, int block_shift) {
    __shared__ typename Target::Shared shared;
    const auto registers = target.begin(shared);

    const int64_t block_size = int64_t{1} << block_shift;
    const int64_t unit = block_size > kWarpTile ? block_size : kWarpTile;
    const int sharing = block_size < kWarpTile ? static_cast<int>(block_size) / kChunk : 32;  // lanes with one absmax
    const int lane = threadIdx.x % 32;
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;

    for (int64_t start = warp * unit; start < numel; start += warps * unit) {
        const int64_t first = start + lane * kChunk;
        float v[kChunk];
        uint32_t largest = 0;  // of the bits of |w|
        for (int64_t tile = 0; tile < unit; tile += kWarpTile) {
            source.load(first + tile, numel, v);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) largest = max(largest, float_bits(v[i]) & 0x7fffffffu);
        }
        for (int step = sharing / 2; step > 0; step /= 2) {
            largest = max(largest, __shfl_xor_sync(kFullWarp, largest, step));
        }
        const int64_t block = first >> block_shift;
        if (lane % sharing == 0 && first < numel) absmax[block] = float_of_bits(largest);
        const Normalizer normalize(float_of_bits(largest), (block + 1) << block_shift > numel);
        for (int64_t tile = 0; tile < unit; tile += kWarpTile) {
            const int64_t e = first + tile;
            if (unit > kWarpTile) source.load(e, numel, v);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) v[i] = e + i < numel ? normalize(v[i]) : 0.0f;
            if (e < numel) target.store(shared, registers, e, numel, v);
        }
    }
}

// ---- double quantization of the scales ------------------------------------------------------------------------------

// The sum of one double per thread, in a fixed order; the result is thread 0's.
__device__ double sum_over_block(double v) {
    __shared__ double part[kThreads];
    part[threadIdx.x] = v;
    for (int half = kThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    return part[0];
}

// The cut, kMeanPartials thread blocks, does not depend on the device.
__global__ void __launch_bounds__(kThreads)
    partial_sums_kernel(const float* __restrict__ absmax, int64_t n, double* __restrict__ partials) {
    double sum = 0.0;
    const int64_t stride = static_cast<int64_t>(kMeanPartials) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) sum += absmax[i];
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    mean_kernel(const double* __restrict__ partials, int64_t n, float* __restrict__ mean) {
    static_assert(kMeanPartials == kThreads);
    const double sum = sum_over_block(partials[threadIdx.x]);
    if (threadIdx.x == 0) *mean = static_cast<float>(sum / static_cast<double>(n));
}

__global__ void __launch_bounds__(kThreads)
    absmax_dequantize_kernel(const uint8_t* __restrict__ q, const float* __restrict__ scale,
                             const float* __restrict__ offset, int64_t n, int block_shift, float* __restrict__ absmax) {
    __shared__ float table[256];
    static_assert(kThreads == 256);
    table[threadIdx.x] = dynamic_value(threadIdx.x);
    __syncthreads();
    const float o = __ldg(offset);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        absmax[i] = nested_scale(table[q[i]], __ldg(scale + (i >> block_shift)), o);
    }
}

// ---- dequantize and embedding ---------------------------------------------------------------------------------------

constexpr int kPieces = 4;  // independent loads in flight a thread

// kVector: `out` is aligned to 16 bytes and the codes of a chunk to as many bytes as they fill.
template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Nf4 w, T* __restrict__ out) {
    __shared__ DecodeTables tables;
    tables.fill(w);

    constexpr int kElements = kVector ? 16 / sizeof(T) : 1;
    const int64_t chunks = w.numel / kElements;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kPieces;
    for (int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads * kPieces + threadIdx.x; start < chunks;
         start += stride) {
        if constexpr (kVector) {
            uint32_t codes[kPieces] = {};
            float scale[kPieces] = {};
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                const int64_t chunk = start + p * kThreads;
                if (chunk < chunks) codes[p] = load_codes<kElements>(w.packed + chunk * (kElements / 2));
            }
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                const int64_t chunk = start + p * kThreads;
                if (chunk < chunks) scale[p] = block_scale(w, tables.dynamic, chunk * kElements >> w.block_shift);
            }
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
                const int64_t chunk = start + p * kThreads;
                if (chunk >= chunks) break;
                float v[kElements];
#pragma unroll
                for (int i = 0; i < kElements; ++i) v[i] = mul_rn(tables.code[nibble(codes[p], i)], scale[p]);
                store_chunk(out + chunk * kElements, v);
            }
        } else {
            for (int p = 0; p < kPieces; ++p) {
                const int64_t e = start + p * kThreads;
                if (e < chunks) out[e] = round_to<T>(decode_element(w, tables, e));
            }
        }
    }
    const int64_t tail = chunks * kElements + threadIdx.x;
    if (blockIdx.x == 0 && tail < w.numel) out[tail] = round_to<T>(decode_element(w, tables, tail));
}

// A thread block works on kThreads >> row_shift rows at a time, 1 << row_shift threads a row. kVector: as above, and
// rows are whole chunks.
template <class T, class Index, bool kVector>
__global__ void __launch_bounds__(kThreads)
    embedding_kernel(const Index* __restrict__ indices, int64_t n, Nf4 w, int64_t num_embeddings, int64_t embedding_dim,
                     int row_shift, T* __restrict__ out) {
    __shared__ DecodeTables tables;
    tables.fill(w);

    constexpr int kElements = kVector ? 16 / sizeof(T) : 1;
    const int64_t chunks = embedding_dim / kElements;
    const int64_t rows = kThreads >> row_shift, across = int64_t{1} << row_shift;
    for (int64_t i = blockIdx.x * rows + (threadIdx.x >> row_shift); i < n; i += gridDim.x * rows) {
        const int64_t row = indices[i];
        const bool inside = row >= 0 && row < num_embeddings;
        for (int64_t c = blockIdx.y * across + (threadIdx.x & (across - 1)); c < chunks; c += gridDim.y * across) {
            T* const target = out + i * embedding_dim + c * kElements;
            const int64_t e = row * embedding_dim + c * kElements;
            if constexpr (kVector) {
                float v[kElements];
                const uint32_t codes = inside ? load_codes<kElements>(w.packed + e / 2) : 0;
                const float scale = inside ? block_scale(w, tables.dynamic, e >> w.block_shift) : NAN;
#pragma unroll
                for (int j = 0; j < kElements; ++j) v[j] = mul_rn(tables.code[nibble(codes, j)], scale);
                store_chunk(target, v);
            } else {
                *target = round_to<T>(inside ? decode_element(w, tables, e) : NAN);
            }
        }
    }
}

// ---- linear for few rows: float32 FMA -------------------------------------------------------------------------------

constexpr int kFeatures = 4;  // output features a thread block: each x that is read is used four times

// kVector: rows of W and x are whole chunks of 8, x is aligned to 16 bytes and the codes to 4.
template <class T, int kRows, bool kVector>
__global__ void __launch_bounds__(kThreads)
    linear_fma_kernel(const T* __restrict__ x, Nf4 w, Bias bias, int64_t rows, int64_t out_features,
                      int64_t in_features, T* __restrict__ y) {
    __shared__ DecodeTables tables;
    __shared__ float part[kThreads / 32][kFeatures][kRows];
    tables.fill(w);

    const int64_t feature0 = static_cast<int64_t>(blockIdx.x) * kFeatures;
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows;
    float sum[kFeatures][kRows] = {};
    for (int64_t k = static_cast<int64_t>(threadIdx.x) * kChunk; k < in_features; k += kThreads * kChunk) {
        float xs[kRows][kChunk];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const T* const source = x + (row0 + r) * in_features + k;
            const bool there = row0 + r < rows;
            if (kVector && there) {
                load_chunk(source, xs[r]);
            } else {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) xs[r][i] = there && k + i < in_features ? to_float(source[i]) : 0.0f;
            }
        }
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) {
            if (feature0 + f >= out_features) break;
            const int64_t e = (feature0 + f) * in_features + k;
            float v[kChunk];
            if constexpr (kVector) {
                const uint32_t codes = load_codes<kChunk>(w.packed + e / 2);
                const float scale = block_scale(w, tables.dynamic, e >> w.block_shift);
#pragma unroll
                for (int i = 0; i < kChunk; ++i) v[i] = mul_rn(tables.code[nibble(codes, i)], scale);
            } else {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) v[i] = k + i < in_features ? decode_element(w, tables, e + i) : 0.0f;
            }
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int i = 0; i < kChunk; ++i) sum[f][r] = fmaf(v[i], xs[r][i], sum[f][r]);
            }
        }
    }
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float s = sum[f][r];
            for (int step = 16; step > 0; step /= 2) s += __shfl_xor_sync(kFullWarp, s, step);
            if (threadIdx.x % 32 == 0) part[threadIdx.x / 32][f][r] = s;
        }
    }
    __syncthreads();
    const int f = threadIdx.x % kFeatures, r = threadIdx.x / kFeatures;
    if (r < kRows && row0 + r < rows && feature0 + f < out_features) {
        float s = 0.0f;
        for (int warp = 0; warp < kThreads / 32; ++warp) s += part[warp][f][r];
        if (bias.data) s += load_float(bias.data, bias.dtype, feature0 + f);
        y[(row0 + r) * out_features + feature0 + f] = round_to<T>(s);
    }
}

// ---- linear for few rows: tensor cores ------------------------------------------------------------------------------

template <class T>
struct LinearArguments {
    const T* x;
    Nf4 w;
    Bias bias;
    T* y;
    float* partial;  // [splits, rows, out_features] when k is cut between thread blocks, else null
    int64_t out_features, in_features, split_k;
    int rows, k_warps_shift;
};

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __nv_bfloat16*) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const __half*) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Both halves of a pair times a scale that is infinite or NaN, or times 1.
template <class T>
__device__ uint32_t times_pair(uint32_t pair, uint32_t scale) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Pair product = __hmul2(*reinterpret_cast<const Pair*>(&pair), *reinterpret_cast<const Pair*>(&scale));
    return *reinterpret_cast<const uint32_t*>(&product);
}

// 16 bytes of shared memory, or zeros: a predicated load instead of the branch that a compiler makes of it.
__device__ uint4 load_shared_if(bool there, const void* shared) {
    uint4 v;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.u32 p, %5, 0;\n"
        "mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
        "@p ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
        "}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(static_cast<uint32_t>(there)));
    return v;
}

// Codes are read once: they leave L1 to the scales.
__device__ uint2 load_once(const uint8_t* p) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ void copy_async(void* shared, const void* global) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

// What a lane holds of one batch of one strip: the codes of its two features (g and g + 8) in four groups, and the
// scales of group t.
template <bool kNested>
struct Batch {
    uint2 codes[kGroups][2];
    float scale[2];  // nested: the scale's scale
    uint8_t nested[2];
};

// The place of a warp in its stream of batches: strips outside, k (from the slice's begin) inside.
struct Cursor {
    int64_t strip;
    int k;
};

template <class T, int kTiles, bool kNested>  // kTiles: 8 rows of x each
__global__ void __launch_bounds__(kWarps * 32, 1) linear_mma_kernel(const LinearArguments<T> p) {
    extern __shared__ __align__(128) unsigned char shared[];
    unsigned char* const pairs = shared;
    float* const dynamic = reinterpret_cast<float*>(shared + kPairTable * 4);
    float* const sums = dynamic + 256;                                            // [kWarps][kTiles * 8][kSumStride]
    T* const xs = reinterpret_cast<T*>(sums + kWarps * kTiles * 8 * kSumStride);  // [rows][split_k + kPadding]
    __shared__ float code[16];

    const int lane = threadIdx.x % 32;
    const int warp = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);  // the compiler sees that it is uniform
    const int g = lane / 4, t = lane % 4;                          // mma's group and thread in group
    const int k_warps = 1 << p.k_warps_shift;
    const int strips_at_once = kWarps >> p.k_warps_shift;
    const int own_strip = warp >> p.k_warps_shift;
    const int64_t strips = ceil_div(p.out_features, kStrip);
    const int64_t strip_step = static_cast<int64_t>(gridDim.x) * strips_at_once;
    const int64_t k_begin = blockIdx.y * p.split_k;
    const int k_length = static_cast<int>(min(p.in_features - k_begin, p.split_k));
    const int k_first = (warp & (k_warps - 1)) * kBatch;
    const int k_step = k_warps * kBatch;
    const int k_stop = k_first + (k_length + k_step - 1) / k_step * k_step;  // as many batches for every warp

    const Cursor begin{static_cast<int64_t>(blockIdx.x) * strips_at_once, k_first};
    const auto advance = [&](Cursor& c) {
        c.k += k_step;
        if (c.k >= k_stop) c = {c.strip + strip_step, k_first};
    };

    // The batch that is fetched next: its first element in the lane's lower feature, and which of the two are there.
    Cursor next = begin;
    int64_t element;
    bool there[2];
    const auto aim = [&] {
        const int64_t feature = (next.strip + own_strip) * kStrip + g;
        element = feature * p.in_features + k_begin + next.k;
        there[0] = feature < p.out_features;
        there[1] = feature + 8 < p.out_features;
    };
    const auto fetch_codes = [&](Batch<kNested>& b, int group) {
        const uint8_t* const address = p.w.packed + (element >> 1) + 8 * t + group * (kGroup / 2);
        const bool in_k = next.k + group * kGroup < k_length;
        b.codes[group][0] = in_k && there[0] ? load_once(address) : make_uint2(0, 0);
        b.codes[group][1] = in_k && there[1] ? load_once(address + 4 * p.in_features) : make_uint2(0, 0);
    };
    const auto fetch_scales = [&](Batch<kNested>& b) {
        const bool in_k = next.k + t * kGroup < k_length;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t block = (element + t * kGroup + 8 * h * p.in_features) >> p.w.block_shift;
            if constexpr (kNested) {
                b.nested[h] = in_k && there[h] ? __ldg(p.w.absmax_q + block) : 0;
                b.scale[h] = in_k && there[h] ? __ldg(p.w.absmax_scale + (block >> p.w.absmax_block_shift)) : 0.0f;
            } else {
                b.scale[h] = in_k && there[h] ? __ldg(p.w.absmax + block) : 0.0f;
            }
        }
        advance(next);
        aim();
    };

    // The first codes set out before anything else.
    Batch<kNested> batches[2];
    aim();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) fetch_codes(batches[i], group);
        fetch_scales(batches[i]);
    }

    // x, row by row; each thread block starts at another row, or all would ask the same L2 slice at once
    const int x_stride = static_cast<int>(p.split_k) + kPadding;
    for (int i = 0; i < p.rows; ++i) {
        const int row = static_cast<int>((i + blockIdx.x) % static_cast<unsigned>(p.rows));
        for (int k = threadIdx.x * 8; k < k_length; k += kWarps * 32 * 8) {
            copy_async(xs + row * x_stride + k, p.x + row * p.in_features + k_begin + k);
        }
    }

    if (threadIdx.x < 16) code[threadIdx.x] = p.w.code ? p.w.code[threadIdx.x] : nf4_value(threadIdx.x);
    if constexpr (kNested) {
        if (threadIdx.x < 256) dynamic[threadIdx.x] = dynamic_value(threadIdx.x);
    }
    __syncthreads();
    // The table in T holds code / 2^e, its largest entry in [1, 2), so that any code fits float16; times a factor.
    float largest = 0.0f;
#pragma unroll 1
    for (int i = 0; i < 16; ++i) largest = fmaxf(largest, fabsf(code[i]));
    const int exponent = largest > 0.0f ? min(max(ilogbf(largest), -126), 126) : 0;
    const float rescale = scalbnf(code_factor<T>(), -exponent), unscale = scalbnf(1.0f / code_factor<T>(), exponent);
#pragma unroll 1
    for (int i = threadIdx.x; i < kPairTable; i += kWarps * 32) {
        const int byte = i / 32;
        reinterpret_cast<uint32_t*>(pairs)[i] = pair_of<T>(code[byte >> 4] * rescale, code[byte & 15] * rescale);
    }
    const float offset = kNested ? __ldg(p.w.absmax_offset) : 0.0f;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();

    const uint32_t lane4 = lane * 4;
    float total[kTiles][4] = {};

    // One batch: 4 groups of 4 mma steps; every group's registers are filled again for the batch after next. `kSpoiled`
    // means that a lane of the warp has a scale that is infinite or NaN.
    const auto multiply_groups = [&]<bool kSpoiled>(Batch<kNested>& b, int batch_k, const float (&scale)[2]) {
        float factor[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) factor[h] = !kSpoiled || isfinite(scale[h]) ? scale[h] * unscale : 1.0f;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            const int k = batch_k + group * kGroup;
            if (k >= k_length) {  // the same for the whole warp
                fetch_codes(b, group);
                continue;
            }
            const int source_lane = (lane & 28) | group;
            [[maybe_unused]] uint32_t spoiler[2];  // the scales that are infinite or NaN, else 1, as pairs
            if constexpr (kSpoiled) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float s = __shfl_sync(kFullWarp, scale[h], source_lane);
                    spoiler[h] = isfinite(s) ? pair_of<T>(1.0f, 1.0f) : pair_of<T>(s, s);
                }
            }
            uint32_t xb[kTiles][8];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                const int row = g + 8 * tile;
                const T* const source = xs + row * x_stride + k + group_k(t, 0, 0);
                const uint4 low = load_shared_if(row < p.rows, source);
                const uint4 high = load_shared_if(row < p.rows, source + 8);
                xb[tile][0] = low.x, xb[tile][1] = low.y, xb[tile][2] = low.z, xb[tile][3] = low.w;
                xb[tile][4] = high.x, xb[tile][5] = high.y, xb[tile][6] = high.z, xb[tile][7] = high.w;
            }
            float sum[kTiles][4] = {};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                uint32_t a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {  // mma's order: features g, g + 8, then the same for the later k
                    const uint2 of_feature = b.codes[group][i % 2];
                    const int byte = 2 * step + i / 2;
                    const uint32_t word = byte < 4 ? of_feature.x : of_feature.y;
                    a[i] = *reinterpret_cast<const uint32_t*>(pairs + pair_offset(word, byte % 4, lane4));
                    if constexpr (kSpoiled) a[i] = times_pair<T>(a[i], spoiler[i % 2]);
                }
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    mma(sum[tile], a, xb[tile][2 * step], xb[tile][2 * step + 1], p.x);
                }
            }
            fetch_codes(b, group);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float of_group = __shfl_sync(kFullWarp, factor[h], source_lane);
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    total[tile][2 * h] = fmaf(of_group, sum[tile][2 * h], total[tile][2 * h]);
                    total[tile][2 * h + 1] = fmaf(of_group, sum[tile][2 * h + 1], total[tile][2 * h + 1]);
                }
            }
        }
    };
    const auto multiply = [&](Batch<kNested>& b, int batch_k) {
        float scale[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            scale[h] = kNested ? nested_scale(dynamic[b.nested[h]], b.scale[h], offset) : b.scale[h];
        }
        if (__all_sync(kFullWarp, isfinite(scale[0]) && isfinite(scale[1]))) {
            multiply_groups.template operator()<false>(b, batch_k, scale);
        } else {
            multiply_groups.template operator()<true>(b, batch_k, scale);
        }
        fetch_scales(b);
    };

    // The end of a strip: add the warps' sums, in order.
    const auto finish = [&](int64_t strip) {
        __syncthreads();  // the sums of the strip before have been read
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = tile * 8 + 2 * t + i % 2, feature = g + 8 * (i / 2);
                sums[(warp * kTiles * 8 + row) * kSumStride + feature] = total[tile][i];
                total[tile][i] = 0.0f;
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < strips_at_once * p.rows * kStrip; i += kWarps * 32) {
            const int within = i % kStrip, row = i / kStrip % p.rows, which = i / kStrip / p.rows;
            const int64_t feature = (strip + which) * kStrip + within;
            if (feature >= p.out_features) continue;
            float s = 0.0f;
#pragma unroll 4
            for (int w = 0; w < k_warps; ++w) {
                s += sums[((which * k_warps + w) * kTiles * 8 + row) * kSumStride + within];
            }
            if (p.partial) {
                p.partial[(static_cast<int64_t>(blockIdx.y) * p.rows + row) * p.out_features + feature] = s;
            } else {
                if (p.bias.data) s += load_float(p.bias.data, p.bias.dtype, feature);
                p.y[row * p.out_features + feature] = round_to<T>(s);
            }
        }
    };

    // Even batches lie in batches[0], odd ones in batches[1]; past the last strip there is nothing to multiply.
    Cursor now = begin;
    while (now.strip < strips) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            multiply(batches[i], now.strip < strips ? now.k : k_length);
            const int64_t strip = now.strip;
            advance(now);
            if (now.strip != strip && strip < strips) finish(strip);
        }
    }
}

// y = the sum of the slices, in order, + bias.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(const float* __restrict__ partial, int splits, int64_t out_features, int64_t numel, Bias bias,
                      T* __restrict__ y) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < numel; i += stride) {
        float s = 0.0f;
        for (int split = 0; split < splits; ++split) s += partial[split * numel + i];
        if (bias.data) s += load_float(bias.data, bias.dtype, i % out_features);
        y[i] = round_to<T>(s);
    }
}

template <class T, int kTiles, bool kNested>
cudaError_t launch_linear_mma(const LinearPlan& plan, const LinearArguments<T>& arguments, cudaStream_t stream) {
    const auto kernel = linear_mma_kernel<T, kTiles, kNested>;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
    kernel<<<dim3(plan.ctas, plan.splits), kWarps * 32, plan.shared_bytes, stream>>>(arguments);
    return cudaGetLastError();
}

template <class T>
cudaError_t linear_mma(const LinearPlan& plan, const LinearArguments<T>& arguments, cudaStream_t stream) {
    const bool nested = arguments.w.absmax_q != nullptr;
    if (arguments.rows > 8) {
        return nested ? launch_linear_mma<T, 2, true>(plan, arguments, stream)
                      : launch_linear_mma<T, 2, false>(plan, arguments, stream);
    }
    return nested ? launch_linear_mma<T, 1, true>(plan, arguments, stream)
                  : launch_linear_mma<T, 1, false>(plan, arguments, stream);
}

template <class T>
void launch_linear_fma(const T* x, const Nf4& w, Bias bias, int64_t rows, int64_t out_features, int64_t in_features,
                       T* y, cudaStream_t stream) {
    const bool vector = in_features % kChunk == 0 && aligned_to<uint4>(x) && aligned_to<uint32_t>(w.packed);
    const int at_once = rows == 1 ? 1 : 4;
    const dim3 grid(static_cast<unsigned>(ceil_div(out_features, kFeatures)),
                    static_cast<unsigned>(ceil_div(rows, at_once)));
    const auto kernel = at_once == 1 ? (vector ? linear_fma_kernel<T, 1, true> : linear_fma_kernel<T, 1, false>)
                                     : (vector ? linear_fma_kernel<T, 4, true> : linear_fma_kernel<T, 4, false>);
    kernel<<<grid, kThreads, 0, stream>>>(x, w, bias, rows, out_features, in_features, y);
}

}  // namespace

// ---- launchers ------------------------------------------------------------------------------------------------------

cudaError_t nf4_quantize(const void* w, Dtype dtype, int64_t numel, int block_shift, const float* code, uint8_t* packed,
                         float* absmax, cudaStream_t stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const TensorSource<T> source{static_cast<const T*>(w), aligned_to<uint4>(w)};
        quantize_kernel<<<persistent_grid(ceil_div(numel, kThreads * kChunk)), kThreads, 0, stream>>>(
            source, NibbleTarget{packed, code}, absmax, numel, block_shift);
    });
}

cudaError_t nf4_dequantize(const Nf4& w, void* out, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const bool vector = aligned_to<uint4>(out) && aligned_to<uint32_t>(w.packed);
        const int64_t elements = vector ? 16 / sizeof(T) : 1;
        const int grid = persistent_grid(ceil_div(w.numel, elements * kThreads * kPieces));
        const auto kernel = vector ? dequantize_kernel<T, true> : dequantize_kernel<T, false>;
        kernel<<<grid, kThreads, 0, stream>>>(w, static_cast<T*>(out));
    });
}

cudaError_t absmax_mean(const float* absmax, int64_t n, double* partials, float* mean, cudaStream_t stream) {
    partial_sums_kernel<<<kMeanPartials, kThreads, 0, stream>>>(absmax, n, partials);
    mean_kernel<<<1, kThreads, 0, stream>>>(partials, n, mean);
    return cudaGetLastError();
}

cudaError_t absmax_quantize(const float* absmax, int64_t n, int block_shift, const float* offset, uint8_t* q,
                            float* scale, cudaStream_t stream) {
    quantize_kernel<<<persistent_grid(ceil_div(n, kThreads * kChunk)), kThreads, 0, stream>>>(
        AbsmaxSource{absmax, offset}, ByteTarget{q}, scale, n, block_shift);
    return cudaGetLastError();
}

cudaError_t absmax_dequantize(const uint8_t* q, const float* scale, const float* offset, int64_t n, int block_shift,
                              float* absmax, cudaStream_t stream) {
    absmax_dequantize_kernel<<<persistent_grid(ceil_div(n, kThreads * 4)), kThreads, 0, stream>>>(q, scale, offset, n,
                                                                                                  block_shift, absmax);
    return cudaGetLastError();
}

cudaError_t nf4_embedding(const void* indices, bool int64_indices, int64_t n, const Nf4& w, int64_t num_embeddings,
                          int64_t embedding_dim, void* out, Dtype dtype, cudaStream_t stream) {
    return with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        constexpr int64_t kElements = 16 / sizeof(T);
        const bool vector = embedding_dim % kElements == 0 && aligned_to<uint4>(out) && aligned_to<uint32_t>(w.packed);
        const int64_t chunks = vector ? embedding_dim / kElements : embedding_dim;
        int row_shift = 0;  // as many threads a row as it has chunks, at most all
        while ((1 << row_shift) < kThreads && (int64_t{1} << row_shift) < chunks) ++row_shift;
        const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(n, kThreads >> row_shift), 1 << 20)),
                        static_cast<unsigned>(std::min<int64_t>(ceil_div(chunks, kThreads), 1 << 10)));
        const auto launch = [&](auto* typed) {
            using Index = std::remove_const_t<std::remove_pointer_t<decltype(typed)>>;
            const auto kernel = vector ? embedding_kernel<T, Index, true> : embedding_kernel<T, Index, false>;
            kernel<<<grid, kThreads, 0, stream>>>(typed, n, w, num_embeddings, embedding_dim, row_shift,
                                                  static_cast<T*>(out));
        };
        if (int64_indices) {
            launch(static_cast<const int64_t*>(indices));
        } else {
            launch(static_cast<const int32_t*>(indices));
        }
    });
}

cudaError_t nf4_linear_plan(const void* x, Dtype dtype, const Nf4& w, int64_t rows, int64_t out_features,
                            int64_t in_features, LinearPlan* plan) {
    *plan = {};
    constexpr int kGroupShift = 6;
    if (dtype == Dtype::float32 || in_features == 0 || in_features % kGroup != 0 || w.block_shift < kGroupShift ||
        !aligned_to<uint4>(x) || !aligned_to<uint2>(w.packed)) {
        return cudaSuccess;
    }
    int device = 0, shared_bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    constexpr size_t kStaticShared = 64;
    *plan = nf4_linear_cut(rows, out_features, in_features, multiprocessors(),
                           static_cast<size_t>(shared_bytes) - kStaticShared);
    return cudaSuccess;
}

cudaError_t nf4_linear(const LinearPlan& plan, const void* x, Dtype dtype, const Nf4& w, Bias bias, int64_t rows,
                       int64_t out_features, int64_t in_features, float* workspace, void* y, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    const cudaError_t last = with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const T* const typed_x = static_cast<const T*>(x);
        T* const typed_y = static_cast<T*>(y);
        if constexpr (!std::is_same_v<T, float>) {
            if (plan.tensor_cores) {
                const LinearArguments<T> arguments{typed_x,
                                                   w,
                                                   bias,
                                                   typed_y,
                                                   workspace,
                                                   out_features,
                                                   in_features,
                                                   plan.split_k,
                                                   static_cast<int>(rows),
                                                   plan.k_warps_shift};
                error = linear_mma(plan, arguments, stream);
                if (error != cudaSuccess || plan.splits == 1) return;
                const int64_t numel = rows * out_features;
                add_splits_kernel<<<persistent_grid(ceil_div(numel, kThreads)), kThreads, 0, stream>>>(
                    workspace, plan.splits, out_features, numel, bias, typed_y);
                return;
            }
        }
        launch_linear_fma(typed_x, w, bias, rows, out_features, in_features, typed_y, stream);
    });
    return error != cudaSuccess ? error : last;
}

}  // namespace tlk::cuda
