// The product of the kept channels of a chunk with the columns of a block, for weights of any format.
//
// A thread holds 8 columns of a strip at a time if they have 16 bits, else 16.
//
// Set on the compiler's command line, beside what cuda_numbers.cuh wants: K, N, CHUNK, WARPS_N,
// WARPS_K, UNROLL, FORMAT, and for quantized weights GROUP, SCALES, HAS_ZEROS.

#pragma once

#include "cuda_numbers.cuh"

// Of the weight.
#define FLOATS 0
#define INT8 1
#define FP8 2
#define INT4 3

// Of the scales.
#define SCALES_FLOAT32 0
#define SCALES_FLOAT16 1
#define SCALES_BFLOAT16 2

// Whether activations are scaled to fit into float16, which the codes of 8 bits become.
#define SCALES_INPUTS (BFLOAT16 && (FORMAT == INT8 || FORMAT == FP8))

constexpr int BITS = FORMAT == FLOATS ? 16 : FORMAT == INT4 ? 4 : 8;
// Of codes of 4 bits only 8, because the sums of 32 columns would not leave registers for anything else.
constexpr int LOAD_BYTES = FORMAT == INT4 ? 8 : 16;
constexpr int COPY_BYTES = 16;
constexpr int PER_LANE = 8 * LOAD_BYTES / BITS;  // columns
// Lanes of a warp that have columns of their own: of a quad, all four have the same.
constexpr int SLOTS = FORMAT == FLOATS ? WARP : WARP / 4;
constexpr int WARP_N = SLOTS * PER_LANE;
constexpr int THREADS = WARP * WARPS_N * WARPS_K;
constexpr int BLOCK_N = WARP_N * WARPS_N;
constexpr int PER_THREAD = (CHUNK + THREADS - 1) / THREADS;
constexpr u64 STRIP_BYTES = (u64)N * BITS / 8;

// A kept channel and its activation.
struct Entry {
  u32 channel;
  float value;
};

// Weights of a channel, which nobody reads again.
struct Strip {
  u32 words[LOAD_BYTES / 4];
};

__device__ __forceinline__ Strip load_strip(const u8* pointer) {
  Strip strip;
#if FORMAT == INT4
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(strip.words[0]), "=r"(strip.words[1])
               : "l"(pointer));
#else
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(strip.words[0]), "=r"(strip.words[1]), "=r"(strip.words[2]), "=r"(strip.words[3])
               : "l"(pointer));
#endif
  return strip;
}

#if FORMAT == FP8
// The codes are read as floats of a smaller exponent, half of it made good in the activations.
constexpr float HALF_RANGE = (float)(1ll << 60);
#else
constexpr float HALF_RANGE = 1.0f;
#endif

// Add an activation times the codes of a strip. Of codes that are no floats yet:
//   int8  counts exactly, in the lowest bits of 2^23
//   int4  stands in the mantissa of 2 + code / 64, to be undone for the sum of a group
//   fp8   keeps its exponent, too small by 2^120
__device__ __forceinline__ void add_strip(const Strip& strip, float value, float (&sums)[PER_LANE]) {
  const u32* words = strip.words;
#pragma unroll
  for (int word = 0; word < LOAD_BYTES / 4; word++) {
    float* of_word = sums + word * (PER_LANE * 4 / LOAD_BYTES);
#if FORMAT == FLOATS
    of_word[0] += value * low_half(words[word]);
    of_word[1] += value * high_half(words[word]);
#elif FORMAT == INT8
    u32 shifted = words[word] ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float above = __uint_as_float(__byte_perm(shifted, 0x4b000000u, 0x7440 + i));
      of_word[i] += value * (above - 8388736.0f);  // 2^23 + 128
    }
#elif FORMAT == FP8
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int top = (int)(words[word] << (24 - 8 * i));
      of_word[i] += value * __uint_as_float((u32)(top >> 4) & 0x87f00000u);
    }
#else
    u32 even = words[word] & 0x0f0f0f0fu, odd = words[word] >> 4 & 0x0f0f0f0fu;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      of_word[2 * i] += value * __uint_as_float(__byte_perm(even, 0x40000000u, 0x7044 + (i << 8)));
      of_word[2 * i + 1] += value * __uint_as_float(__byte_perm(odd, 0x40000000u, 0x7044 + (i << 8)));
    }
#endif
  }
}

