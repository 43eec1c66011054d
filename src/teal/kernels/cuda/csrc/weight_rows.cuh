// Strips of kept channels in any format, for one row of activations.
//
// A thread has PER_LANE columns beside each other.
//
// Set on the compiler's command line: what tile_config.cuh wants.

#pragma once

#include "tile_config.cuh"

#if ROWS == 1

constexpr int LOAD_BYTES = PER_LANE * BITS / 8;
constexpr int LOAD_WORDS = LOAD_BYTES / 4;
// Entries of a list between two of one warp: those of int4 are cut by groups instead.
constexpr int STRIDE = FORMAT == INT4 ? 1 : WARPS_K;

// What a strip is multiplied with: an activation, or twice an operand of tensor cores.
#if FORMAT == FLOATS
typedef float Input;
__device__ __forceinline__ Input input_of(float x) { return x; }
#else
typedef u32 Input;
__device__ __forceinline__ Input input_of(float x) { return to_float16_pair(x, x); }
#endif

// A kept channel and its activation. Of int4 one load brings both; elsewhere the compiler chooses, which
// is faster.
struct alignas(FORMAT == INT4 ? 8 : 4) Entry {
  u32 channel;
  Input input;
};

// A thread's weights of a channel, which nobody reads again.
struct Strip {
  u32 words[LOAD_WORDS];

  __device__ __forceinline__ void load(const u8* pointer) { load_once(words, pointer); }
};

// Strips that are under way together, and what they are multiplied with.
template <int NUMBER>
struct Batch {
  Strip strips[NUMBER];
  Input inputs[NUMBER];

  // Ask for those of the first entries of a warp, of which there are `count`. Where they are fewer
  // than NUMBER, the last one is read again, and counts for nothing.
  template <bool IS_WHOLE>
  __device__ __forceinline__ void ask(const Entry* list, int count, const u8* weight) {
#pragma unroll
    for (int u = 0; u < NUMBER; u++) {
      bool is_there = IS_WHOLE || u < count;
      Entry here = list[(is_there ? u : count - 1) * STRIDE];
      inputs[u] = is_there ? here.input : Input{};
      strips[u].load(weight + here.channel * STRIP_BYTES);
    }
  }
};

// Of a list, in order.
struct Entries {
  Entry all[CHUNK];

  __device__ __forceinline__ void put(int place, u32 channel, const float (&x)[ROWS]) {
    Entry& entry = all[place];
    entry.channel = channel;
    entry.input = input_of(x[0]);
  }
};

#endif
