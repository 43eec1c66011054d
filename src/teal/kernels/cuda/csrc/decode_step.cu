// The products of one decode step of one stream, from fixed-point sums to fixed-point sums.
// docs/fused-step.md explains the scheme with a drawing.
//
// What several blocks add to is kept in fixed point, as 64-bit integers with FRACTION_BITS bits
// after the point: integer addition gives the same bits in any order, so blocks add with atomics
// and none waits for another. The residual stream is such a sum from the first layer to the last.
//
// Set on the compiler's command line, beside what residual.cuh and prefetch.cuh want: NAME of the
// kernel, SOURCE, START_1, START_2, HEAD_DIM, SPLITS, HAS_BIAS, BLOCKS.

#include "accumulate.cuh"
#include "prefetch.cuh"
#include "residual.cuh"

#define HIDDEN 0
#define ATTENTION 1
#define SILU 2
#define GELU_TANH 3

struct Shared {
  List list;
  ColumnScales<BLOCK_N> column_scales;
  GroupScales group_scales;
  Squares squares;
  Totals totals;
};

// How much of it the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(Shared);

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

// The squares of this block's share of the hidden states, added up.
__device__ __forceinline__ float share_of_squares(const i64* hidden, const float (&own)[PER_THREAD]) {
  if constexpr (CLUSTER * CHUNK < K) {
    int first = cluster_rank() * THREADS + threadIdx.x;
    return block_squares<THREADS>(hidden, K / 2, first, CLUSTER * THREADS);
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) sum += own[i] * own[i];
    return block_sum<THREADS>(sum);
  }
}

// This thread's channels of a chunk.
struct Channels {
  int first;  // of the chunk
#if SOURCE == HIDDEN
  float norm_weights[PER_THREAD];
#endif

  __device__ __forceinline__ bool is_inside(int i) const {
    int place = place_in_chunk(i);
    return place < CHUNK && first + place < K;
  }

  __device__ __forceinline__ int channel(int i) const { return first + place_in_chunk(i); }

  // Read what does not depend on the input.
  __device__ __forceinline__ void begin(const float* norm_weight) {
#if SOURCE == HIDDEN
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) norm_weights[i] = is_inside(i) ? load_early(norm_weight + channel(i)) : 0.0f;
#endif
  }

  // Read their activations, rounded to their dtype.
  __device__ __forceinline__ void read(const void* source, float eps, Squares& squares,
                                       float (&x)[PER_THREAD]) const {
#if SOURCE == HIDDEN
    const i64* hidden = static_cast<const i64*>(source);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++)
      x[i] = is_inside(i) ? to_float(__ldcg(hidden + channel(i))) : 0.0f;
    float factor = squares.inverse_rms(share_of_squares(hidden, x), eps);
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) x[i] = normed(x[i], factor, norm_weights[i]);
#else
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
#if SOURCE == ATTENTION
      float exact = is_inside(i) ? attended(static_cast<const float*>(source), channel(i)) : 0.0f;
#else
      float exact = is_inside(i) ? gated_sums(static_cast<const i64*>(source), channel(i)) : 0.0f;
#endif
      x[i] = rounded(exact);
    }
#endif
  }
};

// Add the sums of all warps of a block, in their order, to fixed-point sums.
__device__ __forceinline__ void add_block(const float (&total)[PER_LANE], Shared& shared, i64* sums,
                                          const u16* bias, int columns, float multiplier,
                                          int* overflow) {
  float sums_of[Totals::OWN];
  shared.totals.exchange(total);
  shared.totals.add_up(sums_of);
#pragma unroll
  for (int own = 0; own < Totals::OWN; own++) {
    int i = place_of(own);
    if (i >= min(BLOCK_N, columns)) break;
    float sum = sums_of[own];
#if FORMAT == INT8 || FORMAT == FP8
    sum *= shared.column_scales.scale(i);
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
__cluster_dims__(1, CLUSTER)
#endif
__launch_bounds__(THREADS, BLOCKS)
NAME(const void* source, const float* norm_weight, const float* thresholds, const u8* weight,
        const void* all_scales, const u8* all_zeros, const u16* bias, i64* sums, i64* clear,
        int* overflow, int clear_size, float eps, float multiplier) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int TILES_1 = (START_1 + BLOCK_N - 1) / BLOCK_N;
  constexpr int TILES_2 = TILES_1 + (START_2 - START_1 + BLOCK_N - 1) / BLOCK_N;
  int tile = blockIdx.x, first_channel = blockIdx.y * CHUNK;
  int part = (tile >= TILES_1) + (tile >= TILES_2);
  int start = part == 0 ? 0 : part == 1 ? START_1 : START_2;
  int end = part == 0 ? START_1 : part == 1 ? START_2 : N;
  int first_column = start + (tile - (part == 0 ? 0 : part == 1 ? TILES_1 : TILES_2)) * BLOCK_N;
  Columns<BLOCK_N> columns{weight + (u64)first_column * BITS / 8, end - first_column};
  int warp = threadIdx.x / WARP;
  int column = (warp % WARPS_N) * WARP_N + threadIdx.x % WARP * PER_LANE;
  // Threads beyond the last column read what their block reads anyway.
  u64 start_of_thread = first_column + column < end ? first_column + column : first_column;
  weight = ready(weight + start_of_thread * BITS / 8);

#if SOURCE == HIDDEN
  if (threadIdx.x == 0) shared.squares.open();
  cluster_begin();
#endif
  shared.column_scales.ask(all_scales, first_column, end - first_column);
  shared.group_scales.ask(all_scales, all_zeros, first_channel, start_of_thread);
  float threshold = load_early(thresholds + part);
  Channels channels{first_channel};
  channels.begin(norm_weight);
  wait_for_input();

  float x[ROWS][PER_THREAD];
  bool keeps[PER_THREAD];
  channels.read(source, eps, shared.squares, x[0]);
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++)
    // Dropped when <=, so that NaN is kept.
    keeps[i] = channels.is_inside(i) && !(fabsf(x[0][i]) <= threshold);
  columns.ask_early(keeps[0], channels.channel(0));
  shared.list.fill(keeps, x, first_channel);
  float total[PER_LANE] = {};
  add_chunk(shared.list, shared.group_scales, weight, total);
  add_block(total, shared, sums + first_column, bias + first_column, end - first_column, multiplier,
            overflow);

  int block = blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = block * THREADS + threadIdx.x; i < clear_size; i += gridDim.x * gridDim.y * THREADS)
    clear[i] = 0;
}
