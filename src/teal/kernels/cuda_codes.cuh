// Weights of few bits: sums on tensor cores, and the scales that they are multiplied with.
//
// Set on the compiler's command line, beside what cuda_strips.cuh wants: for codes GROUP, SCALES,
// HAS_ZEROS.

#pragma once

#include "cuda_strips.cuh"

// Of the scales.
#define SCALES_FLOAT32 0
#define SCALES_FLOAT16 1
#define SCALES_BFLOAT16 2

constexpr int COPY_BYTES = 16;

#if FORMAT != FLOATS

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
#define IN_BFLOAT16 (BFLOAT16 && FORMAT == INT4)

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
            strips[u][i] = load_strip(weight + here.channel * STRIP_BYTES);
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
#if FORMAT == INT4
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

#endif

#if FORMAT == FLOATS

template <int ROWS, int COLUMNS>
struct ScaleTile {
  __device__ __forceinline__ void ask(const void*, const u8*, int, int, int, int, int) {}
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

  // Copy them in the background from tables with `row_size` columns; they depend on no input.
  __device__ __forceinline__ void ask(const void* all_scales, const u8* all_zeros, int first_row,
                                      int rows, int row_size, int first_column, int columns) {
    columns = min(COLUMNS, columns);
    u64 start = (u64)first_row * row_size + first_column;
    copy(scales, static_cast<const Scale*>(all_scales) + start, rows, row_size, columns);
#if HAS_ZEROS
    copy(zeros, all_zeros + start, rows, row_size, columns);
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
                                              int row_size, int columns) {
    constexpr int AT_ONCE = COPY_BYTES / sizeof(T), PIECES = (COLUMNS + AT_ONCE - 1) / AT_ONCE;
#pragma unroll 1
    for (int i = threadIdx.x; i < min(ROWS, rows) * PIECES; i += THREADS) {
      int row = i / PIECES, column = i % PIECES * AT_ONCE;
      if (column < columns)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         (u32)__cvta_generic_to_shared(&tile[row][column])),
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
