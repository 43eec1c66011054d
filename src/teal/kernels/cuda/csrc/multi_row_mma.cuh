// Products of several rows of activations with weight rows in floating point, on tensor cores.
//
// One instruction multiplies 16 columns of 16 channels by eight rows. The lanes of a warp form
// eight quads. A quad loads eight columns, each of its lanes those of four channels; two channels
// of a column make up an operand, and the channels of the quad are the 16. So a weight row is read
// once for all rows. Missing rows are zero.
//
// A lane has PER_LANE / 2 loads of eight columns per channel, and loads UNROLL channels at a time
// together with its quad.

#pragma once

#include "tile_config.cuh"

namespace teal {

constexpr int MMA_CHANNELS = 16;
constexpr int CHANNELS_PER_LANE = MMA_CHANNELS / QUAD_LANES;  // of one operand
constexpr int QUAD_LOAD_N = WARP / QUAD_LANES * QUAD_COLUMNS;  // columns that a warp loads at once
constexpr int QUAD_LOADS = WARP_N / QUAD_LOAD_N;

static_assert(!HAS_SEVERAL_ROWS || (Config::ROWS <= 8 && Config::UNROLL % MMA_CHANNELS == 0 &&
                                    Config::PER_LANE % 2 == 0),
              "operands are filled");

__device__ __forceinline__ int lane_in_quad() { return threadIdx.x % QUAD_LANES; }
__device__ __forceinline__ int quad() { return threadIdx.x % WARP / QUAD_LANES; }

// The kept channels of a chunk in order, with the activations of each row: zero in rows that drop
// the channel.
struct MultiRowChannels {
  // A whole number of batches.
  static constexpr int ROOM =
      (Config::CHUNK + Config::UNROLL - 1) / Config::UNROLL * Config::UNROLL;
  // Rows begin in different banks.
  static constexpr int PITCH = (ROOM + 63) / 64 * 64 + MMA_CHANNELS;

  alignas(16) u32 channels[ROOM];
  alignas(16) u16 inputs[Config::ROWS][PITCH];

  __device__ __forceinline__ void put(int place, u32 channel, const float (&x)[Config::ROWS]) {
    channels[place] = channel;
#pragma unroll
    for (int row = 0; row < Config::ROWS; row++) inputs[row][place] = to_bits(x[row]);
  }
};

// Weight rows that are loaded together, and what they are multiplied by.
struct MultiRowBatch {
  static constexpr int OPERANDS = (Config::UNROLL + MMA_CHANNELS - 1) / MMA_CHANNELS;

  u32 words[OPERANDS][CHANNELS_PER_LANE][QUAD_LOADS][QUAD_COLUMNS / 2];
  uint2 inputs[OPERANDS];  // of the row with the number of the lane's quad

  // Load those of the kept channels from `begin` on. If there are fewer than UNROLL, load the last
  // one again and multiply it by zero.
  __device__ __forceinline__ void load(const MultiRowChannels& kept, int count, int begin,
                                       const u8* weight, const u32 (&offsets)[QUAD_LOADS]) {
    if (begin + Config::UNROLL <= count)
      load_some<true>(kept, count, begin, weight, offsets);
    else
      load_some<false>(kept, count, begin, weight, offsets);
  }

 private:
  template <bool IS_WHOLE>
  __device__ __forceinline__ void load_some(const MultiRowChannels& kept, int count, int begin,
                                            const u8* weight, const u32 (&offsets)[QUAD_LOADS]) {
#pragma unroll
    for (int operand = 0; operand < OPERANDS; operand++) {
      int first = begin + operand * MMA_CHANNELS + lane_in_quad() * CHANNELS_PER_LANE;
      uint4 channels = *reinterpret_cast<const uint4*>(kept.channels + first);
      uint2 input =
          *reinterpret_cast<const uint2*>(kept.inputs[min(quad(), Config::ROWS - 1)] + first);
      if (quad() >= Config::ROWS) input = uint2{};
      if (!IS_WHOLE) {
        u32 last = kept.channels[count - 1];
        if (first + 0 >= count) channels.x = last;
        if (first + 1 >= count) channels.y = last;
        if (first + 2 >= count) channels.z = last;
        if (first + 3 >= count) channels.w = last;
        input.x &= first_of_pair(count - first);
        input.y &= first_of_pair(count - first - 2);
      }
      inputs[operand] = input;
      load_channel(words[operand][0], channels.x, weight, offsets);
      load_channel(words[operand][1], channels.y, weight, offsets);
      load_channel(words[operand][2], channels.z, weight, offsets);
      load_channel(words[operand][3], channels.w, weight, offsets);
    }
  }

  // Mask of the first `count` numbers of a pair.
  static __device__ __forceinline__ u32 first_of_pair(int count) {
    return count >= 2 ? ~0u : count == 1 ? 0xffffu : 0u;
  }

