// The products of one decode step of one stream, from fixed-point sums to fixed-point sums.
// docs/fused-step.md explains the scheme with a drawing.
//
// What several blocks add to is kept in fixed point, as 64-bit integers with FRACTION_BITS bits
// after the point: integer addition gives the same bits in any order, so blocks add with atomics
// and none waits for another. The residual stream is such a sum from the first layer to the last.
//
// Set on the compiler's command line, beside what cuda_hidden.cuh wants: NAME of the kernel, SOURCE,
// START_1, START_2, HEAD_DIM, SPLITS, HAS_BIAS, BLOCKS, PREFETCH.

#include "cuda_hidden.cuh"

#define HIDDEN 0
#define ATTENTION 1
#define SILU 2
#define GELU_TANH 3

// What the splits of the context gave, put together in their order.
__device__ __forceinline__ float attended(const float* parts, int channel) {
  const float* row = parts + (channel / HEAD_DIM) * SPLITS * (HEAD_DIM + 2);
  float value[SPLITS], largest[SPLITS], weight[SPLITS];
#pragma unroll
  for (int split = 0; split < SPLITS; split++) {
    const float* here = row + split * (HEAD_DIM + 2);
    value[split] = __ldcg(here + channel % HEAD_DIM);
    largest[split] = __ldcg(here + HEAD_DIM);
    weight[split] = __ldcg(here + HEAD_DIM + 1);
  }
  float top = largest[0];
#pragma unroll
  for (int split = 1; split < SPLITS; split++) top = fmaxf(top, largest[split]);
  float sum = 0.0f, weights = 0.0f;
#pragma unroll
  for (int split = 0; split < SPLITS; split++) {
    float factor = __expf(largest[split] - top);
    sum += factor * value[split];
    weights += factor * weight[split];
  }
  return sum / weights;
}

__device__ __forceinline__ float gated_sums(const i64* sums, int channel) {
  float gate = to_float(__ldcg(sums + channel)), up = to_float(__ldcg(sums + K + channel));
  return gated(SOURCE == SILU, gate, up);
}

// The activations of this thread's channels of the chunk, rounded to their dtype.
__device__ __forceinline__ void read_input(const void* source, const float* gain, float epsilon,
                                           int first_channel, Squares& squares,
                                           float (&x)[PER_THREAD]) {
#if SOURCE == HIDDEN
  const i64* hidden = static_cast<const i64*>(source);
  i64 fixed[PER_THREAD];
  float gains[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int channel = first_channel + i * THREADS + threadIdx.x;
    fixed[i] = channel < K ? __ldcg(hidden + channel) : 0;
    gains[i] = channel < K ? gain[channel] : 0.0f;
  }
  float factor = squares.inverse_rms(hidden, epsilon);
#endif
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int place = i * THREADS + threadIdx.x, channel = first_channel + place;
    bool is_inside = place < CHUNK && channel < K;
#if SOURCE == HIDDEN
    x[i] = is_inside ? normed(fixed[i], factor, gains[i]) : 0.0f;
#elif SOURCE == ATTENTION
    x[i] = is_inside ? rounded(attended(static_cast<const float*>(source), channel)) : 0.0f;
#else
    x[i] = is_inside ? rounded(gated_sums(static_cast<const i64*>(source), channel)) : 0.0f;
#endif
  }
}

// The sums over the kept channels that are a warp's share of the chunk, for a thread's columns.
__device__ __forceinline__ void add_share(const List& list, const Scales& scales, int first_channel,
                                          const u8* weight, float (&total)[PER_LANE]) {
  int share = threadIdx.x / WARP / WARPS_N;
#if FORMAT == FLOATS
  add_strips(list.entries, share, list.count(), WARPS_K, weight, total);
#elif FORMAT != INT4
  Sums sums;
  float factor = list.factor();
  sums.add(list.entries, share, list.count(), WARPS_K, weight, factor);
  sums.share_inputs();
#pragma unroll
  for (int c = 0; c < PER_LANE; c++) total[c] = sums.sum(c) / factor;
#else
  // Whole groups, because the sum of a group is scaled at once.
  constexpr int SEGMENT = GROUP < CHUNK / WARPS_K ? GROUP : CHUNK / WARPS_K;
  int column = (threadIdx.x / WARP % WARPS_N) * WARP_N + slot() * PER_LANE;
#pragma unroll 1
  for (int i = 0; i < CHUNK / SEGMENT / WARPS_K; i++) {
    int segment = share * (CHUNK / SEGMENT / WARPS_K) + i, words = SEGMENT / WARP;
    int begin = list.before(segment * words), end = list.before((segment + 1) * words);
    // Groups beyond the last channel have no scales.
    if (begin == end) continue;
    Sums sums;
    sums.add(list.entries + begin, 0, end - begin, 1, weight, 1.0f);
    sums.share_inputs();
    int channel = first_channel + segment * SEGMENT;
#pragma unroll
    for (int c = 0; c < PER_LANE; c++)
      total[c] += scales.scale(channel, column + c) * sums.sum(c, scales.zero(channel, column + c));
  }
#endif
}

