// The residual stream in fixed point.
//
// Set on the compiler's command line: what weight_rows.cuh and cluster.cuh want.

#pragma once

#include "cluster.cuh"
#include "weight_rows.cuh"

// A block's part beyond this is told; the sum of all parts has to stay below twice that.
constexpr float LARGEST = (float)(1ll << (62 - FRACTION_BITS));

// Add to a fixed-point sum, or say that it does not fit.
__device__ __forceinline__ void add_fixed(i64* sum, float value, int* overflow) {
  // NaN and infinity do not fit either.
  if (fabsf(value) < LARGEST)
    atomicAdd(reinterpret_cast<u64*>(sum), (u64)(i64)(value * UNIT));
  else
    *overflow = 1;
}

// 1 / rms of the hidden states; the blocks of a cluster share the reading.
struct Squares {
  Inbox inbox;
  float of_blocks[CLUSTER];

  __device__ __forceinline__ void open() { inbox.open(sizeof(of_blocks)); }

  // `sum` is this block's share of the squares.
  __device__ __forceinline__ float inverse_rms(float sum, float eps) {
    int rank = cluster_rank();
    cluster_wait();  // every block of the cluster has begun
    if (threadIdx.x < CLUSTER) inbox.send(of_blocks + rank, threadIdx.x, sum);
    inbox.wait();
    sum = 0.0f;
    for (int block = 0; block < CLUSTER; block++) sum += of_blocks[block];
    return rsqrtf(sum / K + eps);
  }
};

// activation(gate) · up
__device__ __forceinline__ float gated(bool is_silu, float gate, float up) {
  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  float inner = is_silu ? gate : 1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate);
  return gate / (1.0f + __expf(-inner)) * up;
}
