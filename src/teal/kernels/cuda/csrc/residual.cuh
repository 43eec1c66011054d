// The residual stream in fixed point, its RMSNorm, and the gated activation of an MLP.

#pragma once

#include "cluster.cuh"
#include "tile_config.cuh"

namespace teal {

// A block reports an addend at or above this bound; the whole sum has to stay below twice that.
constexpr float LARGEST_ADDEND = (float)(1ll << (62 - Config::FRACTION_BITS));

// Add to a fixed-point sum, or report that the addend does not fit.
__device__ __forceinline__ void add_fixed(i64* sum, float value, int* overflow) {
  // NaN and infinity do not fit either.
  if (fabsf(value) < LARGEST_ADDEND)
    atomicAdd(reinterpret_cast<u64*>(sum), (u64)(i64)(value * FIXED_ONE));
  else
    *overflow = 1;
}

// 1 / rms of the hidden states, of which each block of a cluster reads a share.
struct ClusterRms {
  Inbox inbox;
  float block_sums[Config::CLUSTER];

  __device__ __forceinline__ void open() { inbox.open(sizeof(block_sums)); }

  // `sum` is this block's share of the sum of squares.
  __device__ __forceinline__ float inverse_rms(float sum, float eps) {
    int rank = cluster_rank();
    cluster_wait();  // every block of the cluster has begun
    if (threadIdx.x < Config::CLUSTER) inbox.send(block_sums + rank, threadIdx.x, sum);
    inbox.wait();
    sum = 0.0f;
    for (int block = 0; block < Config::CLUSTER; block++) sum += block_sums[block];
    return rsqrtf(sum / Config::IN_FEATURES + eps);
  }
};

// activation(gate) · up, with SiLU or GELU in its tanh form.
__device__ __forceinline__ float gated(bool is_silu, float gate, float up) {
  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  float inner = is_silu ? gate : 1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate);
  return gate / (1.0f + __expf(-inner)) * up;
}

}  // namespace teal
