// How a product is cut into blocks and warps.
//
// A warp has PER_LANE columns for each of its threads.
//
// Set on the compiler's command line, beside what cuda_numbers.cuh wants: K, N, CHUNK, PER_LANE,
// WARPS_N, WARPS_K, UNROLL, DEPTH, FORMAT, ROWS (of activations; several with floats only).

#pragma once

#include "cuda_numbers.cuh"

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
// Sums of threads lie apart in shared memory, so that they are written to different banks.
constexpr int PITCH = PER_LANE + 4;
constexpr int WARP_N = WARP * PER_LANE;
// Lanes beside each other that have the same columns, of other channels, and columns of a lane that lie
// beside each other.
constexpr int LANES_ALIKE = ROWS > 1 ? 4 : 1;
constexpr int LANE_N = ROWS > 1 ? 8 : PER_LANE;
constexpr int THREADS = WARP * WARPS_N * WARPS_K;
constexpr int BLOCK_N = WARP_N * WARPS_N;
constexpr int PER_THREAD = (CHUNK + THREADS - 1) / THREADS;
constexpr u64 STRIP_BYTES = (u64)N * BITS / 8;

// Where the sum of a column of a block lies in shared memory, of each warp that shares its channels.
__device__ __forceinline__ int place_of_sum(int column) {
  return column / PER_LANE * PITCH + column % PER_LANE;
}
