// Norm, gate, up, activation and down of one decode step of one stream, in one launch.
// docs/fused-step.md explains the scheme with a drawing.
//
// A cluster owns a slice of the intermediate channels. Its blocks share the hidden channels among
// themselves: each sums gate and up over its share for the whole slice. They exchange these sums, so
// that each then has OWN channels of the slice in full, and adds their down strips to the residual
// stream.
//
// Set on the compiler's command line, beside what cuda_slices.cuh wants: INTERMEDIATE, OWN, IS_SILU,
// BLOCKS, PREFETCH_GATE_UP, PREFETCH_DOWN.

#include "cuda_slices.cuh"

constexpr int SLICE = OWN * CLUSTER;
constexpr int PARTS = 2;  // gate and up

#if FORMAT == INT4
constexpr int GROUPS_OF_SHARE = GROUP < CHUNK ? CHUNK / GROUP : 1;
constexpr int GROUPS_OF_OWN = DOWN_GROUP < OWN ? OWN / DOWN_GROUP : 1;
#else
constexpr int GROUPS_OF_SHARE = 1, GROUPS_OF_OWN = 1;
#endif

using Down = Rows<OWN, GROUPS_OF_OWN>;

struct Shared {
  List lists[PARTS];
  union {
    Teams<SLICE> teams[PARTS];
    Down::Passes passes;
  };
  ScaleTile<GROUPS_OF_SHARE, FORMAT == INT4 ? SLICE : COPY_BYTES> scales[PARTS];
  Squares squares;
  // Sums of this block's own channels over the share of each block of the cluster.
  Inbox sums;
  float exchange[PARTS][CLUSTER][OWN];
  Down down;
};

// How much of it the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// Where a slice of gate or up begins in the strip of a channel.
__device__ __forceinline__ const u8* part_of(const u8* gate_up, int part, int column, int channel) {
  return gate_up + channel * STRIP_BYTES + (u64)(part * INTERMEDIATE + column) * BITS / 8;
}

// Send the sums over this block's share to the blocks that own their channels.
__device__ __forceinline__ void exchange_sums(Shared& shared) {
  u32 rank = cluster_rank();
  for (int i = threadIdx.x; i < PARTS * SLICE; i += THREADS) {
    int part = i / SLICE, column = i % SLICE;
    shared.sums.send(&shared.exchange[part][rank][column % OWN], column / OWN,
                     shared.teams[part].sum(column));
  }
  shared.sums.wait();
}

// Gate or up of one of this block's channels.
__device__ __forceinline__ float summed(const Shared& shared, int part, int place, int column,
                                        const void* scales, const u16* bias) {
  float sum = 0.0f;
#pragma unroll
  for (int block = 0; block < CLUSTER; block++) sum += shared.exchange[part][block][place];
#if FORMAT == INT8 || FORMAT == FP8
  sum *= to_float(static_cast<const Scale*>(scales)[column]);
#endif
  return bias == nullptr ? sum : sum + low_half(bias[column]);
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER)
#endif
__launch_bounds__(THREADS, BLOCKS)
mlp(const i64* hidden, i64* next, i64* clear, const float* gain, const float* thresholds,
    const float* down_threshold, const u8* gate_up, const void* gate_up_scales, const u8* gate_up_zeros,
    const u16* gate_up_bias, const u8* down, const void* down_scales, const u8* down_zeros,
    const u16* down_bias, int* overflow, float epsilon, float multiplier) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  int rank = blockIdx.x, first_column = blockIdx.y * SLICE;
  int columns = min(SLICE, INTERMEDIATE - first_column);
  int first_channel = rank * CHUNK, first_own = first_column + rank * OWN;

  if (threadIdx.x == 0) {
    shared.squares.open();
    shared.sums.open(sizeof(shared.exchange));
  }
  cluster_begin();
#if FORMAT == INT4
#pragma unroll
  for (int part = 0; part < PARTS; part++)
    shared.scales[part].ask(gate_up_scales, gate_up_zeros, first_channel / GROUP,
                            (K - first_channel + GROUP - 1) / GROUP, N,
                            part * INTERMEDIATE + first_column, columns);
  int groups_left = (INTERMEDIATE - first_own + DOWN_GROUP - 1) / DOWN_GROUP;
  shared.down.scales.ask(down_scales, down_zeros, first_own / DOWN_GROUP, groups_left, K, 0, K);
#else
  shared.down.scales.ask(down_scales, down_zeros, 0, 1, K, 0, K);
#endif
#pragma unroll
  for (int part = 0; part < PARTS; part++)
    Teams<SLICE>::prefetch<STRIP_BYTES>(part_of(gate_up, part, first_column, first_channel), columns,
                                        min(PREFETCH_GATE_UP, K - first_channel));
  wait_for_input();

  Share share;
  share.ask(hidden, gain, first_channel);
  share.norm(shared.squares.inverse_rms(hidden, epsilon), next, clear, first_channel, blockIdx.y == 0);
  wait_for_copies();
#pragma unroll
  for (int part = 0; part < PARTS; part++)
    share.list(shared.lists[part], thresholds[part], first_channel);
#pragma unroll
  for (int part = 0; part < PARTS; part++)
    shared.teams[part].add<STRIP_BYTES>(shared.lists[part], shared.scales[part], 0,
                                        part_of(gate_up, part, first_column, 0), columns);
  shared.down.prefetch(down + first_own * shared.down.BYTES,
                       min(PREFETCH_DOWN, INTERMEDIATE - first_own));
  __syncthreads();
  exchange_sums(shared);

  using Own = KeptChannels<OWN>;
  float x[Own::PER_THREAD];
  bool keeps[Own::PER_THREAD];
#pragma unroll
  for (int i = 0; i < Own::PER_THREAD; i++) {
    int place = i * THREADS + threadIdx.x, channel = first_own + place;
    bool is_inside = place < OWN && channel < INTERMEDIATE;
    x[i] = 0.0f;
    if (is_inside) {
      float gate = summed(shared, 0, place, channel, gate_up_scales, gate_up_bias);
      float up = summed(shared, 1, place, INTERMEDIATE + channel, gate_up_scales, gate_up_bias);
      x[i] = rounded(gated(IS_SILU, gate, up));
    }
    keeps[i] = is_inside && !(fabsf(x[i]) <= *down_threshold);
  }
  shared.down.list.fill(keeps, x, first_own);
  bool adds_bias = blockIdx.x == 0 && blockIdx.y == 0;
  shared.down.add(shared.passes, down, adds_bias ? down_bias : nullptr, next, multiplier, overflow);
}
