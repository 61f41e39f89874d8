// The products of `quantised_linear.py`, which says what is computed and how the weights are laid out.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <immintrin.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#define WITH_AVX2 __attribute__((target("avx2,fma")))
#define WITH_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")))

namespace {

constexpr int64_t TILE = 16;     // outputs, one for each 32-bit lane of an AVX-512 register
constexpr int64_t GROUP = 32;    // inputs
constexpr int64_t AHEAD = 4096;  // bytes that are asked of memory before they are needed

// What a tile holds: blocks of codes, each a group's, with scales and minima if they have 4 bits; else scales at the end.
template <int BITS>
struct Layout {
  static constexpr int PLACES = 32 / BITS, PARTS = GROUP / PLACES;
  static constexpr int64_t CODES = 64 * PARTS, BLOCK = CODES + (BITS == 4 ? 64 : 0), END = BITS == 4 ? 0 : 64;

  static constexpr int64_t bytes(int64_t groups) { return groups * BLOCK + END; }
  // Which of a part's inputs a lane holds at a place.
  static constexpr int64_t input(int64_t place) { return BITS == 4 ? 2 * (place % 4) + place / 4 : place; }
};

template <int64_t BYTES>
inline void ask_for_later(const uint8_t* weight) {
  for (int64_t line = 0; line < BYTES; line += 64) _mm_prefetch(weight + AHEAD + line, _MM_HINT_T0);
}

// Each form says how a group of inputs is prepared, and multiplies ROWS rows by a tile. The order of its sums is the same
// for any ROWS, so that a row's result does not depend on the others.

// Inputs are rounded to 8 bits with a scale for each group, and sums of products with codes are exact.
struct Avx512Vnni {
  using Number = at::BFloat16;
  static constexpr int MOST_ROWS = 8;
  struct Prepared {
    uint32_t codes[GROUP / 4];  // four in each, ordered as the weights that they meet
    float scale, sum;
    int32_t offset;  // for weights of 8 bits, whose codes are stored 128 too high
  };

  template <int BITS>
  WITH_AVX512 static void prepare(const Number* x, Prepared* to) {
    const __m512i pairs = _mm512_loadu_si512(x);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000)));
    const float largest = largest_magnitude(pairs);
    const __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? 127 / largest : 0);
    const __m128i firsts = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(even, inverse)));
    const __m128i seconds = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(odd, inverse)));
    __m256i codes = _mm256_set_m128i(_mm_unpackhi_epi8(firsts, seconds), _mm_unpacklo_epi8(firsts, seconds));
    if (BITS == 4)  // the even places, then the odd ones
      codes = _mm256_shuffle_epi8(codes, _mm256_set_epi8(15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0, 15, 11, 14,
                                                         10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0));
    _mm256_storeu_si256((__m256i*)to->codes, codes);
    const __m256i above = _mm256_sad_epu8(_mm256_xor_si256(codes, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
    const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(above), _mm256_extracti128_si256(above, 1));
    const int32_t sum = _mm_cvtsi128_si32(halves) + _mm_extract_epi32(halves, 2) - 128 * GROUP;
    to->scale = largest / 127;
    to->sum = to->scale * sum;  // of the rounded inputs: codes are all positive, and would double the error of another
    to->offset = -128 * sum;
  }

  // Of bf16 numbers without their signs, which are ordered as integers are: that of no number is above all.
  WITH_AVX512 static float largest_magnitude(__m512i numbers) {
    const __m512i bits = _mm512_and_si512(numbers, _mm512_set1_epi16(0x7FFF));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(bits), _mm512_extracti64x4_epi64(bits, 1));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const int smallest = _mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1))));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((~smallest & 0xFFFF) << 16)));
  }

  template <int BITS, int ROWS>
  WITH_AVX512 static void multiply(const uint8_t* weight, const Prepared* x, Number* y, int64_t groups,
                                   int64_t outputs) {
    using Weights = Layout<BITS>;
    constexpr int CHAINS = ROWS == MOST_ROWS ? 1 : 2;  // of sums, to wait less for each other; many rows do not
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[ROWS];
    for (int r = 0; r < ROWS; ++r) total[r] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, weight += Weights::BLOCK) {
      ask_for_later<Weights::BLOCK>(weight);
      __m512i sums[CHAINS][ROWS];
      for (int r = 0; r < ROWS; ++r) {
        sums[0][r] = BITS == 4 ? _mm512_setzero_si512() : _mm512_set1_epi32(x[g * ROWS + r].offset);
        if (CHAINS == 2) sums[1][r] = _mm512_setzero_si512();
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* const part = weight + 64 * (BITS == 4 ? i : 2 * i);
        const __m512i codes = _mm512_loadu_si512(part);
        const __m512i first = BITS == 4 ? _mm512_and_si512(codes, low) : codes;
        const __m512i second = BITS == 4 ? _mm512_and_si512(_mm512_srli_epi16(codes, 4), low) : _mm512_loadu_si512(part + 64);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const uint32_t* const inputs = x[g * ROWS + r].codes + 2 * i;
          sums[0][r] = _mm512_dpbusd_epi32(sums[0][r], first, _mm512_set1_epi32(inputs[0]));
          sums[CHAINS - 1][r] = _mm512_dpbusd_epi32(sums[CHAINS - 1][r], second, _mm512_set1_epi32(inputs[1]));
        }
      }
      const __m512i factors = BITS == 4 ? _mm512_loadu_si512(weight + Weights::CODES) : _mm512_setzero_si512();
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(factors, 16));
      const __m512 minimum = _mm512_castsi512_ps(_mm512_and_si512(factors, _mm512_set1_epi32(0xFFFF0000)));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const Prepared& group = x[g * ROWS + r];
        const __m512i exact = CHAINS == 2 ? _mm512_add_epi32(sums[0][r], sums[1][r]) : sums[0][r];
        const __m512 sum = _mm512_cvtepi32_ps(exact), step = _mm512_set1_ps(group.scale);
        total[r] = _mm512_fmadd_ps(BITS == 4 ? _mm512_mul_ps(scale, step) : step, sum, total[r]);
        if (BITS == 4) total[r] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(group.sum), total[r]);
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      if (BITS == 8) total[r] = _mm512_mul_ps(total[r], _mm512_loadu_ps(weight));
      _mm256_storeu_si256((__m256i*)(y + r * outputs), (__m256i)_mm512_cvtneps_pbh(total[r]));
    }
  }
};

