// Numbers of the CUDA kernels: activations of 16 bits, sums in fixed point, launches in a row.
//
// Set on the compiler's command line: BFLOAT16, FRACTION_BITS.

#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr float UNIT = (float)(1ll << FRACTION_BITS);

__device__ __forceinline__ float low_half(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair << 16);
#else
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
  return value;
#endif
}

__device__ __forceinline__ float high_half(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair & 0xffff0000u);
#else
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
  return value;
#endif
}

__device__ __forceinline__ u16 to_bits(float value) {
  u16 bits;
#if BFLOAT16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ __forceinline__ float rounded(float value) { return low_half(to_bits(value)); }

// Wait until all that earlier launches wrote is visible, then let the next launch begin: what a
// launch reads before it waits was written two launches ago or earlier.
__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Read a number here and now, long before it is used.
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

__device__ __forceinline__ float to_float(i64 fixed) { return (float)fixed * (1.0f / UNIT); }

// Add `value` of all threads of a warp.
__device__ __forceinline__ float warp_sum(float value) {
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Add `value` of all threads of a block.
template <int BLOCK_THREADS>
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float of_warps[BLOCK_THREADS / WARP];
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < BLOCK_THREADS / WARP; warp++) sum += of_warps[warp];
  return sum;
}

// Sum of squares of the hidden states `first`, `first + stride`, … (in pairs) over a block.
template <int BLOCK_THREADS>
__device__ __forceinline__ float block_squares(const i64* hidden, int pairs, int first, int stride) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = first; i < pairs; i += stride) {
    longlong2 pair = __ldcg(reinterpret_cast<const longlong2*>(hidden) + i);
    float a = to_float(pair.x), b = to_float(pair.y);
    sum += a * a + b * b;
  }
  return block_sum<BLOCK_THREADS>(sum);
}

// An RMSNorm's output, rounded twice as Hugging Face's LlamaRMSNorm does.
__device__ __forceinline__ float normed(float hidden, float factor, float gain) {
  return rounded(rounded(hidden * factor) * gain);
}

__device__ __forceinline__ float normed(i64 hidden, float factor, float gain) {
  return normed(to_float(hidden), factor, gain);
}
