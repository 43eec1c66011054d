// Scales and zeros of weights of few bits, in shared memory.
//
// Set on the compiler's command line, beside what weight_rows.cuh wants: for codes GROUP, SCALES,
// HAS_ZEROS.

#pragma once

#include "single_row_mma.cuh"

// Of the scales.
#define SCALES_FLOAT32 0
#define SCALES_FLOAT16 1
#define SCALES_BFLOAT16 2

#if FORMAT == INT4
// Channels that a warp scales at once: its share of a chunk, or a group if that is not cut evenly.
constexpr int SHARE = CHUNK / WARPS_K;
constexpr int SEGMENT = CHUNK % (WARPS_K * WARP) == 0 && GROUP % SHARE == 0 ? SHARE : GROUP;
static_assert(CHUNK % GROUP == 0 || GROUP % CHUNK == 0, "a chunk is of whole groups, or in one");
static_assert(CHUNK % SEGMENT == 0 && SEGMENT % WARP == 0, "segments cover the chunk");
constexpr int SEGMENTS = CHUNK / SEGMENT;
constexpr int TURNS = (SEGMENTS + WARPS_K - 1) / WARPS_K;  // of a warp
#endif

// Which share of a chunk is that of this thread's warp.
__device__ __forceinline__ int share_of_warp() { return threadIdx.x / WARP / WARPS_N; }

#if FORMAT != FLOATS

#if SCALES == SCALES_FLOAT32
typedef float Scale;
__device__ __forceinline__ float to_float(Scale scale) { return scale; }
#else
typedef u16 Scale;
__device__ __forceinline__ float to_float(Scale scale) {
#if SCALES == SCALES_BFLOAT16
  return __uint_as_float((u32)scale << 16);
#else
  return from_float16(scale);
#endif
}
#endif

#endif

// Scales of 8-bit codes: one for each of WIDTH columns of a block.
template <int WIDTH>
struct ColumnScales {
#if FORMAT == INT8 || FORMAT == FP8
  static constexpr int HELD = 16 / sizeof(Scale);  // numbers that are copied at once

  alignas(16) Scale scales[(WIDTH + HELD - 1) / HELD * HELD];

  // Copy those of `columns` columns from `first` on in the background; they depend on no input.
  __device__ __forceinline__ void ask(const void* all, int first, int columns) {
    const Scale* from = static_cast<const Scale*>(all) + first;
#pragma unroll 1
    for (int i = HELD * threadIdx.x; i < min(WIDTH, columns); i += HELD * THREADS)
      copy<16>(scales + i, from + i);
  }

  __device__ __forceinline__ float scale(int column) const { return to_float(scales[column]); }
#else
  __device__ __forceinline__ void ask(const void*, int, int) {}
#endif
};

#if FORMAT == INT4

// Numbers of a thread's columns, which it copies for itself.
template <typename T>
struct Copies {
  static constexpr int BYTES = PER_LANE * sizeof(T);
  static constexpr int AT_ONCE = BYTES < 16 ? BYTES : 16;
  static constexpr int HELD = AT_ONCE / sizeof(T);

  struct alignas(AT_ONCE) Piece {
    T numbers[HELD];
  };

  Piece pieces[BYTES / AT_ONCE][THREADS];

  // Bring them to the L2 cache.
  static __device__ __forceinline__ void expect(const T* from) {
    constexpr int SECTOR = 32;  // bytes
#pragma unroll
    for (int i = 0; i < BYTES; i += SECTOR) prefetch(from + i / sizeof(T));
  }

  __device__ __forceinline__ void ask(const T* from) {
#pragma unroll
    for (int i = 0; i < BYTES / AT_ONCE; i++)
      copy<AT_ONCE>(&pieces[i][threadIdx.x], from + i * HELD);
  }

  __device__ __forceinline__ void read(T (&numbers)[PER_LANE]) const {
#pragma unroll
    for (int i = 0; i < BYTES / AT_ONCE; i++) {
      Piece piece = pieces[i][threadIdx.x];
#pragma unroll
      for (int held = 0; held < HELD; held++) numbers[i * HELD + held] = piece.numbers[held];
    }
  }
};

#endif

// Scales and zeros of 4-bit codes: of each segment of a warp, for the columns of its threads.
struct GroupScales {
#if FORMAT == INT4
  Copies<Scale> scales[TURNS];
#if HAS_ZEROS
  Copies<u8> zeros[TURNS];
#endif

  // Those of columns from `column` on depend on no input: bring them to the L2 cache early.
  __device__ __forceinline__ void expect(const void* all_scales, const u8* all_zeros,
                                         int first_channel, u64 column) const {
    for_each(first_channel, [&](int, u64 group) {
      Copies<Scale>::expect(static_cast<const Scale*>(all_scales) + group * N + column);
#if HAS_ZEROS
      Copies<u8>::expect(all_zeros + group * N + column);
#endif
    });
  }

  // Copy them in the background.
  __device__ __forceinline__ void ask(const void* all_scales, const u8* all_zeros, int first_channel,
                                      u64 column) {
    for_each(first_channel, [&](int turn, u64 group) {
      scales[turn].ask(static_cast<const Scale*>(all_scales) + group * N + column);
#if HAS_ZEROS
      zeros[turn].ask(all_zeros + group * N + column);
#endif
    });
  }

  // Add the sums of a segment, scaled: sums of counts times `inverse`, less the codes of zero times
  // the sum of activations.
  __device__ __forceinline__ void add(int turn, const Sums& sums, float inverse, float inputs,
                                      float (&total)[PER_LANE]) const {
    Scale scales_of[PER_LANE];
    scales[turn].read(scales_of);
#if HAS_ZEROS
    u8 zeros_of[PER_LANE];
    zeros[turn].read(zeros_of);
#endif
#pragma unroll
    for (int c = 0; c < PER_LANE; c++) {
#if HAS_ZEROS
      float zero = zeros_of[c];
#else
      float zero = 8.0f;
#endif
      total[c] += to_float(scales_of[c]) * (inverse * sums.sum(c) - zero * inputs);
    }
  }

 private:
  // Call `visit` with each turn of this thread's warp and the group of its segment.
  template <typename Visit>
  static __device__ __forceinline__ void for_each(int first_channel, Visit visit) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      int segment = turn * WARPS_K + share_of_warp(), channel = first_channel + segment * SEGMENT;
      // Beyond the last channel there are no scales.
      if (segment < SEGMENTS && channel < K) visit(turn, (u64)(channel / GROUP));
    }
  }
#else
  __device__ __forceinline__ void expect(const void*, const u8*, int, u64) const {}
  __device__ __forceinline__ void ask(const void*, const u8*, int, u64) {}
#endif
};
