// Attention of one decode step of one sequence: from the fixed-point sums of q, k and v to one
// partial result for each split of the context. The output projection combines the splits
// (decode_step.cu).
//
// A block has the query heads of one key head and one split: of the tiles of the context, every
// SPLITS-th. Its warps take turns. They load the cache straight into the registers that they
// multiply, the first tile of each warp before the queries are known: after that, unless the
// context is long, memory is accessed only once more.

#include "attention_mma.cuh"

namespace teal {

constexpr int THREADS = WARP * WARPS;
constexpr int HEADS_PER_WARP = (HEADS + WARPS - 1) / WARPS;
constexpr float LOG_2 = 0.6931471805599453f;

// Positions from one tile of a warp to its next.
constexpr int TILE_STRIDE = WARPS * Config::SPLITS * TILE;

// The heads of the new token that a warp prepares, every WARPS-th.
struct NewHeads {
  HeadPairs<float> angles, norm_weights[HEADS_PER_WARP];

  // Load what does not depend on the input; `cosines` and `sines` are those of the position.
  __device__ __forceinline__ void load(const float* cosines, const float* sines,
                                       const float* q_norm_weight, const float* k_norm_weight) {
    angles.load(cosines, sines);
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; i++) {
      const float* norm_weight = head(i) < KEY ? q_norm_weight : k_norm_weight;
      if (Config::HAS_NORM_WEIGHTS && head(i) <= KEY)
        norm_weights[i].load(norm_weight, norm_weight + HALF_DIM);
    }
  }

  // Write the queries to shared memory. If the split `has_newest` position, also write its key and
  // value, to shared memory and to their rows of the cache.
  __device__ __forceinline__ void store(const i64* qkv, float eps, bool has_newest, u16* key,
                                        u16* value, SharedMemory& shared) const {
    HeadPairs<i64> sums[HEADS_PER_WARP];
    // Everything that a warp may need, so that no branch separates the loads.
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; i++) {
      int here = min(head(i), VALUE);
      int all = here < KEY ? blockIdx.x * QUERIES + here : gridDim.x * here + blockIdx.x;
      const i64* from = qkv + all * HEAD_DIM;
      sums[i].load(from, from + HALF_DIM);
    }
#pragma unroll
    for (int i = 0; i < HEADS_PER_WARP; i++) {
      if (head(i) >= (has_newest ? HEADS : QUERIES)) continue;
      HeadPairs<float> activations = activations_of(sums[i]);
      if (head(i) != VALUE) {
        if (Config::HAS_NORM_WEIGHTS) norm_head(activations, norm_weights[i], eps);
        rotate(activations, angles);
      }
      activations.store(shared.heads[head(i)]);
      if (head(i) >= KEY) activations.store(head(i) == KEY ? key : value);
    }
  }

 private:
  static __device__ __forceinline__ int head(int i) { return i * WARPS + threadIdx.x / WARP; }
};

// Combine the softmaxes of the first `warps` warps, in their order.
__device__ __forceinline__ void combine(const SharedMemory& shared, int warps, float* parts) {
  constexpr int AT_ONCE = 4, GROUPS = HEAD_DIM / AT_ONCE;
  for (int i = threadIdx.x; i < QUERIES * GROUPS; i += THREADS) {
    int head = i / GROUPS, channel = i % GROUPS * AT_ONCE;
    float largest[WARPS], top = LOWEST_SCORE, weights = 0.0f;
    float4 values[WARPS], total = {};
    // Warps without a tile wrote nothing.
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) {
      largest[warp] = warp < warps ? shared.largest[warp][head] : LOWEST_SCORE;
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
    int row = (blockIdx.x * QUERIES + head) * Config::SPLITS + blockIdx.y;
    float2* to = reinterpret_cast<float2*>(parts + row * (HEAD_DIM + 2));
    to[channel / 2] = float2{total.x, total.y};
    to[channel / 2 + 1] = float2{total.z, total.w};
    if (channel == 0) to[HEAD_DIM / 2] = float2{LOG_2 * top, weights};
  }
}

// Append a token to the cache. For each head and split write HEAD_DIM + 2 consecutive numbers: the
// sums of weighted values, the largest score and the sum of weights.
extern "C" __global__ void __launch_bounds__(THREADS)
attend(const i64* qkv, u16* keys, u16* values, const i64* positions, const float* cosines,
       const float* sines, const float* q_norm_weight, const float* k_norm_weight, float* parts,
       int capacity, int window, float scale, float softcap, float eps) {
  __shared__ SharedMemory shared;
  int split = blockIdx.y, warp = threadIdx.x / WARP;
  keys += (u64)blockIdx.x * capacity * HEAD_DIM;
  values += (u64)blockIdx.x * capacity * HEAD_DIM;

  // Launches of the step before wrote position and cache.
  int position = (int)__ldcg(positions);
  int begin = window > 0 ? max(0, position + 1 - window) : 0;
  int tiles = (position - begin) / TILE + 1;
  int first = begin + (warp * Config::SPLITS + split) * TILE;
  Tile tile;
  tile.load_keys(keys, first, position);
  tile.load_values(values, first, position);
  Tile::prefetch(keys, first + TILE_STRIDE, position);
  Tile::prefetch(values, first + TILE_STRIDE, position);
  NewHeads heads;
  heads.load(cosines + (u64)position * HALF_DIM, sines + (u64)position * HALF_DIM, q_norm_weight,
             k_norm_weight);
  wait_for_input();

  u64 newest = (u64)position * HEAD_DIM;
  bool has_newest = (tiles - 1) % Config::SPLITS == split;
  heads.store(qkv, eps, has_newest, keys + newest, values + newest, shared);
  __syncthreads();
  Softmax softmax;
  bool is_first = true;
  for (; first <= position; first += TILE_STRIDE) {
    int next = first + TILE_STRIDE;
    if (position - first < TILE) tile.add_new(shared, position - first);
    tile.interleave_values();
    float scores[SETS][POSITIONS_PER_LANE];
    tile.multiply_keys(shared, scores);
    if (next <= position) tile.load_keys(keys, next, position);
#pragma unroll
    for (int i = 0; i < SETS * POSITIONS_PER_LANE; i++) {
      float& score = scores[i / POSITIONS_PER_LANE][i % POSITIONS_PER_LANE];
      score *= LOG2_E * scale;
      if (Config::HAS_SOFTCAP) score = capped(score, softcap);
      if (first + position_in_tile(i % POSITIONS_PER_LANE) > position) score = minus_infinity();
    }
    softmax.add(scores, tile, is_first);
    if (next <= position) tile.load_values(values, next, position);
    is_first = false;
  }
  int warps = min(WARPS, (tiles - split + Config::SPLITS - 1) / Config::SPLITS);
  if (warp < warps) softmax.store(shared);
  __syncthreads();
  combine(shared, warps, parts);
}

}  // namespace teal
