// Products within one launch: of a slice of columns by a cluster, of a few channels by a block.
//
// Threads form teams. A team lies beside each other over all columns, 16 bytes each, and takes its
// share of the list of kept channels; the sums of all teams meet in shared memory.

#pragma once

#include "cuda_hidden.cuh"

// Which of a warp's columns a thread has, in units of PER_LANE.
__device__ __forceinline__ int slot_of_warp() { return threadIdx.x % WARP / (WARP / SLOTS); }

// Columns beside each other that a block covers at once, and how its threads share them.
template <int COLUMNS>
struct Teams {
  // Slots of a team, each of PER_LANE columns. Of codes, whole warps belong to a team.
  static constexpr int SIZE = FORMAT == FLOATS ? COLUMNS / PER_LANE
                                               : (COLUMNS + WARP_N - 1) / WARP_N * SLOTS;
  static constexpr int NUMBER = THREADS / (WARP / SLOTS) / SIZE;
  // Threads lie apart so that they write to different banks.
  static constexpr int PITCH = PER_LANE + 4;
  static_assert(COLUMNS % PER_LANE == 0 && NUMBER >= 1, "a team is a block at most");

  float sums[NUMBER * SIZE * PITCH];

  // Number of this thread's slot, over all teams.
  static __device__ __forceinline__ int place() { return threadIdx.x / WARP * SLOTS + slot_of_warp(); }

  // Sum the strips of the kept channels; a barrier must follow. `weight` begins at the first column
  // of the COLUMNS, of which `columns` exist; its strips are BYTES apart. What int4 is scaled by is
  // in `tile`, the columns beginning at `tile_column`.
  template <u64 BYTES, int CHANNELS, int GROUPS, int TILE_COLUMNS>
  __device__ __forceinline__ void add(const KeptChannels<CHANNELS>& list,
                                      const ScaleTile<GROUPS, TILE_COLUMNS>& tile, int tile_column,
                                      const u8* weight, int columns) {
    int team = place() / SIZE, slot = place() % SIZE;
    if (team >= NUMBER) return;
    // Threads beyond the last column read what the first of their team reads.
    bool is_inside = slot * PER_LANE < min(columns, COLUMNS);
    weight += is_inside ? slot * LOAD_BYTES : 0;
    float total[PER_LANE] = {};
#if FORMAT == FLOATS
    add_strips<BYTES>(list.entries, team, list.count(), NUMBER, weight, total);
#elif FORMAT != INT4
    Sums of_team;
    float factor = list.factor();
    of_team.template add<BYTES>(list.entries, team, list.count(), NUMBER, weight, factor);
    of_team.share_inputs();
#pragma unroll
    for (int c = 0; c < PER_LANE; c++) total[c] = of_team.sum(c) / factor;
#else
    // Whole groups, because the sum of a group is scaled at once.
    constexpr int PER_GROUP = NUMBER < GROUPS ? 1 : NUMBER / GROUPS, WORDS = CHANNELS / GROUPS / WARP;
#pragma unroll 1
    for (int group = team % GROUPS; group < GROUPS && team / GROUPS < PER_GROUP;
         group += NUMBER < GROUPS ? NUMBER : GROUPS) {
      int begin = GROUPS == 1 ? 0 : list.before(group * WORDS);
      int end = GROUPS == 1 ? list.count() : list.before((group + 1) * WORDS);
      // Groups beyond the last channel have no scales.
      if (begin == end) continue;
      Sums of_group;
      of_group.template add<BYTES>(list.entries + begin, team / GROUPS, end - begin, PER_GROUP, weight, 1.0f);
      of_group.share_inputs();
      int column = tile_column + (is_inside ? slot * PER_LANE : 0);
#pragma unroll
      for (int c = 0; c < PER_LANE; c++)
        total[c] += tile.scale(group, column + c) * of_group.sum(c, tile.zero(group, column + c));
    }
#endif
    float* mine = sums + place() * PITCH;
    // Threads that have the same columns write a part each.
    constexpr int SAME = WARP / SLOTS, PART = PER_LANE / SAME;
#pragma unroll
    for (int c = 0; c < PER_LANE; c++)
      if (c / PART == threadIdx.x % SAME) mine[c] = total[c];
  }

