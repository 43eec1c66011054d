// Blocks that work together as a cluster; without clusters, every block is one of its own.
//
// Set on the compiler's command line, beside what dtypes.cuh wants: CLUSTER.

#pragma once

#include "dtypes.cuh"

__device__ __forceinline__ u32 cluster_rank() {
#if CLUSTER > 1
  return rank_in_cluster();
#else
  return 0;
#endif
}

// Let the cluster know that this block has begun, and its inboxes are open; wait before the first
// of them is sent to.
__device__ __forceinline__ void cluster_begin() {
#if CLUSTER > 1
  arrive_at_cluster();
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if CLUSTER > 1
  wait_for_cluster();
#endif
}

// What the blocks of a cluster send to this one, once per launch. A barrier of the cluster would make
// their writes to global memory visible too, which takes longer than all the rest of it.
struct Inbox {
#if CLUSTER > 1
  u64 barrier;
#endif

  // Say how much will come, by one thread and before the cluster has begun.
  __device__ __forceinline__ void open(int bytes) {
#if CLUSTER > 1
    open_barrier(&barrier, bytes);
#endif
  }

  // Write to where `mine` lies in the shared memory of another block.
  template <typename T>
  __device__ __forceinline__ void send(T* mine, u32 rank, T value) {
#if CLUSTER > 1
    send_to_rank(mine, &barrier, rank, value);
#else
    *mine = value;
#endif
  }

  // Wait until everything has come.
  __device__ __forceinline__ void wait() {
#if CLUSTER > 1
    wait_at_barrier(&barrier);
#else
    __syncthreads();
#endif
  }
};
