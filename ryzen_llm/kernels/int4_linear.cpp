// The product of `int4_linear.py`, which says what is computed and how the weights are laid out.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <vector>

#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define WITH_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace {

constexpr int64_t TILE = 16;     // outputs, one for each 32-bit lane of an AVX-512 register
constexpr int64_t GROUP = 32;    // inputs
constexpr int64_t BLOCK = 320;   // bytes of a tile and group
constexpr int64_t AHEAD = 4096;  // bytes that are asked of memory before they are needed

inline void ask_for_later(const uint8_t* weight) {
  for (int64_t line = 0; line < BLOCK; line += 64) _mm_prefetch(weight + AHEAD + line, _MM_HINT_T0);
}

// Each form says how x is prepared (in place, or in the room that it makes) and what its groups sum to, and multiplies
// ROWS rows by a tile. The order of its sums is the same for any ROWS, so that a row's result does not depend on the
// others.

struct Avx512Bf16 {
  using Number = at::BFloat16;
  using Prepared = uint32_t;                      // a pair of inputs
  static constexpr int64_t PREPARED = GROUP / 2;  // of a group
  static constexpr int MOST_ROWS = 8;

  WITH_AVX512_BF16 static const Prepared* prepare(const void* x, std::vector<Prepared>&, float* sums, int64_t groups) {
    const auto* pairs = static_cast<const Prepared*>(x);
    const auto ones = (__m512bh)_mm512_set1_epi16(0x3F80);
    for (int64_t g = 0; g < groups; ++g) {
      const auto group = (__m512bh)_mm512_loadu_si512(pairs + g * PREPARED);
      sums[g] = _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), group, ones));
    }
    return pairs;
  }

  template <int ROWS>
  WITH_AVX512_BF16 static void multiply(const uint8_t* weight, const Prepared* x, const float* sums, Number* y,
                                        int64_t groups, int64_t outputs) {
    // bf16 numbers 0 to 15, twice: the permutation looks at five bits, of which the fifth is the next code's.
    const __m512i digits = _mm512_broadcast_i64x4(
        _mm256_setr_epi16(0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
                          0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, weight += BLOCK) {
      ask_for_later(weight);
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
          const Prepared* pairs = x + (r * groups + g) * PREPARED + 4 * part;
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
};

// A lane holds eight codes of one output. Code c is read where it stands, as c * 16^place, and x is divided by 16^place.
struct Avx2Fp32 {
  using Number = float;
  using Prepared = float;
  static constexpr int64_t PREPARED = GROUP;
  static constexpr int MOST_ROWS = 4;

  static const Prepared* prepare(const void* x, std::vector<Prepared>& room, float* sums, int64_t groups) {
    constexpr int64_t INPUT[8] = {0, 2, 4, 6, 1, 3, 5, 7};  // at each place
    room.resize(groups * PREPARED);
    const auto* from = static_cast<const Number*>(x);
    for (int64_t g = 0; g < groups; ++g, from += GROUP) {
      float sum = 0, factor = 1;
      for (int64_t i = 0; i < GROUP; ++i) sum += from[i];
      sums[g] = sum;
      for (int64_t place = 0; place < 8; ++place, factor /= 16)
        for (int64_t part = 0; part < 4; ++part)  // the last place is moved to the first, for its sign's sake
          room[g * PREPARED + 8 * part + place] = from[8 * part + INPUT[place]] * (place == 7 ? 1 : factor);
    }
    return room.data();
  }

  template <int ROWS>
  WITH_AVX2 static void multiply(const uint8_t* weight, const Prepared* x, const float* sums, Number* y, int64_t groups,
                                 int64_t outputs) {
    __m256 total[2][ROWS];
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < ROWS; ++r) total[half][r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, weight += BLOCK) {
      ask_for_later(weight);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256 even[ROWS], odd[ROWS];
        for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = _mm256_setzero_ps();
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
          const __m256i codes = _mm256_loadu_si256((const __m256i*)(weight + 64 * part + 32 * half));
#pragma GCC unroll 8
          for (int place = 0; place < 8; ++place) {
            const __m256i code = place == 7 ? _mm256_srli_epi32(codes, 28)
                                            : _mm256_and_si256(codes, _mm256_set1_epi32(15u << (4 * place)));
            const __m256 w = _mm256_cvtepi32_ps(code);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
              __m256& sum = place % 2 ? odd[r] : even[r];
              sum = _mm256_fmadd_ps(w, _mm256_broadcast_ss(x + (r * groups + g) * PREPARED + 8 * part + place), sum);
            }
          }
        }
        const __m256i factors = _mm256_loadu_si256((const __m256i*)(weight + 256 + 32 * half));
        const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(factors, 16));
        const __m256 minimum = _mm256_castsi256_ps(_mm256_and_si256(factors, _mm256_set1_epi32(0xFFFF0000)));
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          total[half][r] = _mm256_fmadd_ps(scale, _mm256_add_ps(even[r], odd[r]), total[half][r]);
          total[half][r] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sums[r * groups + g]), total[half][r]);
        }
      }
    }
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < ROWS; ++r) _mm256_storeu_ps(y + r * outputs + 8 * half, total[half][r]);
  }
};

template <typename Form, int ROWS = Form::MOST_ROWS>
void multiply_all(const uint8_t* weight, const typename Form::Prepared* x, const float* sums, typename Form::Number* y,
                  int64_t rows, int64_t groups, int64_t outputs) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * groups * Form::PREPARED, sums += ROWS * groups, y += ROWS * outputs)
    Form::template multiply<ROWS>(weight, x, sums, y, groups, outputs);
  if constexpr (ROWS > 1) multiply_all<Form, ROWS / 2>(weight, x, sums, y, rows, groups, outputs);
}

template <typename Form>
void product(const at::Tensor& rows, const at::Tensor& weight, at::Tensor& y) {
  const int64_t tiles = weight.size(0), groups = weight.size(1), outputs = tiles * TILE;
  const int64_t num_rows = rows.numel() / rows.size(-1);
  const auto* packed = weight.const_data_ptr<uint8_t>();
  auto* to = y.mutable_data_ptr<typename Form::Number>();
  std::vector<typename Form::Prepared> room;
  std::vector<float> sums(num_rows * groups);
  const auto* prepared = Form::prepare(rows.const_data_ptr(), room, sums.data(), num_rows * groups);
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      multiply_all<Form>(packed + tile * groups * BLOCK, prepared, sums.data(), to + tile * TILE, num_rows, groups,
                         outputs);
  });
}

at::Tensor int4_linear(const at::Tensor& x, const at::Tensor& weight) {
  const int64_t inputs = weight.size(1) * GROUP;
  const bool bf16 = x.scalar_type() == at::kBFloat16 && __builtin_cpu_supports("avx512bf16");
  TORCH_CHECK((bf16 || x.scalar_type() == at::kFloat) && x.size(-1) == inputs, "int4_linear: x is ", x.sizes(), " ",
              x.scalar_type(), ", expected fp32, or bf16 on a CPU with AVX512-BF16, with ", inputs, " inputs");
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0) * TILE;
  at::Tensor y = at::empty(shape, x.options());
  if (bf16)
    product<Avx512Bf16>(x.contiguous(), weight, y);
  else
    product<Avx2Fp32>(x.contiguous(), weight, y);
  return y;
}

}  // namespace

TORCH_LIBRARY(ryzen_llm, m) { m.def("int4_linear(Tensor x, Tensor weight) -> Tensor"); }
TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("int4_linear", int4_linear); }
