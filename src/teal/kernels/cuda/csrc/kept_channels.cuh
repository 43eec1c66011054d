// Compaction: the channels of a chunk that at least one row keeps, in order.

#pragma once

#include "multi_row_mma.cuh"
#include "weight_rows.cuh"

namespace teal {

// Channels of a chunk in words of 32.
constexpr int CHANNEL_WORDS = (Config::CHUNK + WARP - 1) / WARP;

typedef Conditional<HAS_SEVERAL_ROWS, MultiRowChannels, SingleRowChannels>::Type ChannelStore;

// What KeptChannels consists of. Each layer adds what only some formats need, and is empty for the
// others. Layers derive from each other, so that one pointer addresses all members.

struct KeptCounts : ChannelStore {
  int warp_counts[WARPS];
  int size;
};

// Where the kept channels of each word begin. Only int4 needs it, to find those of a group.
template <bool IS_THERE>
struct WordStarts : KeptCounts {
  int starts[CHANNEL_WORDS + 1];

  __device__ __forceinline__ void set_start(int word, int start) { starts[word] = start; }

  // How many channels before a word are kept.
  __device__ __forceinline__ int before(int word) const { return starts[word]; }
};

template <>
struct WordStarts<false> : KeptCounts {
  __device__ __forceinline__ void set_start(int, int) {}
};

// A power of two that brings activations into the range of float16.
template <bool IS_THERE>
struct InputFactor : WordStarts<IS_INT4> {
  u32 largest[WARPS];  // of each warp, the bits of the largest magnitude

  __device__ __forceinline__ void set_largest(int warp, u32 magnitude) {
    largest[warp] = magnitude;
  }

  // Both for whole warps.
  __device__ __forceinline__ float factor() const {
    return __uint_as_float((127u + 127u - exponent_of_inverse()) << 23);
  }

  __device__ __forceinline__ float inverse_factor() const {
    return __uint_as_float(exponent_of_inverse() << 23);
  }

 private:
  // The largest operand lies in [2^14, 2^15), or is infinite if the activation is.
  __device__ __forceinline__ u32 exponent_of_inverse() const {
    int lane = threadIdx.x % WARP;
    u32 magnitude = __reduce_max_sync(~0u, lane < WARPS ? largest[lane] : 0);
    return max(magnitude >> 23, 22) - 14;
  }
};

template <>
struct InputFactor<false> : WordStarts<IS_INT4> {
  __device__ __forceinline__ void set_largest(int, u32) {}
  __device__ __forceinline__ float factor() const { return 1.0f; }
  __device__ __forceinline__ float inverse_factor() const { return 1.0f; }
};

// Sums of the kept activations of each word. Only codes with an offset need them.
template <bool IS_THERE>
struct InputSums : InputFactor<HAS_INPUT_FACTOR> {
  float input_sums[CHANNEL_WORDS];

  __device__ __forceinline__ void set_input_sum(int word, float sum) { input_sums[word] = sum; }

  // Sum over NUMBER words.
  template <int NUMBER>
  __device__ __forceinline__ float input_sum(int first) const {
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < NUMBER; i++) all += input_sums[first + i];
    return all;
  }
};

template <>
struct InputSums<false> : InputFactor<HAS_INPUT_FACTOR> {
  __device__ __forceinline__ void set_input_sum(int, float) {}
};

// The kept channels of a chunk.
struct KeptChannels : InputSums<HAS_CODE_OFFSET> {
  // Compact the channels of a chunk: a thread decides on those at channel_in_chunk.
  __device__ __forceinline__ void compact(
      const bool (&keeps)[CHANNELS_PER_THREAD],
      const float (&x)[Config::ROWS][CHANNELS_PER_THREAD], int first_channel) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 kept[CHANNELS_PER_THREAD];
    int number = 0;
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; i++) {
      kept[i] = __ballot_sync(~0u, keeps[i]);
      number += __popc(kept[i]);
    }
    if (lane == 0) warp_counts[warp] = number;
    if constexpr (HAS_INPUT_FACTOR) {
      u32 magnitude = 0;
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_THREAD; i++)
        if (keeps[i]) magnitude = max(magnitude, __float_as_uint(fabsf(x[0][i])));
      magnitude = __reduce_max_sync(~0u, magnitude);
      if (lane == 0) set_largest(warp, magnitude);
    }
    __syncthreads();
    float multiplier = factor();
    int place = (int)__reduce_add_sync(~0u, lane < warp ? warp_counts[lane] : 0);
    if (threadIdx.x == THREADS - WARP) size = place + number;
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; i++) {
      int word = warp * CHANNELS_PER_THREAD + i;
      if constexpr (IS_INT4) {
        if (word < CHANNEL_WORDS && lane == 0) set_start(word, place);
        if (word == CHANNEL_WORDS - 1 && lane == 0)
          set_start(CHANNEL_WORDS, place + __popc(kept[i]));
      }
      if constexpr (HAS_CODE_OFFSET) {
        float sum = warp_sum(keeps[i] ? x[0][i] : 0.0f);
        if (word < CHANNEL_WORDS && lane == 0) set_input_sum(word, sum);
      }
      if (keeps[i]) {
        float inputs[Config::ROWS];
#pragma unroll
        for (int row = 0; row < Config::ROWS; row++) inputs[row] = x[row][i] * multiplier;
        int earlier = __popc(kept[i] & ((1u << lane) - 1));
        put(place + earlier, first_channel + channel_in_chunk(i), inputs);
      }
      place += __popc(kept[i]);
    }
    __syncthreads();
  }
};

}  // namespace teal
