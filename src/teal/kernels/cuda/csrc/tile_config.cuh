// How a product is cut into blocks and warps.
//
// A warp has PER_LANE columns for each of its threads.
//
// Set on the compiler's command line, beside what dtypes.cuh wants: K, N, CHUNK, PER_LANE,
// WARPS_N, WARPS_K, UNROLL, DEPTH, FORMAT, ROWS (of activations; several with floats only).

#pragma once

#include "dtypes.cuh"

// Of the weight.
#define FLOATS 0
#define INT8 1
#define FP8 2
#define INT4 3

// Codes become float16 for tensor cores, activations too: scaled where that would not hold them.
#define HAS_FACTOR (BFLOAT16 && FORMAT != FLOATS)
// Codes that count from below zero: what that adds to a sum is a multiple of the sum of activations.
#define HAS_OFFSET (FORMAT == INT8 || FORMAT == INT4)

static_assert(ROWS == 1 || FORMAT == FLOATS, "codes are multiplied row by row");

constexpr int BITS = FORMAT == FLOATS ? 16 : FORMAT == INT4 ? 4 : 8;
constexpr int WARP_N = WARP * PER_LANE;
// Lanes beside each other that have the same columns, of other channels, and columns of a lane that lie
// beside each other.
constexpr int LANES_ALIKE = ROWS > 1 ? 4 : 1;
constexpr int LANE_N = ROWS > 1 ? 8 : PER_LANE;
// Tensor cores give a lane the sums of two rows, which stay together from there on.
constexpr int ROWS_ALIKE = ROWS > 1 ? 2 : 1;
constexpr int ROW_PAIRS = (ROWS + ROWS_ALIKE - 1) / ROWS_ALIKE;
constexpr int THREADS = WARP * WARPS_N * WARPS_K;
constexpr int BLOCK_N = WARP_N * WARPS_N;
constexpr int WARPS = THREADS / WARP;
constexpr int PER_THREAD = (CHUNK + THREADS - 1) / THREADS;  // channels of a chunk
constexpr u64 STRIP_BYTES = (u64)N * BITS / 8;

// Of what the threads of a block share out, one after the other, the place of a thread's own.
__device__ __forceinline__ int place_of(int own) { return own * THREADS + threadIdx.x; }

// The sum of a column, of one row or of two.
#if ROWS > 1
typedef float2 Sum;
#else
typedef float Sum;
#endif

__device__ __forceinline__ float of_row(float sum, int) { return sum; }
__device__ __forceinline__ float of_row(float2 sums, int i) { return i == 0 ? sums.x : sums.y; }

// Of the channels of a chunk, the place of a thread's own: those of a warp lie beside each other, so that
// it lists them knowing no more than how many earlier warps keep.
__device__ __forceinline__ int place_in_chunk(int own) {
  return (threadIdx.x / WARP * PER_THREAD + own) * WARP + threadIdx.x % WARP;
}
