// Scales and zeros of weights of few bits, in shared memory.
//
// Set on the compiler's command line, beside what cuda_strips.cuh wants: for codes GROUP, SCALES,
// HAS_ZEROS.

#pragma once

#include "cuda_sums.cuh"

// Of the scales.
#define SCALES_FLOAT32 0
#define SCALES_FLOAT16 1
#define SCALES_BFLOAT16 2

constexpr int COPY_BYTES = 16;

#if FORMAT == INT4
// Groups that begin in a chunk, or the one that it lies in.
constexpr int GROUPS = GROUP < CHUNK ? CHUNK / GROUP : 1;
static_assert(CHUNK % GROUP == 0 || GROUP % CHUNK == 0, "a chunk is of whole groups, or in one");
#else
constexpr int GROUPS = 1;
#endif

#if FORMAT == FLOATS

template <int WIDTH>
struct ScaleTile {
  __device__ __forceinline__ void ask(const void*, const u8*, int, int, int) {}
};

#else

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

// Numbers of the groups of a chunk and of some columns. The pieces of a thread lie a row of pieces
// apart, so that the threads of a warp read beside each other.
template <typename T, int WIDTH>
struct Table {
  static constexpr int HELD = COPY_BYTES / sizeof(T);  // numbers of a piece
  static constexpr int APART = PER_LANE > HELD ? PER_LANE / HELD : 1;
  static constexpr int PIECES = (WIDTH + HELD - 1) / HELD;
  static constexpr int ROW = (PIECES + APART - 1) / APART;

  struct alignas(COPY_BYTES) Piece {
    T numbers[HELD];
  };

  Piece pieces[GROUPS][APART][ROW];

  // Copy them in the background from a table with a row of N for each group.
  __device__ __forceinline__ void ask(const T* from, int groups, int columns) {
#pragma unroll 1
    for (int i = threadIdx.x; i < groups * PIECES; i += THREADS) {
      int group = i / PIECES, piece = i % PIECES;
      if (piece * HELD < columns)
        copy_16(&pieces[group][piece % APART][piece / APART], from + (u64)group * N + piece * HELD);
    }
  }

  __device__ __forceinline__ T at(int group, int column) const {
    int piece = column / HELD;
    return pieces[group][piece % APART][piece / APART].numbers[column % HELD];
  }

  // Those of a thread's columns, from `column` on.
  __device__ __forceinline__ void read(int group, int column, T (&numbers)[PER_LANE]) const {
    constexpr int AT_ONCE = PER_LANE < HELD ? PER_LANE : HELD;
    struct alignas(AT_ONCE * sizeof(T)) Part {
      T numbers[AT_ONCE];
    };
#pragma unroll
    for (int first = 0; first < PER_LANE; first += AT_ONCE) {
      const Piece& piece = pieces[group][first / HELD][(column + first) / HELD / APART];
      Part part = *reinterpret_cast<const Part*>(piece.numbers + (column + first) % HELD);
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) numbers[first + i] = part.numbers[i];
    }
  }
};

// Scales and zeros of a chunk of channels and some columns.
template <int WIDTH>
struct ScaleTile {
  Table<Scale, WIDTH> scales;
#if HAS_ZEROS
  Table<u8, WIDTH> zeros;
#endif

  // Copy them in the background; they depend on no input.
  __device__ __forceinline__ void ask(const void* all_scales, const u8* all_zeros, int first_channel,
                                      int first_column, int columns) {
#if FORMAT == INT4
    int groups = min(GROUPS, (K - first_channel + GROUP - 1) / GROUP);
    u64 start = (u64)(first_channel / GROUP) * N + first_column;
#else
    // One for all channels, and for those beyond the last.
    int groups = 1;
    u64 start = first_column;
#endif
    scales.ask(static_cast<const Scale*>(all_scales) + start, groups, columns);
#if HAS_ZEROS
    zeros.ask(all_zeros + start, groups, columns);
#endif
  }

  __device__ __forceinline__ float scale(int column) const { return to_float(scales.at(0, column)); }

#if FORMAT == INT4
  // Add the sums of a group, scaled, for a thread's columns from `column` on: sums of counts times
  // `inverse`, less the codes of zero times the sum of activations.
  __device__ __forceinline__ void add(int group, int column, const Sums& sums, float inverse,
                                      float inputs, float (&total)[PER_LANE]) const {
    Scale scales_of[PER_LANE];
    scales.read(group, column, scales_of);
#if HAS_ZEROS
    u8 zeros_of[PER_LANE];
    zeros.read(group, column, zeros_of);
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
#endif
};

#endif

// Wait for the other threads of the block, and for what they copied.
__device__ __forceinline__ void wait_for_copies_of_all() {
#if FORMAT != FLOATS
  wait_for_copies();
#endif
  __syncthreads();
}
