// The kept channels of a chunk, their strips in any format, and sums of strips that are floats.
//
// A thread holds 8 columns of a strip at a time if they have 16 bits, else 16.
//
// Set on the compiler's command line, beside what cuda_numbers.cuh wants: K, N, CHUNK, WARPS_N,
// WARPS_K, UNROLL, FORMAT.

#pragma once

#include "cuda_numbers.cuh"

// Of the weight.
#define FLOATS 0
#define INT8 1
#define FP8 2
#define INT4 3

// Whether activations are scaled to fit into float16, which the codes of 8 bits become.
#define SCALES_INPUTS (BFLOAT16 && (FORMAT == INT8 || FORMAT == FP8))

constexpr int BITS = FORMAT == FLOATS ? 16 : FORMAT == INT4 ? 4 : 8;
// Of codes of 4 bits only 8: the sums of 32 columns would leave no registers.
constexpr int LOAD_BYTES = FORMAT == INT4 ? 8 : 16;
constexpr int PER_LANE = 8 * LOAD_BYTES / BITS;  // columns
// Lanes of a warp that have columns of their own: of a quad, all four have the same.
constexpr int SLOTS = FORMAT == FLOATS ? WARP : WARP / 4;
constexpr int ALIKE = WARP / SLOTS;
// Sums of threads lie apart in shared memory, so that they are written to different banks.
constexpr int PITCH = PER_LANE + 4;
constexpr int WARP_N = SLOTS * PER_LANE;
constexpr int THREADS = WARP * WARPS_N * WARPS_K;
constexpr int BLOCK_N = WARP_N * WARPS_N;
constexpr int PER_THREAD = (CHUNK + THREADS - 1) / THREADS;
constexpr u64 STRIP_BYTES = (u64)N * BITS / 8;

// Which of the warp's columns a thread has, in units of PER_LANE.
__device__ __forceinline__ int slot() { return threadIdx.x % WARP / ALIKE; }

// A kept channel and its activation.
struct Entry {
  u32 channel;
  float value;
};

// Weights of a channel, which nobody reads again.
struct Strip {
  u32 words[LOAD_BYTES / 4];
};

__device__ __forceinline__ Strip load_strip(const u8* pointer) {
  Strip strip;
#if FORMAT == INT4
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(strip.words[0]), "=r"(strip.words[1])
               : "l"(pointer));
#else
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(strip.words[0]), "=r"(strip.words[1]), "=r"(strip.words[2]), "=r"(strip.words[3])
               : "l"(pointer));
#endif
  return strip;
}

#if FORMAT == FLOATS
// Add the strips first, first + stride, … of a list for this thread's columns.
__device__ __forceinline__ void add_strips(const Entry* list, int first, int end, int stride,
                                           const u8* weight, float (&sums)[PER_LANE]) {
  for (; first < end; first += stride * UNROLL) {
    Strip strips[UNROLL];
    float values[UNROLL];
    // All loads first. Beyond the list's end they read its last strip, and count for nothing.
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int entry = first + u * stride;
      Entry here = list[min(entry, end - 1)];
      values[u] = entry < end ? here.value : 0.0f;
      strips[u] = load_strip(weight + here.channel * STRIP_BYTES);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int word = 0; word < LOAD_BYTES / 4; word++) {
        sums[2 * word] += values[u] * low_half(strips[u].words[word]);
        sums[2 * word + 1] += values[u] * high_half(strips[u].words[word]);
      }
  }
}
#endif

// The kept channels of a chunk, in order.
struct List {
  static constexpr int WORDS = (CHUNK + WARP - 1) / WARP;

  Entry entries[CHUNK];
  u32 words[WORDS];
  int starts[WORDS + 1];
#if SCALES_INPUTS
  u32 largest[THREADS / WARP];  // of each warp, the bits of a magnitude
#endif

  // Fill it: thread t has the channels i · THREADS + t.
  __device__ __forceinline__ void fill(const bool (&keeps)[PER_THREAD], const float (&x)[PER_THREAD],
                                       int first_channel) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = i * (THREADS / WARP) + warp;
      u32 kept = __ballot_sync(~0u, keeps[i]);
      if (word < WORDS && lane == 0) words[word] = kept;
    }
#if SCALES_INPUTS
    u32 magnitude = 0;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
      if (keeps[i]) magnitude = max(magnitude, __float_as_uint(fabsf(x[i])));
    magnitude = __reduce_max_sync(~0u, magnitude);
    if (lane == 0) largest[warp] = magnitude;
#endif
    __syncthreads();
    count_words(lane);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int word = i * (THREADS / WARP) + warp;
      if (word < WORDS && (words[word] >> lane & 1)) {
        int place = starts[word] + __popc(words[word] & ((1u << lane) - 1));
        entries[place] = Entry{(u32)(first_channel + word * WARP + lane), x[i]};
      }
    }
    __syncthreads();
  }

  // How many are kept of the channels before a word.
  __device__ __forceinline__ int before(int word) const { return starts[word]; }

  __device__ __forceinline__ int count() const { return starts[WORDS]; }

  // What activations are multiplied with to become operands of tensor cores, a power of two.
  __device__ __forceinline__ float factor() const {
#if SCALES_INPUTS
    u32 magnitude = 0;
    for (int warp = 0; warp < THREADS / WARP; warp++) magnitude = max(magnitude, largest[warp]);
    // The largest operand lies in [2^14, 2^15), or is as infinite as the activation.
    int exponent = (int)(magnitude >> 23);
    return __uint_as_float((u32)(127 + 14 + 127 - max(exponent, 22)) << 23);
#else
    return 1.0f;
#endif
  }

 private:
  // Every warp counts all words and writes the same numbers: that saves a barrier.
  __device__ __forceinline__ void count_words(int lane) {
    int earlier = 0;
#pragma unroll
    for (int first = 0; first < WORDS; first += WARP) {
      int word = first + lane, sum = word < WORDS ? __popc(words[word]) : 0;
#pragma unroll
      for (int step = 1; step < min(WARP, WORDS); step *= 2) {
        int left = __shfl_up_sync(~0u, sum, step);
        sum += lane < step ? 0 : left;
      }
      if (word < WORDS) starts[word + 1] = earlier + sum;
      earlier += __shfl_sync(~0u, sum, WARP - 1);
    }
    if (lane == 0) starts[0] = 0;
    __syncwarp();
  }
};
