// For ops in C++: PyTorch's stable headers, which compile in two seconds, where ATen's take eight. A call costs two
// microseconds more, which is why `quantised_linear.cpp`, called a hundred times a token, has ATen's.

#pragma once

#define TORCH_TARGET_VERSION ((2ULL << 56) | (10ULL << 48))  // of the headers: 2.10, which has parallel_for

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#ifdef __x86_64__
#include <immintrin.h>
#define WITH_AVX2 __attribute__((target("avx2,fma")))
#else
#define WITH_AVX2
#endif

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Contiguous, and of this type.
inline Tensor as(ScalarType type, const Tensor& tensor) {
  const Tensor typed = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

// The sizes as PyTorch prints them, for messages.
inline std::string shape(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}
