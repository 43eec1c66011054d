// Numbers of the kernels: 16-bit activations, fixed-point sums, and sums over a warp or a block.

#pragma once

#include "config.cuh"
#include "ptx.cuh"

namespace teal {

constexpr bool IS_BFLOAT16 = Config::DTYPE == Dtype::BFLOAT16;

// 1.0 in fixed point.
constexpr float FIXED_ONE = (float)(1ll << Config::FRACTION_BITS);

__device__ __forceinline__ float low_half(u32 pair) {
  if constexpr (IS_BFLOAT16)
    return __uint_as_float(pair << 16);
  else
    return from_low_float16(pair);
}

__device__ __forceinline__ float high_half(u32 pair) {
  if constexpr (IS_BFLOAT16)
    return __uint_as_float(pair & 0xffff0000u);
  else
    return from_high_float16(pair);
}

// Round two numbers to the dtype of the activations.
__device__ __forceinline__ u32 pair_of(float low, float high) {
  if constexpr (IS_BFLOAT16)
    return to_bfloat16_pair(low, high);
  else
    return to_float16_pair(low, high);
}

// Rounding a pair takes a fraction of the time of rounding one number, even if half is unused.
__device__ __forceinline__ u16 to_bits(float value) { return (u16)pair_of(value, 0.0f); }

__device__ __forceinline__ float rounded(float value) { return low_half(pair_of(value, 0.0f)); }

// Multiply matrices of activations on tensor cores; see ptx.cuh.
__device__ __forceinline__ void mma(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (IS_BFLOAT16)
    mma_bfloat16(sums, a, b0, b1);
  else
    mma_float16(sums, a, b0, b1);
}

// Wait until everything that earlier launches wrote is visible, then let the next launch begin.
// What a launch reads before it waits was therefore written at least two launches ago.
__device__ __forceinline__ void wait_for_input() {
  if constexpr (__CUDA_ARCH__ >= 900) {
    wait_for_earlier_launches();
    let_next_launch_begin();
  }
}

__device__ __forceinline__ float from_fixed(i64 fixed) { return (float)fixed * (1.0f / FIXED_ONE); }

// Sum over the threads of a warp.
__device__ __forceinline__ float warp_sum(float value) {
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// Sum over the threads of a block.
template <int BLOCK_THREADS>
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warp_sums[BLOCK_THREADS / WARP];
  value = warp_sum(value);
  if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < BLOCK_THREADS / WARP; warp++) sum += warp_sums[warp];
  return sum;
}

// Sum over a block of the squares of the pairs `first`, `first + stride`, … of hidden states.
template <int BLOCK_THREADS>
__device__ __forceinline__ float block_sum_of_squares(const i64* hidden, int pairs, int first,
                                                      int stride) {
  float sum = 0.0f;
#pragma unroll 8
  for (int i = first; i < pairs; i += stride) {
    longlong2 pair = __ldcg(reinterpret_cast<const longlong2*>(hidden) + i);
    float a = from_fixed(pair.x), b = from_fixed(pair.y);
    sum += a * a + b * b;
  }
  return block_sum<BLOCK_THREADS>(sum);
}

// RMSNorm of one entry, rounded twice as in Hugging Face's LlamaRMSNorm.
__device__ __forceinline__ float rms_norm(float hidden, float inverse_rms, float norm_weight) {
  return rounded(rounded(hidden * inverse_rms) * norm_weight);
}

__device__ __forceinline__ float rms_norm(i64 hidden, float inverse_rms, float norm_weight) {
  return rms_norm(from_fixed(hidden), inverse_rms, norm_weight);
}

}  // namespace teal
