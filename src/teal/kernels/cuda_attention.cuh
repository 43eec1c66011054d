// Attention of the query heads that share one key head, by the blocks of a cluster.
//
// A warp reads WARP_ROWS positions at a time, 16 bytes of a key and of a value per lane; the warps of
// the whole cluster take the positions in turns. What a thread reads of the cache goes through slots
// of its own in shared memory, the first of them asked for before the queries are known. Every warp
// keeps a softmax of what it has seen; warps, then blocks put theirs together in their order.
//
// Set on the compiler's command line, beside what cuda_hidden.cuh wants: HEAD_DIM, QUERIES (heads per
// key head), AHEAD (positions that a thread asks for in advance).

#pragma once

#include "cuda_hidden.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int HELD = COPY_BYTES / sizeof(u16);  // channels of a key that a lane holds
constexpr int ROW_LANES = HEAD_DIM / HELD;
constexpr int WARP_ROWS = WARP / ROW_LANES;
constexpr int WARPS = THREADS / WARP;
// More query heads than fit into the registers of one warp are shared by several, a set each.
constexpr int MOST_HEADS = 4;
constexpr int SETS = (QUERIES + MOST_HEADS - 1) / MOST_HEADS;
constexpr int SET = (QUERIES + SETS - 1) / SETS;
constexpr int READERS = WARPS / SETS;  // warps that read different positions
constexpr int TURN = CLUSTER * READERS * WARP_ROWS;
// Attended channels that a block puts together.
constexpr int OWN = QUERIES * HEAD_DIM / CLUSTER;

static_assert(ROW_LANES >= 1 && ROW_LANES <= WARP && WARP % ROW_LANES == 0, "a row fits into a warp");
static_assert(QUERIES * HEAD_DIM % CLUSTER == 0 && READERS >= 1, "every block has its share");

// Below every score, and no infinity, so that differences are numbers.
constexpr float LOWEST = -3.4e38f;
#define MINUS_INFINITY __int_as_float(0xff800000)

// The largest value of all threads of a warp.
__device__ __forceinline__ float warp_max(float value) {
  for (int step = WARP / 2; step > 0; step /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
  return value;
}

// Copy 16 bytes in the background.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from)
               : "memory");
}

// Wait for what this thread copied; a barrier makes it visible to the block.
__device__ __forceinline__ void wait_for_all_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Where the keys and values lie that this block's cluster attends to.
struct Context {
  const uint4* keys;    // from position 0 on, ROW_LANES beside each other
  const uint4* values;
  int position;         // of the new token
  int first;            // this warp's first position, behind the new token where it has none

  // `window` is how many positions are covered at most; 0 for all.
  __device__ __forceinline__ Context(const u16* all_keys, const u16* all_values, int position,
                                     int capacity, int key_head, int window)
      : position(position) {
    u64 start = (u64)key_head * capacity * HEAD_DIM;
    keys = reinterpret_cast<const uint4*>(all_keys + start);
    values = reinterpret_cast<const uint4*>(all_values + start);
    int begin = window > 0 ? max(0, position + 1 - window) : 0, reader = threadIdx.x / WARP / SETS;
    first = reader < READERS ? begin + (reader * CLUSTER + (int)cluster_rank()) * WARP_ROWS
                             : position + 1;
  }
};

// Of a softmax: sums of weighted values and of weights, relative to the largest score.
struct Softmax {
  float largest[SET], weights[SET], total[SET][HELD];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int h = 0; h < SET; h++) {
      largest[h] = LOWEST;
      weights[h] = 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; i++) total[h][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void rescale(int h, float larger) {
    float factor = __expf(largest[h] - larger);
    largest[h] = larger;
    weights[h] *= factor;
#pragma unroll
    for (int i = 0; i < HELD; i++) total[h][i] *= factor;
  }

  // Add a position; a score of -infinity adds nothing.
  __device__ __forceinline__ void add(const float (&scores)[SET], const float (&value)[HELD]) {
    bool rises = false;
#pragma unroll
    for (int h = 0; h < SET; h++) rises |= scores[h] > largest[h];
    // After the first positions the largest score rarely changes.
    if (__any_sync(~0u, rises)) {
#pragma unroll
      for (int h = 0; h < SET; h++) rescale(h, fmaxf(largest[h], scores[h]));
    }
#pragma unroll
    for (int h = 0; h < SET; h++) {
      float weight = __expf(scores[h] - largest[h]);
      weights[h] += weight;
#pragma unroll
      for (int i = 0; i < HELD; i++) total[h][i] += weight * value[i];
    }
  }
};