// A lane holds the codes of one output. Code c is read where it stands, as c * 2^(BITS * place), and the input is divided
// by that power.
struct Avx2Fp32 {
  using Number = float;
  static constexpr int MOST_ROWS = 4;
  struct Prepared {
    float inputs[GROUP];
    float sum;
  };

  template <int BITS>
  static void prepare(const Number* x, Prepared* to) {
    using Weights = Layout<BITS>;
    to->sum = 0;
    for (int64_t i = 0; i < GROUP; ++i) to->sum += x[i];
    float factor = 1;
    for (int64_t place = 0; place < Weights::PLACES; ++place, factor /= 1 << BITS)
      for (int64_t part = 0; part < Weights::PARTS; ++part)  // the last place is moved to the first, for its sign's sake
        to->inputs[part * Weights::PLACES + place] = x[part * Weights::PLACES + Weights::input(place)] *
                                                     (place == Weights::PLACES - 1 ? 1 : factor);
  }

  template <int BITS, int ROWS>
  WITH_AVX2 static void multiply(const uint8_t* weight, const Prepared* x, Number* y, int64_t groups, int64_t outputs) {
    using Weights = Layout<BITS>;
    __m256 total[2][ROWS];
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < ROWS; ++r) total[half][r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < groups; ++g, weight += Weights::BLOCK) {
      ask_for_later<Weights::BLOCK>(weight);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m256 even[ROWS], odd[ROWS];
        for (int r = 0; r < ROWS; ++r) even[r] = odd[r] = _mm256_setzero_ps();
#pragma GCC unroll 8
        for (int part = 0; part < Weights::PARTS; ++part) {
          const __m256i codes = _mm256_loadu_si256((const __m256i*)(weight + 64 * part + 32 * half));
#pragma GCC unroll 8
          for (int place = 0; place < Weights::PLACES; ++place) {
            const __m256i code = place == Weights::PLACES - 1
                                     ? _mm256_srli_epi32(codes, 32 - BITS)
                                     : _mm256_and_si256(codes, _mm256_set1_epi32(((1 << BITS) - 1) << (BITS * place)));
            const __m256 w = _mm256_cvtepi32_ps(code);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
              __m256& sum = place % 2 ? odd[r] : even[r];
              const float* const input = x[g * ROWS + r].inputs + part * Weights::PLACES + place;
              sum = _mm256_fmadd_ps(w, _mm256_broadcast_ss(input), sum);
            }
          }
        }
        const __m256i factors = BITS == 4 ? _mm256_loadu_si256((const __m256i*)(weight + Weights::CODES + 32 * half))
                                          : _mm256_setzero_si256();
        const __m256 scale = BITS == 4 ? _mm256_castsi256_ps(_mm256_slli_epi32(factors, 16)) : _mm256_set1_ps(1);
        const __m256 minimum = BITS == 4 ? _mm256_castsi256_ps(_mm256_and_si256(factors, _mm256_set1_epi32(0xFFFF0000)))
                                         : _mm256_set1_ps(-128);  // codes are stored 128 too high
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
          total[half][r] = _mm256_fmadd_ps(scale, _mm256_add_ps(even[r], odd[r]), total[half][r]);
          total[half][r] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x[g * ROWS + r].sum), total[half][r]);
        }
      }
    }
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < ROWS; ++r) {
        if (BITS == 8) total[half][r] = _mm256_mul_ps(total[half][r], _mm256_loadu_ps((const float*)weight + 8 * half));
        _mm256_storeu_ps(y + r * outputs + 8 * half, total[half][r]);
      }
  }
};

