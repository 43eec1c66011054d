// Attention of one warp to a tile of the context, on tensor cores.
//
// The lanes of a warp stand in eight rows of four. In operands of tensor cores a row is a query
// head, a position or a channel, and lane c of a row has the columns 2 c, 2 c + 1, 2 c + 8 and
// 2 c + 9. Which channels the columns stand for does not matter as long as queries and keys agree:
// a lane reads eight beside each other, its columns of two operands.
//
// Set on the compiler's command line, beside what rope.cuh wants: QUERIES (heads per key
// head), WARPS.

#pragma once

#include "rope.cuh"

constexpr int ROWS = 8, COLUMNS = 4;  // of lanes
constexpr int TILE = 16;
constexpr int OWN = TILE / COLUMNS;  // positions of a tile that a lane has
constexpr int PIECE = 8;             // channels that a lane reads at once
constexpr int WORDS = PIECE / 2;     // pairs of numbers
constexpr int PIECES = HEAD_DIM / PIECE;
constexpr int KEY_LOADS = (PIECES + COLUMNS - 1) / COLUMNS;
constexpr int VALUE_LOADS = (PIECES + ROWS - 1) / ROWS;
// Chains of sums of a score, shorter where there are two. Wide heads leave no registers for that.
constexpr int CHAINS = HEAD_DIM <= 128 ? 2 : 1;
// Query heads come in sets of as many as there are rows.
constexpr int SETS = (QUERIES + ROWS - 1) / ROWS;
// Key and value of the new token are two more heads.
constexpr int KEY = QUERIES, VALUE = QUERIES + 1, HEADS = QUERIES + 2;
// Rows in shared memory begin in different banks.
constexpr int HEAD_PITCH = (HEAD_DIM + 63) / 64 * 64 + 32, TOTAL_PITCH = HEAD_DIM + 8;

static_assert(HEAD_DIM % 16 == 0 && SETS <= 2, "heads fill operands of tensor cores");

// Scores are in units of log 2 from where they are multiplied by their scale.
constexpr float LOG2_E = 1.4426950408889634f;
// Below every score, and no infinity, so that differences are numbers.
constexpr float LOWEST = -1e30f * LOG2_E;
#define MINUS_INFINITY __int_as_float(0xff800000)

struct Shared {
  alignas(16) u16 heads[HEADS][HEAD_PITCH];
  // The softmax of each warp.
  alignas(16) float totals[WARPS][QUERIES][TOTAL_PITCH];
  float weights[WARPS][QUERIES], largest[WARPS][QUERIES];

  __device__ __forceinline__ uint4 piece(int head, int i) const {
    return reinterpret_cast<const uint4*>(heads[head])[i];
  }

  __device__ __forceinline__ float4 values(int warp, int head, int channel) const {
    return *reinterpret_cast<const float4*>(totals[warp][head] + channel);
  }
};

__device__ __forceinline__ int row_of_lane() { return threadIdx.x % WARP / COLUMNS; }
__device__ __forceinline__ int column_of_lane() { return threadIdx.x % COLUMNS; }

// Which position of a tile is a lane's i-th.
__device__ __forceinline__ int own(int i) { return 2 * column_of_lane() + i / 2 * ROWS + i % 2; }

__device__ __forceinline__ float capped(float score, float softcap) {
  // tanh(z) = 1 - 2 / (1 + exp(2 z))
  float exponential = power_of_2(__fdividef(2.0f * score, softcap));
  return LOG2_E * softcap * (1.0f - __fdividef(2.0f, 1.0f + exponential));
}

__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if BFLOAT16
  multiply_bfloat16(sums, a, b0, b1);
#else
  multiply_float16(sums, a, b0, b1);
#endif
}

// What a lane has of a tile of the cache of one key head. A row beyond the cache is zero.
struct Tile {
  u32 keys[TILE / ROWS][KEY_LOADS][WORDS], values[OWN][VALUE_LOADS][WORDS];

  // Bring the rows to the L2 cache.
  static __device__ __forceinline__ void prefetch(const u16* all, int first, int position) {
    constexpr int LINE = 128 / sizeof(u16);
    int begin = first * HEAD_DIM + threadIdx.x % WARP * LINE;
    int end = min(first + TILE, position) * HEAD_DIM;
#pragma unroll 1
    for (int i = begin; i < end; i += WARP * LINE) ::prefetch(all + i);
  }

