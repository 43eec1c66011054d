// The product of a chunk's kept channels and the columns of a block.
//
// Set on the compiler's command line: what quant_scales.cuh wants.

#pragma once

#include "quant_scales.cuh"

#if ROWS == 1

// Add a warp's share of the chunk for a thread's columns; what a column of 8 bits is scaled with is
// left to later.
__device__ __forceinline__ void add_chunk(const List& list, const GroupScales& scales,
                                          const u8* weight, float (&total)[PER_LANE]) {
  int share = share_of_warp();
  float inverse = list.inverse_factor();
#if FORMAT != INT4
  Sums sums;
  sums.add(list.entries.all + share, (list.count() - share + WARPS_K - 1) / WARPS_K, weight);
  float offset = 0.0f;
#if FORMAT == INT8
  // Each warp takes its share of what codes count from.
#pragma unroll
  for (int turn = 0; turn < List::WORDS; turn += WARPS_K)
    if (turn + share < List::WORDS) offset += 128.0f * list.sum<1>(turn + share);
#endif
#pragma unroll
  for (int c = 0; c < PER_LANE; c++) total[c] += inverse * sums.sum(c) - offset;
#else
#pragma unroll 1
  for (int turn = 0; turn < TURNS; turn++) {
    constexpr int WORDS = SEGMENT / WARP;
    int segment = turn * WARPS_K + share, begin = 0, end = 0;
    if (segment < SEGMENTS) {
      begin = list.before(segment * WORDS);
      end = list.before((segment + 1) * WORDS);
    }
    Sums sums;
    sums.add(list.entries.all + begin, end - begin, weight);
    // Beyond the last channel there are no scales.
    if (begin == end) continue;
    wait_for_copies();
    scales.add(turn, sums, inverse, list.sum<WORDS>(segment * WORDS), total);
  }
#endif
}

// The sums of all warps of a block in shared memory.
struct Totals {
  // Columns that a thread adds up, THREADS apart.
  static constexpr int OWN = (BLOCK_N + THREADS - 1) / THREADS;
  // Those of threads lie apart, so that they are written to different banks.
  static constexpr int PITCH = PER_LANE + 4;

  alignas(16) float of_warps[WARPS_K][BLOCK_N / PER_LANE * PITCH];

  // Put those of this thread's columns there, and wait for those of the others.
  __device__ __forceinline__ void exchange(const float (&total)[PER_LANE]) {
    int warp = threadIdx.x / WARP, thread = (warp % WARPS_N) * WARP + threadIdx.x % WARP;
    float4* row = reinterpret_cast<float4*>(of_warps[warp / WARPS_N] + thread * PITCH);
#pragma unroll
    for (int c = 0; c < PER_LANE; c += 4)
      row[c / 4] = float4{total[c], total[c + 1], total[c + 2], total[c + 3]};
#if FORMAT != FLOATS
    // Others read the scales that this thread copied, and none may come after the block has gone.
    wait_for_copies();
#endif
    __syncthreads();
  }

  // Add up this thread's columns, each in the order of the warps.
  __device__ __forceinline__ void add_up(float (&sums)[OWN]) const {
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      // Beyond the last, it again: nothing stands between the loads.
      int here = min(place_of(own), BLOCK_N - 1);
      sums[own] = 0.0f;
#pragma unroll
      for (int k = 0; k < WARPS_K; k++)
        sums[own] += of_warps[k][here / PER_LANE * PITCH + here % PER_LANE];
    }
  }
};

#else

__device__ __forceinline__ void add_chunk(const List& list, const GroupScales&, const u8* weight,
                                          SumsOfRows& total) {
  total.add(list.entries, list.count(), weight);
}

#endif
