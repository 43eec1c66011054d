// One product of one row, or of several at once: parts beside each other, or activation(gate) · up.
// docs/kernels.md explains the scheme with a drawing.
//
// A cluster of blocks owns a tile of columns and shares the channels. Each block lists the kept ones
// of its chunks, its warps sum their strips, and each block finishes its share of the columns with
// what the others send it. Of several rows, a strip is read once if any of them keeps it.
//
// Set on the compiler's command line, beside what cuda_hidden.cuh wants: ACTIVATION, HAS_NORM,
// START_1, START_2, BLOCKS, PREFETCH.

#include "cuda_chunks.cuh"
#include "cuda_hidden.cuh"

#define NONE 0
#define SILU 1
#define GELU_TANH 2

constexpr int HALVES = ACTIVATION == NONE ? 1 : 2;  // gate and up
constexpr int TILE_N = BLOCK_N / HALVES;
constexpr int FINISHED = (TILE_N + CLUSTER - 1) / CLUSTER;  // by a block
constexpr int OUT = N / HALVES;  // columns of the result
// No part ends within a tile.
constexpr bool IS_EVEN = START_1 % TILE_N == 0 && START_2 % TILE_N == 0 && N % TILE_N == 0;

static_assert(WARPS_N % HALVES == 0, "a warp has columns of gate or of up");
static_assert(FINISHED <= THREADS, "a thread finishes a column");
static_assert((CLUSTER - 1) * FINISHED < TILE_N, "every block finishes columns");

struct Shared {
  List lists[HALVES];
  ColumnScales<TILE_N> column_scales[HALVES];
  GroupScales group_scales;
  Totals totals;
  // Sums of the columns that this block finishes, of each block of the cluster.
  float received[ROWS][CLUSTER][HALVES][FINISHED];
  Inbox inbox;
};

// How much of it the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// 1 / rms of the input, which every block reads whole.
__device__ __forceinline__ float inverse_rms(const u16* x, float epsilon) {
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
  return rsqrtf(block_sum<THREADS>(sum) / K + epsilon);
}

// This thread's activations of a chunk.
struct Activations {
  float x[ROWS][PER_THREAD];

  static __device__ __forceinline__ bool is_inside(int i, int first) {
    int place = i * THREADS + threadIdx.x;
    return place < CHUNK && first + place < K;
  }

  // Read them, through a norm where there is one; `factors` are the norm's once they are known.
  __device__ __forceinline__ void read(const u16* input, const float* gain, float epsilon, int first,
                                       float (&factors)[ROWS]) {
#if HAS_NORM
    float gains[PER_THREAD];
#endif
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int channel = is_inside(i, first) ? first + i * THREADS + threadIdx.x : 0;
#pragma unroll
      for (int row = 0; row < ROWS; row++) x[row][i] = low_half(__ldcg(input + row * K + channel));
#if HAS_NORM
      gains[i] = gain[channel];
#endif
    }
#if HAS_NORM
#pragma unroll
    for (int row = 0; row < ROWS; row++) {
      if (factors[row] == 0.0f) factors[row] = inverse_rms(input + row * K, epsilon);
#pragma unroll
      for (int i = 0; i < PER_THREAD; i++) x[row][i] = normed(x[row][i], factors[row], gains[i]);
    }
#endif
  }

  // List those that some row keeps, centred, and zero in rows that drop them.
  __device__ __forceinline__ void list(List& kept, float threshold, const float* scale,
                                       const float* shift, int first) const {
    bool keeps[PER_THREAD];
    float centred[ROWS][PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) {
      int channel = is_inside(i, first) ? first + i * THREADS + threadIdx.x : 0;
      keeps[i] = false;
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        float exact = shift == nullptr ? x[row][i] : x[row][i] - shift[channel];
        float score = scale == nullptr ? fabsf(exact) : fabsf(exact) * scale[channel];
        // Dropped when <=, so that NaN is kept.
        bool is_kept = is_inside(i, first) && !(score <= threshold);
        keeps[i] |= is_kept;
        centred[row][i] = !is_kept ? 0.0f : shift == nullptr ? exact : rounded(exact);
      }
    }
    kept.fill(keeps, centred, first);
  }
};