  // The tile begins at position `first`, the cache ends at `position`, that of the new token.
  __device__ __forceinline__ void ask_keys(const u16* all, int first, int position) {
    const uint4* from = pieces(all, first + row_of_lane(), column_of_lane());
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++)
#pragma unroll
      for (int load = 0; load < KEY_LOADS; load++) {
        bool is_inside = first + i * ROWS + row_of_lane() < position && key_piece(load) < PIECES;
        int piece = i * ROWS * PIECES + load * COLUMNS;
        put(keys[i][load], is_inside ? __ldcg(from + piece) : uint4{});
      }
  }

  __device__ __forceinline__ void ask_values(const u16* all, int first, int position) {
    const uint4* from = pieces(all, first + own(0), row_of_lane());
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int load = 0; load < VALUE_LOADS; load++) {
        bool is_inside = first + own(i) < position && value_piece(load) < PIECES;
        int piece = (i / 2 * ROWS + i % 2) * PIECES + load * ROWS;
        put(values[i][load], is_inside ? __ldcg(from + piece) : uint4{});
      }
  }

  // Put key and value of the new token to their place, the `newest`-th of the tile.
  __device__ __forceinline__ void add_new(const Shared& shared, int newest) {
#pragma unroll
    for (int i = 0; i < TILE / ROWS; i++)
#pragma unroll
      for (int load = 0; load < KEY_LOADS; load++)
        if (i * ROWS + row_of_lane() == newest && key_piece(load) < PIECES)
          put(keys[i][load], shared.piece(KEY, key_piece(load)));
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
      for (int load = 0; load < VALUE_LOADS; load++)
        if (own(i) == newest && value_piece(load) < PIECES)
          put(values[i][load], shared.piece(VALUE, value_piece(load)));
  }

  // Put the numbers of two positions beside each other, channel by channel.
  __device__ __forceinline__ void interleave_values() {
#pragma unroll
    for (int i = 0; i < OWN; i += 2)
#pragma unroll
      for (int word = 0; word < VALUE_LOADS * WORDS; word++) {
        u32& one = values[i][word / WORDS][word % WORDS];
        u32& other = values[i + 1][word / WORDS][word % WORDS];
        u32 low = __byte_perm(one, other, 0x5410);
        other = __byte_perm(one, other, 0x7632);
        one = low;
      }
  }

  // Scores of this lane's positions, of the head of each set that is the lane's row.
  __device__ __forceinline__ void multiply_keys(const Shared& shared,
                                                float (&scores)[SETS][OWN]) const {
    float sums[TILE / ROWS][CHAINS][4] = {};
#pragma unroll
    for (int load = 0; load < KEY_LOADS; load++) {
      uint4 queries[2] = {};
#pragma unroll
      for (int set = 0; set < SETS; set++) {
        // A set with fewer heads does its last one again.
        int head = min(set * ROWS + row_of_lane(), QUERIES - 1);
        if (key_piece(load) < PIECES) queries[set] = shared.piece(head, key_piece(load));
      }
      u32 first[4] = {queries[0].x, queries[1].x, queries[0].y, queries[1].y};
      u32 second[4] = {queries[0].z, queries[1].z, queries[0].w, queries[1].w};
#pragma unroll
      for (int i = 0; i < TILE / ROWS; i++) {
        multiply(sums[i][0], first, keys[i][load][0], keys[i][load][1]);
        multiply(sums[i][CHAINS - 1], second, keys[i][load][2], keys[i][load][3]);
      }
    }
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
      for (int i = 0; i < OWN; i++) {
        scores[set][i] = sums[i / 2][0][2 * set + i % 2];
        if (CHAINS > 1) scores[set][i] += sums[i / 2][CHAINS - 1][2 * set + i % 2];
      }
  }

  // Which pieces of a row a lane has.
  static __device__ __forceinline__ int key_piece(int load) {
    return load * COLUMNS + column_of_lane();
  }
  static __device__ __forceinline__ int value_piece(int load) {
    return load * ROWS + row_of_lane();
  }

 private:
  static __device__ __forceinline__ const uint4* pieces(const u16* all, int row, int piece) {
    return reinterpret_cast<const uint4*>(all) + ((u64)row * PIECES + piece);
  }

  static __device__ __forceinline__ void put(u32 (&words)[WORDS], const uint4& piece) {
    words[0] = piece.x, words[1] = piece.y, words[2] = piece.z, words[3] = piece.w;
  }
};

