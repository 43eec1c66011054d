// One product of one row, or of several at once: parts beside each other, or activation(gate) · up.
// docs/kernels.md explains the scheme with a drawing.
//
// A cluster of blocks owns a tile of columns and shares the channels. Each block lists the kept ones
// of its chunks, its warps sum their strips, and each block finishes its share of the columns with
// what the others send it. Of several rows, a strip is read once if any of them keeps it.
//
// Set on the compiler's command line, beside what residual.cuh and prefetch.cuh want: ACTIVATION, HAS_NORM,
// HAS_SCALE (of scores), HAS_SHIFT, HAS_ONE_LIST (gate and up keep the same), START_1, START_2, BLOCKS,
// PREFETCH.

#include "accumulate.cuh"
#include "prefetch.cuh"
#include "residual.cuh"

#define NONE 0
#define SILU 1
#define GELU_TANH 2

constexpr int HALVES = ACTIVATION == NONE ? 1 : 2;  // gate and up
constexpr int LISTS = HAS_ONE_LIST ? 1 : HALVES;
constexpr int TILE_N = BLOCK_N / HALVES;
constexpr int FINISHED = (TILE_N + CLUSTER - 1) / CLUSTER;  // columns, by a block
constexpr int OWN = (ROW_PAIRS * FINISHED + THREADS - 1) / THREADS;  // columns of a pair of rows, by a thread
constexpr int OUT = N / HALVES;  // columns of the result
// No part ends within a tile.
constexpr bool IS_EVEN = START_1 % TILE_N == 0 && START_2 % TILE_N == 0 && N % TILE_N == 0;

static_assert(WARPS_N % HALVES == 0, "a warp has columns of gate or of up");
static_assert(ROWS > 1 || FINISHED <= THREADS, "a thread finishes a column");
static_assert((CLUSTER - 1) * FINISHED < TILE_N, "every block finishes columns");

struct Shared {
  List lists[LISTS];
  ColumnScales<TILE_N> column_scales[HALVES];
  GroupScales group_scales;
  Totals totals;
  // Sums of the columns that this block finishes, of each block of the cluster.
  Sum received[ROW_PAIRS][CLUSTER][HALVES][FINISHED];
  Inbox inbox;
};

// How much of it the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// 1 / rms of the input, which every block reads whole.
__device__ __forceinline__ float inverse_rms(const u16* x, float eps) {
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < K / 8; i += THREADS) {
    uint4 eight = __ldcg(reinterpret_cast<const uint4*>(x) + i);
    const u32* pairs = reinterpret_cast<const u32*>(&eight);
#pragma unroll
    for (int pair = 0; pair < 4; pair++) {
      float a = low_half(pairs[pair]), b = high_half(pairs[pair]);
      sum += a * a + b * b;
    }
  }
  return rsqrtf(block_sum<THREADS>(sum) / K + eps);
}

// This thread's activations of a chunk.
struct Activations {
  float x[ROWS][PER_THREAD];

  static __device__ __forceinline__ bool is_inside(int i, int first) {
    int place = place_in_chunk(i);
    return place < CHUNK && first + place < K;
  }

  // Read them, through a norm where there is one; `factors` are the norm's once they are known.
  __device__ __forceinline__ void read(const u16* input, const float* norm_weight, float eps, int first,
                                       float (&factors)[ROWS]) {
#if HAS_NORM
    float norm_weights[PER_THREAD];
#endif
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int channel = is_inside(i, first) ? first + place_in_chunk(i) : 0;
#pragma unroll
      for (int row = 0; row < ROWS; row++) x[row][i] = low_half(__ldcg(input + row * K + channel));
#if HAS_NORM
      norm_weights[i] = norm_weight[channel];
#endif
    }
#if HAS_NORM
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      if (factors[row] == 0.0f) factors[row] = inverse_rms(input + row * K, eps);
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) x[row][i] = normed(x[row][i], factors[row], norm_weights[i]);
    }
