// Several rows of activations, times strips of floats, on tensor cores.
//
// Tensor cores add up 16 columns of 16 channels for eight rows at once. The lanes of a warp stand in
// eight groups of four. A group reads eight columns, each of its lanes those of four channels: two
// channels of a column beside each other are an operand, and the channels of the group are the 16.
// So a strip is read once for all rows, and multiplied once. Rows that are missing are zero.
//
// Set on the compiler's command line: what tile_config.cuh wants. A thread has PER_LANE / 2 pieces of
// columns and asks for UNROLL channels, shared with its group, at a time.

#pragma once

#include "tile_config.cuh"

#if ROWS > 1

constexpr int OPERAND = 16;                      // channels
constexpr int CHANNELS = OPERAND / LANES_ALIKE;  // of a lane, in an operand
constexpr int PIECE = LANE_N;                    // columns that a lane reads at once
constexpr int PIECE_N = WARP / LANES_ALIKE * PIECE;
constexpr int PIECES = WARP_N / PIECE_N;
constexpr int STEP = UNROLL * WARPS_K;  // entries of a list between two batches of a warp

static_assert(ROWS <= 8 && UNROLL % OPERAND == 0 && PER_LANE % 2 == 0, "operands are filled");

__device__ __forceinline__ int lane_in_group() { return threadIdx.x % LANES_ALIKE; }
__device__ __forceinline__ int group() { return threadIdx.x % WARP / LANES_ALIKE; }

// Of a list, in order: channels, and the activations of each row, zero in rows that drop them.
struct Entries {
  static constexpr int ROOM = (CHUNK + UNROLL - 1) / UNROLL * UNROLL;
  // Rows begin in different banks.
  static constexpr int ROW = (ROOM + 63) / 64 * 64 + OPERAND;

  alignas(16) u32 channels[ROOM];
  alignas(16) u16 inputs[ROWS][ROW];

  __device__ __forceinline__ void put(int place, u32 channel, const float (&x)[ROWS]) {
    channels[place] = channel;
#pragma unroll
    for (int row = 0; row < ROWS; row++) inputs[row][place] = to_bits(x[row]);
  }
};

// Strips that are under way together, and what they are multiplied with.
struct Batch {
  static constexpr int OPERANDS = UNROLL / OPERAND;

  u32 words[OPERANDS][CHANNELS][PIECES][PIECE / 2];
  uint2 inputs[OPERANDS];  // of the row that is the lane's group

  // Ask for those of the entries from `begin` on. Where they are fewer than UNROLL, the last one of the
  // list is read again, and counts for nothing.
  __device__ __forceinline__ void ask(const Entries& list, int count, int begin, const u8* weight,
                                      const u32 (&offsets)[PIECES]) {
    if (begin + UNROLL <= count)
      ask_some<true>(list, count, begin, weight, offsets);
    else
      ask_some<false>(list, count, begin, weight, offsets);
  }

 private:
  template <bool IS_WHOLE>
  __device__ __forceinline__ void ask_some(const Entries& list, int count, int begin, const u8* weight,
                                           const u32 (&offsets)[PIECES]) {
#pragma unroll
    for (int operand = 0; operand < OPERANDS; operand++) {
      int first = begin + operand * OPERAND + lane_in_group() * CHANNELS;
      uint4 channels = *reinterpret_cast<const uint4*>(list.channels + first);
      uint2 input = *reinterpret_cast<const uint2*>(list.inputs[min(group(), ROWS - 1)] + first);
      if (group() >= ROWS) input = uint2{};
      if (!IS_WHOLE) {
        u32 last = list.channels[count - 1];
        if (first + 0 >= count) channels.x = last;
        if (first + 1 >= count) channels.y = last;
        if (first + 2 >= count) channels.z = last;
        if (first + 3 >= count) channels.w = last;
        input.x &= first_of_pair(count - first);
        input.y &= first_of_pair(count - first - 2);
      }
      inputs[operand] = input;
      ask_channel(words[operand][0], channels.x, weight, offsets);
      ask_channel(words[operand][1], channels.y, weight, offsets);
      ask_channel(words[operand][2], channels.z, weight, offsets);
      ask_channel(words[operand][3], channels.w, weight, offsets);
    }
  }

  // The bits of the first `count` numbers of a pair.
  static __device__ __forceinline__ u32 first_of_pair(int count) {
    return count >= 2 ? ~0u : count == 1 ? 0xffffu : 0u;
  }

  static __device__ __forceinline__ void ask_channel(u32 (&words)[PIECES][PIECE / 2], u32 channel,
                                                     const u8* weight,
                                                     const u32 (&offsets)[PIECES]) {
    weight += channel * STRIP_BYTES;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) load_once(words[piece], weight + offsets[piece]);
  }
};

