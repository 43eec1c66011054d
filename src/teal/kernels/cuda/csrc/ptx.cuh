// Instructions that CUDA C++ has no name for. All inline assembly is in this file, so that the
// tests can replace it by functions of the host.

#pragma once

#include "types.cuh"

namespace teal {

// Pairs of 16-bit numbers in one register.

__device__ __forceinline__ float from_float16(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ __forceinline__ float from_low_float16(u32 pair) {
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
  return value;
}

__device__ __forceinline__ float from_high_float16(u32 pair) {
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
  return value;
}

__device__ __forceinline__ u32 to_float16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 to_bfloat16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Tensor cores: add the product of a 16 × 16 and a 16 × 8 matrix of 16-bit numbers to `sums`. The
// PTX manual shows which lane holds which entries (mma.m16n8k16).

__device__ __forceinline__ void mma_float16(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bfloat16(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Memory.

// Load here and now: the compiler must not move the load to where the number is used.
__device__ __forceinline__ u16 load_early(const u16* pointer) {
  u16 bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(pointer));
  return bits;
}

__device__ __forceinline__ float load_early(const float* pointer) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(pointer));
  return value;
}

// Load words that are read once: they do not stay in the L1 cache.
__device__ __forceinline__ void load_once(u32 (&words)[4], const u8* pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(pointer));
}

__device__ __forceinline__ void load_once(u32 (&words)[2], const u8* pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "l"(pointer));
}

__device__ __forceinline__ void load_once(u32 (&words)[1], const u8* pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(pointer));
}

// Return the pointer in registers, so that the compiler does not compute it again at every use.
__device__ __forceinline__ const u8* computed(const u8* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Prefetch a line into the L2 cache.
__device__ __forceinline__ void prefetch(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// Copy 4, 8 or 16 bytes to shared memory asynchronously.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  u32 to = (u32)__cvta_generic_to_shared(shared);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES)
                 : "memory");
}

// Wait for this thread's asynchronous copies.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Programmatic dependent launch.

// Wait until everything that earlier launches wrote is visible.
__device__ __forceinline__ void wait_for_earlier_launches() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ void let_next_launch_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Clusters of blocks.

__device__ __forceinline__ u32 rank_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Arrive at the cluster's barrier. Relaxed: writes to global memory need not become visible.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Wait until all threads of the cluster have arrived.
__device__ __forceinline__ void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

// Map an address in this block's shared memory to the same place in another block's.
__device__ __forceinline__ u32 at_rank(const void* mine, u32 rank) {
  u32 here = (u32)__cvta_generic_to_shared(mine), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}

// Let a barrier in shared memory expect some bytes.
__device__ __forceinline__ void open_barrier(u64* barrier, int bytes) {
  u32 here = (u32)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes)
               : "memory");
}

// Write to the place of `mine` in another block's shared memory; that block's barrier counts the
// bytes.
__device__ __forceinline__ void send_to_rank(float* mine, u64* barrier, u32 rank, float value) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
               :
               : "r"(at_rank(mine, rank)), "f"(value), "r"(at_rank(barrier, rank))
               : "memory");
}

__device__ __forceinline__ void send_to_rank(float2* mine, u64* barrier, u32 rank, float2 value) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      :
      : "r"(at_rank(mine, rank)), "f"(value.x), "f"(value.y), "r"(at_rank(barrier, rank))
      : "memory");
}

// Wait until all bytes have arrived. The scope is the block, as in CUTLASS's
// ClusterTransactionBarrier: cluster scope would invalidate the L1 cache, which does not hold
// shared memory.
__device__ __forceinline__ void wait_at_barrier(u64* barrier) {
  u32 here = (u32)__cvta_generic_to_shared(barrier), done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(here)
        : "memory");
}

}  // namespace teal