// Add the strips first, first + stride, … of a list for this thread's columns; return the sum of
// their activations.
template <u64 BYTES = STRIP_BYTES>
__device__ __forceinline__ float add_strips(const Entry* list, int first, int end, int stride,
                                            const u8* weight, float (&sums)[PER_LANE]) {
  float values_sum = 0.0f;
  for (; first < end; first += stride * UNROLL) {
    Strip strips[UNROLL];
    float values[UNROLL];
    // All loads first. Beyond the list's end they read its last strip, and count for nothing.
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int entry = first + u * stride;
      Entry here = list[min(entry, end - 1)];
      values[u] = entry < end ? here.value : 0.0f;
      strips[u] = load_strip(weight + here.channel * BYTES);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      values_sum += values[u];
      add_strip(strips[u], values[u] * HALF_RANGE, sums);
    }
  }
  return values_sum;
}

// The kept ones of up to SIZE channels that follow each other, in order.
template <int SIZE>
struct KeptChannels {
  static constexpr int WORDS = (SIZE + WARP - 1) / WARP;
  static constexpr int PER_THREAD = (SIZE + THREADS - 1) / THREADS;

  Entry entries[SIZE];
  u32 words[WORDS];
  int starts[WORDS + 1];
#if SCALES_INPUTS
  u32 largest[THREADS / WARP];  // of each warp, the bits of a magnitude
#endif

  // Fill it: thread t has the channels i · THREADS + t.
  __device__ __forceinline__ void fill(const bool (&keeps)[PER_THREAD], const float (&x)[PER_THREAD],
                                       int first_channel) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = i * (THREADS / WARP) + warp;
      u32 kept = __ballot_sync(~0u, keeps[i]);
      if (word < WORDS && lane == 0) words[word] = kept;
    }
#if SCALES_INPUTS
    u32 magnitude = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
      if (keeps[i]) magnitude = max(magnitude, __float_as_uint(fabsf(x[i])));
    magnitude = __reduce_max_sync(~0u, magnitude);
    if (lane == 0) largest[warp] = magnitude;
#endif
    __syncthreads();
    count_words(lane);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = i * (THREADS / WARP) + warp;
      if (word < WORDS && (words[word] >> lane & 1)) {
        int place = starts[word] + __popc(words[word] & ((1u << lane) - 1));
        entries[place] = Entry{(u32)(first_channel + word * WARP + lane), x[i]};
      }
    }
    __syncthreads();
  }

  // How many are kept of the channels before a word.
  __device__ __forceinline__ int before(int word) const { return starts[word]; }

  __device__ __forceinline__ int count() const { return starts[WORDS]; }

  // What activations are multiplied with to become operands of tensor cores, a power of two.
  __device__ __forceinline__ float factor() const {
#if SCALES_INPUTS
    u32 magnitude = 0;
    for (int warp = 0; warp < THREADS / WARP; warp++) magnitude = max(magnitude, largest[warp]);
    // The largest operand lies in [2^14, 2^15), or is as infinite as the activation.
    int exponent = (int)(magnitude >> 23);
    return __uint_as_float((u32)(127 + 14 + 127 - max(exponent, 22)) << 23);
#else
    return 1.0f;
#endif
  }

 private:
  // Every warp counts all words and writes the same numbers: that saves a barrier.
  __device__ __forceinline__ void count_words(int lane) {
    int earlier = 0;
#pragma unroll
    for (int first = 0; first < WORDS; first += WARP) {
      int word = first + lane, sum = word < WORDS ? __popc(words[word]) : 0;
#pragma unroll
      for (int step = 1; step < min(WARP, WORDS); step *= 2) {
        int left = __shfl_up_sync(~0u, sum, step);
        sum += lane < step ? 0 : left;
      }
      if (word < WORDS) starts[word + 1] = earlier + sum;
      earlier += __shfl_sync(~0u, sum, WARP - 1);
    }
    if (lane == 0) starts[0] = 0;
    __syncwarp();
  }
};

using List = KeptChannels<CHUNK>;

// Tensor cores multiply the strips of sixteen kept channels with their activations. A quad of lanes
// has PER_LANE columns, each lane of it four of the channels.
//
// Codes become floats with few operations on pairs of channels, the offset being subtracted from
// sums later on:
//   int8  counts in the lowest bits of 1024, in float16
//   fp8   becomes float16, too small by 2^8
//   int4  counts in the lowest bits of 128 in bfloat16, of 1024 in float16
constexpr int AT_ONCE = 16;  // channels
#if FORMAT == INT4
constexpr float OFFSET = BFLOAT16 ? 128.0f : 1024.0f;
#elif FORMAT == INT8
constexpr float OFFSET = 1024.0f + 128.0f;
#else
constexpr float OFFSET = 0.0f;
#endif
constexpr float STEP = FORMAT == FP8 ? 256.0f : 1.0f;
#define IN_BFLOAT16 (BFLOAT16 && (FORMAT == FLOATS || FORMAT == INT4))