// The sums of a group's columns, for the two rows that a lane has: twice its place in the group, and
// the next.
struct SumsOfRows {
  float sums[PIECES][PIECE / 2][4] = {};
  u32 offsets[PIECES];  // of pieces, in bytes

  // Of `columns` columns from the thread's first one on; pieces beyond them are the first one again.
  __device__ __forceinline__ explicit SumsOfRows(int columns) {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
      offsets[piece] = piece * PIECE_N < columns ? piece * PIECE_N * BITS / 8 : 0;
  }

  // Add a warp's share of a list.
  __device__ __forceinline__ void add(const Entries& list, int count, const u8* weight) {
    int begin = threadIdx.x / WARP / WARPS_N * UNROLL;
#if DEPTH == 1
#pragma unroll 1
    for (; begin < count; begin += STEP) {
      Batch batch;
      batch.ask(list, count, begin, weight, offsets);
      add_batch(batch);
    }
#else
    // While one batch is added, the next is on its way.
    Batch even, odd;
    if (begin < count) even.ask(list, count, begin, weight, offsets);
#pragma unroll 1
    while (begin < count) {
      if (begin + STEP < count) odd.ask(list, count, begin + STEP, weight, offsets);
      add_batch(even);
      begin += 2 * STEP;
      if (begin < count) even.ask(list, count, begin, weight, offsets);
      if (begin - STEP < count) add_batch(odd);
    }
#endif
  }

  // Put them where the block adds them up: of a lane's two rows, from its group's first column on.
  __device__ __forceinline__ void put(float2* of_rows) const {
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
      for (int pair = 0; pair < PIECE / 2; pair++) {
        const float(&four)[4] = sums[piece][pair];
        *reinterpret_cast<float4*>(of_rows + piece * PIECE_N + 2 * pair) =
            float4{four[0], four[1], four[2], four[3]};
      }
  }

 private:
  __device__ __forceinline__ void add_batch(const Batch& batch) {
#pragma unroll
    for (int operand = 0; operand < Batch::OPERANDS; operand++)
#pragma unroll
      for (int piece = 0; piece < PIECES; piece++)
#pragma unroll
        for (int pair = 0; pair < PIECE / 2; pair++) {
          // Of each pair of channels the pair's first column, then its second.
          u32 columns[4];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            u32 one = batch.words[operand][2 * half][piece][pair];
            u32 other = batch.words[operand][2 * half + 1][piece][pair];
            columns[2 * half] = __byte_perm(one, other, 0x5410);
            columns[2 * half + 1] = __byte_perm(one, other, 0x7632);
          }
          uint2 inputs = batch.inputs[operand];
#if BFLOAT16
          multiply_bfloat16(sums[piece][pair], columns, inputs.x, inputs.y);
#else
          multiply_float16(sums[piece][pair], columns, inputs.x, inputs.y);
#endif
        }
  }
};

// The sums of all warps of a block in shared memory, of two rows beside each other.
struct Totals {
  // Those that a thread adds up, THREADS apart.
  static constexpr int OWN = (ROW_PAIRS * BLOCK_N + THREADS - 1) / THREADS;
  // Those of four pairs are written to different banks.
  static constexpr int PITCH_OF_PAIR = WARPS_K * BLOCK_N + 2;

  alignas(16) float2 of_pairs[ROW_PAIRS][PITCH_OF_PAIR];

  // Put those of this thread's columns there, and wait for those of the others.
  __device__ __forceinline__ void exchange(const SumsOfRows& total) {
    int warp = threadIdx.x / WARP;
    int column = warp % WARPS_N * WARP_N + group() * PIECE;
    if (lane_in_group() < ROW_PAIRS)
      total.put(of_pairs[lane_in_group()] + warp / WARPS_N * BLOCK_N + column);
    __syncthreads();
  }

  // Add up this thread's, each in the order of the warps.
  __device__ __forceinline__ void add_up(float2 (&sums)[OWN]) const {
#pragma unroll
    for (int own = 0; own < OWN; own++) {
      // Beyond the last, it again: nothing stands between the loads.
      int here = min(place_of(own), ROW_PAIRS * BLOCK_N - 1);
      const float2* of_warps = of_pairs[here / BLOCK_N] + here % BLOCK_N;
      sums[own] = float2{0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < WARPS_K; k++) {
        sums[own].x += of_warps[k * BLOCK_N].x;
        sums[own].y += of_warps[k * BLOCK_N].y;
      }
    }
  }
};

#endif
