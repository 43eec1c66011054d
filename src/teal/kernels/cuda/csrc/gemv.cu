// One product for one row of activations, or for several at once: parts side by side, or
// activation(gate) · up. docs/kernels.md explains the scheme with a drawing.
//
// A cluster of blocks owns a tile of columns and shares the channels. Each block compacts its
// chunks to the kept channels, its warps add up their weight rows, and each block finishes its
// share of the columns with what the others send it. With several rows, a weight row is read once
// if any of them keeps its channel.

#include "accumulate.cuh"
#include "prefetch.cuh"
#include "residual.cuh"

namespace teal {

constexpr bool IS_GATED = Config::ACTIVATION != Activation::NONE;
constexpr int HALVES = IS_GATED ? 2 : 1;  // gate and up
constexpr int MASKS = Config::HAS_ONE_MASK ? 1 : HALVES;
constexpr int TILE_N = BLOCK_N / HALVES;
// Columns of a tile that one block finishes.
constexpr int FINISHED_N = (TILE_N + Config::CLUSTER - 1) / Config::CLUSTER;
// Columns, of one row or of two, that one thread finishes.
constexpr int OUTPUTS_PER_THREAD = (ROW_PAIRS * FINISHED_N + THREADS - 1) / THREADS;
constexpr int OUT_COLUMNS = Config::OUT_FEATURES / HALVES;
// No part ends within a tile.
constexpr bool HAS_WHOLE_TILES = Config::START_1 % TILE_N == 0 && Config::START_2 % TILE_N == 0 &&
                                 Config::OUT_FEATURES % TILE_N == 0;

static_assert(Config::WARPS_N % HALVES == 0, "a warp has columns of gate or of up");
static_assert(HAS_SEVERAL_ROWS || FINISHED_N <= THREADS, "a thread finishes a column");
static_assert((Config::CLUSTER - 1) * FINISHED_N < TILE_N, "every block finishes columns");

struct SharedMemory {
  KeptChannels kept[MASKS];
  ColumnScales<TILE_N> column_scales[HALVES];
  GroupScales group_scales;
  Reduction reduction;
  // Sums of the columns that this block finishes, from each block of the cluster.
  ColumnSum received[ROW_PAIRS][Config::CLUSTER][HALVES][FINISHED_N];
  Inbox inbox;
};

// How much dynamic shared memory the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(SharedMemory);

// 1 / rms of the input, which every block reads whole.
__device__ __forceinline__ float inverse_rms(const u16* x, float eps) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < Config::IN_FEATURES / 8; i += THREADS) {
    uint4 eight = __ldcg(reinterpret_cast<const uint4*>(x) + i);
    const u32* pairs = reinterpret_cast<const u32*>(&eight);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      float a = low_half(pairs[pair]), b = high_half(pairs[pair]);
      sum += a * a + b * b;
    }
  }
  return rsqrtf(block_sum<THREADS>(sum) / Config::IN_FEATURES + eps);
}

// This thread's activations of a chunk.
struct Activations {
  float x[Config::ROWS][CHANNELS_PER_THREAD];

  static __device__ __forceinline__ bool is_inside(int i, int first) {
    int place = channel_in_chunk(i);
    return place < Config::CHUNK && first + place < Config::IN_FEATURES;
  }

  // Load them, through the norm if there is one; `inverses` holds 1 / rms of each row once it is
  // known, and zero before.
  __device__ __forceinline__ void load(const u16* input, const float* norm_weight, float eps,
                                       int first, float (&inverses)[Config::ROWS]) {
    float norm_weights[CHANNELS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; i++) {
      int channel = is_inside(i, first) ? first + channel_in_chunk(i) : 0;
#pragma unroll
      for (int row = 0; row < Config::ROWS; row++)
        x[row][i] = low_half(__ldcg(input + row * Config::IN_FEATURES + channel));
      if constexpr (Config::HAS_NORM) norm_weights[i] = norm_weight[channel];
    }
    if constexpr (Config::HAS_NORM) {
#pragma unroll
      for (int row = 0; row < Config::ROWS; row++) {
        if (inverses[row] == 0.0f)
          inverses[row] = inverse_rms(input + row * Config::IN_FEATURES, eps);
#pragma unroll
        for (int i = 0; i < CHANNELS_PER_THREAD; i++)
          x[row][i] = rms_norm(x[row][i], inverses[row], norm_weights[i]);
      }
    }
  }

