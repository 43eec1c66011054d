// Heads of the new token: from fixed-point sums to activations, normed and turned to their
// position, one head by one warp.
//
// Set on the compiler's command line, beside what dtypes.cuh wants: HEAD_DIM.

#pragma once

#include "dtypes.cuh"

constexpr int HALF = HEAD_DIM / 2;
// Channels i and i + HALF are a pair. A lane has so many.
constexpr int PAIRS = (HALF + WARP - 1) / WARP;

// A lane's pairs of a head that its warp places, or of the numbers that it needs for that.
template <typename T>
struct Pairs {
  T low[PAIRS], high[PAIRS];

  static __device__ __forceinline__ int channel(int i) { return i * WARP + threadIdx.x % WARP; }

  // Ask for two times HALF numbers in memory.
  __device__ __forceinline__ void ask(const T* lows, const T* highs) {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      bool is_inside = channel(i) < HALF;
      low[i] = is_inside ? __ldcg(lows + channel(i)) : T(0);
      high[i] = is_inside ? __ldcg(highs + channel(i)) : T(0);
    }
  }

  __device__ __forceinline__ void round() {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      u32 both = pair_of(low[i], high[i]);
      low[i] = low_half(both);
      high[i] = high_half(both);
    }
  }

  __device__ __forceinline__ void write(u16* head) const {
#pragma unroll
    for (int i = 0; i < PAIRS; i++)
      if (channel(i) < HALF) {
        head[channel(i)] = to_bits(low[i]);
        head[channel(i) + HALF] = to_bits(high[i]);
      }
  }
};

__device__ __forceinline__ Pairs<float> activations_of(const Pairs<i64>& sums) {
  Pairs<float> head;
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    head.low[i] = to_float(sums.low[i]);
    head.high[i] = to_float(sums.high[i]);
  }
  head.round();
  return head;
}

// Rounded twice, as Hugging Face's LlamaRMSNorm does.
__device__ __forceinline__ void norm(Pairs<float>& head, const Pairs<float>& norm_weights, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < PAIRS; i++)
    squares += head.low[i] * head.low[i] + head.high[i] * head.high[i];
  float factor = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    head.low[i] *= factor;
    head.high[i] *= factor;
  }
  head.round();
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    head.low[i] *= norm_weights.low[i];
    head.high[i] *= norm_weights.high[i];
  }
  head.round();
}

// By angles whose cosines are low and whose sines are high.
__device__ __forceinline__ void turn(Pairs<float>& head, const Pairs<float>& angles) {
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    float low = head.low[i], high = head.high[i], cosine = angles.low[i], sine = angles.high[i];
    head.low[i] = low * cosine - high * sine;
    head.high[i] = high * cosine + low * sine;
  }
}
