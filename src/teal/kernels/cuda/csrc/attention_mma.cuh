// Attention of one warp to a tile of the context, on tensor cores.
//
// The lanes of a warp form eight rows of four columns. In an operand of the tensor cores a row
// is a query head, a position or a channel, and lane c of a row holds its entries 2 c, 2 c + 1, 2 c
// + 8 and 2 c + 9. Which channels the entries stand for does not matter as long as queries and keys
// agree: a lane loads eight consecutive channels, its entries of two operands.

#pragma once

#include "rope.cuh"

namespace teal {

constexpr int QUERIES = Config::QUERIES;  // query heads per key head
constexpr int WARPS = Config::WARPS;
constexpr int LANE_ROWS = 8, LANE_COLUMNS = 4;
constexpr int TILE = 16;  // positions
constexpr int POSITIONS_PER_LANE = TILE / LANE_COLUMNS;
constexpr int CHANNELS_PER_LOAD = 8;
constexpr int LOAD_WORDS = CHANNELS_PER_LOAD / 2;  // pairs of numbers
constexpr int HEAD_LOADS = HEAD_DIM / CHANNELS_PER_LOAD;
constexpr int KEY_LOADS = (HEAD_LOADS + LANE_COLUMNS - 1) / LANE_COLUMNS;  // of a lane
constexpr int VALUE_LOADS = (HEAD_LOADS + LANE_ROWS - 1) / LANE_ROWS;      // of a lane
// A score is summed in so many chains: two are shorter, but wide heads leave no registers for them.
constexpr int CHAINS = HEAD_DIM <= 128 ? 2 : 1;
// Query heads come in sets of LANE_ROWS.
constexpr int SETS = (QUERIES + LANE_ROWS - 1) / LANE_ROWS;
// Key and value of the new token count as two more heads.
constexpr int KEY = QUERIES, VALUE = QUERIES + 1, HEADS = QUERIES + 2;
// Rows in shared memory begin in different banks.
constexpr int HEAD_PITCH = (HEAD_DIM + 63) / 64 * 64 + 32, TOTAL_PITCH = HEAD_DIM + 8;

static_assert(HEAD_DIM % 16 == 0 && SETS <= 2, "heads fill operands of tensor cores");

// Scores are in units of log 2 once they have been scaled.
constexpr float LOG2_E = 1.4426950408889634f;
// Below every score, and finite, so that differences are numbers.
constexpr float LOWEST_SCORE = -1e30f * LOG2_E;

struct SharedMemory {
  alignas(16) u16 heads[HEADS][HEAD_PITCH];
  // The online softmax of each warp.
  alignas(16) float totals[WARPS][QUERIES][TOTAL_PITCH];
  float weights[WARPS][QUERIES], largest[WARPS][QUERIES];

  // The i-th load of a head.
  __device__ __forceinline__ uint4 channels(int head, int i) const {
    return reinterpret_cast<const uint4*>(heads[head])[i];
  }

  __device__ __forceinline__ float4 values(int warp, int head, int channel) const {
    return *reinterpret_cast<const float4*>(totals[warp][head] + channel);
  }
};

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / LANE_COLUMNS; }
__device__ __forceinline__ int lane_column() { return threadIdx.x % LANE_COLUMNS; }

