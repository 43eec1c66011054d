// The products of one decode step of one sequence, from fixed-point sums to fixed-point sums.
// docs/fused-step.md explains the scheme with a drawing.
//
// Sums of several blocks are kept in fixed point, as 64-bit integers with FRACTION_BITS fractional
// bits. Integer addition gives the same bits in any order, so blocks add with atomics and never
// wait for each other. The residual stream is such a sum from the first layer to the last.

#include "accumulate.cuh"
#include "prefetch.cuh"
#include "residual.cuh"

namespace teal {

struct SharedMemory {
  KeptChannels kept;
  ColumnScales<BLOCK_N> column_scales;
  GroupScales group_scales;
  ClusterRms rms;
  Reduction reduction;
};

// How much dynamic shared memory the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(SharedMemory);

// Attention's output in one channel, combined from the splits of the context in their order.
__device__ __forceinline__ float combined_splits(const float* parts, int channel) {
  constexpr int SPLITS = Config::SPLITS, HEAD_DIM = Config::HEAD_DIM;
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
  float gate = from_fixed(__ldcg(sums + channel));
  float up = from_fixed(__ldcg(sums + Config::IN_FEATURES + channel));
  return gated(Config::INPUT == Input::SILU, gate, up);
}

// Sum of squares of this block's share of the hidden states; `mine` are those of this thread.
__device__ __forceinline__ float share_of_squares(const i64* hidden,
                                                  const float (&mine)[CHANNELS_PER_THREAD]) {
  if constexpr (Config::CLUSTER * Config::CHUNK < Config::IN_FEATURES) {
    int first = cluster_rank() * THREADS + threadIdx.x;
    return block_sum_of_squares<THREADS>(hidden, Config::IN_FEATURES / 2, first,
                                         Config::CLUSTER * THREADS);
  } else {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; i++) sum += mine[i] * mine[i];
    return block_sum<THREADS>(sum);
  }
}

// This thread's channels of a chunk.
struct ThreadChannels {
  int first;  // of the chunk
  float norm_weights[CHANNELS_PER_THREAD];

  __device__ __forceinline__ bool is_inside(int i) const {
    int place = channel_in_chunk(i);
    return place < Config::CHUNK && first + place < Config::IN_FEATURES;
  }

  __device__ __forceinline__ int channel(int i) const { return first + channel_in_chunk(i); }

  // Load what does not depend on the input.
  __device__ __forceinline__ void load_weights(const float* norm_weight) {
    if constexpr (Config::INPUT == Input::HIDDEN) {
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_THREAD; i++)
        norm_weights[i] = is_inside(i) ? load_early(norm_weight + channel(i)) : 0.0f;
    }
  }

  // Load the activations, rounded to their dtype.
  __device__ __forceinline__ void load(const void* source, float eps, ClusterRms& rms,
                                       float (&x)[CHANNELS_PER_THREAD]) const {
    if constexpr (Config::INPUT == Input::HIDDEN) {
      const i64* hidden = static_cast<const i64*>(source);
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_THREAD; i++)
        x[i] = is_inside(i) ? from_fixed(__ldcg(hidden + channel(i))) : 0.0f;
      float inverse_rms = rms.inverse_rms(share_of_squares(hidden, x), eps);
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_THREAD; i++)
        x[i] = rms_norm(x[i], inverse_rms, norm_weights[i]);
    } else {
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_THREAD; i++)
        x[i] = rounded(is_inside(i) ? made_from(source, channel(i)) : 0.0f);
    }
  }

 private:
  static __device__ __forceinline__ float made_from(const void* source, int channel) {
    if constexpr (Config::INPUT == Input::ATTENTION)
      return combined_splits(static_cast<const float*>(source), channel);
    else
      return gated_sums(static_cast<const i64*>(source), channel);
  }
};

