// Heads of the new token: from fixed-point sums to activations, through the norm of the head and
// RoPE. A warp takes one head.

#pragma once

#include "dtypes.cuh"

namespace teal {

constexpr int HEAD_DIM = Config::HEAD_DIM;
constexpr int HALF_DIM = HEAD_DIM / 2;
// RoPE rotates pairs of the channels i and i + HALF_DIM. A lane has so many pairs.
constexpr int PAIRS_PER_LANE = (HALF_DIM + WARP - 1) / WARP;

// A lane's pairs of a head, or of numbers that belong to its channels.
template <typename T>
struct HeadPairs {
  T low[PAIRS_PER_LANE], high[PAIRS_PER_LANE];

  static __device__ __forceinline__ int channel(int i) { return i * WARP + threadIdx.x % WARP; }

  // Load from two arrays of HALF_DIM numbers.
  __device__ __forceinline__ void load(const T* lows, const T* highs) {
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
      bool is_inside = channel(i) < HALF_DIM;
      low[i] = is_inside ? __ldcg(lows + channel(i)) : T(0);
      high[i] = is_inside ? __ldcg(highs + channel(i)) : T(0);
    }
  }

  __device__ __forceinline__ void round() {
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++) {
      u32 both = pair_of(low[i], high[i]);
      low[i] = low_half(both);
      high[i] = high_half(both);
    }
  }

  __device__ __forceinline__ void store(u16* head) const {
#pragma unroll
    for (int i = 0; i < PAIRS_PER_LANE; i++)
      if (channel(i) < HALF_DIM) {
        head[channel(i)] = to_bits(low[i]);
        head[channel(i) + HALF_DIM] = to_bits(high[i]);
      }
  }
};

__device__ __forceinline__ HeadPairs<float> activations_of(const HeadPairs<i64>& sums) {
  HeadPairs<float> head;
#pragma unroll
  for (int i = 0; i < PAIRS_PER_LANE; i++) {
    head.low[i] = from_fixed(sums.low[i]);
    head.high[i] = from_fixed(sums.high[i]);
  }
  head.round();
  return head;
}

// RMSNorm of a head, rounded twice as in Hugging Face's LlamaRMSNorm.
__device__ __forceinline__ void norm_head(HeadPairs<float>& head,
                                          const HeadPairs<float>& norm_weights, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < PAIRS_PER_LANE; i++)
    squares += head.low[i] * head.low[i] + head.high[i] * head.high[i];
  float inverse_rms = rsqrtf(warp_sum(squares) / HEAD_DIM + eps);
#pragma unroll
  for (int i = 0; i < PAIRS_PER_LANE; i++) {
    head.low[i] *= inverse_rms;
    head.high[i] *= inverse_rms;
  }
  head.round();
#pragma unroll
  for (int i = 0; i < PAIRS_PER_LANE; i++) {
    head.low[i] *= norm_weights.low[i];
    head.high[i] *= norm_weights.high[i];
  }
  head.round();
}

// RoPE; `angles` has cosines as its low numbers and sines as its high ones.
__device__ __forceinline__ void rotate(HeadPairs<float>& head, const HeadPairs<float>& angles) {
#pragma unroll
  for (int i = 0; i < PAIRS_PER_LANE; i++) {
    float low = head.low[i], high = head.high[i], cosine = angles.low[i], sine = angles.high[i];
    head.low[i] = low * cosine - high * sine;
    head.high[i] = high * cosine + low * sine;
  }
}

}  // namespace teal