#endif
  }

  // List those that some row keeps, centred, and zero in rows that drop them. Ask early for strips of
  // the columns that the list is for.
  __device__ __forceinline__ void list(List& kept, float threshold, const float* scale,
                                       const float* shift, int first,
                                       const Columns<TILE_N>& columns) const {
    bool keeps[PER_THREAD];
    float centred[ROWS][PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int channel = is_inside(i, first) ? first + place_in_chunk(i) : 0;
      keeps[i] = false;
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        float exact = HAS_SHIFT ? x[row][i] - shift[channel] : x[row][i];
        float score = HAS_SCALE ? fabsf(exact) * scale[channel] : fabsf(exact);
        // Dropped when <=, so that NaN is kept.
        bool is_kept = is_inside(i, first) && !(score <= threshold);
        keeps[i] |= is_kept;
        centred[row][i] = !is_kept ? 0.0f : HAS_SHIFT ? rounded(exact) : exact;
      }
    }
#pragma unroll
    for (int side = 0; side < HALVES / LISTS; side++)
      columns.beside(side * START_1).ask_early(keeps[0], first + place_in_chunk(0));
    kept.fill(keeps, centred, first);
  }
};

// Add up the warps of this block, in their order, and send each sum to the block that finishes it.
template <typename Total>
__device__ __forceinline__ void send_sums(Shared& shared, const Total& total) {
  Sum sums[Totals::OWN];
  shared.totals.exchange(total);
  shared.totals.add_up(sums);
  cluster_wait();  // every block of the cluster has begun
#pragma unroll
  for (int own = 0; own < Totals::OWN; own++) {
    int place = place_of(own);
    if (place >= ROW_PAIRS * BLOCK_N) break;
    int pair = ROW_PAIRS == 1 ? 0 : place / BLOCK_N, i = ROW_PAIRS == 1 ? place : place % BLOCK_N;
    int column = i % TILE_N;
    shared.inbox.send(&shared.received[pair][blockIdx.y][i / TILE_N][column % FINISHED],
                      column / FINISHED, sums[own]);
  }
}

// A column of this block's share that this thread finishes, of one row or of two.
struct Ending {
  int pair, place, column, out_column;
  bool is_any;
  u16 biases[HALVES] = {}, rest[ROWS_ALIKE] = {};

  // Of the first `share` columns of the block's share, in a tile that has `columns` from `first_column`
  // on. Read what is added to the sums.
  __device__ __forceinline__ void begin(int own, int share, int first_column, int columns,
                                        const u16* bias, const u16* residual) {
    int item = place_of(own);
    pair = ROW_PAIRS == 1 ? 0 : item / FINISHED;
    place = ROW_PAIRS == 1 ? item : item % FINISHED;
    column = blockIdx.y * FINISHED + place;
    out_column = first_column + column;
    is_any = pair < ROW_PAIRS && place < share && column < columns;
    if (is_any && bias != nullptr)
#pragma unroll
      for (int side = 0; side < HALVES; side++)
        biases[side] = load_early(bias + side * START_1 + out_column);
    if (is_any && residual != nullptr)
#pragma unroll
      for (int i = 0; i < ROWS_ALIKE; i++)
        if (row(i) < ROWS) rest[i] = load_early(residual + row(i) * OUT + out_column);
  }

  // Finish it once all sums have come.
  __device__ __forceinline__ void finish(const Shared& shared, u16* out) const {
    if (!is_any) return;
#pragma unroll
    for (int i = 0; i < ROWS_ALIKE; i++) {
      if (row(i) >= ROWS) break;
      float sums[HALVES];
#pragma unroll
      for (int side = 0; side < HALVES; side++) {
        sums[side] = 0.0f;
#pragma unroll
        for (int block = 0; block < CLUSTER; block++)
          sums[side] += of_row(shared.received[pair][block][side][place], i);
#if FORMAT == INT8 || FORMAT == FP8
        sums[side] *= shared.column_scales[side].scale(column);
#endif
        sums[side] += low_half(biases[side]);
      }
#if ACTIVATION == NONE
      out[row(i) * OUT + out_column] = to_bits(sums[0] + low_half(rest[i]));
#else
      out[row(i) * OUT + out_column] = to_bits(gated(ACTIVATION == SILU, sums[0], sums[1]));
#endif
    }
  }

 private:
  __device__ __forceinline__ int row(int i) const { return pair * ROWS_ALIKE + i; }
};