  // Ask for the first strips of a weight that nothing is dropped from, before the list is known.
  template <u64 BYTES>
  static __device__ __forceinline__ void prefetch(const u8* weight, int columns, int channels) {
    int team = place() / SIZE, slot = place() % SIZE;
    if (slot * PER_LANE >= min(columns, COLUMNS) || threadIdx.x % (WARP / SLOTS) != 0) return;
    for (int channel = team; channel < channels; channel += NUMBER)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + channel * BYTES + slot * LOAD_BYTES));
  }

  // The sum of a column, in the order of the teams.
  __device__ __forceinline__ float sum(int column) const {
    float all = 0.0f;
#pragma unroll
    for (int team = 0; team < NUMBER; team++)
      all += sums[(team * SIZE + column / PER_LANE) * PITCH + column % PER_LANE];
    return all;
  }
};

// Columns of each of the fewest equal passes over all `columns` for which a team is a block at most.
__device__ constexpr int pass_columns(int columns) {
  int loads = columns / PER_LANE, passes = 1;
  // A warp has columns of one pass.
  while (loads % passes != 0 || (loads / passes + SLOTS - 1) / SLOTS * WARP > THREADS) passes++;
  return loads / passes * PER_LANE;
}

// Adds the product of a few channels and all columns of a weight to the residual stream.
template <int CHANNELS, int GROUPS>
struct Rows {
  static constexpr int PASS = pass_columns(K);
  static constexpr int PASSES = K / PASS;
  static constexpr u64 BYTES = (u64)K * BITS / 8;

  // May lie where what comes before the product is kept.
  using Passes = Teams<PASS>[PASSES];

  KeptChannels<CHANNELS> list;
  ScaleTile<GROUPS, K> scales;

  static __device__ __forceinline__ void prefetch(const u8* weight, int channels) {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
      Teams<PASS>::template prefetch<BYTES>(weight + (u64)pass * PASS * BITS / 8, PASS, channels);
  }

  // The list is filled; `scales` have arrived.
  __device__ __forceinline__ void add(Passes& passes, const u8* weight, const u16* bias, i64* hidden,
                                      float multiplier, int* overflow) const {
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
      passes[pass].template add<BYTES>(list, scales, pass * PASS,
                                       weight + (u64)pass * PASS * BITS / 8, PASS);
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++)
      for (int i = threadIdx.x; i < PASS; i += THREADS) {
        int column = pass * PASS + i;
        float sum = passes[pass].sum(i);
#if FORMAT == INT8 || FORMAT == FP8
        sum *= scales.scale(0, column);
#endif
        if (bias != nullptr) sum += low_half(bias[column]);
        add_fixed(hidden + column, sum * multiplier, overflow);
      }
  }
};

// This block's share of the hidden channels, and the residual stream that the launch adds to.
//
// A launch reads the stream from one buffer and adds to the next, because other blocks may still be
// reading; a third is cleared for the launch after this one.
struct Share {
  static constexpr int PER_THREAD = List::PER_THREAD;

  float x[PER_THREAD];

  // Ask for the channels from `first` on.
  __device__ __forceinline__ void ask(const i64* hidden, const float* gain, int first) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int channel = first + i * THREADS + threadIdx.x;
      fixed[i] = is_inside(i, first) ? __ldcg(hidden + channel) : 0;
      gains[i] = is_inside(i, first) ? gain[channel] : 0.0f;
    }
  }

  // Norm them. One cluster of the grid carries the stream over.
  __device__ __forceinline__ void norm(float inverse_rms, i64* next, i64* clear, int first,
                                       bool carries) {
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int channel = first + i * THREADS + threadIdx.x;
      x[i] = is_inside(i, first) ? normed(fixed[i], inverse_rms, gains[i]) : 0.0f;
      if (carries && is_inside(i, first)) {
        atomicAdd(reinterpret_cast<u64*>(next) + channel, (u64)fixed[i]);
        clear[channel] = 0;
      }
    }
  }

  // List those that a threshold keeps.
  __device__ __forceinline__ void list(List& kept, float threshold, int first) const {
    bool keeps[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
      // Dropped when <=, so that NaN is kept.
      keeps[i] = is_inside(i, first) && !(fabsf(x[i]) <= threshold);
    kept.fill(keeps, x, first);
  }

 private:
  i64 fixed[PER_THREAD];
  float gains[PER_THREAD];

  static __device__ __forceinline__ bool is_inside(int i, int first) {
    int place = i * THREADS + threadIdx.x;
    return place < CHUNK && first + place < K;
  }
};
