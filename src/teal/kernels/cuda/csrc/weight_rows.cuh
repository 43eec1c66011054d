// Weight rows of kept channels, in any format, for one row of activations.
//
// A lane loads Config::PER_LANE consecutive columns of a weight row at once.

#pragma once

#include "tile_config.cuh"

namespace teal {

constexpr int LOAD_BYTES = Config::PER_LANE * BITS / 8;
constexpr int LOAD_WORDS = LOAD_BYTES / 4;
// Kept channels from one of a warp to its next. Those of int4 are divided by groups instead.
constexpr int CHANNEL_STRIDE = IS_INT4 ? 1 : Config::WARPS_K;

// What a weight row is multiplied by: an activation, or twice the same one as a float16 pair for
// tensor cores.
typedef Conditional<IS_QUANTIZED, u32, float>::Type Operand;

__device__ __forceinline__ Operand operand_of(float x) {
  if constexpr (IS_QUANTIZED)
    return to_float16_pair(x, x);
  else
    return x;
}

// For int4 one load brings both members. For other formats the compiler chooses, which is faster.
struct alignas(IS_INT4 ? 8 : 4) KeptChannel {
  u32 channel;
  Operand operand;
};

// The kept channels of a chunk with their activations, in order.
struct SingleRowChannels {
  KeptChannel channels[Config::CHUNK];

  __device__ __forceinline__ void put(int place, u32 channel, const float (&x)[Config::ROWS]) {
    KeptChannel& kept = channels[place];
    kept.channel = channel;
    kept.operand = operand_of(x[0]);
  }
};

// A lane's columns of one weight row.
struct WeightRow {
  u32 words[LOAD_WORDS];

  __device__ __forceinline__ void load(const u8* pointer) { load_once(words, pointer); }
};

// Weight rows that are loaded together, and what they are multiplied by.
template <int NUMBER>
struct WeightRowBatch {
  WeightRow rows[NUMBER];
  Operand operands[NUMBER];

  // Load those of the first of `count` kept channels of a warp. If there are fewer than NUMBER,
  // load the last one again and multiply it by zero.
  template <bool IS_WHOLE>
  __device__ __forceinline__ void load(const KeptChannel* kept, int count, const u8* weight) {
#pragma unroll
    for (int i = 0; i < NUMBER; i++) {
      bool is_there = IS_WHOLE || i < count;
      KeptChannel here = kept[(is_there ? i : count - 1) * CHANNEL_STRIDE];
      operands[i] = is_there ? here.operand : Operand{};
      rows[i].load(weight + here.channel * WEIGHT_ROW_BYTES);
    }
  }
};

}  // namespace teal
