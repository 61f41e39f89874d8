// The product of one row with packed rows: `packed_dot.py` says what is computed, `packed_rows.py` how codes are laid out.

#include <vector>

#include "tensors.h"

namespace {

constexpr int64_t LANES = 8;
constexpr int64_t AHEAD = 2048;  // bytes that are asked of memory before they are needed

struct Plane {
  const uint8_t* bytes;
  int width, shift;
};

WITH_AVX2 inline void add(__m256& sum, __m128i codes, const float* x) {
  sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(codes)), _mm256_loadu_ps(x), sum);
}

// Sixteen codes at a time, or eight: each plane's bits are cut out of as many bytes, and put together to a byte a code.
template <int PLANES>
WITH_AVX2 float dot(const Plane* planes, const float* x, int64_t group, int64_t length) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t stretch = 0; stretch * length < group; ++stretch) {
    const uint8_t* from[PLANES];
    __m128i right[PLANES], left[PLANES], mask[PLANES];
    for (int p = 0; p < PLANES; ++p) {
      const int64_t in_plane = group * planes[p].width / 8 / length;  // stretches of one part
      from[p] = planes[p].bytes + stretch % in_plane * length;
      right[p] = _mm_cvtsi32_si128(planes[p].width * static_cast<int>(stretch / in_plane));
      left[p] = _mm_cvtsi32_si128(planes[p].shift);
      mask[p] = _mm_set1_epi8(static_cast<char>((1u << planes[p].width) - 1));
    }
    const float* at = x + stretch * length;
    for (int64_t j = 0; j < length; j += 2 * LANES) {
      const bool sixteen = j + 2 * LANES <= length;
      __m128i codes = _mm_setzero_si128();
      for (int p = 0; p < PLANES; ++p) {
        const auto* bytes = (const __m128i*)(from[p] + j);
        const __m128i part =
            _mm_and_si128(_mm_srl_epi16(sixteen ? _mm_loadu_si128(bytes) : _mm_loadl_epi64(bytes), right[p]), mask[p]);
        codes = p ? _mm_or_si128(codes, _mm_sll_epi16(part, left[p])) : part;
      }
      add(sums[0], codes, at + j);
      if (sixteen) add(sums[1], _mm_unpackhi_epi64(codes, codes), at + j + LANES);
    }
  }
  const __m256 both = _mm256_add_ps(sums[0], sums[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <typename Scale, int PLANES>
void product(const uint8_t* codes, const Scale* scale, const float* x, const float* sums, float* y, int64_t rows,
             int64_t groups, int64_t group, int bits) {
  const int64_t bytes = group * bits / 8;
  parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float total = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* at = codes + (row * groups + g) * bytes;
        for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(at + AHEAD + line, _MM_HINT_T0);
        Plane planes[PLANES];
        int shift = 0, plane = 0, narrowest = 8;
        for (int width : {8, 4, 2, 1})
          if (bits & width) {
            planes[plane++] = {at, width, shift};
            at += group * width / 8;
            shift += width;
            narrowest = width;
          }
        const float half = static_cast<float>((1 << bits) - 1) / 2;
        const float found = dot<PLANES>(planes, x + g * group, group, group * narrowest / 8);
        total += (found - sums[g] * half) * static_cast<float>(scale[row * groups + g]);
      }
      y[row] = total;
    }
  });
}

template <typename Scale>
void by_planes(const Tensor& x, const Tensor& codes, const Tensor& scale, int bits, Tensor& y) {
  const int64_t rows = codes.size(0), groups = codes.size(1), group = x.numel() / groups;
  const auto* numbers = x.const_data_ptr<float>();
  std::vector<float> sums(groups);
  for (int64_t i = 0; i < x.numel(); ++i) sums[i / group] += numbers[i];
  const int planes = __builtin_popcount(bits);
  const auto run = planes == 1 ? product<Scale, 1> : planes == 2 ? product<Scale, 2> : product<Scale, 3>;
  run(codes.const_data_ptr<uint8_t>(), scale.const_data_ptr<Scale>(), numbers, sums.data(),
      y.mutable_data_ptr<float>(), rows, groups, group, bits);
}

Tensor packed_dot(const Tensor& x, const Tensor& codes, const Tensor& scale, int64_t bits) {
  const bool shaped = codes.dim() == 3 && scale.dim() == 2 && x.dim() == 1 && codes.size(1) > 0 &&
                      scale.size(0) == codes.size(0) && scale.size(1) == codes.size(1);
  STD_TORCH_CHECK(shaped && bits >= 1 && bits <= 8 && codes.scalar_type() == ScalarType::Byte &&
                      x.numel() * bits == codes.size(1) * codes.size(2) * 8 &&
                      x.numel() / codes.size(1) * (bits & -bits) / 8 % LANES == 0,
                  "packed_dot: x is ", shape(x), ", codes ", shape(codes), " and scale ", shape(scale), " of ", bits,
                  " bits, which do not fit");
  Tensor y = torch::stable::new_empty(x, {codes.size(0)}, ScalarType::Float);
  const Tensor numbers = as(ScalarType::Float, x), in_rows = as(ScalarType::Byte, codes);
  if (scale.scalar_type() == ScalarType::BFloat16)
    by_planes<BFloat16>(numbers, in_rows, as(ScalarType::BFloat16, scale), static_cast<int>(bits), y);
  else
    by_planes<float>(numbers, in_rows, as(ScalarType::Float, scale), static_cast<int>(bits), y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def("packed_dot(Tensor x, Tensor codes, Tensor scale, int bits) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("packed_dot", TORCH_BOX(&packed_dot)); }