__device__ __forceinline__ void unpack(const uint4& row, float (&values)[HELD]) {
  const u32* words = reinterpret_cast<const u32*>(&row);
#pragma unroll
  for (int word = 0; word < HELD / 2; word++) {
    values[2 * word] = low_half(words[word]);
    values[2 * word + 1] = high_half(words[word]);
  }
}

// What the blocks of a cluster need for attention, in shared memory.
struct Attention {
  // Queries, key and value of the new token as activations, the same in all blocks.
  alignas(COPY_BYTES) float heads[QUERIES + 2][HEAD_DIM];
  // Result: this block's share of the attended channels.
  float attended[OWN];

  // Ask for everything that does not depend on this step's products.
  __device__ __forceinline__ void ask(const Context& context, const float* cosines, const float* sines,
                                      const float* q_gain, const float* k_gain) {
    constexpr int FLOATS_AT_ONCE = COPY_BYTES / sizeof(float);
    for (int i = threadIdx.x * FLOATS_AT_ONCE; i < HALF; i += THREADS * FLOATS_AT_ONCE) {
      copy_16(angles[0] + i, cosines + (u64)context.position * HALF + i);
      copy_16(angles[1] + i, sines + (u64)context.position * HALF + i);
    }
    if (q_gain != nullptr)
      for (int i = threadIdx.x * FLOATS_AT_ONCE; i < HEAD_DIM; i += THREADS * FLOATS_AT_ONCE) {
        copy_16(gains[0] + i, q_gain + i);
        copy_16(gains[1] + i, k_gain + i);
      }
    for (int turn = 0; turn < AHEAD; turn++) ask_turn(context, turn);
  }

