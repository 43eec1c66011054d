// Kernels of one decode step of one stream: embedding, products of the kept channels, final norm.
// docs/fused-step.md explains the scheme with a drawing.
//
// What several blocks add to is kept in fixed point, as 64-bit integers with FRACTION_BITS bits
// after the point: integer addition gives the same bits in any order, so blocks add with atomics
// and none waits for another. The residual stream is such a sum from the first layer to the last.
//
// Set on the compiler's command line: BFLOAT16, FRACTION_BITS, and for `project` SOURCE, K, N,
// START_1, START_2, HEAD_DIM, SPLITS, HAS_BIAS, CHUNK, WARPS_N, WARPS_K, UNROLL, BLOCKS, CLUSTER,
// PREFETCH.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define HIDDEN 0
#define ATTENTION 1
#define SILU 2
#define GELU_TANH 3

constexpr int WARP = 32;
constexpr int PER_LANE = 8;  // columns, 16 bytes
constexpr int WARP_N = WARP * PER_LANE;
constexpr int THREADS = WARP * WARPS_N * WARPS_K;
constexpr int BLOCK_N = WARP_N * WARPS_N;
constexpr int WORDS = CHUNK / WARP;
constexpr int PER_THREAD = (CHUNK + THREADS - 1) / THREADS;
constexpr int NORM_THREADS = 1024;
constexpr float UNIT = (float)(1ll << FRACTION_BITS);
// Beyond this a sum of many blocks could leave 64 bits.
constexpr float LARGEST = (float)(1ll << (62 - FRACTION_BITS));

// A kept channel and its activation.
struct Entry {
  u32 channel;
  float value;
};

__device__ __forceinline__ float low_half(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair << 16);
#else
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(value) : "r"(pair));
  return value;
#endif
}

__device__ __forceinline__ float high_half(u32 pair) {
#if BFLOAT16
  return __uint_as_float(pair & 0xffff0000u);
#else
  float value;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(value) : "r"(pair));
  return value;
#endif
}

__device__ __forceinline__ u16 to_bits(float value) {
  u16 bits;
#if BFLOAT16
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ __forceinline__ float rounded(float value) { return low_half(to_bits(value)); }

// Wait until all that earlier launches wrote is visible, then let the next launch begin: what a
// launch reads before it waits was written two launches ago or earlier.
__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float to_float(i64 fixed) { return (float)fixed * (1.0f / UNIT); }

// The weights of eight columns of a channel, which nobody reads again.
__device__ __forceinline__ uint4 load_strip(const u16* pointer) {
  uint4 strip;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(strip.x), "=r"(strip.y), "=r"(strip.z), "=r"(strip.w)
               : "l"(pointer));
  return strip;
}

// Add `value` of all threads of a warp.
__device__ __forceinline__ float warp_sum(float value) {
  for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ __forceinline__ void cluster_arrive() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Sum of squares of the hidden states `first`, `first + stride`, … (in pairs) over a block.
template <int BLOCK_THREADS>
__device__ __forceinline__ float block_squares(const i64* hidden, int pairs, int first, int stride) {
  __shared__ float of_warps[BLOCK_THREADS / WARP];
  float sum = 0.0f;
#pragma unroll 8
  for (int i = first; i < pairs; i += stride) {
    longlong2 pair = __ldcg(reinterpret_cast<const longlong2*>(hidden) + i);
    float a = to_float(pair.x), b = to_float(pair.y);
    sum += a * a + b * b;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int warp = 0; warp < BLOCK_THREADS / WARP; warp++) sum += of_warps[warp];
  return sum;
}

// 1 / rms of the hidden states; the blocks of a cluster share the reading.
__device__ __forceinline__ float inverse_rms(const i64* hidden, float epsilon) {
#if CLUSTER > 1
  __shared__ float of_blocks[CLUSTER];
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  float sum = block_squares<THREADS>(hidden, K / 2, rank * THREADS + threadIdx.x, CLUSTER * THREADS);
  cluster_wait();  // every block of the cluster has begun
  if (threadIdx.x < CLUSTER) {
    u32 here = (u32)__cvta_generic_to_shared(of_blocks + rank), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(threadIdx.x));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(sum) : "memory");
  }
  cluster_arrive();
  cluster_wait();
  sum = 0.0f;
  for (int block = 0; block < CLUSTER; block++) sum += of_blocks[block];
