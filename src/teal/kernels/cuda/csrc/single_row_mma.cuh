// Products of one row of activations with weight rows: floats by fused multiply-add, codes on
// tensor cores.
//
// Tensor cores add up a row of A times a column of B. Here a row of A holds weights of the four
// lanes of a quad: of each lane two columns of two channels. Each column of B holds the activations
// at one column of one lane and zeros elsewhere, so that every lane receives the sums of its own
// columns.
//
// Two columns of one channel fill a register. Codes become float16 by one or two operations; what
// that multiplies them by, or adds to them, is taken out of the sums:
//   int8  counts from -128 on, as a denormal number in units of 2^-24
//   fp8   becomes float16, too small by 2^8
//   int4  as int8, from 0 on, every other pair in units of 2^-20; the third pair of a word keeps
//         the fourth beside it, which saves an operation

#pragma once

#include "kept_channels.cuh"

namespace teal {

constexpr int CHANNELS_AT_ONCE = 2;
constexpr int COLUMN_PAIRS = 16 / BITS;  // of a word
// The last batch of a warp may be smaller; with floats, smaller batches would save nothing.
constexpr int SMALLEST_BATCH = !IS_QUANTIZED ? Config::UNROLL
                                             : (Config::UNROLL / 2 + CHANNELS_AT_ONCE - 1) /
                                                   CHANNELS_AT_ONCE * CHANNELS_AT_ONCE;
static_assert(!IS_QUANTIZED || Config::UNROLL % CHANNELS_AT_ONCE == 0,
              "batches are multiplied whole");
static_assert(!IS_QUANTIZED || LOAD_WORDS * COLUMN_PAIRS % 2 == 0,
              "pairs are multiplied two by two");

// A pair of columns of a word as operands: the columns `pair` and `pair` + COLUMN_PAIRS.
__device__ __forceinline__ u32 column_pair(u32 word, int pair) {
  if constexpr (Config::FORMAT == Format::INT8) {
    u32 counts = word ^ 0x80808080u;
    return pair == 0 ? counts & 0x00ff00ffu : __byte_perm(counts, 0, 0x4341);
  } else if constexpr (Config::FORMAT == Format::FP8) {
    u32 bytes = pair == 0 ? word << 8 : word;
    return bytes & 0x80008000u | bytes >> 1 & 0x3f803f80u;
  } else {
    if (pair < 2) return word & (pair == 0 ? 0x000f000fu : 0x00f000f0u);
    u32 high = __byte_perm(word, 0, 0x4341);
    return pair == 2 ? high : high & 0x00f000f0u;
  }
}

// Mask of the half of an operand that meets the lane's columns.
__device__ __forceinline__ u32 operand_mask() {
  int row = threadIdx.x % WARP / 4, first = 2 * (threadIdx.x % 4);
  return row == first ? 0x0000ffffu : row == first + 1 ? 0xffff0000u : 0u;
}

template <int NUMBER>
__device__ __forceinline__ void add_floats(float (&sums)[Config::PER_LANE],
                                           const WeightRowBatch<NUMBER>& batch) {
#pragma unroll
  for (int i = 0; i < NUMBER; i++)
#pragma unroll
    for (int word = 0; word < LOAD_WORDS; word++) {
      float input = batch.operands[i];
      sums[2 * word] += input * low_half(batch.rows[i].words[word]);
      sums[2 * word + 1] += input * high_half(batch.rows[i].words[word]);
    }
}

template <int NUMBER>
__device__ __forceinline__ void add_codes(float (&sums)[Config::PER_LANE],
                                          const WeightRowBatch<NUMBER>& batch) {
  u32 mask = operand_mask();
#pragma unroll
  for (int channel = 0; channel < NUMBER; channel += CHANNELS_AT_ONCE) {
    u32 first = batch.operands[channel] & mask, second = batch.operands[channel + 1] & mask;
#pragma unroll
    for (int pair = 0; pair < LOAD_WORDS * COLUMN_PAIRS; pair += 2) {
      u32 columns[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int this_pair = pair + i % 2;
        columns[i] = column_pair(batch.rows[channel + i / 2].words[this_pair / COLUMN_PAIRS],
                                 this_pair % COLUMN_PAIRS);
      }
      // Two pairs of the first channel, then of the second.
      mma_float16(sums + 2 * pair, columns, first, second);
    }
  }
}

// A lane's sums over kept channels, in the units of the operands.
struct OperandSums {
  float sums[Config::PER_LANE] = {};

  // Add `count` kept channels, CHANNEL_STRIDE apart.
  __device__ __forceinline__ void add(const KeptChannel* kept, int count, const u8* weight) {
    constexpr int UNROLL = Config::UNROLL, STEP = UNROLL * CHANNEL_STRIDE;
    if constexpr (Config::DEPTH == 1) {
#pragma unroll 1
      for (; count >= UNROLL; count -= UNROLL) {
        WeightRowBatch<UNROLL> batch;
        batch.template load<true>(kept, count, weight);
        add_batch(batch);
        kept += STEP;
      }
      if (SMALLEST_BATCH < UNROLL && count > 0 && count <= SMALLEST_BATCH)
        add_last<SMALLEST_BATCH>(kept, count, weight);
      else if (count > 0)
        add_last<UNROLL>(kept, count, weight);
    } else {
      // One batch is loaded while the other is added.
      WeightRowBatch<UNROLL> even, odd;
      if (count > 0) even.template load<false>(kept, count, weight);
#pragma unroll 1
      while (count > 0) {
        if (count > UNROLL) odd.template load<false>(kept + STEP, count - UNROLL, weight);
        add_batch(even);
        count -= 2 * UNROLL, kept += 2 * STEP;
        if (count > 0) even.template load<false>(kept, count, weight);
        if (count > -UNROLL) add_batch(odd);
      }
    }
  }

  // Sum of a column: of counts, if codes are integers.
  __device__ __forceinline__ float sum(int column) const {
    if constexpr (!IS_QUANTIZED) {
      return sums[column];
    } else {
      // Which pair holds the column, and which of the two it is.
      int word = column / (2 * COLUMN_PAIRS), pair = column % COLUMN_PAIRS;
      int half = column / COLUMN_PAIRS % 2;
      const float* pairs = sums + 2 * word * COLUMN_PAIRS + half;
      bool is_fp8 = Config::FORMAT == Format::FP8;
      float unit = is_fp8 ? 1 << 8 : IS_INT4 && pair % 2 == 1 ? 1 << 20 : 1 << 24;
      float beside = IS_INT4 && pair == 2 ? pairs[2 * 3] : 0.0f;
      return (pairs[2 * pair] - beside) * unit;
    }
  }

 private:
  template <int NUMBER>
  __device__ __forceinline__ void add_last(const KeptChannel* kept, int count, const u8* weight) {
    WeightRowBatch<NUMBER> batch;
    batch.template load<false>(kept, count, weight);
    add_batch(batch);
  }

  template <int NUMBER>
  __device__ __forceinline__ void add_batch(const WeightRowBatch<NUMBER>& batch) {
    if constexpr (IS_QUANTIZED)
      add_codes(sums, batch);
    else
      add_floats(sums, batch);
  }
};

}  // namespace teal
