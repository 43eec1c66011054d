// The list of the channels of a chunk that some row keeps.
//
// Set on the compiler's command line: what cuda_cut.cuh wants.

#pragma once

#include "cuda_rows.cuh"
#include "cuda_strips.cuh"

// The kept channels of a chunk, in order.
struct List {
  static constexpr int WORDS = (CHUNK + WARP - 1) / WARP;

  Entries entries;
  u32 words[WORDS];  // a bit for each channel
  int starts[WORDS + 1];
#if HAS_FACTOR
  u32 largest[THREADS / WARP];  // of each warp, the bits of a magnitude
#endif
#if HAS_OFFSET
  float sums[WORDS];  // of the kept activations of each word
#endif

  // Fill it: thread t has the channels i · THREADS + t, which some row keeps.
  __device__ __forceinline__ void fill(const bool (&keeps)[PER_THREAD],
                                       const float (&x)[ROWS][PER_THREAD], int first_channel) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    u32 kept[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = i * (THREADS / WARP) + warp;
      kept[i] = __ballot_sync(~0u, keeps[i]);
      if (word < WORDS && lane == 0) words[word] = kept[i];
    }
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
    int places[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = i * (THREADS / WARP) + warp, start = counted(word);
      places[i] = start + __popc(kept[i] & ((1u << lane) - 1));
      if (word < WORDS && lane == 0) starts[word] = start;
      if (word == WORDS - 1 && lane == 0) starts[WORDS] = start + __popc(kept[i]);
#if HAS_OFFSET
      float sum = warp_sum(keeps[i] ? x[0][i] : 0.0f);
      if (word < WORDS && lane == 0) sums[word] = sum;
#endif
    }
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      if (!keeps[i]) continue;
      float inputs[ROWS];
#pragma unroll
      for (int row = 0; row < ROWS; row++) inputs[row] = x[row][i] * multiplier;
      entries.put(places[i], first_channel + i * THREADS + threadIdx.x, inputs);
    }
    __syncthreads();
  }

  // How many are kept of the channels before a word.
  __device__ __forceinline__ int before(int word) const { return starts[word]; }

  __device__ __forceinline__ int count() const { return starts[WORDS]; }

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
    u32 magnitude = __reduce_max_sync(~0u, lane < THREADS / WARP ? largest[lane] : 0);
    return max(magnitude >> 23, 22) - 14;
  }
#endif

  // Count the bits of the words before one; for whole warps.
  __device__ __forceinline__ int counted(int word) const {
    u32 bits = 0;
#pragma unroll
    for (int first = 0; first < WORDS; first += WARP) {
      int here = first + threadIdx.x % WARP;
      if (here < min(word, WORDS)) bits += __popc(words[here]);
    }
    return (int)__reduce_add_sync(~0u, bits);
  }
};
