// The product of `int4_linear.py`, which says what is computed and how the weights are laid out.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <vector>

#define WITH_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr int64_t TILE = 16;      // outputs, one for each 32-bit lane of a register
constexpr int64_t GROUP = 32;     // inputs
constexpr int64_t PAIRS = GROUP / 2;
constexpr int64_t BLOCK = 320;    // bytes of a tile and group
constexpr int64_t AHEAD = 4096;   // bytes that are asked of memory before they are needed

// The order of the sums is the same for any ROWS, so that a row's result does not depend on the others.
template <int ROWS>
WITH_AVX512_BF16 inline void multiply(const uint8_t* weight, const uint32_t* x, const float* sums,
                                      at::BFloat16* y, int64_t groups, int64_t outputs) {
  // bf16 numbers 0 to 15, twice: the permutation looks at five bits, of which the fifth is the next code's.
  const __m512i digits = _mm512_broadcast_i64x4(
      _mm256_setr_epi16(0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
                        0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
  __m512 total[ROWS];
  for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; ++g, weight += BLOCK) {
    for (int64_t line = 0; line < BLOCK; line += 64) _mm_prefetch(weight + AHEAD + line, _MM_HINT_T0);
    __m512 even[ROWS], odd[ROWS];
    for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512i codes = _mm512_loadu_si512(weight + 64 * part);
      const auto w0 = (__m512bh)_mm512_permutexvar_epi16(codes, digits);
      const auto w1 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), digits);
      const auto w2 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), digits);
      const auto w3 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 12), digits);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const uint32_t* pairs = x + (r * groups + g) * PAIRS + 4 * part;
        even[r] = _mm512_dpbf16_ps(even[r], w0, (__m512bh)_mm512_set1_epi32(pairs[0]));
        odd[r] = _mm512_dpbf16_ps(odd[r], w1, (__m512bh)_mm512_set1_epi32(pairs[1]));
        even[r] = _mm512_dpbf16_ps(even[r], w2, (__m512bh)_mm512_set1_epi32(pairs[2]));
        odd[r] = _mm512_dpbf16_ps(odd[r], w3, (__m512bh)_mm512_set1_epi32(pairs[3]));
      }
    }
    const __m512i factors = _mm512_loadu_si512(weight + 256);
    const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(factors, 16));
    const __m512 minimum = _mm512_castsi512_ps(_mm512_and_si512(factors, _mm512_set1_epi32(0xFFFF0000)));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      total[r] = _mm512_fmadd_ps(scale, _mm512_add_ps(even[r], odd[r]), total[r]);
      total[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sums[r * groups + g]), total[r]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    _mm256_storeu_si256((__m256i*)(y + r * outputs), (__m256i)_mm512_cvtneps_pbh(total[r]));
}

template <int ROWS>
void multiply_all(const uint8_t* weight, const uint32_t* x, const float* sums, at::BFloat16* y, int64_t rows,
                  int64_t groups, int64_t outputs) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * groups * PAIRS, sums += ROWS * groups, y += ROWS * outputs)
    multiply<ROWS>(weight, x, sums, y, groups, outputs);
  if constexpr (ROWS > 1) multiply_all<ROWS / 2>(weight, x, sums, y, rows, groups, outputs);
}

WITH_AVX512_BF16 void sum_groups(const uint32_t* x, float* sums, int64_t count) {
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3F80);
  for (int64_t i = 0; i < count; ++i) {
    const auto group = (__m512bh)_mm512_loadu_si512(x + i * PAIRS);
    sums[i] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), group, ones));
  }
}

at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t tiles = weight.size(0), groups = weight.size(1), outputs = tiles * TILE;
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.size(-1) == groups * GROUP, "int4_linear: x is ", x.sizes(),
              " ", x.scalar_type(), ", expected bf16 with ", groups * GROUP, " inputs");
  const at::Tensor rows = x.contiguous();
  const int64_t num_rows = rows.numel() / rows.size(-1);
  auto shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options());
  const auto* from = static_cast<const uint32_t*>(rows.const_data_ptr());
  const auto* packed = weight.const_data_ptr<uint8_t>();
  auto* to = y.mutable_data_ptr<at::BFloat16>();
  std::vector<float> sums(num_rows * groups);
  sum_groups(from, sums.data(), num_rows * groups);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      multiply_all<8>(packed + tile * groups * BLOCK, from, sums.data(), to + tile * TILE, num_rows, groups, outputs);
  });
  return y;
}

}  // namespace

TORCH_LIBRARY(ryzen_llm, m) { m.def("int4_linear(Tensor x, Tensor weight) -> Tensor"); }
TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("int4_linear", int4_linear); }
