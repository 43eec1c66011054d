// Number types, the enumerations that config.cuh is written in, and a choice between two types.
//
// config.cuh is not a file: the host writes it for each kernel that it compiles, one struct of
// constants called Config (kernel_config.py).

#pragma once

namespace teal {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr int WARP = 32;

enum class Dtype { FLOAT32, FLOAT16, BFLOAT16 };

// How a weight is stored: in the dtype of the activations, or as codes.
enum class Format { FLOAT, INT8, FP8, INT4 };

// What a decode step makes the input of a product from: hidden states through an RMSNorm, the
// splits of attention, or gate and up.
enum class Input { HIDDEN, ATTENTION, SILU, GELU_TANH };

// Activation function of a gate.
enum class Activation { NONE, SILU, GELU_TANH };

// std::conditional, which NVRTC does not have.
template <bool IS_FIRST, typename First, typename Second>
struct Conditional {
  typedef First Type;
};

template <typename First, typename Second>
struct Conditional<false, First, Second> {
  typedef Second Type;
};

}  // namespace teal
