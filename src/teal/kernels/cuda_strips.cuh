// The product of the kept channels of a chunk with the columns of a block, for weights of any format.
//
// A thread holds 16 bytes of a strip at a time: 8 columns of 16 bits, 16 of 8 bits, 32 of 4 bits.
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

constexpr int BITS = FORMAT == FLOATS ? 16 : FORMAT == INT4 ? 4 : 8;
constexpr int LOAD_BYTES = 16;
constexpr int PER_LANE = 8 * LOAD_BYTES / BITS;  // columns
constexpr int WARP_N = WARP * PER_LANE;
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
__device__ __forceinline__ uint4 load_strip(const u8* pointer) {
  uint4 strip;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(strip.x), "=r"(strip.y), "=r"(strip.z), "=r"(strip.w)
               : "l"(pointer));
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
__device__ __forceinline__ void add_strip(const uint4& strip, float value, float (&sums)[PER_LANE]) {
  const u32* words = reinterpret_cast<const u32*>(&strip);
#pragma unroll
  for (int word = 0; word < LOAD_BYTES / 4; word++) {
    float* of_word = sums + word * (PER_LANE / 4);
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
    uint4 strips[UNROLL];
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
  alignas(LOAD_BYTES) Scale scales[ROWS][COLUMNS];
#if HAS_ZEROS
  alignas(LOAD_BYTES) u8 zeros[ROWS][COLUMNS];
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
    constexpr int AT_ONCE = LOAD_BYTES / sizeof(T), PIECES = (COLUMNS + AT_ONCE - 1) / AT_ONCE;
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