// Add the sums of all warps of a block, in their order, to fixed-point sums.
__device__ __forceinline__ void add_block(const float (&total)[PER_LANE], const Scales& scales,
                                          i64* sums, const u16* bias, int columns, float multiplier,
                                          int* overflow) {
  // Of the threads that have the same columns each writes a part.
  constexpr int PART = PER_LANE / ALIKE;
  __shared__ float of_warps[WARPS_K][BLOCK_N / PER_LANE * PITCH];
  int warp = threadIdx.x / WARP;
  float* row = of_warps[warp / WARPS_N] + ((warp % WARPS_N) * SLOTS + slot()) * PITCH;
#pragma unroll
  for (int c = 0; c < PER_LANE; c++)
    if (c / PART == threadIdx.x % ALIKE) row[c] = total[c];
  __syncthreads();
  for (int i = threadIdx.x; i < min(BLOCK_N, columns); i += THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS_K; k++) sum += of_warps[k][i / PER_LANE * PITCH + i % PER_LANE];
#if FORMAT == INT8 || FORMAT == FP8
    sum *= scales.scale(0, i);
#endif
#if HAS_BIAS
    if (blockIdx.y == 0) sum += low_half(bias[i]);
#endif
    add_fixed(sums + i, sum * multiplier, overflow);
  }
}

// Add the product of CHUNK channels of an input and BLOCK_N columns of a weight to `sums`.
//
// Up to three projections lie beside each other, the second from column START_1 and the third from
// START_2, each with a threshold of its own. `clear` are sums that a later launch adds to.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER)
#endif
__launch_bounds__(THREADS, BLOCKS)
NAME(const void* source, const float* gain, const float* thresholds, const u8* weight,
        const void* all_scales, const u8* all_zeros, const u16* bias, i64* sums, i64* clear,
        int* overflow, int clear_size, float epsilon, float multiplier) {
  __shared__ List list;
  __shared__ Scales scales;
  __shared__ Squares squares;
  constexpr int TILES_1 = (START_1 + BLOCK_N - 1) / BLOCK_N;
  constexpr int TILES_2 = TILES_1 + (START_2 - START_1 + BLOCK_N - 1) / BLOCK_N;
  int tile = blockIdx.x, first_channel = blockIdx.y * CHUNK;
  int part = (tile >= TILES_1) + (tile >= TILES_2);
  int start = part == 0 ? 0 : part == 1 ? START_1 : START_2;
  int end = part == 0 ? START_1 : part == 1 ? START_2 : N;
  int first_column = start + (tile - (part == 0 ? 0 : part == 1 ? TILES_1 : TILES_2)) * BLOCK_N;
  int warp = threadIdx.x / WARP;
  int column = first_column + (warp % WARPS_N) * WARP_N + slot() * PER_LANE;
  // Threads beyond the last column read what their block reads anyway.
  weight += (u64)(column < end ? column : first_column) * BITS / 8;

#if SOURCE == HIDDEN
  if (threadIdx.x == 0) squares.open();
  cluster_begin();
#endif
#if PREFETCH > 0
  // Nothing is dropped: what comes first is known before the input is.
  for (int i = warp / WARPS_N * ALIKE + threadIdx.x % ALIKE; i < PREFETCH && first_channel + i < K;
       i += WARPS_K * ALIKE)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + (first_channel + i) * STRIP_BYTES));
#endif
  scales.ask(all_scales, all_zeros, first_channel, first_column, end - first_column);
  float threshold = thresholds[part];
  wait_for_input();

  float x[PER_THREAD];
  bool keeps[PER_THREAD];
  read_input(source, gain, epsilon, first_channel, squares, x);
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int place = i * THREADS + threadIdx.x;
    // Dropped when <=, so that NaN is kept.
    keeps[i] = place < CHUNK && first_channel + place < K && !(fabsf(x[i]) <= threshold);
  }
  wait_for_copies();
  list.fill(keeps, x, first_channel);
  float total[PER_LANE] = {};
  add_share(list, scales, first_channel, weight, total);
  add_block(total, scales, sums + first_column, bias + first_column, end - first_column, multiplier,
            overflow);

  int block = blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = block * THREADS + threadIdx.x; i < clear_size; i += gridDim.x * gridDim.y * THREADS)
    clear[i] = 0;
}