// Add the sums of a block to fixed-point sums.
__device__ __forceinline__ void add_block(const Sums& total, SharedMemory& shared, i64* sums,
                                          const u16* bias, int columns, float multiplier,
                                          int* overflow) {
  ColumnSum column_sums[Reduction::COLUMNS_PER_THREAD];
  shared.reduction.exchange(total);
  shared.reduction.add_up(column_sums);
#pragma unroll
  for (int i = 0; i < Reduction::COLUMNS_PER_THREAD; i++) {
    int column = item_of_thread(i);
    if (column >= min(BLOCK_N, columns)) break;
    float sum = shared.column_scales.scaled(column_sums[i], column);
    if (Config::HAS_BIAS && blockIdx.y == 0) sum += low_half(bias[column]);
    add_fixed(sums + column, sum * multiplier, overflow);
  }
}

// Add the product of CHUNK channels of an input with BLOCK_N columns of a weight to `sums`.
//
// There are up to three projections side by side, the second from column START_1 and the third from
// START_2 on, each with its own threshold. `clear` are sums that a later launch adds to.
extern "C" __global__ void TEAL_CLUSTER __launch_bounds__(THREADS, Config::BLOCKS)
TEAL_KERNEL(const void* source, const float* norm_weight, const float* thresholds,
            const u8* weight, const void* all_scales, const u8* all_zeros, const u16* bias,
            i64* sums, i64* clear, int* overflow, int clear_size, float eps, float multiplier) {
  extern __shared__ uint4 memory[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(memory);
  constexpr int START_1 = Config::START_1, START_2 = Config::START_2;
  constexpr int TILES_1 = (START_1 + BLOCK_N - 1) / BLOCK_N;
  constexpr int TILES_2 = TILES_1 + (START_2 - START_1 + BLOCK_N - 1) / BLOCK_N;
  int tile = blockIdx.x, first_channel = blockIdx.y * Config::CHUNK;
  int part = (tile >= TILES_1) + (tile >= TILES_2);
  int start = part == 0 ? 0 : part == 1 ? START_1 : START_2;
  int end = part == 0 ? START_1 : part == 1 ? START_2 : Config::OUT_FEATURES;
  int first_column = start + (tile - (part == 0 ? 0 : part == 1 ? TILES_1 : TILES_2)) * BLOCK_N;
  BlockColumns<BLOCK_N> columns{weight + (u64)first_column * BITS / 8, end - first_column};
  int warp = threadIdx.x / WARP;
  int column = (warp % Config::WARPS_N) * WARP_N + threadIdx.x % WARP * Config::PER_LANE;
  // Threads beyond the last column load what their block loads anyway.
  u64 start_of_thread = first_column + column < end ? first_column + column : first_column;
  weight = computed(weight + start_of_thread * BITS / 8);

  if constexpr (Config::INPUT == Input::HIDDEN) {
    if (threadIdx.x == 0) shared.rms.open();
    cluster_begin();
  }
  shared.column_scales.copy(all_scales, first_column, end - first_column);
  shared.group_scales.copy(all_scales, all_zeros, first_channel, start_of_thread);
  float threshold = load_early(thresholds + part);
  ThreadChannels channels{first_channel};
  channels.load_weights(norm_weight);
  wait_for_input();

  float x[Config::ROWS][CHANNELS_PER_THREAD];
  bool keeps[CHANNELS_PER_THREAD];
  channels.load(source, eps, shared.rms, x[0]);
#pragma unroll
  for (int i = 0; i < CHANNELS_PER_THREAD; i++)
    // Dropped when <=, so that NaN is kept.
    keeps[i] = channels.is_inside(i) && !(fabsf(x[0][i]) <= threshold);
  columns.prefetch_kept(keeps[0], channels.channel(0));
  shared.kept.compact(keeps, x, first_channel);
  Sums total;
  add_chunk(shared.kept, shared.group_scales, weight, total);
  add_block(total, shared, sums + first_column, bias + first_column, end - first_column, multiplier,
            overflow);

  int block = blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = block * THREADS + threadIdx.x; i < clear_size; i += gridDim.x * gridDim.y * THREADS)
    clear[i] = 0;
}

}  // namespace teal