template <typename Form, int BITS, int ROWS = Form::MOST_ROWS>
void multiply_all(const uint8_t* weight, const typename Form::Prepared* x, typename Form::Number* y, int64_t rows,
                  int64_t groups, int64_t outputs) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS * groups, y += ROWS * outputs)
    Form::template multiply<BITS, ROWS>(weight, x, y, groups, outputs);
  if constexpr (ROWS > 1) multiply_all<Form, BITS, ROWS / 2>(weight, x, y, rows, groups, outputs);
}

// The first of the rows that `multiply_all` takes together with one, and how many: prepared, a group of theirs is in one
// place, and the next group follows.
template <int MOST_ROWS>
std::pair<int64_t, int64_t> rows_together(int64_t row, int64_t rows) {
  int64_t together = MOST_ROWS, first = row - row % together;
  while (first + together > rows) {
    together /= 2;
    first = row - row % together;
  }
  return {first, together};
}

template <typename Form, int BITS>
void product(const at::Tensor& rows, const at::Tensor& weight, at::Tensor& y) {
  const int64_t tiles = weight.size(0), outputs = tiles * TILE, groups = rows.size(-1) / GROUP;
  const int64_t num_rows = rows.numel() / rows.size(-1);
  const auto* from = static_cast<const typename Form::Number*>(rows.const_data_ptr());
  const auto* packed = weight.const_data_ptr<uint8_t>();
  auto* to = y.mutable_data_ptr<typename Form::Number>();
  std::vector<typename Form::Prepared> prepared(num_rows * groups);
  at::parallel_for(0, num_rows * groups, 512, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups, group = i % groups;
      const auto [first, together] = rows_together<Form::MOST_ROWS>(row, num_rows);
      Form::template prepare<BITS>(from + i * GROUP, &prepared[first * groups + group * together + row - first]);
    }
  });
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile)
      multiply_all<Form, BITS>(packed + tile * weight.size(1), prepared.data(), to + tile * TILE, num_rows, groups, outputs);
  });
}

template <int BITS>
void check(const at::Tensor& x, const at::Tensor& weight, bool bf16) {
  using Weights = Layout<BITS>;
  const int64_t groups = weight.dim() == 2 ? (weight.size(1) - Weights::END) / Weights::BLOCK : 0;
  TORCH_CHECK(groups && weight.size(1) == Weights::bytes(groups) && weight.is_contiguous(), "quantised_linear: weight is ",
              weight.sizes(), ", expected contiguous tiles of ", Weights::BLOCK, " bytes a group and ", Weights::END);
  TORCH_CHECK((bf16 || x.scalar_type() == at::kFloat) && x.size(-1) == groups * GROUP, "quantised_linear: x is ",
              x.sizes(), " ", x.scalar_type(), ", expected fp32, or bf16 on a CPU with AVX512-BF16 and VNNI, with ",
              groups * GROUP, " inputs");
}

at::Tensor quantised_linear(const at::Tensor& x, const at::Tensor& weight, int64_t bits) {
  const bool bf16 = x.scalar_type() == at::kBFloat16 && __builtin_cpu_supports("avx512bf16") &&
                    __builtin_cpu_supports("avx512vnni");
  TORCH_CHECK(bits == 4 || bits == 8, "quantised_linear: bits are ", bits, ", expected 4 or 8");
  bits == 4 ? check<4>(x, weight, bf16) : check<8>(x, weight, bf16);
  auto shape = x.sizes().vec();
  shape.back() = weight.size(0) * TILE;
  at::Tensor y = at::empty(shape, x.options());
  const auto multiply = bf16 ? (bits == 4 ? product<Avx512Vnni, 4> : product<Avx512Vnni, 8>)
                             : (bits == 4 ? product<Avx2Fp32, 4> : product<Avx2Fp32, 8>);
  multiply(x.contiguous(), weight, y);
  return y;
}

}  // namespace

TORCH_LIBRARY(ryzen_llm, m) {
  m.def("quantised_linear(Tensor x, Tensor weight, int bits) -> Tensor");
}
TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("quantised_linear", quantised_linear); }
