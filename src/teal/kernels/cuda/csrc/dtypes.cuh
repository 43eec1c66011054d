// Numbers of the CUDA kernels: activations of 16 bits, sums in fixed point, launches in a row.
//
// Set on the compiler's command line: BFLOAT16, FRACTION_BITS.

#pragma once

#include "ptx.cuh"

constexpr float UNIT = (float)(1ll << FRACTION_BITS);

__device__ __forceinline__ float low_half(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair << 16);
#else
  return from_low_float16(pair);
#endif
}

__device__ __forceinline__ float high_half(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair & 0xffff0000u);
#else
  return from_high_float16(pair);
#endif
}

// Two activations.
__device__ __forceinline__ u32 pair_of(float low, float high) {
#if BFLOAT16
  return to_bfloat16_pair(low, high);
#else
  return to_float16_pair(low, high);
#endif
}

// To round two numbers takes a fraction of the time of one, even where the other is of no use.
__device__ __forceinline__ u16 to_bits(float value) { return (u16)pair_of(value, 0.0f); }

__device__ __forceinline__ float rounded(float value) { return low_half(pair_of(value, 0.0f)); }

// Wait until all that earlier launches wrote is visible, then let the next launch begin: what a
// launch reads before it waits was written two launches ago or earlier.
__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  wait_for_earlier_launches();
  let_next_launch_begin();
#endif
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
__device__ __forceinline__ float normed(float hidden, float factor, float norm_weight) {
  return rounded(rounded(hidden * factor) * norm_weight);
}

__device__ __forceinline__ float normed(i64 hidden, float factor, float norm_weight) {
  return normed(to_float(hidden), factor, norm_weight);
}
