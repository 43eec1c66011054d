// The list of the channels of a chunk that some row keeps.
//
// Set on the compiler's command line: what tile_config.cuh wants.

#pragma once

#include "multi_row_mma.cuh"
#include "weight_rows.cuh"

// The kept channels of a chunk, in order.
struct List {
  static constexpr int WORDS = (CHUNK + WARP - 1) / WARP;

  Entries entries;
  int of_warps[WARPS];  // how many are kept of the channels of each warp
  int size;
#if FORMAT == INT4
  int starts[WORDS + 1];
#endif
#if HAS_FACTOR
  u32 largest[WARPS];  // of each warp, the bits of a magnitude
#endif
#if HAS_OFFSET
  float sums[WORDS];  // of the kept activations of each word
#endif

  // Fill it: thread t has the channels at place_in_chunk, which some row keeps.
  __device__ __forceinline__ void fill(const bool (&keeps)[PER_THREAD],
                                       const float (&x)[ROWS][PER_THREAD], int first_channel) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 kept[PER_THREAD];
    int number = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      kept[i] = __ballot_sync(~0u, keeps[i]);
      number += __popc(kept[i]);
    }
    if (lane == 0) of_warps[warp] = number;
#if HAS_FACTOR
    u32 magnitude = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
      if (keeps[i]) magnitude = max(magnitude, __float_as_uint(fabsf(x[0][i])));
    magnitude = __reduce_max_sync(~0u, magnitude);
    if (lane == 0) largest[warp] = magnitude;
#endif
    __syncthreads();
    float multiplier = factor();
    int place = (int)__reduce_add_sync(~0u, lane < warp ? of_warps[lane] : 0);
    if (threadIdx.x == THREADS - WARP) size = place + number;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = warp * PER_THREAD + i;
#if FORMAT == INT4
      if (word < WORDS && lane == 0) starts[word] = place;
      if (word == WORDS - 1 && lane == 0) starts[WORDS] = place + __popc(kept[i]);
#endif
#if HAS_OFFSET
      float sum = warp_sum(keeps[i] ? x[0][i] : 0.0f);
      if (word < WORDS && lane == 0) sums[word] = sum;
#endif
      if (keeps[i]) {
        float inputs[ROWS];
#pragma unroll
        for (int row = 0; row < ROWS; row++) inputs[row] = x[row][i] * multiplier;
        int earlier = __popc(kept[i] & ((1u << lane) - 1));
        entries.put(place + earlier, first_channel + place_in_chunk(i), inputs);
      }
      place += __popc(kept[i]);
    }
    __syncthreads();
  }

#if FORMAT == INT4
  // How many are kept of the channels before a word.
  __device__ __forceinline__ int before(int word) const { return starts[word]; }
#endif

  __device__ __forceinline__ int count() const { return size; }

  // What activations are multiplied with to become operands of tensor cores, a power of two; for
  // whole warps.
  __device__ __forceinline__ float factor() const {
#if HAS_FACTOR
    return __uint_as_float((127u + 127u - exponent_of_inverse()) << 23);
#else
    return 1.0f;
#endif
  }

  // One divided by that.
  __device__ __forceinline__ float inverse_factor() const {
#if HAS_FACTOR
    return __uint_as_float(exponent_of_inverse() << 23);
#else
    return 1.0f;
#endif
  }

#if HAS_OFFSET
  // The sum of the kept activations of some words.
  template <int NUMBER>
  __device__ __forceinline__ float sum(int first) const {
    float all = 0.0f;
#pragma unroll
    for (int i = 0; i < NUMBER; i++) all += sums[first + i];
    return all;
  }
#endif

 private:
#if HAS_FACTOR
  // The largest operand lies in [2^14, 2^15), or is as infinite as the activation.
  __device__ __forceinline__ u32 exponent_of_inverse() const {
    int lane = threadIdx.x % WARP;
    u32 magnitude = __reduce_max_sync(~0u, lane < WARPS ? largest[lane] : 0);
    return max(magnitude >> 23, 22) - 14;
  }
#endif
};
