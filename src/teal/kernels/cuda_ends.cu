// Beginning and end of a decode step of one stream; cuda_step.cu has what lies between.
//
// Set on the compiler's command line: BFLOAT16, FRACTION_BITS, CLUSTER, THREADS of `finish` and
// `choose`.

#include "cuda_cluster.cuh"

// Of `choose`: a value in the order of unsigned integers, and the index of the first that has it.
constexpr u32 POSITIVE_INFINITY = 0xff800000u, NEGATIVE_INFINITY = 0x007fffffu;

// Start the residual stream with the embedding of a token, a step without overflow, and `clear` with
// zeros.
extern "C" __global__ void embed(const i64* token, const u16* embedding, i64* hidden, i64* clear,
                                 int* overflow, float multiplier, int size, int clear_size) {
  int channel = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  for (int i = channel; i < clear_size; i += gridDim.x * blockDim.x) clear[i] = 0;
  if (channel == 0) *overflow = 0;
  if (channel >= size) return;
  float value = rounded(low_half(embedding[*token * size + channel]) * multiplier);
  hidden[channel] = (i64)(value * UNIT);
}

// Write the normed residual stream for the head, NaN everywhere after an overflow, and move the
// stream on by a position.
extern "C" __global__ void __launch_bounds__(THREADS)
finish(const i64* hidden, const float* gain, const int* overflow, u16* out, i64* position,
       float epsilon, int size) {
  wait_for_input();
  if (threadIdx.x == 0) *position += 1;
  float sum = block_squares<THREADS>(hidden, size / 2, threadIdx.x, THREADS);
  float factor = rsqrtf(sum / size + epsilon);
  float fault = *overflow ? __int_as_float(0x7fffffff) : 0.0f;
  for (int i = threadIdx.x; i < size; i += THREADS)
    out[i] = to_bits(normed(__ldcg(hidden + i), factor, gain[i]) + fault);
}

__device__ __forceinline__ u64 larger(u64 a, u64 b) { return a > b ? a : b; }

// Orders a logit and its index: the largest first, of equals the first, NaN before all.
__device__ __forceinline__ u64 rank_of(float logit, u32 index) {
  u32 bits = __float_as_uint(logit);
  u32 order = isnan(logit) ? ~0u : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (u64)order << 32 | ~index;
}

// Choose the likeliest token: set `token` and the row of `history` that `step` counts, there
// `broken` where the logits hold NaN or infinity.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER)
#endif
__launch_bounds__(THREADS)
choose(const float* logits, i64* token, i64* history, i64* step, int size, int broken) {
  __shared__ u64 of_warps[THREADS / WARP], of_blocks[CLUSTER];
  u32 rank = cluster_rank();
  cluster_arrive();
  wait_for_input();
  u64 best = 0;
#pragma unroll 8
  for (int i = rank * THREADS + threadIdx.x; i < size; i += CLUSTER * THREADS)
    best = larger(best, rank_of(__ldcg(logits + i), i));
  for (int lane = WARP / 2; lane > 0; lane /= 2) best = larger(best, __shfl_xor_sync(~0u, best, lane));
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = best;
  __syncthreads();
  for (int warp = 0; warp < THREADS / WARP; warp++) best = larger(best, of_warps[warp]);
  cluster_wait();  // the first block has begun
  if (threadIdx.x == 0) store_at_rank(&of_blocks[rank], 0, best);
  cluster_arrive();
  cluster_wait();
  if (rank != 0 || threadIdx.x != 0) return;
  for (int block = 0; block < CLUSTER; block++) best = larger(best, of_blocks[block]);
  u32 order = best >> 32;
  i64 chosen = (u32)~best;
  *token = chosen;
  history[*step] = order >= POSITIVE_INFINITY || order <= NEGATIVE_INFINITY ? (i64)broken : chosen;
  *step += 1;
}