  // Compact the channels that some row keeps, with centred activations, zero in rows that drop the
  // channel. Prefetch the first weight rows of the columns that the kept channels are for.
  __device__ __forceinline__ void compact(KeptChannels& kept, float threshold,
                                          const float* score_scale, const float* shift, int first,
                                          const BlockColumns<TILE_N>& columns) const {
    bool keeps[CHANNELS_PER_THREAD];
    float centred[Config::ROWS][CHANNELS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_THREAD; i++) {
      int channel = is_inside(i, first) ? first + channel_in_chunk(i) : 0;
      keeps[i] = false;
#pragma unroll
      for (int row = 0; row < Config::ROWS; row++) {
        float exact = Config::HAS_SHIFT ? x[row][i] - shift[channel] : x[row][i];
        float score = Config::HAS_SCORE_SCALE ? fabsf(exact) * score_scale[channel] : fabsf(exact);
        // Dropped when <=, so that NaN is kept.
        bool is_kept = is_inside(i, first) && !(score <= threshold);
        keeps[i] |= is_kept;
        centred[row][i] = !is_kept ? 0.0f : Config::HAS_SHIFT ? rounded(exact) : exact;
      }
    }
#pragma unroll
    for (int half = 0; half < HALVES / MASKS; half++)
      columns.beside(half * Config::START_1).prefetch_kept(keeps[0], first + channel_in_chunk(0));
    kept.compact(keeps, centred, first);
  }
};

// Add up the warps of this block, in their order, and send each sum to the block that finishes it.
__device__ __forceinline__ void send_sums(SharedMemory& shared, const Sums& total) {
  ColumnSum sums[Reduction::COLUMNS_PER_THREAD];
  shared.reduction.exchange(total);
  shared.reduction.add_up(sums);
  cluster_wait();  // every block of the cluster has begun
#pragma unroll
  for (int i = 0; i < Reduction::COLUMNS_PER_THREAD; i++) {
    int item = item_of_thread(i);
    if (item >= ROW_PAIRS * BLOCK_N) break;
    int pair = ROW_PAIRS == 1 ? 0 : item / BLOCK_N, place = ROW_PAIRS == 1 ? item : item % BLOCK_N;
    int column = place % TILE_N;
    shared.inbox.send(&shared.received[pair][blockIdx.y][place / TILE_N][column % FINISHED_N],
                      column / FINISHED_N, sums[i]);
  }
}

// A column that this thread finishes, of one row or of two.
struct Output {
  int pair, place, column, out_column;
  bool is_there;
  u16 biases[HALVES] = {}, residuals[ROWS_PER_SUM] = {};

  // Load what is added to the sums. The block finishes the first `share` columns of its share, in a
  // tile that has `columns` columns from `first_column` on.
  __device__ __forceinline__ void load(int i, int share, int first_column, int columns,
                                       const u16* bias, const u16* residual) {
    int item = item_of_thread(i);
    pair = ROW_PAIRS == 1 ? 0 : item / FINISHED_N;
    place = ROW_PAIRS == 1 ? item : item % FINISHED_N;
    column = blockIdx.y * FINISHED_N + place;
    out_column = first_column + column;
    is_there = pair < ROW_PAIRS && place < share && column < columns;
    if (is_there && bias != nullptr)
#pragma unroll
      for (int half = 0; half < HALVES; half++)
        biases[half] = load_early(bias + half * Config::START_1 + out_column);
    if (is_there && residual != nullptr)
#pragma unroll
      for (int j = 0; j < ROWS_PER_SUM; j++)
        if (row(j) < Config::ROWS)
          residuals[j] = load_early(residual + row(j) * OUT_COLUMNS + out_column);
  }

  // Write the result once all sums have arrived.
  __device__ __forceinline__ void store(const SharedMemory& shared, u16* out) const {
    if (!is_there) return;
#pragma unroll
    for (int j = 0; j < ROWS_PER_SUM; j++) {
      if (row(j) >= Config::ROWS) break;
      float sums[HALVES];
#pragma unroll
      for (int half = 0; half < HALVES; half++) {
        sums[half] = 0.0f;
#pragma unroll
        for (int block = 0; block < Config::CLUSTER; block++)
          sums[half] += sum_of_row(shared.received[pair][block][half][place], j);
        sums[half] = shared.column_scales[half].scaled(sums[half], column);
        sums[half] += low_half(biases[half]);
      }
      float result;
      if constexpr (IS_GATED)
        result = gated(Config::ACTIVATION == Activation::SILU, sums[0], sums[HALVES - 1]);
      else
        result = sums[0] + low_half(residuals[j]);
      out[row(j) * OUT_COLUMNS + out_column] = to_bits(result);
    }
  }

 private:
  __device__ __forceinline__ int row(int j) const { return pair * ROWS_PER_SUM + j; }
};

