// The products of `linear_cpu.py`: y = x wᵀ, and its gradients dx = dy w and dw = dyᵀ x, in tiles whose sums stay in
// registers.
//
// Of the right factor there are panels of 48 columns, in which the pairs of one step of the sum lie next to each other.

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "products_avx512.h"
#include "transpose_avx512.h"

namespace {

constexpr int ROWS = 8, VECTORS = 3;  // of a tile: 24 sums, with 3 vectors of a panel and a pair in 32 registers
constexpr int64_t PANEL = VECTORS * LANES;
constexpr int64_t BLOCK = 16;      // tiles that meet a panel while it is in the second cache
constexpr int64_t SUMMED = 2048;   // rows of which a weight's gradient is made at once
constexpr int64_t TOGETHER = 8;    // rows that are packed while they are in the first cache
constexpr int64_t APART = LANES;   // beyond a panel, so that the same place of all panels is not one place of a cache

constexpr auto HUGE_PAGE = std::align_val_t(1 << 21);
struct Free {
  void operator()(Pair* memory) const { ::operator delete(memory, HUGE_PAGE); }
};

// Room for packed factors, kept from call to call: the operating system would clear the pages of a new one each time.
Pair* room(int64_t pairs) {
  static thread_local std::unique_ptr<Pair, Free> kept;
  static thread_local int64_t size = 0;
  if (pairs > size) {
    size = 0;
    kept.reset();
    kept.reset(static_cast<Pair*>(::operator new(pairs * sizeof(Pair), HUGE_PAGE)));
    size = pairs;
#ifdef MADV_HUGEPAGE  // in small pages a weight's gradient took 2% or 12% longer, from process to process
    madvise(kept.get(), pairs * sizeof(Pair), MADV_HUGEPAGE);
#endif
  }
  return kept.get();
}

// Step s of panel p is at data[p * panel + s * WIDTH].
template <int64_t WIDTH>
struct Panels {
  Pair* data;
  int64_t panel;

  static int64_t size(int64_t columns, int64_t steps) { return (columns + WIDTH - 1) / WIDTH * (steps * WIDTH + APART); }
  Panels(Pair* memory, int64_t steps) : data(memory), panel(steps * WIDTH + APART) {}
};

INLINE __m256i in_bf16(const uint16_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
INLINE __m256i in_bf16(const float* from) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)); }
INLINE void put(uint16_t* to, __m512 sums, bool) { store_bf16(to, sums); }
INLINE void put(float* to, __m512 sums, bool add) {
  _mm512_storeu_ps(to, add ? _mm512_add_ps(sums, _mm512_loadu_ps(to)) : sums);
}

// Each number with the one below it, where the sum runs over rows: `from` has `rows` of them, the first of which is row
// `first` of the sum.
template <int64_t WIDTH, typename Number>
WITH_BF16 void pack(const Number* from, int64_t first, int64_t rows, int64_t columns, const Panels<WIDTH>& to) {
  for (int64_t column = 0; column < columns; column += WIDTH) {
    Pair* panel = to.data + column / WIDTH * to.panel + first / 2 * WIDTH;
    for (int64_t row = 0; row < rows; row += 2, panel += WIDTH)
      for (int64_t c = 0; c < std::min(WIDTH, columns - column); c += LANES) {
        const Number* above = from + row * columns + column + c;
        _mm_prefetch(above + TOGETHER * columns, _MM_HINT_T0);
        _mm_prefetch(above + (TOGETHER + 1) * columns, _MM_HINT_T0);
        const __m512i low = _mm512_cvtepu16_epi32(in_bf16(above));
        const __m512i high = row + 1 < rows ? _mm512_cvtepu16_epi32(in_bf16(above + columns)) : _mm512_setzero_si512();
        _mm512_store_si512(panel + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
  }
}

template <int64_t WIDTH, typename Number>
void pack_all(const Number* from, int64_t rows, int64_t columns, const Panels<WIDTH>& to) {
  parallel_for(0, (rows + TOGETHER - 1) / TOGETHER, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * TOGETHER; r < std::min(rows, end * TOGETHER); r += TOGETHER)
      pack(from + r * columns, r, std::min(TOGETHER, rows - r), columns, to);
  });
}

INLINE __m512i pairs_at(const uint16_t* from) { return _mm512_loadu_si512(from); }
INLINE __m512i pairs_at(const float* from) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + LANES), _mm512_loadu_ps(from));
}

