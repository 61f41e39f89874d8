// For ops in C++ on heads in bf16, with AVX512-BF16.

#pragma once

#include "tensors.h"

#define WITH_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define INLINE inline __attribute__((always_inline)) WITH_BF16

constexpr int64_t LANES = 16;

INLINE __m512 load_bf16(const uint16_t* from) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
}
INLINE void store_bf16(uint16_t* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x)); }

inline const uint16_t* numbers(const Tensor& tensor) { return static_cast<const uint16_t*>(tensor.const_data_ptr()); }
inline uint16_t* writable(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

// (batch, heads, time, head_dim) in bf16, each head_dim of them next to each other.
struct Heads {
  Tensor tensor;
  const uint16_t* data;
  int64_t heads, batch, head, time;

  explicit Heads(const Tensor& given)
      : tensor(given.scalar_type() == ScalarType::BFloat16 && given.stride(3) == 1 ? given
                                                                                : as(ScalarType::BFloat16, given)),
        data(numbers(tensor)), heads(tensor.size(1)), batch(tensor.stride(0)), head(tensor.stride(1)),
        time(tensor.stride(2)) {}
  const uint16_t* at(int64_t text, int64_t h, int64_t t) const { return data + text * batch + h * head + t * time; }
};
