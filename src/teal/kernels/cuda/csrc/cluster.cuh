// Blocks that work together as a cluster. On GPUs without clusters every block is alone: its
// cluster has one block.

#pragma once

#include "dtypes.cuh"

namespace teal {

constexpr bool HAS_CLUSTERS = Config::CLUSTER > 1;

__device__ __forceinline__ u32 cluster_rank() {
  if constexpr (HAS_CLUSTERS)
    return rank_in_cluster();
  else
    return 0;
}

// Tell the cluster that this block has begun and that its inboxes are open. Wait with cluster_wait
// before sending to any of them.
__device__ __forceinline__ void cluster_begin() {
  if constexpr (HAS_CLUSTERS) arrive_at_cluster();
}

__device__ __forceinline__ void cluster_wait() {
  if constexpr (HAS_CLUSTERS) wait_for_cluster();
}

// Receives what the blocks of a cluster send to this one, once per launch. A barrier of the whole
// cluster would also make writes to global memory visible, which takes longer than everything else
// here.
struct ClusterInbox {
  u64 barrier;

  // Called by one thread, before cluster_begin: how many bytes will arrive.
  __device__ __forceinline__ void open(int bytes) { open_barrier(&barrier, bytes); }

  // Write to the place of `mine` in the shared memory of the block `rank`.
  template <typename T>
  __device__ __forceinline__ void send(T* mine, u32 rank, T value) {
    send_to_rank(mine, &barrier, rank, value);
  }

  // Wait until everything has arrived.
  __device__ __forceinline__ void wait() { wait_at_barrier(&barrier); }
};

// The same for a block that is alone.
struct LocalInbox {
  __device__ __forceinline__ void open(int) {}

  template <typename T>
  __device__ __forceinline__ void send(T* mine, u32, T value) {
    *mine = value;
  }

  __device__ __forceinline__ void wait() { __syncthreads(); }
};

typedef Conditional<HAS_CLUSTERS, ClusterInbox, LocalInbox>::Type Inbox;

}  // namespace teal
