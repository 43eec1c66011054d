// Emulates a GPU on the host, for tests: the parts of CUDA C++ that the kernels use, and ptx.cuh.
//
// A block is a thread of the host and its threads are contexts, which take turns: one runs until it
// has to wait for others. So code that lacks a barrier reads data that is not there yet. Asynchronous
// copies happen when they are waited for, and not before.

#pragma once

#include <math.h>
#include <sched.h>
#include <string.h>
#include <ucontext.h>

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
// A block runs in one thread.
#define __shared__ static thread_local
#define __CUDA_ARCH__ 900

#include "types.cuh"

namespace teal {

constexpr int STACK_BYTES = 128 * 1024;

struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) longlong2 { i64 x, y; };
struct Index { u32 x, y, z; };

// Exchanges words between the lanes of a warp: two meetings at a time, as a lane may be at the next.
struct Meeting {
  u32 words[WARP][6];
  int arrived = 0;
};

struct Copy { void* to; const void* from; int bytes; };

struct Context {
  ucontext_t place;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  std::vector<Copy> copies;  // asynchronous ones that nobody has waited for
  int meetings = 0, cluster_phases = 0;
  bool is_done = false;
};

struct Cluster;

struct Block {
  Cluster* cluster;
  u32 rank;
  std::vector<Context> contexts;
  std::vector<Meeting> meetings;
  ucontext_t scheduler;
  int running = 0, at_barrier = 0, live = 0, barriers = 0;
  char* memory;

  Context& context() { return contexts[running]; }
  Meeting& meeting(int number) { return meetings[running / WARP * 2 + number % 2]; }
};

struct Cluster {
  std::vector<std::vector<char>> memories;
  std::atomic<int> arrived{0};
  int threads = 0;  // of all its blocks
};

thread_local Block* block;
thread_local Index threadIdx, blockIdx, blockDim, gridDim;

inline void let_others_run() {
  Context& mine = block->context();
  swapcontext(&mine.place, &block->scheduler);
}

inline void wait_until(const std::function<bool()>& is_so) {
  while (!is_so()) let_others_run();
}

// Barriers and warps.

inline void __syncthreads() {
  int barrier = block->barriers;
  block->at_barrier++;
  wait_until([&] {
    if (block->barriers == barrier && block->at_barrier >= block->live) {
      block->at_barrier = 0;
      block->barriers++;
    }
    return block->barriers != barrier;
  });
}

// Give words to the warp, and return what every lane gave.
inline const u32 (*meet(std::initializer_list<u32> words))[6] {
  int number = block->context().meetings++;
  Meeting& meeting = block->meeting(number);
  int word = 0;
  for (u32 value : words) meeting.words[threadIdx.x % WARP][word++] = value;
  int full = (number / 2 + 1) * WARP;
  meeting.arrived++;
  wait_until([&] { return meeting.arrived >= full; });
  return meeting.words;
}

