// Instructions of the GPU that CUDA C++ has no name for. Nothing else is written in assembly, so
// that the tests can put functions of the host in their place.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr int WARP = 32;

#define PTX __device__ __forceinline__

// Numbers of 16 bits, two of them in a register.

PTX float from_float16(u16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

PTX float from_low_float16(u32 pair) {
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
  return value;
}

PTX float from_high_float16(u32 pair) {
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
  return value;
}

PTX u32 to_float16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

PTX u32 to_bfloat16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

PTX float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Tensor cores: add the product of 16 by 16 and 16 by 8 numbers of 16 bits. PTX says which lane has
// which of them (mma.m16n8k16).

#define MULTIPLY(operands)                                                                       \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." operands                                          \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

PTX void multiply_float16(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
  MULTIPLY("f16.f16");
}

PTX void multiply_bfloat16(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
  MULTIPLY("bf16.bf16");
}

// Memory.

// Read a number here and now, long before it is used.
PTX u16 load_early(const u16* pointer) {
  u16 bits;
  asm volatile("ld.global.u16 %0, [%1];" : "=h"(bits) : "l"(pointer));
  return bits;
}

PTX float load_early(const float* pointer) {
  float value;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(pointer));
  return value;
}

// Read words that nobody reads again.
PTX void load_once(u32 (&words)[4], const u8* pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "l"(pointer));
}

PTX void load_once(u32 (&words)[2], const u8* pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "l"(pointer));
}

PTX void load_once(u32 (&words)[1], const u8* pointer) {
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(pointer));
}

// Have a pointer ready whole, so that it is not put together again wherever it is used.
PTX const u8* ready(const u8* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

// Bring a line to the L2 cache.
PTX void prefetch(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// Copy 8 or 16 bytes to shared memory in the background.
template <int BYTES>
PTX void copy(void* shared, const void* global) {
  u32 to = (u32)__cvta_generic_to_shared(shared);
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES)
                 : "memory");
}

// Wait for what this thread copied.
PTX void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Launches in a row: wait until all that earlier ones wrote is visible, let the next one begin.

PTX void wait_for_earlier_launches() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

PTX void let_next_launch_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Clusters of blocks.

PTX u32 rank_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// Say that this thread has come so far; what it wrote to global memory need not be visible.
PTX void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

// Wait until all threads of the cluster have come so far.
PTX void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Where an address of this block's shared memory lies in that of another block.
PTX u32 at_rank(const void* mine, u32 rank) {
  u32 here = (u32)__cvta_generic_to_shared(mine), there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  return there;
}

// Expect some bytes at a barrier in shared memory.
PTX void open_barrier(u64* barrier, int bytes) {
  u32 here = (u32)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(here) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(here), "r"(bytes)
               : "memory");
}

// Write to where `mine` lies in the shared memory of another block, whose barrier counts the bytes.

#define SEND "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"

PTX void send_to_rank(float* mine, u64* barrier, u32 rank, float value) {
  asm volatile(SEND ".f32 [%0], %1, [%2];" ::"r"(at_rank(mine, rank)), "f"(value),
               "r"(at_rank(barrier, rank))
               : "memory");
}

PTX void send_to_rank(float2* mine, u64* barrier, u32 rank, float2 value) {
  asm volatile(SEND ".v2.f32 [%0], {%1, %2}, [%3];" ::"r"(at_rank(mine, rank)), "f"(value.x),
               "f"(value.y), "r"(at_rank(barrier, rank))
               : "memory");
}

// Wait until all bytes have come. The scope is the block, as where CUTLASS waits for other blocks of a
// cluster (ClusterTransactionBarrier): the scope of the cluster would empty the first-level cache, in
// which shared memory is not.
PTX void wait_at_barrier(u64* barrier) {
  u32 here = (u32)__cvta_generic_to_shared(barrier), done = 0;
  while (!done)
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(here)
        : "memory");
}
