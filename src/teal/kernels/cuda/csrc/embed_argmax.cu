// The beginning and the end of a decode step of one sequence: embedding, final norm, and the
// likeliest token. decode_step.cu and attention.cu have what lies between.

#include "cluster.cuh"

namespace teal {

// Of final_norm and argmax.
constexpr int THREADS = Config::THREADS;
constexpr int WARPS = THREADS / WARP;
static_assert(WARPS == WARP && Config::CLUSTER <= WARP,
              "a warp reads what all warps, or blocks, found");

// Begin the residual stream with the embedding of a token, clear the overflow flag, and fill
// `clear` with zeros.
extern "C" __global__ void embed(const i64* token, const u16* embedding, i64* hidden, i64* clear,
                                 int* overflow, float multiplier, int size, int clear_size) {
  int channel = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  for (int i = channel; i < clear_size; i += gridDim.x * blockDim.x) clear[i] = 0;
  if (channel == 0) *overflow = 0;
  if (channel >= size) return;
  float value = rounded(low_half(embedding[*token * size + channel]) * multiplier);
  hidden[channel] = (i64)(value * FIXED_ONE);
}

// Write the normed residual stream for the language-model head, NaN everywhere after an overflow,
// and advance the position of the sequence.
extern "C" __global__ void __launch_bounds__(THREADS)
final_norm(const i64* hidden, const float* norm_weight, const int* overflow, u16* out,
           i64* position, float eps, int size) {
  wait_for_input();
  if (threadIdx.x == 0) *position += 1;
  float sum = block_sum_of_squares<THREADS>(hidden, size / 2, threadIdx.x, THREADS);
  float inverse_rms = rsqrtf(sum / size + eps);
  float fault = *overflow ? __int_as_float(0x7fffffff) : 0.0f;
  for (int i = threadIdx.x; i < size; i += THREADS)
    out[i] = to_bits(rms_norm(__ldcg(hidden + i), inverse_rms, norm_weight[i]) + fault);
}

constexpr bool HAS_WIDE_LOGITS = Config::DTYPE == Dtype::FLOAT32;
typedef Conditional<HAS_WIDE_LOGITS, u32, u16>::Type Logit;

constexpr int LOGITS_PER_LOAD = sizeof(uint4) / sizeof(Logit);
constexpr int LOADS = 2;  // of a thread at once

// The i-th of consecutive logits.
__device__ __forceinline__ float logit_at(const u32* words, int i) {
  if constexpr (HAS_WIDE_LOGITS)
    return __uint_as_float(words[i]);
  else
    return i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]);
}

// The largest of some logits, and the first of equals. NaN counts as larger than any number.
// `order` is a logit mapped to an unsigned integer that compares alike, 0 if there is none.
struct Best {
  static constexpr u32 POSITIVE_INFINITY = 0xff800000u, NEGATIVE_INFINITY = 0x007fffffu;

  u32 order, index;

  // Compare with a logit of a higher index.
  __device__ __forceinline__ void update(float logit, u32 new_index) {
    // The addition removes the sign of zero and of NaN.
    u32 bits = __float_as_uint(logit + 0.0f);
    u32 new_order = bits ^ ((u32)((int)bits >> 31) | 0x80000000u);
    index = new_order > order ? new_index : index;
    order = max(order, new_order);
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
__device__ __forceinline__ Best best_of_share(const Logit* logits, int size) {
  constexpr int STRIDE = Config::CLUSTER * THREADS;
  int thread = cluster_rank() * THREADS + threadIdx.x;
  // A view may begin anywhere: then all logits are read one by one, as are those after the last
  // load.
  int loads = (u64)logits % sizeof(uint4) ? 0 : size / LOGITS_PER_LOAD;
  Best best = {0, 0};
  for (int first = thread; first < loads; first += LOADS * STRIDE) {
    // Beyond the end, repeat the last load: a branch would make one wait for the other.
    uint4 read[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      read[i] = __ldcg(reinterpret_cast<const uint4*>(logits) + min(first + i * STRIDE, loads - 1));
#pragma unroll
    for (int i = 0; i < LOADS * LOGITS_PER_LOAD; i++) {
      int load = min(first + i / LOGITS_PER_LOAD * STRIDE, loads - 1);
      const u32* words = reinterpret_cast<const u32*>(read + i / LOGITS_PER_LOAD);
      best.update(logit_at(words, i % LOGITS_PER_LOAD),
                  load * LOGITS_PER_LOAD + i % LOGITS_PER_LOAD);
    }
  }
  for (int i = loads * LOGITS_PER_LOAD + thread; i < size; i += STRIDE) {
    u32 word = __ldcg(logits + i);
    best.update(logit_at(&word, 0), i);
  }
  return best;
}

// Write the likeliest token to `token` and to the row of `history` that `step` counts; there write
// `broken` if the logits hold NaN or infinity.
extern "C" __global__ void TEAL_CLUSTER __launch_bounds__(THREADS)
argmax(const Logit* logits, i64* token, i64* history, i64* step, int size, int broken) {
  __shared__ Best warp_bests[WARPS];
  // Bits of integers: an inbox takes floats.
  __shared__ float orders[Config::CLUSTER], indices[Config::CLUSTER];
  __shared__ Inbox inbox;
  u32 rank = cluster_rank();
  if (rank == 0 && threadIdx.x == 0) inbox.open(sizeof(orders) + sizeof(indices));
  cluster_begin();
  wait_for_input();
  // Loaded here, so that nothing waits for it at the end.
  i64 row = threadIdx.x == 0 ? __ldcg(step) : 0;
  Best best = best_of_share(logits, size).of_warp();
  if (threadIdx.x % WARP == 0) warp_bests[threadIdx.x / WARP] = best;
  __syncthreads();
  best = warp_bests[threadIdx.x % WARP].of_warp();
  cluster_wait();  // the first block has begun
  if (threadIdx.x == 0) {
    inbox.send(orders + rank, 0, __uint_as_float(best.order));
    inbox.send(indices + rank, 0, __uint_as_float(best.index));
  }
  if (rank != 0) return;
  inbox.wait();
  int block = min((int)threadIdx.x, Config::CLUSTER - 1);
  best = Best{__float_as_uint(orders[block]), __float_as_uint(indices[block])}.of_warp();
  if (threadIdx.x != 0) return;
  *token = best.index;
  history[row] = best.is_finite() ? (i64)best.index : (i64)broken;
  *step = row + 1;
}

}  // namespace teal
