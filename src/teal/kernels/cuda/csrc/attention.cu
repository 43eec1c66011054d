// Attention of one decode step of one stream, from the fixed-point sums of q, k and v to what the
// splits of its context give, which the output projection puts together (decode_step.cu).
//
// A block has the query heads of one key head, and one split: of the tiles that the context is cut
// into, every SPLITS-th. Its warps take turns at them. What they read of the cache goes straight
// into the registers that they multiply, the first tile of each before the queries are known: after
// that there is one way to memory and back, unless the context is long.
//
// Set on the compiler's command line, beside what attention_mma.cuh wants: SPLITS, HAS_NORM_WEIGHTS,
// HAS_SOFTCAP.

#include "attention_mma.cuh"

constexpr int THREADS = WARP * WARPS;
constexpr int HEADS_OF_WARP = (HEADS + WARPS - 1) / WARPS;
constexpr float LOG_2 = 0.6931471805599453f;

// Positions between two tiles of a warp.
constexpr int TURN = WARPS * SPLITS * TILE;

// The heads of the new token that a warp places, one in WARPS.
struct Heads {
  Pairs<float> angles, norm_weights[HEADS_OF_WARP];

  // `cosines` and `sines` are those of the position.
  __device__ __forceinline__ void ask(const float* cosines, const float* sines, const float* q_norm_weight,
                                      const float* k_norm_weight) {
    angles.ask(cosines, sines);
#pragma unroll
    for (int i = 0; i < HEADS_OF_WARP; i++) {
      const float* norm_weight = head(i) < KEY ? q_norm_weight : k_norm_weight;
      if (HAS_NORM_WEIGHTS && head(i) <= KEY) norm_weights[i].ask(norm_weight, norm_weight + HALF);
    }
  }

  // Bring the queries to shared memory; where the split `has_newest` position, also its key and
  // value, and these to their rows of the cache.
  __device__ __forceinline__ void place(const i64* qkv, float eps, bool has_newest, u16* key,
                                        u16* value, Shared& shared) const {
    Pairs<i64> sums[HEADS_OF_WARP];
    // All that a warp may need, so that nothing stands between the loads.
#pragma unroll
    for (int i = 0; i < HEADS_OF_WARP; i++) {
      int here = min(head(i), VALUE);
      int all = here < KEY ? blockIdx.x * QUERIES + here : gridDim.x * here + blockIdx.x;
      const i64* from = qkv + all * HEAD_DIM;
      sums[i].ask(from, from + HALF);
    }
#pragma unroll
    for (int i = 0; i < HEADS_OF_WARP; i++) {
      if (head(i) >= (has_newest ? HEADS : QUERIES)) continue;
      Pairs<float> activations = activations_of(sums[i]);
      if (head(i) != VALUE) {
        if (HAS_NORM_WEIGHTS) norm(activations, norm_weights[i], eps);
        turn(activations, angles);
      }
      activations.write(shared.heads[head(i)]);
      if (head(i) >= KEY) activations.write(head(i) == KEY ? key : value);
    }
  }

 private:
  static __device__ __forceinline__ int head(int i) { return i * WARPS + threadIdx.x / WARP; }
};

// Put the softmaxes of the first `warps` warps together, in their order.
__device__ __forceinline__ void combine(const Shared& shared, int warps, float* parts) {
  constexpr int AT_ONCE = 4, GROUPS = HEAD_DIM / AT_ONCE;
  for (int i = threadIdx.x; i < QUERIES * GROUPS; i += THREADS) {
    int head = i / GROUPS, channel = i % GROUPS * AT_ONCE;
    float largest[WARPS], top = LOWEST, weights = 0.0f;
    float4 values[WARPS], total = {};
    // Warps without a tile wrote nothing.
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
      largest[warp] = warp < warps ? shared.largest[warp][head] : LOWEST;
      values[warp] = warp < warps ? shared.values(warp, head, channel) : float4{};
      top = fmaxf(top, largest[warp]);
    }
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
      float factor = power_of_2(largest[warp] - top);
      total.x += factor * values[warp].x;
      total.y += factor * values[warp].y;
      total.z += factor * values[warp].z;
      total.w += factor * values[warp].w;
      if (channel == 0 && warp < warps) weights += factor * shared.weights[warp][head];
    }
    int row = (blockIdx.x * QUERIES + head) * SPLITS + blockIdx.y;
    float2* to = reinterpret_cast<float2*>(parts + row * (HEAD_DIM + 2));
    to[channel / 2] = float2{total.x, total.y};
    to[channel / 2 + 1] = float2{total.z, total.w};
    if (channel == 0) to[HEAD_DIM / 2] = float2{LOG_2 * top, weights};
  }
}

// Append a token to the cache, and write for each head and split HEAD_DIM sums of weighted values,
// the largest score and the sum of weights, HEAD_DIM + 2 entries beside each other.
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const i64* qkv, u16* keys, u16* values, const i64* positions, const float* cosines,
       const float* sines, const float* q_norm_weight, const float* k_norm_weight, float* parts, int capacity,
       int window, float scale, float softcap, float eps) {
  __shared__ Shared shared;
  int split = blockIdx.y, warp = threadIdx.x / WARP;
  keys += (u64)blockIdx.x * capacity * HEAD_DIM;
  values += (u64)blockIdx.x * capacity * HEAD_DIM;

  // Position and cache were written by launches of the step before.
  int position = (int)__ldcg(positions);
  int begin = window > 0 ? max(0, position + 1 - window) : 0;
  int tiles = (position - begin) / TILE + 1;
  int first = begin + (warp * SPLITS + split) * TILE;
  Tile tile;
  tile.ask_keys(keys, first, position);
  tile.ask_values(values, first, position);
  Tile::prefetch(keys, first + TURN, position);
  Tile::prefetch(values, first + TURN, position);
  Heads heads;
  heads.ask(cosines + (u64)position * HALF, sines + (u64)position * HALF, q_norm_weight, k_norm_weight);
  wait_for_input();

  u64 newest = (u64)position * HEAD_DIM;
  heads.place(qkv, eps, (tiles - 1) % SPLITS == split, keys + newest, values + newest, shared);
  __syncthreads();
  Softmax softmax;
  bool is_first = true;
  for (; first <= position; first += TURN) {
    int next = first + TURN;
    if (position - first < TILE) tile.add_new(shared, position - first);
    tile.interleave_values();
    float scores[SETS][OWN];
    tile.multiply_keys(shared, scores);
    if (next <= position) tile.ask_keys(keys, next, position);
#pragma unroll
    for (int i = 0; i < SETS * OWN; i++) {
      float& score = scores[i / OWN][i % OWN];
      score *= LOG2_E * scale;
      if (HAS_SOFTCAP) score = capped(score, softcap);
      if (first + own(i % OWN) > position) score = MINUS_INFINITY;
    }
    softmax.add(scores, tile, is_first);
    if (next <= position) tile.ask_values(values, next, position);
    is_first = false;
  }
  int warps = min(WARPS, (tiles - split + SPLITS - 1) / SPLITS);
  if (warp < warps) softmax.write(shared);
  __syncthreads();
  combine(shared, warps, parts);
}