// There are up to three parts side by side, the second from column START_1 and the third from
// START_2 on, each with its own threshold and score scales; or gate and up, with half of the
// columns each.
extern "C" __global__ void TEAL_CLUSTER __launch_bounds__(THREADS, Config::BLOCKS)
gemv(const u16* x, const u8* weight, const void* all_scales, const u8* all_zeros,
     const float* norm_weight, const float* score_scale, const float* shift, const u16* bias,
     const u16* residual, u16* out, float threshold_0, float threshold_1, float threshold_2,
     float eps) {
  extern __shared__ uint4 memory[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(memory);
  constexpr int START_1 = Config::START_1, START_2 = Config::START_2;
  constexpr int CHUNK = Config::CHUNK, CLUSTER = Config::CLUSTER, IN_FEATURES = Config::IN_FEATURES;
  constexpr int TILES_1 = (START_1 + TILE_N - 1) / TILE_N;
  constexpr int TILES_2 = TILES_1 + (START_2 - START_1 + TILE_N - 1) / TILE_N;
  int tile = blockIdx.x, rank = blockIdx.y;
  int part = HALVES == 1 ? (tile >= TILES_1) + (tile >= TILES_2) : 0;
  int start = part == 0 ? 0 : part == 1 ? START_1 : START_2;
  int end = part == 0 ? START_1 : part == 1 ? START_2 : Config::OUT_FEATURES;
  int first_column = start + (tile - (part == 0 ? 0 : part == 1 ? TILES_1 : TILES_2)) * TILE_N;
  int columns = end - first_column;
  float threshold = part == 0 ? threshold_0 : part == 1 ? threshold_1 : threshold_2;

  BlockColumns<TILE_N> tile_columns{weight + (u64)first_column * BITS / 8, columns};
  int warp = threadIdx.x / WARP;
  int place = (warp % Config::WARPS_N) * WARP_N +
              threadIdx.x % WARP / LANES_PER_LOAD * COLUMNS_PER_LOAD;
  int half = place / TILE_N, column = place % TILE_N;
  // Threads beyond the last column load what their block loads anyway.
  u64 offset = half * START_1 + first_column + (column < columns ? column : 0);
  weight = computed(weight + offset * BITS / 8);

  // The last block may finish fewer columns. If none does, the compiler knows the number.
  int finished_here =
      TILE_N % CLUSTER == 0 ? FINISHED_N : min(FINISHED_N, TILE_N - rank * FINISHED_N);
  if (threadIdx.x == 0)
    shared.inbox.open(ROW_PAIRS * CLUSTER * HALVES * finished_here * sizeof(ColumnSum));
  cluster_begin();
  if (Config::ROWS > 2 || (half == 0 ? threshold : threshold_1) < 0.0f)
    // Nothing is dropped, or few channels by all rows: the first weight rows are known before the
    // input is.
    for (int i = warp / Config::WARPS_N;
         i < min(Config::PREFETCHED_ROWS, IN_FEATURES - rank * CHUNK); i += Config::WARPS_K)
      prefetch(weight + (rank * CHUNK + i) * WEIGHT_ROW_BYTES);
  // An earlier launch may have written the scales, so they are not read yet.
  shared.group_scales.prefetch(all_scales, all_zeros, rank * CHUNK, offset);
  wait_for_input();
#pragma unroll
  for (int i = 0; i < HALVES; i++)
    shared.column_scales[i].copy(all_scales, i * START_1 + first_column, columns);

  Output outputs[OUTPUTS_PER_THREAD];
#pragma unroll
  for (int i = 0; i < OUTPUTS_PER_THREAD; i++)
    outputs[i].load(i, finished_here, first_column, columns, bias, residual);

  Sums total(HAS_SEVERAL_ROWS && !HAS_WHOLE_TILES ? columns - column : TILE_N);
  float inverses[Config::ROWS] = {};
#pragma unroll 1
  for (int first_channel = rank * CHUNK; first_channel < IN_FEATURES;
       first_channel += CLUSTER * CHUNK) {
    if (first_channel != rank * CHUNK) __syncthreads();
    shared.group_scales.copy(all_scales, all_zeros, first_channel, offset);
    Activations activations;
    activations.load(x, norm_weight, eps, first_channel, inverses);
    activations.compact(shared.kept[0], threshold, score_scale + part * IN_FEATURES, shift,
                        first_channel, tile_columns);
    if (MASKS > 1)
      activations.compact(shared.kept[MASKS - 1], threshold_1, score_scale + IN_FEATURES, shift,
                          first_channel, tile_columns.beside(START_1));
    add_chunk(shared.kept[MASKS > 1 ? half : 0], shared.group_scales, weight, total);
    if (CLUSTER * CHUNK >= IN_FEATURES) break;
  }
  send_sums(shared, total);

  if (HAS_CLUSTERS && threadIdx.x >= ROW_PAIRS * FINISHED_N) return;
  // A block stays until everything has arrived, whether it has columns or not.
  shared.inbox.wait();
#pragma unroll
  for (int i = 0; i < OUTPUTS_PER_THREAD; i++) outputs[i].store(shared, out);
}

}  // namespace teal