#else
  float sum = block_squares<THREADS>(hidden, K / 2, threadIdx.x, THREADS);
#endif
  return rsqrtf(sum / K + epsilon);
}

// An RMSNorm's output, rounded twice as Hugging Face's LlamaRMSNorm does.
__device__ __forceinline__ float normed(i64 hidden, float factor, float gain) {
  return rounded(rounded(to_float(hidden) * factor) * gain);
}

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

__device__ __forceinline__ float gated(const i64* sums, int channel) {
  float gate = to_float(__ldcg(sums + channel)), up = to_float(__ldcg(sums + K + channel));
  // (1 + tanh(z)) / 2 = sigmoid(2 z)
  float inner = SOURCE == SILU ? gate : 1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate);
  return gate / (1.0f + __expf(-inner)) * up;
}

// Fill `x` with this thread's channels of the chunk, rounded to the activations' dtype.
__device__ __forceinline__ void read_input(const void* source, const float* gain, float epsilon,
                                           int first_channel, float (&x)[PER_THREAD]) {
#if SOURCE == HIDDEN
  const i64* hidden = static_cast<const i64*>(source);
  i64 fixed[PER_THREAD];
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int channel = first_channel + i * THREADS + threadIdx.x;
    fixed[i] = channel < K ? __ldcg(hidden + channel) : 0;
  }
  float factor = inverse_rms(hidden, epsilon);
#endif
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int channel = first_channel + i * THREADS + threadIdx.x;
    bool inside = i * THREADS + threadIdx.x < CHUNK && channel < K;
#if SOURCE == HIDDEN
    x[i] = inside ? normed(fixed[i], factor, gain[channel]) : 0.0f;
#elif SOURCE == ATTENTION
    x[i] = inside ? rounded(attended(static_cast<const float*>(source), channel)) : 0.0f;
#else
    x[i] = inside ? rounded(gated(static_cast<const i64*>(source), channel)) : 0.0f;
#endif
  }
}

// List the kept channels of the chunk in order; return how many.
__device__ __forceinline__ int list_kept(const float (&x)[PER_THREAD], float threshold,
                                         int first_channel, Entry* list) {
  __shared__ u32 words[WORDS];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int word = i * (THREADS / WARP) + warp;
    bool inside = word < WORDS && first_channel + word * WARP + lane < K;
    // Dropped when <=, so that NaN is kept.
    u32 kept = __ballot_sync(~0u, inside && !(fabsf(x[i]) <= threshold));
    if (word < WORDS && lane == 0) words[word] = kept;
  }
  __syncthreads();
  int count = 0;
#pragma unroll
  for (int word = 0; word < WORDS; word++) count += __popc(words[word]);
#pragma unroll
  for (int i = 0; i < PER_THREAD; i++) {
    int word = i * (THREADS / WARP) + warp;
    if (word < WORDS && (words[word] >> lane & 1)) {
      int place = __popc(words[word] & ((1u << lane) - 1));
      for (int before = 0; before < word; before++) place += __popc(words[before]);
      list[place] = Entry{(u32)(first_channel + word * WARP + lane), x[i]};
    }
  }
  __syncthreads();
  return count;
}

// Sums over the channels of the list for this thread's eight columns.
__device__ __forceinline__ void add_strips(const Entry* list, int count, const u16* weight,
                                           float (&total)[PER_LANE]) {
  for (int first = threadIdx.x / WARP / WARPS_N; first < count; first += WARPS_K * UNROLL) {
    uint4 strips[UNROLL];
    float values[UNROLL];
    // All loads first. Beyond the list's end they read its last strip, and count for nothing.
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      int entry = first + u * WARPS_K;
      Entry here = list[min(entry, count - 1)];
      values[u] = entry < count ? here.value : 0.0f;
      strips[u] = load_strip(weight + (u64)here.channel * N);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const u32* pairs = reinterpret_cast<const u32*>(&strips[u]);
#pragma unroll
      for (int pair = 0; pair < PER_LANE / 2; pair++) {
        total[2 * pair] += values[u] * low_half(pairs[pair]);
        total[2 * pair + 1] += values[u] * high_half(pairs[pair]);
      }
    }
  }
}