// The i-th of a lane's positions in a tile.
__device__ __forceinline__ int position_in_tile(int i) {
  return 2 * lane_column() + i / 2 * LANE_ROWS + i % 2;
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// softcap · tanh(score / softcap)
__device__ __forceinline__ float capped(float score, float softcap) {
  // tanh(z) = 1 - 2 / (1 + exp(2 z))
  float exponential = power_of_2(__fdividef(2.0f * score, softcap));
  return LOG2_E * softcap * (1.0f - __fdividef(2.0f, 1.0f + exponential));
}

// A lane's part of a tile of the cache of one key head. Rows beyond the cache are zero.
struct Tile {
  u32 keys[TILE / LANE_ROWS][KEY_LOADS][LOAD_WORDS];
  u32 values[POSITIONS_PER_LANE][VALUE_LOADS][LOAD_WORDS];

  // Prefetch the rows into the L2 cache.
  static __device__ __forceinline__ void prefetch(const u16* all, int first, int position) {
    constexpr int LINE = 128 / sizeof(u16);
    int begin = first * HEAD_DIM + threadIdx.x % WARP * LINE;
    int end = min(first + TILE, position) * HEAD_DIM;
#pragma unroll 1
    for (int i = begin; i < end; i += WARP * LINE) teal::prefetch(all + i);
  }

  // The tile begins at position `first`; the cache ends at `position`, that of the new token.
  __device__ __forceinline__ void load_keys(const u16* all, int first, int position) {
    const uint4* from = address(all, first + lane_row(), lane_column());
#pragma unroll
    for (int i = 0; i < TILE / LANE_ROWS; i++)
#pragma unroll
      for (int load = 0; load < KEY_LOADS; load++) {
        bool is_inside =
            first + i * LANE_ROWS + lane_row() < position && key_load(load) < HEAD_LOADS;
        int offset = i * LANE_ROWS * HEAD_LOADS + load * LANE_COLUMNS;
        put(keys[i][load], is_inside ? __ldcg(from + offset) : uint4{});
      }
  }

  __device__ __forceinline__ void load_values(const u16* all, int first, int position) {
    const uint4* from = address(all, first + position_in_tile(0), lane_row());
#pragma unroll
    for (int i = 0; i < POSITIONS_PER_LANE; i++)
#pragma unroll
      for (int load = 0; load < VALUE_LOADS; load++) {
        bool is_inside = first + position_in_tile(i) < position && value_load(load) < HEAD_LOADS;
        int offset = (i / 2 * LANE_ROWS + i % 2) * HEAD_LOADS + load * LANE_ROWS;
        put(values[i][load], is_inside ? __ldcg(from + offset) : uint4{});
      }
  }

  // Put key and value of the new token into their place, the `newest`-th position of the tile.
  __device__ __forceinline__ void add_new(const SharedMemory& shared, int newest) {
#pragma unroll
    for (int i = 0; i < TILE / LANE_ROWS; i++)
#pragma unroll
      for (int load = 0; load < KEY_LOADS; load++)
        if (i * LANE_ROWS + lane_row() == newest && key_load(load) < HEAD_LOADS)
          put(keys[i][load], shared.channels(KEY, key_load(load)));
#pragma unroll
    for (int i = 0; i < POSITIONS_PER_LANE; i++)
#pragma unroll
      for (int load = 0; load < VALUE_LOADS; load++)
        if (position_in_tile(i) == newest && value_load(load) < HEAD_LOADS)
          put(values[i][load], shared.channels(VALUE, value_load(load)));
  }

  // Interleave the numbers of two positions, channel by channel.
  __device__ __forceinline__ void interleave_values() {
#pragma unroll
    for (int i = 0; i < POSITIONS_PER_LANE; i += 2)
#pragma unroll
      for (int word = 0; word < VALUE_LOADS * LOAD_WORDS; word++) {
        u32& one = values[i][word / LOAD_WORDS][word % LOAD_WORDS];
        u32& other = values[i + 1][word / LOAD_WORDS][word % LOAD_WORDS];
        u32 low = __byte_perm(one, other, 0x5410);
        other = __byte_perm(one, other, 0x7632);
        one = low;
      }
  }

  // Compute the scores of this lane's positions for the head of each set that is the lane's row.
  __device__ __forceinline__ void multiply_keys(const SharedMemory& shared,
                                                float (&scores)[SETS][POSITIONS_PER_LANE]) const {
    float sums[TILE / LANE_ROWS][CHAINS][4] = {};
#pragma unroll
    for (int load = 0; load < KEY_LOADS; load++) {
      uint4 queries[2] = {};
#pragma unroll
      for (int set = 0; set < SETS; set++) {
        // A set with fewer heads repeats its last one.
        int head = min(set * LANE_ROWS + lane_row(), QUERIES - 1);
        if (key_load(load) < HEAD_LOADS) queries[set] = shared.channels(head, key_load(load));
      }
      u32 first[4] = {queries[0].x, queries[1].x, queries[0].y, queries[1].y};
      u32 second[4] = {queries[0].z, queries[1].z, queries[0].w, queries[1].w};
#pragma unroll
      for (int i = 0; i < TILE / LANE_ROWS; i++) {
        mma(sums[i][0], first, keys[i][load][0], keys[i][load][1]);
        mma(sums[i][CHAINS - 1], second, keys[i][load][2], keys[i][load][3]);
      }
    }
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
      for (int i = 0; i < POSITIONS_PER_LANE; i++) {
        scores[set][i] = sums[i / 2][0][2 * set + i % 2];
        if (CHAINS > 1) scores[set][i] += sums[i / 2][CHAINS - 1][2 * set + i % 2];
      }
  }

  // Which load of a head is a lane's `load`-th.
  static __device__ __forceinline__ int key_load(int load) {
    return load * LANE_COLUMNS + lane_column();
  }
  static __device__ __forceinline__ int value_load(int load) {
    return load * LANE_ROWS + lane_row();
  }

 private:
  static __device__ __forceinline__ const uint4* address(const u16* all, int row, int load) {
    return reinterpret_cast<const uint4*>(all) + ((u64)row * HEAD_LOADS + load);
  }

  static __device__ __forceinline__ void put(u32 (&words)[LOAD_WORDS], const uint4& loaded) {
    words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
  }
};

// Online softmax: sums of weighted values and of weights, relative to the largest score. A lane has
// the weights of the head that is its row in each set, and the totals of the heads that are its
// columns, in channels of its row.
struct Softmax {
  float largest[SETS], weights[SETS] = {}, totals[SETS][VALUE_LOADS * LOAD_WORDS][4] = {};

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int set = 0; set < SETS; set++) largest[set] = LOWEST_SCORE;
  }

  // Add a tile; a score of -infinity adds nothing.
  __device__ __forceinline__ void add(const float (&scores)[SETS][POSITIONS_PER_LANE],
                                      const Tile& tile, bool is_first) {
    // Weights rounded for tensor cores, and the rounding errors, which are multiplied too.
    u32 high[SETS][2], low[SETS][2];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      raise(set, scores[set], is_first);
#pragma unroll
      for (int i = 0; i < POSITIONS_PER_LANE; i += 2) {
        float first = power_of_2(scores[set][i] - largest[set]);
        float second = power_of_2(scores[set][i + 1] - largest[set]);
        weights[set] += first + second;
        u32 pair = high[set][i / 2] = pair_of(first, second);
        low[set][i / 2] = pair_of(first - low_half(pair), second - high_half(pair));
      }
    }