// Up to three parts lie beside each other, the second from column START_1 and the third from START_2,
// each with a threshold and scales of scores of its own, or gate and up, half of the columns each.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(1, CLUSTER)
#endif
__launch_bounds__(THREADS, BLOCKS)
multiply(const u16* x, const u8* weight, const void* all_scales, const u8* all_zeros,
         const float* norm_weight, const float* scale, const float* shift, const u16* bias,
         const u16* residual, u16* out, float threshold_0, float threshold_1, float threshold_2,
         float eps) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int TILES_1 = (START_1 + TILE_N - 1) / TILE_N;
  constexpr int TILES_2 = TILES_1 + (START_2 - START_1 + TILE_N - 1) / TILE_N;
  int tile = blockIdx.x, rank = blockIdx.y;
  int part = HALVES == 1 ? (tile >= TILES_1) + (tile >= TILES_2) : 0;
  int start = part == 0 ? 0 : part == 1 ? START_1 : START_2;
  int end = part == 0 ? START_1 : part == 1 ? START_2 : N;
  int first_column = start + (tile - (part == 0 ? 0 : part == 1 ? TILES_1 : TILES_2)) * TILE_N;
  int columns = end - first_column;
  float threshold = part == 0 ? threshold_0 : part == 1 ? threshold_1 : threshold_2;

  Columns<TILE_N> tile_columns{weight + (u64)first_column * BITS / 8, columns};
  int warp = threadIdx.x / WARP;
  int place = (warp % WARPS_N) * WARP_N + threadIdx.x % WARP / LANES_ALIKE * LANE_N;
  int half = place / TILE_N, column = place % TILE_N;
  // Threads beyond the last column read what their block reads anyway.
  u64 offset = half * START_1 + first_column + (column < columns ? column : 0);
  weight = ready(weight + offset * BITS / 8);

  // The last block may finish fewer; where none does, the compiler knows how many.
  int finished_here =
      TILE_N % CLUSTER == 0 ? FINISHED : min(FINISHED, TILE_N - rank * FINISHED);
  if (threadIdx.x == 0)
    shared.inbox.open(ROW_PAIRS * CLUSTER * HALVES * finished_here * sizeof(Sum));
  cluster_begin();
  if (ROWS > 2 || (half == 0 ? threshold : threshold_1) < 0.0f)
    // Nothing is dropped, or little by all rows: what comes first is known before the input is.
    for (int i = warp / WARPS_N; i < min(PREFETCH, K - rank * CHUNK); i += WARPS_K)
      prefetch(weight + (rank * CHUNK + i) * STRIP_BYTES);
  // An earlier launch may have written them: here they are not read yet.
  shared.group_scales.expect(all_scales, all_zeros, rank * CHUNK, offset);
  wait_for_input();
#pragma unroll
  for (int side = 0; side < HALVES; side++)
    shared.column_scales[side].ask(all_scales, side * START_1 + first_column, columns);

  Ending endings[OWN];
#pragma unroll
  for (int own = 0; own < OWN; own++)
    endings[own].begin(own, finished_here, first_column, columns, bias, residual);

#if ROWS > 1
  SumsOfRows total(IS_EVEN ? TILE_N : columns - column);
#else
  float total[PER_LANE] = {};
#endif
  float factors[ROWS] = {};
#pragma unroll 1
  for (int first_channel = rank * CHUNK; first_channel < K; first_channel += CLUSTER * CHUNK) {
    if (first_channel != rank * CHUNK) __syncthreads();
    shared.group_scales.ask(all_scales, all_zeros, first_channel, offset);
    Activations activations;
    activations.read(x, norm_weight, eps, first_channel, factors);
    activations.list(shared.lists[0], threshold, scale + part * K, shift, first_channel, tile_columns);
    if (LISTS > 1)
      activations.list(shared.lists[LISTS - 1], threshold_1, scale + K, shift, first_channel,
                       tile_columns.beside(START_1));
    add_chunk(shared.lists[LISTS > 1 ? half : 0], shared.group_scales, weight, total);
    if (CLUSTER * CHUNK >= K) break;
  }
  send_sums(shared, total);

#if CLUSTER > 1
  if (threadIdx.x >= ROW_PAIRS * FINISHED) return;
#endif
  // A block stays until all has come, whether it has columns or not.
  shared.inbox.wait();
#pragma unroll
  for (int own = 0; own < OWN; own++) endings[own].finish(shared, out);
}