inline u32 bits_of(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }
inline float float_of(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
inline u32 to_word(float value) { return bits_of(value); }
inline u32 to_word(int value) { return (u32)value; }
inline u32 to_word(u32 value) { return value; }
template <typename T> T from_word(u32 word) { T value; memcpy(&value, &word, 4); return value; }

template <typename T> T from_lane(T value, int lane) {
  return from_word<T>(meet({to_word(value)})[lane][0]);
}

template <typename T> T __shfl_sync(u32, T value, int lane) { return from_lane(value, lane); }
template <typename T> T __shfl_xor_sync(u32, T value, int mask) {
  return from_lane(value, (threadIdx.x % WARP) ^ mask);
}
template <typename T> T __shfl_up_sync(u32, T value, int step) {
  int lane = threadIdx.x % WARP;
  return from_lane(value, lane < step ? lane : lane - step);
}
inline u32 __ballot_sync(u32, bool vote) {
  const u32(*votes)[6] = meet({vote});
  u32 all = 0;
  for (int lane = 0; lane < WARP; lane++) all |= votes[lane][0] << lane;
  return all;
}
inline bool __any_sync(u32, bool vote) { return __ballot_sync(~0u, vote) != 0; }
inline u32 __reduce_max_sync(u32, u32 value) {
  const u32(*values)[6] = meet({value});
  u32 largest = 0;
  for (int lane = 0; lane < WARP; lane++) largest = values[lane][0] > largest ? values[lane][0] : largest;
  return largest;
}
inline u32 __reduce_add_sync(u32, u32 value) {
  const u32(*values)[6] = meet({value});
  u32 sum = 0;
  for (int lane = 0; lane < WARP; lane++) sum += values[lane][0];
  return sum;
}
inline u32 __reduce_min_sync(u32, u32 value) { return ~__reduce_max_sync(~0u, ~value); }
inline void __syncwarp() { meet({}); }

// Numbers.

inline float __uint_as_float(u32 bits) { return float_of(bits); }
inline float __int_as_float(int bits) { return float_of((u32)bits); }
inline u32 __float_as_uint(float value) { return bits_of(value); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
  u64 both = (u64)high << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= (u32)(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return result;
}
template <typename T> T min(T a, T b) { return a < b ? a : b; }
template <typename T> T max(T a, T b) { return a > b ? a : b; }
inline u32 max(u32 a, int b) { return max(a, (u32)b); }

// Memory.

template <typename T> T __ldcg(const T* pointer) { return *pointer; }
inline u64 atomicAdd(u64* sum, u64 value) { return __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }

// ptx.cuh.

inline float from_float16(u16 bits) { _Float16 value; memcpy(&value, &bits, 2); return (float)value; }
inline float from_bfloat16(u16 bits) { return float_of((u32)bits << 16); }
inline float from_low_float16(u32 pair) { return from_float16((u16)pair); }
inline float from_high_float16(u32 pair) { return from_float16((u16)(pair >> 16)); }
inline u16 to_float16(float value) { _Float16 half = (_Float16)value; u16 bits; memcpy(&bits, &half, 2); return bits; }
inline u16 to_bfloat16(float value) {
  u32 bits = bits_of(value);
  if (value != value) return 0x7fff;
  return (u16)(bits + 0x7fff + (bits >> 16 & 1) >> 16);
}
inline u32 to_float16_pair(float low, float high) { return to_float16(low) | (u32)to_float16(high) << 16; }
inline u32 to_bfloat16_pair(float low, float high) { return to_bfloat16(low) | (u32)to_bfloat16(high) << 16; }
inline float power_of_2(float x) { return exp2f(x); }

// Operands lie where the PTX manual says.
template <float (*NUMBER)(u16)>
void multiply_operands(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
  const u32(*given)[6] = meet({a[0], a[1], a[2], a[3], b0, b1});
  int lane = threadIdx.x % WARP;
  for (int i = 0; i < 4; i++) {
    int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0.0;
    for (int k = 0; k < 16; k++) {
      u32 left = given[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      u32 right = given[column * 4 + k % 8 / 2][4 + k / 8];
      sum += (double)NUMBER((u16)(left >> k % 2 * 16)) * NUMBER((u16)(right >> k % 2 * 16));
    }
    sums[i] = (float)(sums[i] + sum);
  }
}
inline void mma_float16(float* sums, const u32 (&a)[4], u32 b0, u32 b1) { multiply_operands<from_float16>(sums, a, b0, b1); }
inline void mma_bfloat16(float* sums, const u32 (&a)[4], u32 b0, u32 b1) { multiply_operands<from_bfloat16>(sums, a, b0, b1); }

template <typename T> T load_early(const T* pointer) { return *pointer; }
template <int NUMBER> void load_once(u32 (&words)[NUMBER], const u8* pointer) { memcpy(words, pointer, sizeof(words)); }
inline const u8* computed(const u8* pointer) { return pointer; }
// Unlike a GPU, fault if the address is not readable.
inline void prefetch(const void* pointer) { (void)*static_cast<const volatile char*>(pointer); }
template <int BYTES> void copy_async(void* shared, const void* global) {
  block->context().copies.push_back({shared, global, BYTES});
}
inline void wait_for_copies() {
  for (const Copy& each : block->context().copies) memcpy(each.to, each.from, each.bytes);
  block->context().copies.clear();
}
inline void wait_for_earlier_launches() {}
inline void let_next_launch_begin() {}

inline u32 rank_in_cluster() { return block->rank; }
inline void arrive_at_cluster() {
  block->context().cluster_phases++;
  block->cluster->arrived++;
}
inline void wait_for_cluster() {
  int all = block->context().cluster_phases * block->cluster->threads;
  wait_until([&] { return block->cluster->arrived >= all; });
}
template <typename T> T* at_rank(T* mine, u32 rank) {
  auto* memory = block->cluster->memories[rank].data();
  return reinterpret_cast<T*>(memory + (reinterpret_cast<char*>(mine) - block->memory));
}
inline std::atomic<i64>& missing(u64* barrier) { return *reinterpret_cast<std::atomic<i64>*>(barrier); }
inline void open_barrier(u64* barrier, int bytes) { missing(barrier) = bytes; }
template <typename T> void send_to_rank(T* mine, u64* barrier, u32 rank, T value) {
  *at_rank(mine, rank) = value;
  missing(at_rank(barrier, rank)) -= sizeof(T);
}
inline void wait_at_barrier(u64* barrier) { wait_until([=] { return missing(barrier) == 0; }); }

// A launch.

thread_local std::function<void()>* emulated_work;

inline void run_context() {
  (*emulated_work)();
  block->context().is_done = true;
  block->live--;
  swapcontext(&block->context().place, &block->scheduler);
}

inline void run_block(std::function<void()> work, Cluster& cluster, u32 rank, Index index, Index grid, int threads) {
  Block mine{&cluster, rank};
  block = &mine, emulated_work = &work, blockIdx = index, gridDim = grid, blockDim = {(u32)threads, 1, 1};
  mine.contexts = std::vector<Context>(threads);
  mine.meetings = std::vector<Meeting>(threads / WARP * 2);
  mine.live = threads;
  mine.memory = cluster.memories[rank].data();
  for (Context& context : mine.contexts) {
    getcontext(&context.place);
    context.place.uc_stack.ss_sp = context.stack.get();
    context.place.uc_stack.ss_size = STACK_BYTES;
    makecontext(&context.place, run_context, 0);
  }
  while (mine.live > 0) {
    // The last thread first: most code is written as if the first ran first.
    for (int thread = threads - 1; thread >= 0; thread--) {
      if (mine.contexts[thread].is_done) continue;
      mine.running = thread, threadIdx = {(u32)thread, 0, 0};
      swapcontext(&mine.scheduler, &mine.contexts[thread].place);
    }
    if (cluster.memories.size() > 1) sched_yield();
  }
}

template <typename... A, size_t... I>
void call(void (*function)(A...), void** arguments, std::index_sequence<I...>) {
  function(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

// Clusters lie along y.
template <typename... A>
void launch(void (*function)(A...), u32 columns, u32 rows, int cluster, int threads, int shared_bytes, void** arguments) {
  u32 number = columns * rows / cluster;
  for (u32 first = 0; first < number; first++) {
    Cluster all;
    all.memories = std::vector<std::vector<char>>(cluster);
    // Unwritten floats are NaN.
    for (auto& memory : all.memories) memory.assign(shared_bytes + 16, (char)0xff);
    all.threads = cluster * threads;
    std::vector<std::thread> blocks;
    for (int rank = 0; rank < cluster; rank++) {
      Index index{first % columns, first / columns * cluster + rank, 0};
      auto work = [=] { call(function, arguments, std::index_sequence_for<A...>{}); };
      blocks.emplace_back(run_block, work, std::ref(all), rank, index, Index{columns, rows, 1}, threads);
    }
    for (std::thread& each : blocks) each.join();
  }
}

}  // namespace teal
