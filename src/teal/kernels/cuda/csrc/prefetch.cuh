// Prefetches the first weight rows of a product before compaction is complete.
//
// Between the time when a block knows its input and the time when it has compacted its channels,
// memory would be idle. A warp knows earlier which of its own channels it keeps: it prefetches some
// of their weight rows into the L2 cache, and none that are dropped.

#pragma once

#include "tile_config.cuh"

namespace teal {

static_assert(Config::EARLY <= WARP, "a thread has one of the channels");

// Columns of a block; WIDTH at most.
template <int WIDTH>
struct BlockColumns {
  const u8* weight;  // the first column of channel 0
  int number;

  // The columns `distance` further on.
  __device__ __forceinline__ BlockColumns beside(int distance) const {
    return {weight + (u64)distance * BITS / 8, number};
  }

  // Prefetch the weight rows that a warp keeps of its first EARLY channels. `channel` is the first
  // channel of this thread. For whole warps.
  __device__ __forceinline__ void prefetch_kept(bool is_kept, int channel) const {
    if constexpr (Config::EARLY > 0) {
      constexpr int LINE = 128;  // bytes
      constexpr int LINES = (WIDTH * BITS / 8 + LINE - 1) / LINE;
      u32 kept = __ballot_sync(~0u, is_kept);
      int lane = threadIdx.x % WARP;
      const u8* first = weight + (u64)(channel - lane) * WEIGHT_ROW_BYTES;
#pragma unroll
      for (int i = lane; i < Config::EARLY * LINES; i += WARP) {
        int row = i / LINES, begin = i % LINES * LINE;
        if (kept >> row & 1 && begin < number * BITS / 8)
          prefetch(first + row * WEIGHT_ROW_BYTES + begin);
      }
    }
  }
};

}  // namespace teal
