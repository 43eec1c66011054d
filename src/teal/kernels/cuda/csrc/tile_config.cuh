// How a product is divided among blocks and warps: sizes that follow from Config.
//
// A block has BLOCK_N columns and takes Config::CHUNK channels at a time. Its warps are arranged in
// Config::WARPS_N columns and Config::WARPS_K shares of the channels.

#pragma once

#include "dtypes.cuh"

namespace teal {

constexpr bool HAS_SEVERAL_ROWS = Config::ROWS > 1;
constexpr bool IS_QUANTIZED = Config::FORMAT != Format::FLOAT;
constexpr bool IS_INT4 = Config::FORMAT == Format::INT4;
// Codes of 8 bits have one scale per column, codes of 4 bits one per group of channels and column.
constexpr bool HAS_COLUMN_SCALES = IS_QUANTIZED && !IS_INT4;
// Codes are multiplied as float16, and so are activations; bfloat16 has to be scaled into its
// range.
constexpr bool HAS_INPUT_FACTOR = IS_BFLOAT16 && IS_QUANTIZED;
// Integer codes are multiplied as counts from the lowest code on, which adds a multiple of the sum
// of activations to each result.
constexpr bool HAS_CODE_OFFSET = IS_INT4 || Config::FORMAT == Format::INT8;

static_assert(!HAS_SEVERAL_ROWS || !IS_QUANTIZED, "codes are multiplied row by row");

constexpr int BITS = !IS_QUANTIZED ? 16 : IS_INT4 ? 4 : 8;
constexpr u64 WEIGHT_ROW_BYTES = (u64)Config::OUT_FEATURES * BITS / 8;

constexpr int WARPS = Config::WARPS_N * Config::WARPS_K;
constexpr int THREADS = WARP * WARPS;
constexpr int WARP_N = WARP * Config::PER_LANE;
constexpr int BLOCK_N = WARP_N * Config::WARPS_N;
// Channels of a chunk that a thread decides on.
constexpr int CHANNELS_PER_THREAD = (Config::CHUNK + THREADS - 1) / THREADS;

// With several rows the four lanes of a quad load the same eight columns of different channels
// (multi_row_mma.cuh). With one row a lane has its columns to itself.
constexpr int QUAD_LANES = 4, QUAD_COLUMNS = 8;
constexpr int LANES_PER_LOAD = HAS_SEVERAL_ROWS ? QUAD_LANES : 1;
constexpr int COLUMNS_PER_LOAD = HAS_SEVERAL_ROWS ? QUAD_COLUMNS : Config::PER_LANE;

// Tensor cores give a lane the sums of two rows, which stay together from there on.
constexpr int ROWS_PER_SUM = HAS_SEVERAL_ROWS ? 2 : 1;
constexpr int ROW_PAIRS = (Config::ROWS + ROWS_PER_SUM - 1) / ROWS_PER_SUM;

// Sum of a column, for one row or for two.
typedef Conditional<HAS_SEVERAL_ROWS, float2, float>::Type ColumnSum;

__device__ __forceinline__ float sum_of_row(float sum, int) { return sum; }
__device__ __forceinline__ float sum_of_row(float2 sums, int i) { return i == 0 ? sums.x : sums.y; }

// The i-th of the items that a thread takes when a block deals them out one by one.
__device__ __forceinline__ int item_of_thread(int i) { return i * THREADS + threadIdx.x; }

// The i-th channel of a chunk that a thread decides on. The channels of a warp are consecutive, so
// that it compacts them knowing no more than how many the warps before it keep.
__device__ __forceinline__ int channel_in_chunk(int i) {
  return (threadIdx.x / WARP * CHANNELS_PER_THREAD + i) * WARP + threadIdx.x % WARP;
}

// Which of the WARPS_K shares of a chunk belongs to this thread's warp.
__device__ __forceinline__ int share_of_warp() { return threadIdx.x / WARP / Config::WARPS_N; }

}  // namespace teal