// Each number with the one to its right, where the sum runs along rows: what was a row becomes a column.
template <typename Number>
WITH_BF16 void pack_turned(const Number* from, int64_t rows, int64_t width, Pair* panel) {
  __m512i turned[LANES];
  for (int64_t row = 0; row < rows; row += LANES)
    for (int64_t c = 0; c < width; c += 2 * LANES) {
      const bool whole = c + 2 * LANES <= width;  // or half
      for (int64_t i = 0; i < LANES; ++i) {
        const Number* at = from + (row + i) * width + c;
        for (int64_t line = 0; line < 2 * LANES; line += 64 / sizeof(Number))
          _mm_prefetch(at + LANES * width + line, _MM_HINT_T0);  // the next rows
        turned[i] = whole ? pairs_at(at) : _mm512_zextsi256_si512(in_bf16(at));
      }
      transpose(turned);
      for (int64_t i = 0; i < (whole ? LANES : LANES / 2); ++i)
        _mm512_store_si512(panel + (c / 2 + i) * PANEL + row, turned[i]);
    }
}

template <typename Number>
void pack_all_turned(const Number* from, int64_t rows, int64_t width, const Panels<PANEL>& to) {
  parallel_for(0, (rows + PANEL - 1) / PANEL, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack_turned(from + p * PANEL * width, std::min(PANEL, rows - p * PANEL), width, to.data + p * to.panel);
  });
}

template <int HEIGHT, int WIDTH, typename Number>
WITH_BF16 void multiply_tile(Left left, const Pair* right, int64_t steps, Number* to, int64_t stride, bool add) {
  __m512 sums[HEIGHT][WIDTH];
#pragma GCC unroll 8
  for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < WIDTH; ++v) {
      sums[r][v] = _mm512_setzero_ps();
      _mm_prefetch(to + r * stride + v * LANES, _MM_HINT_T0);  // for the end
    }
  add_products(left, right, PANEL, steps, sums);
#pragma GCC unroll 8
  for (int r = 0; r < HEIGHT; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < WIDTH; ++v) put(to + r * stride + v * LANES, sums[r][v], add);
}

template <int HEIGHT = ROWS, typename Number>
void multiply_tile(int64_t height, int64_t width, Left left, const Pair* right, int64_t steps, Number* to, int64_t stride,
                   bool add) {
  if (height < HEIGHT) {
    if constexpr (HEIGHT > 1) multiply_tile<HEIGHT - 1>(height, width, left, right, steps, to, stride, add);
  } else if (width >= 3 * LANES) {
    multiply_tile<HEIGHT, 3>(left, right, steps, to, stride, add);
  } else if (width == 2 * LANES) {
    multiply_tile<HEIGHT, 2>(left, right, steps, to, stride, add);
  } else {
    multiply_tile<HEIGHT, 1>(left, right, steps, to, stride, add);
  }
}

// to (rows x columns) = or += a product; `left` gives the factor's rows from one on, ROWS of them at most.
template <typename Number, typename LeftOf>
void multiply(LeftOf left, int64_t rows, const Panels<PANEL>& right, int64_t columns, int64_t steps, Number* to, bool add) {
  parallel_for(0, (rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += BLOCK)
      for (int64_t column = 0; column < columns; column += PANEL)
        for (int64_t tile = block; tile < std::min(end, block + BLOCK); ++tile) {
          const int64_t row = tile * ROWS;
          multiply_tile(std::min<int64_t>(ROWS, rows - row), columns - column, left(row),
                        right.data + column / PANEL * right.panel, steps, to + row * columns + column, columns, add);
        }
  });
}

// (..., width) as rows next to each other.
struct Matrix {
  Tensor tensor;
  int64_t rows, width;

  Matrix(const char* op, const Tensor& given) : tensor(as(ScalarType::BFloat16, given)) {
    STD_TORCH_CHECK(given.dim() > 0 && given.scalar_type() == ScalarType::BFloat16, op, " needs bf16, got ", shape(given));
    width = given.size(given.dim() - 1);
    rows = width ? given.numel() / width : 0;
  }
  const Pair* pairs() const { return static_cast<const Pair*>(tensor.const_data_ptr()); }
  // As a left factor, where the sum runs along rows.
  auto left() const {
    return [from = pairs(), row = width / 2](int64_t r) { return Left{from + r * row, row, 1}; };
  }
  Tensor result(int64_t of_width) const {
    std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
    sizes.back() = of_width;
    return torch::stable::new_empty(tensor, sizes);
  }
};

