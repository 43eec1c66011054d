// The product of a chunk's kept channels and the columns of a block.
//
// Set on the compiler's command line: what cuda_scales.cuh wants.

#pragma once

#include "cuda_scales.cuh"

#if FORMAT == INT4
// Channels that a warp scales at once: its share of a chunk, or a group if that is not cut evenly.
constexpr int SHARE = CHUNK / WARPS_K;
constexpr int SEGMENT = CHUNK % (WARPS_K * WARP) == 0 && GROUP % SHARE == 0 ? SHARE : GROUP;
static_assert(CHUNK % SEGMENT == 0 && SEGMENT % WARP == 0, "segments cover the chunk");
constexpr int SEGMENTS = CHUNK / SEGMENT;
constexpr int TURNS = (SEGMENTS + WARPS_K - 1) / WARPS_K;
#endif

// Add a warp's share of the chunk for a thread's columns, of which `column` is the first in `scales`,
// which may still be on their way; what every column of 8 bits is scaled with is left to later. All
// warps of a block call it together.
template <int WIDTH>
__device__ __forceinline__ void add_chunk(const List& list, const ScaleTile<WIDTH>& scales, int column,
                                          const u8* weight, float (&total)[ROWS][PER_LANE]) {
  int share = threadIdx.x / WARP / WARPS_N;
  float inverse = 1.0f / list.factor();
#if FORMAT != INT4
  Sums sums;
  sums.add(list.entries + share, (list.count() - share + WARPS_K - 1) / WARPS_K, weight);
  float offset = 0.0f;
#if FORMAT == INT8
  if (share == 0) offset = 128.0f * list.sum<List::WORDS>(0);
#endif
#pragma unroll
  for (int row = 0; row < ROWS; row++)
#pragma unroll
    for (int c = 0; c < PER_LANE; c++) total[row][c] += inverse * sums.sum(c, row) - offset;
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
    sums.add(list.entries + begin, end - begin, weight);
    if (turn == 0) wait_for_copies_of_all();
    // Beyond the last channel there are no scales.
    if (begin == end) continue;
    scales.add(segment * SEGMENT / GROUP, column, sums, inverse, list.sum<WORDS>(segment * WORDS),
               total[0]);
  }
#endif
}

// The sums of all warps of a block, of one row, in shared memory.
struct Totals {
  alignas(16) float of_warps[WARPS_K][BLOCK_N / PER_LANE * PITCH];

  // Put those of this thread's columns there, and wait for those of the others.
  __device__ __forceinline__ void exchange(const float (&total)[PER_LANE]) {
    int warp = threadIdx.x / WARP, thread = (warp % WARPS_N) * WARP + threadIdx.x % WARP;
    float4* row = reinterpret_cast<float4*>(of_warps[warp / WARPS_N] + thread * PITCH);
#pragma unroll
    for (int c = 0; c < PER_LANE; c += 4)
      row[c / 4] = float4{total[c], total[c + 1], total[c + 2], total[c + 3]};
    wait_for_copies_of_all();
  }

  // Add up a column of the block, in the order of the warps.
  __device__ __forceinline__ float sum(int column) const {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS_K; k++)
      sum += of_warps[k][column / PER_LANE * PITCH + column % PER_LANE];
    return sum;
  }
};