  // Norm heads, where there are gains, and turn queries and key to their position. One block of the
  // cluster appends key and value to the cache. What was asked for has arrived.
  __device__ __forceinline__ void place_heads(const Context& context, bool has_gains, float epsilon) {
    for (int head = threadIdx.x / WARP; head <= QUERIES; head += WARPS)
      place_head(heads[head], has_gains ? gains[head == QUERIES] : nullptr, epsilon);
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * HEAD_DIM; i += THREADS)
      fresh[i / HEAD_DIM][i % HEAD_DIM] = to_bits(heads[QUERIES + i / HEAD_DIM][i % HEAD_DIM]);
    __syncthreads();
    if (cluster_rank() == 0 && threadIdx.x < 2 * ROW_LANES) {
      int lane = threadIdx.x % ROW_LANES, is_value = threadIdx.x / ROW_LANES;
      const uint4* rows = is_value ? context.values : context.keys;
      const_cast<uint4*>(rows)[(u64)context.position * ROW_LANES + lane] = fresh_row(is_value, lane);
    }
  }

  // By one thread, before the cluster has begun.
  __device__ __forceinline__ void open() {
    inbox.open(sizeof(tops_of_blocks) + sizeof(weights_of_blocks) + sizeof(values_of_blocks));
  }

  // Fill `attended`. A score is multiplied by `scale`, and where `softcap` is positive ends there.
  __device__ __forceinline__ void attend(const Context& context, float scale, float softcap) {
    Softmax softmax;
    read(context, scale, softcap, softmax);
    send(softmax);
    inbox.wait();
    combine();
    __syncthreads();
  }

 private:
  Inbox inbox;
  alignas(COPY_BYTES) float angles[2][HALF];     // cosines, sines
  alignas(COPY_BYTES) float gains[2][HEAD_DIM];  // of queries, of the key
  alignas(COPY_BYTES) u16 fresh[2][HEAD_DIM];    // new key and value as the cache holds them
  union {
    uint4 slots[AHEAD][2][THREADS];
    // Sums of weighted values of the warps; the slots are done with then.
    float values_of_warps[WARPS][SET][HEAD_DIM];
  };
  float tops_of_warps[WARPS][SET], weights_of_warps[WARPS][SET], tops[QUERIES];
  // From all blocks: their largest scores, sums of weights, and sums of values of this one's channels.
  float tops_of_blocks[CLUSTER][QUERIES], weights_of_blocks[CLUSTER][QUERIES];
  float values_of_blocks[CLUSTER][OWN];

  // Ask for the position of one of this thread's turns, unless it is not in the cache yet.
  __device__ __forceinline__ void ask_turn(const Context& context, int turn) {
    int lane = threadIdx.x % WARP, row = context.first + turn * TURN + lane / ROW_LANES;
    if (row < context.position) {
      u64 place = (u64)row * ROW_LANES + lane % ROW_LANES;
      copy_16(&slots[turn % AHEAD][0][threadIdx.x], context.keys + place);
      copy_16(&slots[turn % AHEAD][1][threadIdx.x], context.values + place);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  __device__ __forceinline__ uint4 fresh_row(int is_value, int lane) const {
    return reinterpret_cast<const uint4*>(fresh[is_value])[lane];
  }

  // Norm and turn one head, by a warp: channels i and i + HALF are a pair.
  __device__ __forceinline__ void place_head(float* head, const float* gain, float epsilon) {
    constexpr int PAIRS = (HALF + WARP - 1) / WARP;
    int lane = threadIdx.x % WARP;
    float low[PAIRS], high[PAIRS], squares = 0.0f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      int pair = i * WARP + lane;
      low[i] = pair < HALF ? head[pair] : 0.0f;
      high[i] = pair < HALF ? head[HALF + pair] : 0.0f;
      squares += low[i] * low[i] + high[i] * high[i];
    }
    float factor = gain == nullptr ? 0.0f : rsqrtf(warp_sum(squares) / HEAD_DIM + epsilon);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      int pair = i * WARP + lane;
      if (pair >= HALF) break;
      if (gain != nullptr) {
        low[i] = rounded(rounded(low[i] * factor) * gain[pair]);
        high[i] = rounded(rounded(high[i] * factor) * gain[HALF + pair]);
      }
      float cosine = angles[0][pair], sine = angles[1][pair];
      head[pair] = rounded(low[i] * cosine - high[i] * sine);
      head[HALF + pair] = rounded(high[i] * cosine + low[i] * sine);
    }
  }

  // The softmax over this lane's positions, in the channels that it holds.
  __device__ __forceinline__ void read(const Context& context, float scale, float softcap,
                                       Softmax& softmax) {
    int lane = threadIdx.x % WARP, set = threadIdx.x / WARP % SETS;
    float queries[SET][HELD];
#pragma unroll
    for (int h = 0; h < SET; h++)
#pragma unroll
      for (int i = 0; i < HELD; i++)
        // A set with fewer heads does its last one again.
        queries[h][i] = heads[min(set * SET + h, QUERIES - 1)][lane % ROW_LANES * HELD + i];
    for (int turn = 0; context.first + turn * TURN <= context.position; turn++) {
      asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
      int row = context.first + turn * TURN + lane / ROW_LANES;
      uint4 key = {}, value = {};
      if (row < context.position) {
        key = slots[turn % AHEAD][0][threadIdx.x];
        value = slots[turn % AHEAD][1][threadIdx.x];
      } else if (row == context.position) {
        key = fresh_row(0, lane % ROW_LANES);
        value = fresh_row(1, lane % ROW_LANES);
      }
      ask_turn(context, turn + AHEAD);
      float channels[HELD], scores[SET];
      unpack(key, channels);
#pragma unroll
      for (int h = 0; h < SET; h++) {
        scores[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; i++) scores[h] += queries[h][i] * channels[i];
      }
#pragma unroll
      for (int h = 0; h < SET; h++) {
        for (int step = ROW_LANES / 2; step > 0; step /= 2)
          scores[h] += __shfl_xor_sync(~0u, scores[h], step);
        scores[h] = row <= context.position ? capped(scores[h] * scale, softcap) : MINUS_INFINITY;
      }
      unpack(value, channels);
      softmax.add(scores, channels);
    }
  }

  static __device__ __forceinline__ float capped(float score, float softcap) {
    // tanh(z) = 1 - 2 / (1 + exp(2 z))
    return softcap > 0.0f ? softcap - 2.0f * softcap / (1.0f + __expf(2.0f * score / softcap)) : score;
  }

  // Put the warps of this block together, and send every block of the cluster what it needs of that.
  __device__ __forceinline__ void send(Softmax& softmax) {
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, set = warp % SETS;
#pragma unroll
    for (int h = 0; h < SET; h++) {
      float top = warp_max(softmax.largest[h]);
      if (lane == 0) tops_of_warps[warp][h] = top;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < SET; h++) {
      float top = warp_max(lane < READERS ? tops_of_warps[lane * SETS + set][h] : LOWEST);
      softmax.rescale(h, top);
      for (int step = ROW_LANES; step < WARP; step *= 2) {
        softmax.weights[h] += __shfl_xor_sync(~0u, softmax.weights[h], step);
#pragma unroll
        for (int i = 0; i < HELD; i++)
          softmax.total[h][i] += __shfl_xor_sync(~0u, softmax.total[h][i], step);
      }
      if (lane == 0) weights_of_warps[warp][h] = softmax.weights[h];
      if (lane == 0 && warp < SETS && set * SET + h < QUERIES) tops[set * SET + h] = top;
#pragma unroll
      for (int i = 0; i < HELD; i++)
        if (lane < ROW_LANES) values_of_warps[warp][h][lane * HELD + i] = softmax.total[h][i];
    }
    __syncthreads();
    u32 rank = cluster_rank();
    for (int i = threadIdx.x; i < QUERIES * HEAD_DIM; i += THREADS) {
      int head = i / HEAD_DIM;
      float sum = 0.0f;
      for (int reader = 0; reader < READERS; reader++)
        sum += values_of_warps[reader * SETS + head / SET][head % SET][i % HEAD_DIM];
      inbox.send(&values_of_blocks[rank][i % OWN], i / OWN, sum);
    }
    for (int i = threadIdx.x; i < QUERIES * CLUSTER; i += THREADS) {
      int head = i / CLUSTER;
      float sum = 0.0f;
      for (int reader = 0; reader < READERS; reader++)
        sum += weights_of_warps[reader * SETS + head / SET][head % SET];
      inbox.send(&weights_of_blocks[rank][head], i % CLUSTER, sum);
      inbox.send(&tops_of_blocks[rank][head], i % CLUSTER, tops[head]);
    }
  }

  // Put the blocks together: a lane has one channel of one block.
  __device__ __forceinline__ void combine() {
    for (int i = threadIdx.x; i < OWN * CLUSTER; i += THREADS) {
      int place = i / CLUSTER, block = i % CLUSTER, head = (cluster_rank() * OWN + place) / HEAD_DIM;
      float top = tops_of_blocks[block][head], largest = top;
      for (int step = 1; step < CLUSTER; step *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      float factor = __expf(top - largest);
      float value = factor * values_of_blocks[block][place];
      float weight = factor * weights_of_blocks[block][head];
      for (int step = 1; step < CLUSTER; step *= 2) {
        value += __shfl_xor_sync(~0u, value, step);
        weight += __shfl_xor_sync(~0u, weight, step);
      }
      if (block == 0) attended[place] = value / weight;
    }
  }
};
