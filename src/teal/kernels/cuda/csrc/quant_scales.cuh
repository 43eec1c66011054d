// Scales and zeros of quantized weights, copied to shared memory asynchronously.

#pragma once

#include "single_row_mma.cuh"

namespace teal {

typedef Conditional<Config::SCALE_DTYPE == Dtype::FLOAT32, float, u16>::Type Scale;

__device__ __forceinline__ float scale_value(float scale) { return scale; }

__device__ __forceinline__ float scale_value(u16 scale) {
  if constexpr (Config::SCALE_DTYPE == Dtype::BFLOAT16)
    return __uint_as_float((u32)scale << 16);
  else
    return from_float16(scale);
}

// One scale for each of WIDTH columns of a block.
template <int WIDTH, bool IS_THERE = HAS_COLUMN_SCALES>
struct ColumnScales {
  static constexpr int PER_COPY = 16 / sizeof(Scale);

  alignas(16) Scale scales[(WIDTH + PER_COPY - 1) / PER_COPY * PER_COPY];

  // Start copying the scales of `columns` columns from `first` on.
  __device__ __forceinline__ void copy(const void* all, int first, int columns) {
    const Scale* from = static_cast<const Scale*>(all) + first;
#pragma unroll 1
    for (int i = PER_COPY * threadIdx.x; i < min(WIDTH, columns); i += PER_COPY * THREADS)
      copy_async<16>(scales + i, from + i);
  }

  __device__ __forceinline__ float scaled(float sum, int column) const {
    return sum * scale_value(scales[column]);
  }
};

template <int WIDTH>
struct ColumnScales<WIDTH, false> {
  __device__ __forceinline__ void copy(const void*, int, int) {}
  __device__ __forceinline__ float scaled(float sum, int) const { return sum; }
};

// One number for each of a lane's columns. Every thread copies its own.
template <typename T>
struct LaneCopy {
  static constexpr int BYTES = Config::PER_LANE * sizeof(T);
  static constexpr int COPY_BYTES = BYTES < 16 ? BYTES : 16;
  static constexpr int PER_COPY = COPY_BYTES / sizeof(T);

  struct alignas(COPY_BYTES) Piece {
    T numbers[PER_COPY];
  };

  Piece pieces[BYTES / COPY_BYTES][THREADS];

  static __device__ __forceinline__ void prefetch(const T* from) {
    constexpr int SECTOR = 32;  // bytes
#pragma unroll
    for (int i = 0; i < BYTES; i += SECTOR) teal::prefetch(from + i / sizeof(T));
  }

  __device__ __forceinline__ void copy(const T* from) {
#pragma unroll
    for (int i = 0; i < BYTES / COPY_BYTES; i++)
      copy_async<COPY_BYTES>(&pieces[i][threadIdx.x], from + i * PER_COPY);
  }

