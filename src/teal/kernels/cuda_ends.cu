// Beginning and end of a decode step of one stream; cuda_step.cu has what lies between.
//
// Set on the compiler's command line: BFLOAT16, FRACTION_BITS.

#include "cuda_numbers.cuh"

constexpr int NORM_THREADS = 1024;

// Start the residual stream with the embedding of a token, and a step without overflow. The second
// buffer of the stream is cleared.
extern "C" __global__ void embed(const i64* token, const u16* embedding, i64* hidden, int* overflow,
                                 float multiplier, int size) {
  int channel = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  if (channel == 0) *overflow = 0;
  if (channel >= size) return;
  float value = rounded(low_half(embedding[*token * size + channel]) * multiplier);
  hidden[channel] = (i64)(value * UNIT);
  hidden[size + channel] = 0;
}

// Write the normed residual stream for the head; NaN everywhere after an overflow.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
final_norm(const i64* hidden, const float* gain, const int* overflow, u16* out, float epsilon,
           int size) {
  wait_for_input();
  float sum = block_squares<NORM_THREADS>(hidden, size / 2, threadIdx.x, NORM_THREADS);
  float factor = rsqrtf(sum / size + epsilon);
  float fault = *overflow ? __int_as_float(0x7fffffff) : 0.0f;
  for (int i = threadIdx.x; i < size; i += NORM_THREADS)
    out[i] = to_bits(normed(__ldcg(hidden + i), factor, gain[i]) + fault);
}