  static __device__ __forceinline__ void load_channel(u32 (&words)[QUAD_LOADS][QUAD_COLUMNS / 2],
                                                      u32 channel, const u8* weight,
                                                      const u32 (&offsets)[QUAD_LOADS]) {
    weight += channel * WEIGHT_ROW_BYTES;
#pragma unroll
    for (int load = 0; load < QUAD_LOADS; load++) load_once(words[load], weight + offsets[load]);
  }
};

// Sums of a quad's columns. A lane has two rows: twice its place in the quad, and the next.
struct MultiRowSums {
  float sums[QUAD_LOADS][QUAD_COLUMNS / 2][4] = {};
  u32 offsets[QUAD_LOADS];  // of the lane's loads, in bytes

  // There are `columns` columns from the lane's first one on; loads beyond them repeat the first.
  __device__ __forceinline__ explicit MultiRowSums(int columns) {
#pragma unroll
    for (int load = 0; load < QUAD_LOADS; load++)
      offsets[load] = load * QUAD_LOAD_N < columns ? load * QUAD_LOAD_N * BITS / 8 : 0;
  }

  // Add a warp's share of the kept channels.
  __device__ __forceinline__ void add(const MultiRowChannels& kept, int count, const u8* weight) {
    // Kept channels from one batch of a warp to its next.
    constexpr int STEP = Config::UNROLL * Config::WARPS_K;
    int begin = share_of_warp() * Config::UNROLL;
    if constexpr (Config::DEPTH == 1) {
#pragma unroll 1
      for (; begin < count; begin += STEP) {
        MultiRowBatch batch;
        batch.load(kept, count, begin, weight, offsets);
        add_batch(batch);
      }
    } else {
      // One batch is loaded while the other is added.
      MultiRowBatch even, odd;
      if (begin < count) even.load(kept, count, begin, weight, offsets);
#pragma unroll 1
      while (begin < count) {
        if (begin + STEP < count) odd.load(kept, count, begin + STEP, weight, offsets);
        add_batch(even);
        begin += 2 * STEP;
        if (begin < count) even.load(kept, count, begin, weight, offsets);
        if (begin - STEP < count) add_batch(odd);
      }
    }
  }

  // Write the sums of the lane's two rows to where the block adds them up.
  __device__ __forceinline__ void write(float2* row_pairs) const {
#pragma unroll
    for (int load = 0; load < QUAD_LOADS; load++)
#pragma unroll
      for (int pair = 0; pair < QUAD_COLUMNS / 2; pair++) {
        const float(&four)[4] = sums[load][pair];
        *reinterpret_cast<float4*>(row_pairs + load * QUAD_LOAD_N + 2 * pair) =
            float4{four[0], four[1], four[2], four[3]};
      }
  }

 private:
  __device__ __forceinline__ void add_batch(const MultiRowBatch& batch) {
#pragma unroll
    for (int operand = 0; operand < MultiRowBatch::OPERANDS; operand++)
#pragma unroll
      for (int load = 0; load < QUAD_LOADS; load++)
#pragma unroll
        for (int pair = 0; pair < QUAD_COLUMNS / 2; pair++) {
          // For each pair of channels, the first column of the pair and then the second.
          u32 columns[4];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            u32 one = batch.words[operand][2 * half][load][pair];
            u32 other = batch.words[operand][2 * half + 1][load][pair];
            columns[2 * half] = __byte_perm(one, other, 0x5410);
            columns[2 * half + 1] = __byte_perm(one, other, 0x7632);
          }
          uint2 inputs = batch.inputs[operand];
          mma(sums[load][pair], columns, inputs.x, inputs.y);
        }
  }
};

// Adds up the sums of all warps of a block in shared memory, for two rows side by side.
struct MultiRowReduction {
  // Columns that a thread adds up.
  static constexpr int COLUMNS_PER_THREAD = (ROW_PAIRS * BLOCK_N + THREADS - 1) / THREADS;
  // Four pairs of rows are written to different banks.
  static constexpr int PITCH = Config::WARPS_K * BLOCK_N + 2;

  alignas(16) float2 row_pairs[ROW_PAIRS][PITCH];

  // Write this thread's sums and wait for those of the others.
  __device__ __forceinline__ void exchange(const MultiRowSums& sums) {
    int warp = threadIdx.x / WARP;
    int column = warp % Config::WARPS_N * WARP_N + quad() * QUAD_COLUMNS;
    if (lane_in_quad() < ROW_PAIRS)
      sums.write(row_pairs[lane_in_quad()] + warp / Config::WARPS_N * BLOCK_N + column);
    __syncthreads();
  }

  // Add up this thread's columns, always in the order of the warps.
  __device__ __forceinline__ void add_up(float2 (&sums)[COLUMNS_PER_THREAD]) const {
#pragma unroll
    for (int i = 0; i < COLUMNS_PER_THREAD; i++) {
      // Beyond the last column, repeat it: a branch would separate the loads.
      int here = min(item_of_thread(i), ROW_PAIRS * BLOCK_N - 1);
      const float2* warp_sums = row_pairs[here / BLOCK_N] + here % BLOCK_N;
      sums[i] = float2{0.0f, 0.0f};
#pragma unroll
      for (int k = 0; k < Config::WARPS_K; k++) {
        sums[i].x += warp_sums[k * BLOCK_N].x;
        sums[i].y += warp_sums[k * BLOCK_N].y;
      }
    }
  }
};

}  // namespace teal
