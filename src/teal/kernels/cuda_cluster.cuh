// Blocks that work together as a cluster; without clusters, every block is one of its own.
//
// Set on the compiler's command line, beside what cuda_numbers.cuh wants: CLUSTER.

#pragma once

#include "cuda_numbers.cuh"

__device__ __forceinline__ void cluster_arrive() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
#if CLUSTER > 1
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

#if CLUSTER > 1
// Where an address of this block's shared memory lies in that of another block.
__device__ __forceinline__ u32 at_rank(const void* mine, u32 rank) {
  u32 here = (u32)__cvta_generic_to_shared(mine), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}
#endif

// Write to the shared memory of another block of the cluster, where `mine` lies in this block's.
__device__ __forceinline__ void store_at_rank(u64* mine, u32 rank, u64 value) {
#if CLUSTER > 1
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(at_rank(mine, rank)), "l"(value) : "memory");
#else
  *mine = value;
#endif
}

// Let the cluster know that this block has begun, and its inboxes are open; wait before the first
// of them is sent to.
__device__ __forceinline__ void cluster_begin() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
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
    u32 here = (u32)__cvta_generic_to_shared(&barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes)
                 : "memory");
#endif
  }

  // Write to where `mine` lies in the shared memory of another block.
  __device__ __forceinline__ void send(float* mine, u32 rank, float value) {
#if CLUSTER > 1
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
            at_rank(mine, rank)),
        "f"(value), "r"(at_rank(&barrier, rank))
        : "memory");
#else
    *mine = value;
#endif
  }

  // Wait until everything has come.
  __device__ __forceinline__ void wait() {
#if CLUSTER > 1
    u32 here = (u32)__cvta_generic_to_shared(&barrier), done = 0;
    while (!done)
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; "
          "selp.u32 %0, 1, 0, p; }"
          : "=r"(done)
          : "r"(here)
          : "memory");
#else
    __syncthreads();
#endif
  }
};
