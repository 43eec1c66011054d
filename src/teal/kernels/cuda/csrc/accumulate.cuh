// The product of a chunk's kept channels with the columns of a block, and its sum over the warps.

#pragma once

#include "quant_scales.cuh"

namespace teal {

// A lane's sums of one row.
struct SingleRowSums {
  float columns[Config::PER_LANE] = {};

  __device__ __forceinline__ SingleRowSums() {}
  __device__ __forceinline__ explicit SingleRowSums(int) {}
};

typedef Conditional<HAS_SEVERAL_ROWS, MultiRowSums, SingleRowSums>::Type Sums;

// Add a warp's share of a chunk of floats or 8-bit codes. Column scales are applied later.
template <typename Kept>
__device__ __forceinline__ void add_columns(const Kept& kept, const u8* weight,
                                            SingleRowSums& total) {
  int share = share_of_warp();
  float inverse = kept.inverse_factor();
  OperandSums sums;
  sums.add(kept.channels + share, (kept.size - share + Config::WARPS_K - 1) / Config::WARPS_K,
           weight);
  float offset = 0.0f;
  if constexpr (Config::FORMAT == Format::INT8) {
    // Each warp takes its share of the offset of the codes.
#pragma unroll
    for (int first = 0; first < CHANNEL_WORDS; first += Config::WARPS_K)
      if (first + share < CHANNEL_WORDS)
        offset += 128.0f * kept.template input_sum<1>(first + share);
  }
#pragma unroll
  for (int c = 0; c < Config::PER_LANE; c++) total.columns[c] += inverse * sums.sum(c) - offset;
}

// Add a warp's share of a chunk of int4, segment by segment.
template <typename Kept, typename Scales>
__device__ __forceinline__ void add_segments(const Kept& kept, const Scales& scales,
                                             const u8* weight, SingleRowSums& total) {
  typedef typename Scales::Segment Segment;
  int share = share_of_warp();
  float inverse = kept.inverse_factor();
#pragma unroll 1
  for (int i = 0; i < Segment::PER_WARP; i++) {
    constexpr int WORDS = Segment::SIZE / WARP;
    int segment = i * Config::WARPS_K + share, begin = 0, end = 0;
    if (segment < Segment::NUMBER) {
      begin = kept.before(segment * WORDS);
      end = kept.before((segment + 1) * WORDS);
    }
    OperandSums sums;
    sums.add(kept.channels + begin, end - begin, weight);
    // Beyond the last channel there are no scales.
    if (begin == end) continue;
    wait_for_copies();
    scales.add(i, sums, inverse, kept.template input_sum<WORDS>(segment * WORDS), total.columns);
  }
}

// Add a warp's share of the chunk to its sums.
template <typename Kept, typename Scales>
__device__ __forceinline__ void add_chunk(const Kept& kept, const Scales& scales, const u8* weight,
                                          SingleRowSums& total) {
  if constexpr (IS_INT4)
    add_segments(kept, scales, weight, total);
  else
    add_columns(kept, weight, total);
}

template <typename Kept, typename Scales>
__device__ __forceinline__ void add_chunk(const Kept& kept, const Scales&, const u8* weight,
                                          MultiRowSums& total) {
  total.add(kept, kept.size, weight);
}

// Adds up the sums of all warps of a block in shared memory.
struct SingleRowReduction {
  // Columns that a thread adds up, THREADS apart.
  static constexpr int COLUMNS_PER_THREAD = (BLOCK_N + THREADS - 1) / THREADS;
  // Threads write to different banks.
  static constexpr int PITCH = Config::PER_LANE + 4;

  alignas(16) float warp_sums[Config::WARPS_K][BLOCK_N / Config::PER_LANE * PITCH];

  // Write this thread's sums and wait for those of the others.
  __device__ __forceinline__ void exchange(const SingleRowSums& total) {
    int warp = threadIdx.x / WARP;
    int thread = (warp % Config::WARPS_N) * WARP + threadIdx.x % WARP;
    float4* row = reinterpret_cast<float4*>(warp_sums[warp / Config::WARPS_N] + thread * PITCH);
#pragma unroll
    for (int c = 0; c < Config::PER_LANE; c += 4)
      row[c / 4] = float4{total.columns[c], total.columns[c + 1], total.columns[c + 2],
                          total.columns[c + 3]};
    // Other threads read the scales that this one copied, and no copy may outlive the block.
    if constexpr (IS_QUANTIZED) wait_for_copies();
    __syncthreads();
  }

  // Add up this thread's columns, always in the order of the warps.
  __device__ __forceinline__ void add_up(float (&sums)[COLUMNS_PER_THREAD]) const {
#pragma unroll
    for (int i = 0; i < COLUMNS_PER_THREAD; i++) {
      // Beyond the last column, repeat it: a branch would separate the loads.
      int here = min(item_of_thread(i), BLOCK_N - 1);
      sums[i] = 0.0f;
#pragma unroll
      for (int k = 0; k < Config::WARPS_K; k++)
        sums[i] += warp_sums[k][here / Config::PER_LANE * PITCH + here % Config::PER_LANE];
    }
  }
};

typedef Conditional<HAS_SEVERAL_ROWS, MultiRowReduction, SingleRowReduction>::Type Reduction;

}  // namespace teal
