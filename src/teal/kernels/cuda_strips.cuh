// The kept channels of a chunk, and their strips in any format.
//
// A thread has PER_LANE columns beside each other, a warp those of its threads.
//
// Set on the compiler's command line, beside what cuda_numbers.cuh wants: K, N, CHUNK, PER_LANE,
// WARPS_N, WARPS_K, UNROLL, DEPTH, FORMAT, ROWS (of activations; several with floats only).

#pragma once

#include "cuda_numbers.cuh"

// Of the weight.
#define FLOATS 0
#define INT8 1
#define FP8 2
#define INT4 3

// Codes become float16 for tensor cores, activations too: scaled where that would not hold them.
#define HAS_FACTOR (BFLOAT16 && FORMAT != FLOATS)
// Codes that count from below zero: what that adds to a sum is a multiple of the sum of activations.
#define HAS_OFFSET (FORMAT == INT8 || FORMAT == INT4)

static_assert(ROWS == 1 || FORMAT == FLOATS, "codes are multiplied row by row");

constexpr int BITS = FORMAT == FLOATS ? 16 : FORMAT == INT4 ? 4 : 8;
constexpr int LOAD_BYTES = PER_LANE * BITS / 8;
constexpr int LOAD_WORDS = LOAD_BYTES / 4;
// Sums of threads lie apart in shared memory, so that they are written to different banks.
constexpr int PITCH = PER_LANE + 4;
constexpr int WARP_N = WARP * PER_LANE;
constexpr int THREADS = WARP * WARPS_N * WARPS_K;
constexpr int BLOCK_N = WARP_N * WARPS_N;
constexpr int PER_THREAD = (CHUNK + THREADS - 1) / THREADS;
constexpr u64 STRIP_BYTES = (u64)N * BITS / 8;
// Entries of a list between two of one warp: those of int4 are cut by groups instead.
constexpr int STRIDE = FORMAT == INT4 ? 1 : WARPS_K;

// Tensor cores add up codes, and several rows.
#define ON_TENSOR_CORES (FORMAT != FLOATS || ROWS > 1)

// What a strip is multiplied with: an activation, or twice an operand of tensor cores.
#if !ON_TENSOR_CORES
typedef float Input;
__device__ __forceinline__ Input input_of(float x) { return x; }
#elif FORMAT == FLOATS
typedef u32 Input;
__device__ __forceinline__ Input input_of(float x) { return pair_of(x, x); }
#else
typedef u32 Input;
__device__ __forceinline__ Input input_of(float x) { return to_float16_pair(x, x); }
#endif

struct alignas(ROWS % 4 == 0 ? 16 : ROWS % 2 == 0 ? 8 : 4) Inputs {
  Input of_rows[ROWS];
};

// A channel that some row keeps, and its activations, zero in rows that drop it. Of int4 one load brings
// both; elsewhere the compiler chooses, which is faster.
struct alignas(FORMAT == INT4 ? 8 : alignof(Inputs)) Entry {
  u32 channel;
  Inputs inputs;
};

// A thread's weights of a channel, which nobody reads again.
struct Strip {
  u32 words[LOAD_WORDS];

  __device__ __forceinline__ void load(const u8* pointer) { load_once(words, pointer); }
};

// Strips that are under way together, and what they are multiplied with.
struct Batch {
  Strip strips[UNROLL];
  Inputs inputs[UNROLL];

  // Ask for those of the first entries of a warp, of which there are `count`. Where they are fewer
  // than UNROLL, the last one is read again, and counts for nothing.
  template <bool IS_WHOLE>
  __device__ __forceinline__ void ask(const Entry* list, int count, const u8* weight) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      bool is_there = IS_WHOLE || u < count;
      Entry here = list[(is_there ? u : count - 1) * STRIDE];
      inputs[u] = is_there ? here.inputs : Inputs{};
      strips[u].load(weight + here.channel * STRIP_BYTES);
    }
  }
};

// The kept channels of a chunk, in order.
struct List {
  static constexpr int WORDS = (CHUNK + WARP - 1) / WARP;

  Entry entries[CHUNK];
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
      Entry& entry = entries[places[i]];
      entry.channel = first_channel + i * THREADS + threadIdx.x;
#pragma unroll
      for (int row = 0; row < ROWS; row++)
        entry.inputs.of_rows[row] = input_of(x[row][i] * multiplier);
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