// Sums of weighted values and of weights, relative to the largest score. Of the heads of a set, a
// lane has the one of its row, but totals of those of its columns, in channels of its row.
struct Softmax {
  float largest[SETS], weights[SETS] = {}, totals[SETS][VALUE_LOADS * WORDS][4] = {};

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int set = 0; set < SETS; set++) largest[set] = LOWEST;
  }

  // Add a tile; a score of -infinity adds nothing.
  __device__ __forceinline__ void add(const float (&scores)[SETS][OWN], const Tile& tile,
                                      bool is_first) {
    // Rounded for tensor cores, and what that leaves over.
    u32 heavy[SETS][2], light[SETS][2];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      raise(set, scores[set], is_first);
#pragma unroll
      for (int i = 0; i < OWN; i += 2) {
        float first = power_of_2(scores[set][i] - largest[set]);
        float second = power_of_2(scores[set][i + 1] - largest[set]);
        weights[set] += first + second;
        u32 pair = heavy[set][i / 2] = pair_of(first, second);
        light[set][i / 2] = pair_of(first - low_half(pair), second - high_half(pair));
      }
    }
#pragma unroll
    for (int word = 0; word < VALUE_LOADS * WORDS; word++) {
      u32 values[OWN];
#pragma unroll
      for (int i = 0; i < OWN; i++) values[i] = tile.values[i][word / WORDS][word % WORDS];
#pragma unroll
      for (int set = 0; set < SETS; set++) {
        multiply(totals[set][word], values, heavy[set][0], heavy[set][1]);
        multiply(totals[set][word], values, light[set][0], light[set][1]);
      }
    }
  }

  __device__ __forceinline__ void write(Shared& shared) const {
    int warp = threadIdx.x / WARP;
#pragma unroll
    for (int set = 0; set < SETS; set++) {
      float sum = weights[set];
      for (int step = 1; step < COLUMNS; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
      int head = set * ROWS + row_of_lane();
      if (column_of_lane() == 0 && head < QUERIES) {
        shared.weights[warp][head] = sum;
        shared.largest[warp][head] = largest[set];
      }
#pragma unroll
      for (int i = 0; i < 2 * VALUE_LOADS; i++) {
        int load = i / 2, column = i % 2, piece = Tile::value_piece(load);
        const float(*channels)[4] = totals[set] + load * WORDS;
        head = set * ROWS + 2 * column_of_lane() + column;
        if (head >= QUERIES || piece >= PIECES) continue;
        float4* to = reinterpret_cast<float4*>(shared.totals[warp][head] + piece * PIECE);
#pragma unroll
        for (int word = 0; word < WORDS; word += 2)
          to[word / 2] = float4{channels[word][column], channels[word][2 + column],
                                channels[word + 1][column], channels[word + 1][2 + column]};
      }
    }
  }

 private:
  __device__ __forceinline__ void raise(int set, const float (&scores)[OWN], bool is_first) {
    float larger = largest[set];
#pragma unroll
    for (int i = 0; i < OWN; i++) larger = fmaxf(larger, scores[i]);
    for (int step = 1; step < COLUMNS; step *= 2)
      larger = fmaxf(larger, __shfl_xor_sync(~0u, larger, step));
    float factor = power_of_2(largest[set] - larger);
    largest[set] = larger;
    weights[set] *= factor;
    // After the first positions the largest score rarely changes.
    if (is_first || !__any_sync(~0u, factor != 1.0f)) return;
    int lane = 2 * column_of_lane() * COLUMNS;
    float factors[2] = {__shfl_sync(~0u, factor, lane), __shfl_sync(~0u, factor, lane + COLUMNS)};
#pragma unroll
    for (int i = 0; i < 4 * VALUE_LOADS * WORDS; i++) totals[set][i / 4][i % 4] *= factors[i % 2];
  }
};