#pragma unroll
    for (int word = 0; word < VALUE_LOADS * LOAD_WORDS; word++) {
      u32 values[POSITIONS_PER_LANE];
#pragma unroll
      for (int i = 0; i < POSITIONS_PER_LANE; i++)
        values[i] = tile.values[i][word / LOAD_WORDS][word % LOAD_WORDS];
#pragma unroll
      for (int set = 0; set < SETS; set++) {
        mma(totals[set][word], values, high[set][0], high[set][1]);
        mma(totals[set][word], values, low[set][0], low[set][1]);
      }
    }
  }

  __device__ __forceinline__ void store(SharedMemory& shared) const {
    int warp = threadIdx.x / WARP;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      float sum = weights[set];
      for (int step = 1; step < LANE_COLUMNS; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      int head = set * LANE_ROWS + lane_row();
      if (lane_column() == 0 && head < QUERIES) {
        shared.weights[warp][head] = sum;
        shared.largest[warp][head] = largest[set];
      }
#pragma unroll
      for (int i = 0; i < 2 * VALUE_LOADS; i++) {
        int load = i / 2, column = i % 2, place = Tile::value_load(load);
        const float(*channels)[4] = totals[set] + load * LOAD_WORDS;
        head = set * LANE_ROWS + 2 * lane_column() + column;
        if (head >= QUERIES || place >= HEAD_LOADS) continue;
        float4* to =
            reinterpret_cast<float4*>(shared.totals[warp][head] + place * CHANNELS_PER_LOAD);
#pragma unroll
        for (int word = 0; word < LOAD_WORDS; word += 2)
          to[word / 2] = float4{channels[word][column], channels[word][2 + column],
                                channels[word + 1][column], channels[word + 1][2 + column]};
      }
    }
  }

 private:
  // Raise the largest score of a set to include new ones, and rescale the sums.
  __device__ __forceinline__ void raise(int set, const float (&scores)[POSITIONS_PER_LANE],
                                        bool is_first) {
    float larger = largest[set];
#pragma unroll
    for (int i = 0; i < POSITIONS_PER_LANE; i++) larger = fmaxf(larger, scores[i]);
    for (int step = 1; step < LANE_COLUMNS; step *= 2)
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, step));
    float factor = power_of_2(largest[set] - larger);
    largest[set] = larger;
    weights[set] *= factor;
    // After the first positions the largest score rarely changes.
    if (is_first || !__any_sync(~0u, factor != 1.0f)) return;
    int lane = 2 * lane_column() * LANE_COLUMNS;
    float factors[2] = {__shfl_sync(~0u, factor, lane),
                        __shfl_sync(~0u, factor, lane + LANE_COLUMNS)};
#pragma unroll
    for (int i = 0; i < 4 * VALUE_LOADS * LOAD_WORDS; i++)
      totals[set][i / 4][i % 4] *= factors[i % 2];
  }
};

}  // namespace teal
