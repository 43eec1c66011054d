// The first strips of a product, asked for before they are listed.
//
// Between the time when a block knows its input and the time when its list is complete, memory would
// idle. A warp knows what it keeps of its own channels before that: it has the L2 cache bring some of
// these strips, no dropped one.
//
// Set on the compiler's command line, beside what tile_config.cuh wants: EARLY.

#pragma once

#include "tile_config.cuh"

static_assert(EARLY <= WARP, "they are of a warp's first channels, one of each thread");

// Columns of a block.
template <int WIDTH>
struct Columns {
  const u8* strip;  // of channel 0
  int number;

  // Those that lie so many columns further on.
  __device__ __forceinline__ Columns beside(int distance) const {
    return {strip + (u64)distance * BITS / 8, number};
  }

  // Ask for the strips of a warp's first EARLY channels, of those that it keeps. `channel` is the first
  // channel of this thread; for whole warps.
  __device__ __forceinline__ void ask_early(bool is_kept, int channel) const {
#if EARLY > 0
    constexpr int LINE = 128;  // bytes
    constexpr int LINES = (WIDTH * BITS / 8 + LINE - 1) / LINE;
    u32 kept = __ballot_sync(~0u, is_kept);
    int lane = threadIdx.x % WARP;
    const u8* first = strip + (u64)(channel - lane) * STRIP_BYTES;
#pragma unroll
    for (int i = lane; i < EARLY * LINES; i += WARP) {
      int own = i / LINES, begin = i % LINES * LINE;
      if (kept >> own & 1 && begin < number * BITS / 8) prefetch(first + own * STRIP_BYTES + begin);
    }
#endif
  }
};