// Add the sums of all warps of a block, in their order, to fixed-point sums.
__device__ __forceinline__ void add_fixed(const float (&total)[PER_LANE], i64* sums, const u16* bias,
                                          int columns, float multiplier, int* overflow) {
  __shared__ float of_warps[WARPS_K][BLOCK_N];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  float* row = of_warps[warp / WARPS_N] + (warp % WARPS_N) * WARP_N + lane * PER_LANE;
#pragma unroll
  for (int i = 0; i < PER_LANE; i++) row[i] = total[i];
  __syncthreads();
  for (int i = threadIdx.x; i < min(BLOCK_N, columns); i += THREADS) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < WARPS_K; k++) sum += of_warps[k][i];
#if HAS_BIAS
    if (blockIdx.y == 0) sum += low_half(bias[i]);
#endif
    sum *= multiplier;
    // NaN and infinity do not fit either.
    if (fabsf(sum) < LARGEST)
      atomicAdd(reinterpret_cast<u64*>(sums) + i, (u64)(i64)(sum * UNIT));
    else
      *overflow = 1;
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
project(const void* source, const float* gain, const float* thresholds, const u16* weight,
        const u16* bias, i64* sums, i64* clear, int* overflow, int clear_size, float epsilon,
        float multiplier) {
  __shared__ Entry list[CHUNK];
  constexpr int TILES_1 = (START_1 + BLOCK_N - 1) / BLOCK_N;
  constexpr int TILES_2 = TILES_1 + (START_2 - START_1 + BLOCK_N - 1) / BLOCK_N;
  int tile = blockIdx.x, first_channel = blockIdx.y * CHUNK;
  int part = (tile >= TILES_1) + (tile >= TILES_2);
  int start = part == 0 ? 0 : part == 1 ? START_1 : START_2;
  int end = part == 0 ? START_1 : part == 1 ? START_2 : N;
  int first_column = start + (tile - (part == 0 ? 0 : part == 1 ? TILES_1 : TILES_2)) * BLOCK_N;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int column = first_column + (warp % WARPS_N) * WARP_N + lane * PER_LANE;
  // Threads beyond the last column read what their block reads anyway.
  weight += column < end ? column : first_column;

#if SOURCE == HIDDEN
  cluster_arrive();
#endif
#if PREFETCH > 0
  // Nothing is dropped: what comes first is known before the input is.
  for (int i = warp / WARPS_N; i < PREFETCH && first_channel + i < K; i += WARPS_K)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(weight + (u64)(first_channel + i) * N));
#endif
  float threshold = thresholds[part];
  wait_for_input();

  float x[PER_THREAD];
  read_input(source, gain, epsilon, first_channel, x);
  int count = list_kept(x, threshold, first_channel, list);
  float total[PER_LANE] = {};
  add_strips(list, count, weight, total);
  add_fixed(total, sums + first_column, bias + first_column, end - first_column, multiplier, overflow);

  int block = blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = block * THREADS + threadIdx.x; i < clear_size; i += gridDim.x * gridDim.y * THREADS)
    clear[i] = 0;
}

// Start the residual stream with the embedding of a token, and a step without overflow.
extern "C" __global__ void embed(const i64* token, const u16* embedding, i64* hidden, int* overflow,
                                 float multiplier, int size) {
  int channel = blockIdx.x * blockDim.x + threadIdx.x;
  wait_for_input();
  if (channel == 0) *overflow = 0;
  if (channel >= size) return;
  float value = rounded(low_half(embedding[*token * size + channel]) * multiplier);
  hidden[channel] = (i64)(value * UNIT);
}

// Write the normed residual stream for the head; NaN everywhere after an overflow.
extern "C" __global__ void __launch_bounds__(NORM_THREADS)
final_norm(const i64* hidden, const float* gain, const int* overflow, u16* out, float epsilon,
           int size) {
  wait_for_input();
  float sum = block_squares<NORM_THREADS>(hidden, size / 2, threadIdx.x, NORM_THREADS);
  float factor = rsqrtf(sum / size + epsilon);
  float fault = *overflow ? __int_as_float(0x7fffffff) : 0.0f;
  for (int i = threadIdx.x; i < size; i += NORM_THREADS)
    out[i] = to_bits(normed(__ldcg(hidden + i), factor, gain[i]) + fault);
}