// Two numbers as a pair of operands.
__device__ __forceinline__ u32 operands_of(float first, float second) {
#if IN_BFLOAT16
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
#else
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
#endif
}

// Add the products of 16 channels for 16 columns: of the quad's `columns[0]` and `columns[1]`.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&columns)[4],
                                         const u32 (&inputs)[2]) {
#if IN_BFLOAT16
#define OPERANDS "bf16.bf16"
#else
#define OPERANDS "f16.f16"
#endif
  asm("mma.sync.aligned.m16n8k16.row.col.f32." OPERANDS
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(columns[0]), "r"(columns[1]), "r"(columns[2]), "r"(columns[3]), "r"(inputs[0]),
        "r"(inputs[1]));
}

// The sums of a warp.
struct Sums {
  float tiles[PER_LANE / 2][4] = {};
  float inputs = 0.0f;  // of this lane's channels

  // Add entries first · 16 …, (first + stride) · 16 … of a list.
  template <u64 BYTES = STRIP_BYTES>
  __device__ __forceinline__ void add(const Entry* list, int first, int end, int stride,
                                      const u8* weight, float factor) {
    int lane = threadIdx.x % 4;
    for (int begin = first * AT_ONCE; begin < end; begin += stride * AT_ONCE * UNROLL) {
      Strip strips[UNROLL][4];
      float values[UNROLL][4];
      // All loads first.
#pragma unroll
      for (int u = 0; u < UNROLL; u++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int entry = begin + u * stride * AT_ONCE + 4 * lane + i;
          strips[u][i] = Strip{};
          values[u][i] = 0.0f;
          if (entry < end) {
            Entry here = list[entry];
            values[u][i] = here.value * factor;
            strips[u][i] = load_strip(weight + here.channel * BYTES);
          }
        }
#pragma unroll
      for (int u = 0; u < UNROLL; u++) add_channels(strips[u], values[u]);
    }
  }

  // Leave in every lane of a quad the sum of the inputs of all.
  __device__ __forceinline__ void share_inputs() {
    inputs += __shfl_xor_sync(~0u, inputs, 1);
    inputs += __shfl_xor_sync(~0u, inputs, 2);
  }

  // The sum of a column of this quad, of codes minus OFFSET + zero.
  __device__ __forceinline__ float sum(int column, float zero = 0.0f) const {
    float all = tiles[column / 2][column % 2 * 2];
    return OFFSET > 0.0f ? all - (OFFSET + zero) * inputs : all * STEP;
  }

 private:
  __device__ __forceinline__ void add_channels(const Strip (&strips)[4], const float (&values)[4]) {
    u32 inputs_of[2] = {operands_of(values[0], values[1]), operands_of(values[2], values[3])};
    if (OFFSET > 0.0f) inputs += values[0] + values[1] + values[2] + values[3];
#pragma unroll
    for (int word = 0; word < LOAD_BYTES / 4; word++) {
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = strips[i].words[word];
      add_word(word, words, inputs_of);
    }
  }

  // Add the columns of one word of the strips of four channels.
  __device__ __forceinline__ void add_word(int word, const u32 (&words)[4], const u32 (&inputs_of)[2]) {
    float(*of_word)[4] = tiles + word * (PER_LANE * 2 / LOAD_BYTES);
#if FORMAT == FLOATS
    u32 columns[4] = {__byte_perm(words[0], words[1], 0x5410), __byte_perm(words[0], words[1], 0x7632),
                      __byte_perm(words[2], words[3], 0x5410), __byte_perm(words[2], words[3], 0x7632)};
    multiply(of_word[0], columns, inputs_of);
#elif FORMAT == INT4
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 select = half == 0 ? 0x5410 : 0x7632;
      u32 pairs[2] = {__byte_perm(words[0], words[1], select), __byte_perm(words[2], words[3], select)};
#pragma unroll
      for (int two = 0; two < 2; two++) {
        u32 columns[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
          columns[i] = pairs[i / 2] >> (8 * two + 4 * (i % 2)) & 0x000f000fu |
                       (BFLOAT16 ? 0x43004300u : 0x64006400u);
        multiply(of_word[2 * half + two], columns, inputs_of);
      }
    }
#else
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 select = half == 0 ? 0x5140 : 0x7362;
      u32 pairs[2] = {__byte_perm(words[0], words[1], select), __byte_perm(words[2], words[3], select)};
      u32 columns[4];
#pragma unroll
      for (int i = 0; i < 4; i++) columns[i] = column_of(pairs[i / 2], i % 2);
      multiply(of_word[half], columns, inputs_of);
    }
#endif
  }

