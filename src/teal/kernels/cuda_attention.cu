// Norm, q, k, v, rotary embedding, cache, attention and o of one decode step of one stream, in one
// launch. docs/fused-step.md explains the scheme with a drawing.
//
// A cluster owns a key head and the query heads that share it. Its blocks share the hidden channels
// among themselves: each sums q, k and v over its share for all of these heads. They exchange these
// sums, share the positions among themselves, and exchange what they attended to, so that each then
// has OWN attended channels in full, and adds their strips of o to the residual stream.
//
// Set on the compiler's command line, beside what cuda_slices.cuh and cuda_attention.cuh want:
// O_GROUP, BLOCKS, PREFETCH_QKV, PREFETCH_O, MOST_SHARED.

#include "cuda_attention.cuh"
#include "cuda_slices.cuh"

constexpr int PARTS = 3;  // q, k and v
constexpr int Q_COLUMNS = QUERIES * HEAD_DIM;
constexpr int COLUMNS = Q_COLUMNS + 2 * HEAD_DIM;
constexpr int KEY_HEADS = N / COLUMNS;
// Columns that a block sums up for its cluster.
constexpr int SUMMED = COLUMNS / CLUSTER;

#if FORMAT == INT4
constexpr int GROUPS_OF_SHARE = GROUP < CHUNK ? CHUNK / GROUP : 1;
constexpr int GROUPS_OF_OWN = O_GROUP < OWN ? OWN / O_GROUP : 1;
#else
constexpr int GROUPS_OF_SHARE = 1, GROUPS_OF_OWN = 1;
#endif

using Output = Rows<OWN, GROUPS_OF_OWN>;

struct Shared {
  Squares squares;
  Inbox sums, heads;
  List lists[PARTS];
  union {
    struct {
      Teams<Q_COLUMNS> q;
      Teams<HEAD_DIM> kv[2];
    };
    Output::Passes passes;
  };
  ScaleTile<GROUPS_OF_SHARE, COLUMNS> scales;
  alignas(COPY_BYTES) u16 bias[COLUMNS];
  // Sums that this block adds up, over the share of each block of the cluster.
  float exchange[CLUSTER][SUMMED];
  Attention attention;
  Output o;
};

static_assert(sizeof(Shared) <= MOST_SHARED, "the host expects less");

// How much of it the host has to provide.
extern "C" __constant__ int shared_bytes = sizeof(Shared);

__device__ __forceinline__ int width_of(int part) { return part == 0 ? Q_COLUMNS : HEAD_DIM; }

// First of the columns of a part among those of the cluster.
__device__ __forceinline__ int start_of(int part) {
  return part == 0 ? 0 : Q_COLUMNS + (part - 1) * HEAD_DIM;
}

// And among those of the weight.
__device__ __forceinline__ int weight_start_of(int part) {
  return KEY_HEADS * start_of(part) + blockIdx.y * width_of(part);
}

// Ask for scales, zeros and bias of the cluster's columns.
__device__ __forceinline__ void ask_for_columns(Shared& shared, const void* scales, const u8* zeros,
                                                const u16* bias, int first_channel) {
#pragma unroll
  for (int part = 0; part < PARTS; part++) {
    int start = start_of(part), weight_start = weight_start_of(part), width = width_of(part);
#if FORMAT == INT4
    shared.scales.ask(scales, zeros, first_channel / GROUP, (K - first_channel + GROUP - 1) / GROUP, N,
                      weight_start, width, start);
#else
    shared.scales.ask(scales, zeros, 0, 1, N, weight_start, width, start);
#endif
    if (bias != nullptr)
      for (int i = threadIdx.x * HELD; i < width; i += THREADS * HELD)
        copy_16(shared.bias + start + i, bias + weight_start + i);
  }
}

// Begin, with all inboxes open.
__device__ __forceinline__ void begin(Shared& shared) {
  if (threadIdx.x == 0) {
    shared.squares.open();
    shared.sums.open(COLUMNS * sizeof(float));
    shared.heads.open(COLUMNS * sizeof(float));
    shared.attention.open();
  }
  cluster_begin();
}

// This block's sum of one of the cluster's columns.
__device__ __forceinline__ float sum_of(const Shared& shared, int column) {
  if (column < Q_COLUMNS) return shared.q.sum(column);
  column -= Q_COLUMNS;
  return shared.kv[column / HEAD_DIM].sum(column % HEAD_DIM);
}