void check(const char* op, const Matrix& x, const Tensor& weight, int64_t side) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(side) == x.width && weight.size(0) % LANES == 0 &&
                      weight.size(1) % LANES == 0 && weight.is_contiguous() &&
                      (weight.scalar_type() == ScalarType::BFloat16 || weight.scalar_type() == ScalarType::Float),
                  op, " needs a weight (outputs, inputs) in bf16 or fp32, both multiples of 16, got ", shape(weight), " for ",
                  shape(x.tensor));
}

// `then` with the weight's numbers as they are stored.
template <typename Then>
void of_type(const Tensor& weight, Then then) {
  if (weight.scalar_type() == ScalarType::Float) then(static_cast<const float*>(weight.const_data_ptr()));
  else then(numbers(weight));
}

// `given` (..., n) times a weight, of whose side 1 the sum is for x wᵀ, of side 0 for dy w.
Tensor product(const char* op, const Tensor& given, const Tensor& weight, int64_t side) {
  const Matrix left(op, given);
  check(op, left, weight, side);
  const int64_t rows = weight.size(0), width = weight.size(1), columns = weight.size(1 - side), steps = left.width / 2;
  Tensor result = left.result(columns);
  const Panels<PANEL> right(room(Panels<PANEL>::size(columns, steps)), steps);
  of_type(weight, [&](auto* from) {
    if (side == 1) pack_all_turned(from, rows, width, right);
    else pack_all(from, rows, width, right);
  });
  multiply(left.left(), left.rows, right, columns, steps, writable(result), false);
  return result;
}

Tensor linear(const Tensor& x, const Tensor& weight) { return product("linear_cpu", x, weight, 1); }
Tensor by_input(const Tensor& upstream, const Tensor& weight) { return product("linear_cpu_by_input", upstream, weight, 0); }

void add_by_weight(Tensor total, const Tensor& upstream, const Tensor& given, bool add) {
  const Matrix dy("linear_cpu_by_weight", upstream), x("linear_cpu_by_weight", given);
  STD_TORCH_CHECK(dy.rows == x.rows && dy.width % LANES == 0 && x.width % LANES == 0 && total.dim() == 2 &&
                      total.size(0) == dy.width && total.size(1) == x.width && total.is_contiguous() &&
                      total.scalar_type() == ScalarType::Float,
                  "linear_cpu_by_weight needs a gradient (..., outputs) and x (..., inputs), both multiples of 16, and for "
                  "the result (outputs, inputs) in fp32, got ",
                  shape(upstream), ", ", shape(given), " and ", shape(total));
  auto* to = static_cast<float*>(total.mutable_data_ptr());
  if (!x.rows && !add) torch::stable::zero_(total);
  const int64_t most = std::min(SUMMED, x.rows), steps = (most + 1) / 2;
  const int64_t size = Panels<LANES>::size(dy.width, steps);
  const Panels<LANES> left(room(size + Panels<PANEL>::size(x.width, steps)), steps);
  const Panels<PANEL> right(left.data + size, steps);
  for (int64_t r = 0; r < x.rows; r += most) {
    const int64_t rows = std::min(most, x.rows - r);
    pack_all(numbers(dy.tensor) + r * dy.width, rows, dy.width, left);
    pack_all(numbers(x.tensor) + r * x.width, rows, x.width, right);
    const auto rows_of = [&](int64_t row) { return Left{left.data + row / LANES * left.panel + row % LANES, 1, LANES}; };
    multiply(rows_of, dy.width, right, x.width, (rows + 1) / 2, to, add || r > 0);
  }
}

Tensor by_weight(const Tensor& upstream, const Tensor& x) {
  Tensor dw = torch::stable::new_empty(x, {upstream.size(upstream.dim() - 1), x.size(x.dim() - 1)}, ScalarType::Float);
  add_by_weight(dw, upstream, x, false);
  return dw;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def("linear_cpu(Tensor x, Tensor weight) -> Tensor");
  m.def("linear_cpu_by_input(Tensor upstream, Tensor weight) -> Tensor");
  m.def("linear_cpu_by_weight(Tensor upstream, Tensor x) -> Tensor");
  m.def("linear_cpu_add_by_weight(Tensor(a!) total, Tensor upstream, Tensor x, bool add) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) {
  m.impl("linear_cpu", TORCH_BOX(&linear));
  m.impl("linear_cpu_by_input", TORCH_BOX(&by_input));
  m.impl("linear_cpu_by_weight", TORCH_BOX(&by_weight));
  m.impl("linear_cpu_add_by_weight", TORCH_BOX(&add_by_weight));
}
