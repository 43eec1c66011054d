// Sums of strips times the activations of one row: one by one, or on tensor cores.

#pragma once

#include "kept_channels.cuh"

#if ROWS == 1

#if FORMAT != FLOATS

// Tensor cores add up a row of A times a column of B. Here a row of A are weights of the four lanes
// of a quad, of each lane two columns of two channels, and in every column of B the activations stand
// at one column of one lane, with zeros beside them: so each lane is given the sums of its columns.
//
// Two columns of one channel fill a register. Codes become float16 with one or two operations, and what
// that multiplies them with, or adds to them, is taken away from the sums:
//   int8  counts from -128 on as a denormal number, in units of 2^-24
//   fp8   becomes float16, too small by 2^8
//   int4  as int8, from 0 on, every other pair in units of 2^-20; the third pair of a word keeps the
//         fourth beside it, which saves an operation
constexpr int AT_ONCE = 2;  // channels
// The last batch of a warp may be a smaller one.
constexpr int LEAST = (UNROLL / 2 + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
constexpr int PAIRS = 16 / BITS;  // of columns, in a word
static_assert(UNROLL % AT_ONCE == 0, "batches are multiplied whole");
static_assert(LOAD_WORDS * PAIRS % 2 == 0, "pairs are multiplied two by two");

// A pair of columns as operands: the columns `pair` and `pair` + PAIRS of a word.
__device__ __forceinline__ u32 columns_of(u32 word, int pair) {
#if FORMAT == INT8
  u32 counts = word ^ 0x80808080u;
  return pair == 0 ? counts & 0x00ff00ffu : __byte_perm(counts, 0, 0x4341);
#elif FORMAT == FP8
  u32 bytes = pair == 0 ? word << 8 : word;
  return bytes & 0x80008000u | bytes >> 1 & 0x3f803f80u;
#else
  if (pair < 2) return word & (pair == 0 ? 0x000f000fu : 0x00f000f0u);
  u32 high = __byte_perm(word, 0, 0x4341);
  return pair == 2 ? high : high & 0x00f000f0u;
#endif
}

// Which half of an activation, given twice, meets a lane's columns.
__device__ __forceinline__ u32 place_of_input() {
  int row = threadIdx.x % WARP / 4, first = 2 * (threadIdx.x % 4);
  return row == first ? 0x0000ffffu : row == first + 1 ? 0xffff0000u : 0u;
}

#else

// Smaller batches would save nothing.
constexpr int LEAST = UNROLL;

#endif

// The sums of a thread's columns.
struct Sums {
  static constexpr int STEP = UNROLL * STRIDE;  // entries of a list

  float sums[PER_LANE] = {};

  // Add `count` entries of a list, a STRIDE apart.
  __device__ __forceinline__ void add(const Entry* list, int count, const u8* weight) {
#if DEPTH == 1
#pragma unroll 1
    for (; count >= UNROLL; count -= UNROLL) {
      Batch<UNROLL> batch;
      batch.template ask<true>(list, count, weight);
      add_batch(batch);
      list += STEP;
    }
    if (LEAST < UNROLL && count > 0 && count <= LEAST)
      add_last<LEAST>(list, count, weight);
    else if (count > 0)
      add_last<UNROLL>(list, count, weight);
#else
    // While one batch is added, the next is on its way.
    Batch<UNROLL> even, odd;
    if (count > 0) even.template ask<false>(list, count, weight);
#pragma unroll 1
    while (count > 0) {
      if (count > UNROLL) odd.template ask<false>(list + STEP, count - UNROLL, weight);
      add_batch(even);
      count -= 2 * UNROLL, list += 2 * STEP;
      if (count > 0) even.template ask<false>(list, count, weight);
      if (count > -UNROLL) add_batch(odd);
    }
#endif
  }

  // The sum of a column, of counts where codes are counts.
  __device__ __forceinline__ float sum(int column) const {
#if FORMAT == FLOATS
    return sums[column];
#else
    // Where the column's pair lies, and which of the pair it is.
    int word = column / (2 * PAIRS), pair = column % PAIRS, half = column / PAIRS % 2;
    const float* of_pairs = sums + 2 * word * PAIRS + half;
    float unit = FORMAT == FP8 ? 1 << 8 : FORMAT == INT4 && pair % 2 == 1 ? 1 << 20 : 1 << 24;
    float beside = FORMAT == INT4 && pair == 2 ? of_pairs[2 * 3] : 0.0f;
    return (of_pairs[2 * pair] - beside) * unit;
#endif
  }

 private:
  template <int NUMBER>
  __device__ __forceinline__ void add_last(const Entry* list, int count, const u8* weight) {
    Batch<NUMBER> batch;
    batch.template ask<false>(list, count, weight);
    add_batch(batch);
  }

#if FORMAT == FLOATS
  template <int NUMBER>
  __device__ __forceinline__ void add_batch(const Batch<NUMBER>& batch) {
#pragma unroll
    for (int u = 0; u < NUMBER; u++)
#pragma unroll
      for (int word = 0; word < LOAD_WORDS; word++) {
        float input = batch.inputs[u];
        sums[2 * word] += input * low_half(batch.strips[u].words[word]);
        sums[2 * word + 1] += input * high_half(batch.strips[u].words[word]);
      }
  }
#else
  template <int NUMBER>
  __device__ __forceinline__ void add_batch(const Batch<NUMBER>& batch) {
    u32 place = place_of_input();
#pragma unroll
    for (int u = 0; u < NUMBER; u += AT_ONCE) {
      u32 first = batch.inputs[u] & place, second = batch.inputs[u + 1] & place;
#pragma unroll
      for (int pair = 0; pair < LOAD_WORDS * PAIRS; pair += 2) {
        u32 columns[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int this_pair = pair + i % 2;
          columns[i] = columns_of(batch.strips[u + i / 2].words[this_pair / PAIRS], this_pair % PAIRS);
        }
        // Two pairs of the first channel, then of the second.
        multiply_float16(sums + 2 * pair, columns, first, second);
      }
    }
  }
#endif
};

#endif
