// Beginning and end of a decode step of one stream; decode_step.cu has what lies between.
//
// Set on the compiler's command line: BFLOAT16, FRACTION_BITS, CLUSTER, THREADS of `finish` and
// `choose`, and of the latter LOGIT_BITS, which is 32 for float32.

#include "cluster.cuh"

#if LOGIT_BITS == 16
typedef u16 Logit;
#else
typedef u32 Logit;
#endif

constexpr int PER_LOAD = sizeof(uint4) / sizeof(Logit);
constexpr int LOADS = 2;  // under way per thread
constexpr int WARPS = THREADS / WARP;
static_assert(WARPS == WARP && CLUSTER <= WARP, "a warp reads what all warps, or blocks, found");

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
finish(const i64* hidden, const float* norm_weight, const int* overflow, u16* out, i64* position,
       float eps, int size) {
  wait_for_input();
  if (threadIdx.x == 0) *position += 1;
  float sum = block_squares<THREADS>(hidden, size / 2, threadIdx.x, THREADS);
  float factor = rsqrtf(sum / size + eps);
  float fault = *overflow ? __int_as_float(0x7fffffff) : 0.0f;
  for (int i = threadIdx.x; i < size; i += THREADS)
    out[i] = to_bits(normed(__ldcg(hidden + i), factor, norm_weight[i]) + fault);
}

// Number `i` of logits beside each other.
__device__ __forceinline__ float logit_at(const u32* words, int i) {
#if LOGIT_BITS == 16
  return i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]);
#else
  return __uint_as_float(words[i]);
#endif
}

// The largest of some logits, NaN before all, and of equals the first. `order` is a logit that
// compares as an unsigned integer, 0 where there is none.
struct Best {
  static constexpr u32 POSITIVE_INFINITY = 0xff800000u, NEGATIVE_INFINITY = 0x007fffffu;

  u32 order, index;

  // Compare with a logit behind those before.
  __device__ __forceinline__ void meet(float logit, u32 its_index) {
    // An addition takes the sign from zero and from NaN.
    u32 bits = __float_as_uint(logit + 0.0f);
    u32 its_order = bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
    index = its_order > order ? its_index : index;
    order = max(order, its_order);
  }

  __device__ __forceinline__ Best of_warp() const {
    u32 largest = __reduce_max_sync(~0u, order);
    return {largest, __reduce_min_sync(~0u, order == largest ? index : ~0u)};
  }

  __device__ __forceinline__ bool is_finite() const {
    return order > NEGATIVE_INFINITY && order < POSITIVE_INFINITY;
  }
};

// The best of this thread's share of the logits.
__device__ __forceinline__ Best best_of(const Logit* logits, int size) {
  constexpr int STRIDE = CLUSTER * THREADS;
  int thread = cluster_rank() * THREADS + threadIdx.x;
  // A view may begin anywhere: then all is read like the few behind the last load.
  int loads = (u64)logits % sizeof(uint4) ? 0 : size / PER_LOAD;
  Best best = {0, 0};
  for (int first = thread; first < loads; first += LOADS * STRIDE) {
    // Beyond the end the last is read again, for a branch would make one wait for the other.
    uint4 read[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      read[i] = __ldcg(reinterpret_cast<const uint4*>(logits) + min(first + i * STRIDE, loads - 1));
#pragma unroll
    for (int i = 0; i < LOADS * PER_LOAD; i++) {
      int load = min(first + i / PER_LOAD * STRIDE, loads - 1);
      const u32* words = reinterpret_cast<const u32*>(read + i / PER_LOAD);
      best.meet(logit_at(words, i % PER_LOAD), load * PER_LOAD + i % PER_LOAD);
    }
  }
  for (int i = loads * PER_LOAD + thread; i < size; i += STRIDE) {
    u32 word = __ldcg(logits + i);
    best.meet(logit_at(&word, 0), i);
  }
  return best;
}

// Choose the likeliest token: set `token` and the row of `history` that `step` counts, there
// `broken` where the logits hold NaN or infinity.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER)
#endif
__launch_bounds__(THREADS)
choose(const Logit* logits, i64* token, i64* history, i64* step, int size, int broken) {
  __shared__ Best of_warps[WARPS];
  // Bits of integers: floats are what an inbox takes.
  __shared__ float orders[CLUSTER], indices[CLUSTER];
  __shared__ Inbox inbox;
  u32 rank = cluster_rank();
  if (rank == 0 && threadIdx.x == 0) inbox.open(sizeof(orders) + sizeof(indices));
  cluster_begin();
  wait_for_input();
  // Read here, so that nothing waits for it at the end.
  i64 row = threadIdx.x == 0 ? __ldcg(step) : 0;
  Best best = best_of(logits, size).of_warp();
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = best;
  __syncthreads();
  best = of_warps[threadIdx.x % WARP].of_warp();
  cluster_wait();  // the first block has begun
  if (threadIdx.x == 0) {
    inbox.send(orders + rank, 0, __uint_as_float(best.order));
    inbox.send(indices + rank, 0, __uint_as_float(best.index));
  }
  if (rank != 0) return;
  inbox.wait();
  int block = min((int)threadIdx.x, CLUSTER - 1);
  best = Best{__float_as_uint(orders[block]), __float_as_uint(indices[block])}.of_warp();
  if (threadIdx.x != 0) return;
  *token = best.index;
  history[row] = best.is_finite() ? (i64)best.index : (i64)broken;
  *step = row + 1;
}