// Add up the warps of this block, in their order, and send each sum to the block that finishes it.
template <typename Total>
__device__ __forceinline__ void send_sums(Shared& shared, const Total& total) {
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    if (row > 0) __syncthreads();
    shared.totals.exchange(total, row);
    float sums[Totals::OWN];
    shared.totals.add_up(sums);
    if (row == 0) cluster_wait();  // every block of the cluster has begun
#pragma unroll
    for (int own = 0; own < Totals::OWN; own++) {
      int i = Totals::column(own), column = i % TILE_N;
      if (i >= BLOCK_N) break;
      shared.inbox.send(&shared.received[row][blockIdx.y][i / TILE_N][column % FINISHED],
                        column / FINISHED, sums[own]);
    }
  }
}

// Up to three parts lie beside each other, the second from column START_1 and the third from START_2,
// each with a threshold and scales of scores of its own, or gate and up, half of the columns each.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(1, CLUSTER)
#endif
__launch_bounds__(THREADS, BLOCKS)
multiply(const u16* x, const u8* weight, const void* all_scales, const u8* all_zeros,
         const float* gain, const float* scale, const float* shift, const u16* bias,
         const u16* residual, u16* out, float threshold_0, float threshold_1, float threshold_2,
         float epsilon) {
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
    shared.inbox.open(ROWS * CLUSTER * HALVES * finished_here * sizeof(float));
  cluster_begin();
  if ((half == 0 ? threshold : threshold_1) < 0.0f)
    // Nothing is dropped: what comes first is known before the input is.
    for (int i = warp / WARPS_N; i < min(PREFETCH, K - rank * CHUNK); i += WARPS_K)
      prefetch(weight + (rank * CHUNK + i) * STRIP_BYTES);
  // An earlier launch may have written them: here they are not read yet.
  shared.group_scales.expect(all_scales, all_zeros, rank * CHUNK, offset);
  wait_for_input();
#pragma unroll
  for (int side = 0; side < HALVES; side++)
    shared.column_scales[side].ask(all_scales, side * START_1 + first_column, columns);

  int finished = rank * FINISHED + threadIdx.x, out_column = first_column + finished;
  bool finishes = threadIdx.x < finished_here && finished < columns;
  u16 biases[HALVES] = {}, rest[ROWS] = {};
  if (finishes && bias != nullptr)
#pragma unroll
    for (int side = 0; side < HALVES; side++)
      biases[side] = load_early(bias + side * START_1 + out_column);
  if (finishes && residual != nullptr)
#pragma unroll
    for (int row = 0; row < ROWS; row++) rest[row] = load_early(residual + row * OUT + out_column);

  bool has_one_list = HALVES == 1 || (scale == nullptr && threshold_0 == threshold_1);
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
    activations.read(x, gain, epsilon, first_channel, factors);
    activations.list(shared.lists[0], threshold, scale == nullptr ? scale : scale + part * K, shift,
                     first_channel);
    if (!has_one_list)
      activations.list(shared.lists[HALVES - 1], threshold_1, scale == nullptr ? scale : scale + K,
                       shift, first_channel);
    add_chunk(shared.lists[has_one_list ? 0 : half], shared.group_scales, weight, total);
    if (CLUSTER * CHUNK >= K) break;
  }
  send_sums(shared, total);

#if CLUSTER > 1
  if (threadIdx.x >= FINISHED) return;
#endif
  // A block stays until all has come, whether it has columns or not.
  shared.inbox.wait();
  if (!finishes) return;
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
    float sums[HALVES];
#pragma unroll
    for (int side = 0; side < HALVES; side++) {
      sums[side] = 0.0f;
#pragma unroll
      for (int block = 0; block < CLUSTER; block++)
        sums[side] += shared.received[row][block][side][threadIdx.x];
#if FORMAT == INT8 || FORMAT == FP8
      sums[side] *= shared.column_scales[side].scale(finished);
#endif
      sums[side] += low_half(biases[side]);
    }
#if ACTIVATION == NONE
    out[row * OUT + out_column] = to_bits(sums[0] + low_half(rest[row]));
#else
    out[row * OUT + out_column] = to_bits(gated(ACTIVATION == SILU, sums[0], sums[1]));
#endif
  }
}