// Add up q, k and v over all shares, and give every block of the cluster all of them.
__device__ __forceinline__ void exchange_sums(Shared& shared, bool has_bias) {
  u32 rank = cluster_rank();
  for (int column = threadIdx.x; column < COLUMNS; column += THREADS) {
    float sum = sum_of(shared, column);
#if FORMAT == INT8 || FORMAT == FP8
    sum *= shared.scales.scale(0, column);
#endif
    shared.sums.send(&shared.exchange[rank][column % SUMMED], column / SUMMED, sum);
  }
  shared.sums.wait();
  // A lane has one column of one block, and sends the sum to that block.
  for (int i = threadIdx.x; i < COLUMNS; i += THREADS) {
    int block = i % CLUSTER, column = rank * SUMMED + i / CLUSTER;
    float sum = shared.exchange[block][i / CLUSTER];
    for (int step = 1; step < CLUSTER; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (has_bias) sum += low_half(shared.bias[column]);
    shared.heads.send(&shared.attention.heads[0][0] + column, block, rounded(sum));
  }
  shared.heads.wait();
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER)
#endif
__launch_bounds__(THREADS, BLOCKS)
attend_and_project(const i64* hidden, i64* next, i64* clear, const float* gain, const float* thresholds,
                   const float* o_threshold, const u8* qkv, const void* qkv_scales,
                   const u8* qkv_zeros, const u16* qkv_bias, const u8* o, const void* o_scales,
                   const u8* o_zeros, const u16* o_bias, const u16* keys, const u16* values,
                   const i64* position, const float* cosines, const float* sines, const float* q_gain,
                   const float* k_gain, int* overflow, int capacity, int window, float scale,
                   float softcap, float epsilon, float head_epsilon, float multiplier) {
  extern __shared__ uint4 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  int rank = blockIdx.x, key_head = blockIdx.y;
  int first_channel = rank * CHUNK, first_own = key_head * Q_COLUMNS + rank * OWN;
  float limits[PARTS], o_limit = *o_threshold;
#pragma unroll
  for (int i = 0; i < PARTS; i++) limits[i] = thresholds[i];

  begin(shared);
  ask_for_columns(shared, qkv_scales, qkv_zeros, qkv_bias, first_channel);
#if FORMAT == INT4
  int groups_left = (KEY_HEADS * Q_COLUMNS - first_own + O_GROUP - 1) / O_GROUP;
  shared.o.scales.ask(o_scales, o_zeros, first_own / O_GROUP, groups_left, K, 0, K);
#else
  shared.o.scales.ask(o_scales, o_zeros, 0, 1, K, 0, K);
#endif
  // Position and cache were written by launches of the step before.
  Context context(keys, values, (int)__ldcg(position), capacity, key_head, window);
  shared.attention.ask(context, cosines, sines, q_gain, k_gain);
  const u8* weights[PARTS];
#pragma unroll
  for (int i = 0; i < PARTS; i++) weights[i] = qkv + (u64)weight_start_of(i) * BITS / 8;
  int prefetched = min(PREFETCH_QKV, K - first_channel);
  u64 first_strip = first_channel * STRIP_BYTES;
  shared.q.prefetch<STRIP_BYTES>(weights[0] + first_strip, Q_COLUMNS, prefetched);
#pragma unroll
  for (int i = 1; i < PARTS; i++)
    shared.kv[i - 1].prefetch<STRIP_BYTES>(weights[i] + first_strip, HEAD_DIM, prefetched);
  wait_for_input();

  Share share;
  share.ask(hidden, gain, first_channel);
  float inverse_rms = shared.squares.inverse_rms(hidden, epsilon);
  share.norm(inverse_rms, next, clear, first_channel, key_head == 0);
  wait_for_all_copies();
#pragma unroll
  for (int i = 0; i < PARTS; i++) share.list(shared.lists[i], limits[i], first_channel);
  shared.q.add<STRIP_BYTES>(shared.lists[0], shared.scales, 0, weights[0], Q_COLUMNS);
#pragma unroll
  for (int i = 1; i < PARTS; i++)
    shared.kv[i - 1].add<STRIP_BYTES>(shared.lists[i], shared.scales, start_of(i), weights[i], HEAD_DIM);
  shared.o.prefetch(o + first_own * shared.o.BYTES, min(PREFETCH_O, OWN));
  __syncthreads();
  exchange_sums(shared, qkv_bias != nullptr);

  shared.attention.place_heads(context, q_gain != nullptr, head_epsilon);
  shared.attention.attend(context, scale, softcap);

  using Own = KeptChannels<OWN>;
  float x[Own::PER_THREAD];
  bool keeps[Own::PER_THREAD];
#pragma unroll
  for (int i = 0; i < Own::PER_THREAD; i++) {
    int place = i * THREADS + threadIdx.x;
    x[i] = place < OWN ? rounded(shared.attention.attended[place]) : 0.0f;
    keeps[i] = place < OWN && !(fabsf(x[i]) <= o_limit);
  }
  shared.o.list.fill(keeps, x, first_own);
  bool adds_bias = rank == 0 && key_head == 0;
  shared.o.add(shared.passes, o, adds_bias ? o_bias : nullptr, next, multiplier, overflow);
}