  __device__ __forceinline__ void read(T (&numbers)[Config::PER_LANE]) const {
#pragma unroll
    for (int i = 0; i < BYTES / COPY_BYTES; i++) {
      Piece piece = pieces[i][threadIdx.x];
#pragma unroll
      for (int j = 0; j < PER_COPY; j++) numbers[i * PER_COPY + j] = piece.numbers[j];
    }
  }
};

// Scales of a warp's segments, and zeros if codes are not symmetric.
template <int SEGMENTS>
struct SegmentScales {
  LaneCopy<Scale> scales[SEGMENTS];
};

template <int SEGMENTS, bool HAS_ZEROS = Config::HAS_ZEROS>
struct SegmentZeros : SegmentScales<SEGMENTS> {
  LaneCopy<u8> zeros[SEGMENTS];
};

template <int SEGMENTS>
struct SegmentZeros<SEGMENTS, false> : SegmentScales<SEGMENTS> {};

// How a chunk of int4 is divided into segments, the channels that a warp scales at once: its share
// of the chunk, or a group if groups do not divide into shares evenly.
template <int GROUP_SIZE>
struct Segments {
  static constexpr int SHARE = Config::CHUNK / Config::WARPS_K;
  static constexpr bool IS_SHARE =
      Config::CHUNK % (Config::WARPS_K * WARP) == 0 && GROUP_SIZE % SHARE == 0;
  static constexpr int SIZE = IS_SHARE ? SHARE : GROUP_SIZE;
  static_assert(Config::CHUNK % GROUP_SIZE == 0 || GROUP_SIZE % Config::CHUNK == 0,
                "a chunk consists of whole groups, or lies in one");
  static_assert(Config::CHUNK % SIZE == 0 && SIZE % WARP == 0, "segments cover the chunk");
  static constexpr int NUMBER = Config::CHUNK / SIZE;
  static constexpr int PER_WARP = (NUMBER + Config::WARPS_K - 1) / Config::WARPS_K;
};

// Scales and zeros of int4, of each segment of a warp for the columns of its threads. Other formats
// have none.
template <bool IS_THERE, int GROUP_SIZE>
struct GroupScalesOf {
  __device__ __forceinline__ void prefetch(const void*, const u8*, int, u64) const {}
  __device__ __forceinline__ void copy(const void*, const u8*, int, u64) {}
};

template <int GROUP_SIZE>
struct GroupScalesOf<true, GROUP_SIZE> : SegmentZeros<Segments<GROUP_SIZE>::PER_WARP> {
  typedef Segments<GROUP_SIZE> Segment;

  // Prefetch those of the columns from `column` on, which depend on no input, into the L2 cache.
  __device__ __forceinline__ void prefetch(const void* all_scales, const u8* all_zeros,
                                           int first_channel, u64 column) const {
    for_each(first_channel, [&](int, u64 group) {
      LaneCopy<Scale>::prefetch(static_cast<const Scale*>(all_scales) +
                                group * Config::OUT_FEATURES + column);
      if constexpr (Config::HAS_ZEROS)
        LaneCopy<u8>::prefetch(all_zeros + group * Config::OUT_FEATURES + column);
    });
  }

  // Start copying them.
  __device__ __forceinline__ void copy(const void* all_scales, const u8* all_zeros,
                                       int first_channel, u64 column) {
    for_each(first_channel, [&](int i, u64 group) {
      this->scales[i].copy(static_cast<const Scale*>(all_scales) + group * Config::OUT_FEATURES +
                           column);
      if constexpr (Config::HAS_ZEROS)
        this->zeros[i].copy(all_zeros + group * Config::OUT_FEATURES + column);
    });
  }

  // Add the scaled sums of a warp's i-th segment: sums of counts times `inverse`, minus the zeros
  // times the sum of the activations.
  __device__ __forceinline__ void add(int i, const OperandSums& sums, float inverse,
                                      float input_sum, float (&total)[Config::PER_LANE]) const {
    constexpr float SYMMETRIC_ZERO = 8.0f;
    Scale scales_of[Config::PER_LANE];
    this->scales[i].read(scales_of);
    u8 zeros_of[Config::PER_LANE];
    if constexpr (Config::HAS_ZEROS) this->zeros[i].read(zeros_of);
#pragma unroll
    for (int c = 0; c < Config::PER_LANE; c++) {
      float zero = Config::HAS_ZEROS ? (float)zeros_of[c] : SYMMETRIC_ZERO;
      total[c] += scale_value(scales_of[c]) * (inverse * sums.sum(c) - zero * input_sum);
    }
  }

 private:
  // Call `visit` with the number of each segment of this thread's warp, and the segment's group.
  template <typename Visit>
  static __device__ __forceinline__ void for_each(int first_channel, Visit visit) {
#pragma unroll
    for (int i = 0; i < Segment::PER_WARP; i++) {
      int segment = i * Config::WARPS_K + share_of_warp();
      int channel = first_channel + segment * Segment::SIZE;
      // Beyond the last channel there are no scales.
      if (segment < Segment::NUMBER && channel < Config::IN_FEATURES)
        visit(i, (u64)(channel / GROUP_SIZE));
    }
  }
};

typedef GroupScalesOf<IS_INT4, Config::GROUP_SIZE> GroupScales;

}  // namespace teal