#if FORMAT == INT8
  static __device__ __forceinline__ u32 column_of(u32 bytes, int second) {
    return __byte_perm(bytes ^ 0x80808080u, 0x64646464u, second ? 0x4342 : 0x4140);
  }
#elif FORMAT == FP8
  static __device__ __forceinline__ u32 column_of(u32 bytes, int second) {
    u32 high = __byte_perm(bytes, 0, second ? 0x3424 : 0x1404);
    return high & 0x80008000u | high >> 1 & 0x3f803f80u;
  }
#endif
};

#if FORMAT == FLOATS

template <int ROWS, int COLUMNS>
struct ScaleTile {
  __device__ __forceinline__ void ask(const void*, const u8*, int, int, int, int, int, int = 0) {}
};

struct Scales {
  __device__ __forceinline__ void ask(const void*, const u8*, int, int, int) {}
};

#else

#if SCALES == SCALES_FLOAT32
typedef float Scale;
__device__ __forceinline__ float to_float(Scale scale) { return scale; }
#else
typedef u16 Scale;
__device__ __forceinline__ float to_float(Scale scale) {
  float value;
#if SCALES == SCALES_BFLOAT16
  value = __uint_as_float((u32)scale << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(scale));
#endif
  return value;
}
#endif

// Scales and zeros of some groups and columns, in shared memory.
template <int ROWS, int COLUMNS>
struct ScaleTile {
  alignas(COPY_BYTES) Scale scales[ROWS][COLUMNS];
#if HAS_ZEROS
  alignas(COPY_BYTES) u8 zeros[ROWS][COLUMNS];
#endif

  // Copy them in the background from tables with `row_size` columns, to the tile's columns from `to`
  // on; they depend on no input.
  __device__ __forceinline__ void ask(const void* all_scales, const u8* all_zeros, int first_row,
                                      int rows, int row_size, int first_column, int columns,
                                      int to = 0) {
    columns = min(COLUMNS - to, columns);
    u64 start = (u64)first_row * row_size + first_column;
    copy(scales, static_cast<const Scale*>(all_scales) + start, rows, row_size, columns, to);
#if HAS_ZEROS
    copy(zeros, all_zeros + start, rows, row_size, columns, to);
#endif
  }

  __device__ __forceinline__ float scale(int row, int column) const {
    return to_float(scales[row][column]);
  }

  // Code of zero; int4 only.
  __device__ __forceinline__ float zero(int row, int column) const {
#if HAS_ZEROS
    return (float)zeros[row][column];
#else
    return 8.0f;
#endif
  }

 private:
  template <typename T>
  static __device__ __forceinline__ void copy(T (*tile)[COLUMNS], const T* from, int rows,
                                              int row_size, int columns, int to) {
    constexpr int AT_ONCE = COPY_BYTES / sizeof(T), PIECES = (COLUMNS + AT_ONCE - 1) / AT_ONCE;
#pragma unroll 1
    for (int i = threadIdx.x; i < min(ROWS, rows) * PIECES; i += THREADS) {
      int row = i / PIECES, column = i % PIECES * AT_ONCE;
      if (column < columns)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         (u32)__cvta_generic_to_shared(&tile[row][to + column])),
                     "l"(from + (u64)row * row_size + column)
                     : "memory");
    }
  }
};

// Those of a chunk of channels and the columns of a block.
struct Scales {
  // Groups that begin in a chunk, or the one that it lies in.
  static constexpr int GROUPS = GROUP < CHUNK ? CHUNK / GROUP : 1;

  ScaleTile<GROUPS, BLOCK_N> tile;

  __device__ __forceinline__ void ask(const void* all_scales, const u8* all_zeros, int first_channel,
                                      int first_column, int columns) {
    tile.ask(all_scales, all_zeros, first_channel / GROUP, (K - first_channel + GROUP - 1) / GROUP, N,
             first_column, columns);
  }

  __device__ __forceinline__ float scale(int channel, int column) const {
    return tile.scale(channel / GROUP % GROUPS, column);
  }

  __device__ __forceinline__ float zero(int channel, int column) const {
    return tile.zero(channel / GROUP % GROUPS, column);
  }
};

#endif

// Wait for what this thread copied; a barrier makes it visible to the block.
__device__ __forceinline__ void wait_for_copies() {
#if FORMAT != FLOATS
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
