// The products of `few_rows_linear.py`.

#include <algorithm>

#include "bf16_avx512.h"

namespace {

constexpr int64_t OUTPUTS = 4, MOST_ROWS = 4, STEP = 32;
constexpr int64_t GRAIN = 16;  // blocks of outputs
constexpr int64_t AHEAD = 8192;  // numbers that are asked of memory before they are needed, into the second cache

INLINE __m128 quarter(__m512 x) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// ROWS rows times a block of outputs. The order of the sums is the same for any ROWS.
template <int ROWS>
WITH_BF16 void multiply(const uint16_t* x, const uint16_t* weight, int64_t inputs, uint16_t* y, int64_t outputs) {
  __m512 total[ROWS][OUTPUTS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; ++o) total[r][o] = _mm512_setzero_ps();
  const auto step = [&](int64_t i, __mmask32 there) WITH_BF16 __attribute__((always_inline)) {
    __m512bh w[OUTPUTS];
#pragma GCC unroll 4
    for (int o = 0; o < OUTPUTS; ++o) {
      w[o] = (__m512bh)_mm512_maskz_loadu_epi16(there, weight + o * inputs + i);
      _mm_prefetch(weight + o * inputs + i + AHEAD, _MM_HINT_T1);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh numbers = (__m512bh)_mm512_maskz_loadu_epi16(there, x + r * inputs + i);
#pragma GCC unroll 4
      for (int o = 0; o < OUTPUTS; ++o) total[r][o] = _mm512_dpbf16_ps(total[r][o], w[o], numbers);
    }
  };
  int64_t i = 0;
  for (; i + STEP <= inputs; i += STEP) step(i, ~0u);
  if (i < inputs) step(i, (1u << (inputs - i)) - 1);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
    const __m128 low = _mm_hadd_ps(quarter(total[r][0]), quarter(total[r][1]));
    const __m128 sums = _mm_hadd_ps(low, _mm_hadd_ps(quarter(total[r][2]), quarter(total[r][3])));
    _mm_storel_epi64((__m128i*)(y + r * outputs), (__m128i)_mm_cvtneps_pbh(sums));
  }
}

template <int ROWS = MOST_ROWS>
void multiply_all(const uint16_t* x, int64_t rows, const uint16_t* weight, int64_t inputs, uint16_t* y, int64_t outputs) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * inputs, y += ROWS * outputs)
    multiply<ROWS>(x, weight, inputs, y, outputs);
  if constexpr (ROWS > 1) multiply_all<ROWS / 2>(x, rows, weight, inputs, y, outputs);
}

Tensor few_rows_linear(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1) && weight.size(0) >= OUTPUTS &&
                      x.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16,
                  "few_rows_linear needs x (rows, inputs) and weight (outputs, inputs) in bf16 with 4 outputs or more, got ",
                  shape(x), " and ", shape(weight));
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  const Tensor given = as(ScalarType::BFloat16, x), matrix = as(ScalarType::BFloat16, weight);
  Tensor result = torch::stable::new_empty(given, {rows, outputs});
  const uint16_t *from = numbers(given), *w = numbers(matrix);
  uint16_t* to = writable(result);
  parallel_for(0, (outputs + OUTPUTS - 1) / OUTPUTS, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = std::min(block * OUTPUTS, outputs - OUTPUTS);  // the last block may have some of the one before
      multiply_all(from, rows, w + first * inputs, inputs, to + first, outputs);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) { m.def("few_rows_linear(Tensor x, Tensor weight) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear)); }
