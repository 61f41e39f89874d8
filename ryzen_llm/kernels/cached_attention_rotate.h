// Between what a model computes and what a cache stores, for `cached_attention_cpu.cpp`.

template <int ROWS, int VECTORS>
INLINE void multiply_columns(const Matrix& matrix, const float* x, int64_t column, float* to) {
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t i = 0; i < matrix.width; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = i * matrix.width + column + v * LANES;
      const Floats factor = matrix.fp32 ? load<Floats>(matrix.fp32 + at) : widened(matrix.fp16 + at);
      for (int r = 0; r < ROWS; ++r) sums[r][v] = plus(sums[r][v], all(x[r * matrix.width + i]), factor);
    }
  for (int r = 0; r < ROWS; ++r) std::memcpy(to + r * matrix.width + column, sums[r], sizeof sums[r]);
}

// Rows of a matrix's width times the matrix.
void multiply(const Matrix& matrix, const float* x, int64_t rows, float* to) {
  const int64_t width = matrix.width, whole = width / LANES * LANES;
  by_four(rows, [&](auto n, int64_t r) INLINED {
    constexpr int ROWS = decltype(n)::value;
    int64_t column = 0;
    for (; column + 4 * LANES <= width; column += 4 * LANES)
      multiply_columns<ROWS, 4>(matrix, x + r * width, column, to + r * width);
    for (; column < whole; column += LANES) multiply_columns<ROWS, 1>(matrix, x + r * width, column, to + r * width);
  });
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t column = whole; column < width; ++column) {
      float sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += x[r * width + i] * matrix.at(i * width + column);
      to[r * width + column] = sum;
    }
}

// What each lane and the one whose number differs in `BIT` come to.
template <int BIT>
INLINE Floats butterfly(Floats x) {
  const Floats sign = (LANE & BIT) ? all(-1.0f) : all(1.0f);
  const Floats other = BIT == 1   ? PICKED(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
                       : BIT == 2 ? PICKED(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
                       : BIT == 4 ? PICKED(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
                                  : PICKED(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  return other + x * sign;
}

// Rows of `width`, `count` numbers in all, times `hadamard_matrix`, faster than the product and rounded elsewhere: for
// what is not stored.
void hadamard(float* x, int64_t count, int64_t width) {
  const int64_t block = std::gcd(width, int64_t{256});
  const float factor = 1 / std::sqrt(static_cast<float>(block));
  const auto pair = [&](int64_t i, int64_t j, auto of) INLINED {
    const auto a = load<decltype(of)>(x + i), b = load<decltype(of)>(x + j), sum = a + b, difference = a - b;
    std::memcpy(x + i, &sum, sizeof sum), std::memcpy(x + j, &difference, sizeof difference);
  };
  const auto pairs = [&](int64_t half, int64_t step, auto of) INLINED {
    for (; half < block; half *= 2)
      for (int64_t i = 0; i < count; i += 2 * half)
        for (int64_t j = i; j < i + half; j += step) pair(j, j + half, of);
  };
  if (block % LANES) {
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
    return pairs(1, 1, float());
  }
  for (int64_t i = 0; i < count; i += LANES) {
    const Floats y = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load<Floats>(x + i) * factor))));
    std::memcpy(x + i, &y, sizeof y);
  }
  pairs(LANES, LANES, Floats());
}

// fp32 from bf16, and rounded back to it.
void widen_all(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const Floats x = from_bf16(reinterpret_cast<const uint8_t*>(from + i));
    std::memcpy(to + i, &x, sizeof x);
  }
  for (; i < count; ++i) to[i] = reinterpret_cast<const BFloat16*>(from)[i];
}
void round_all(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) to_bf16(load<Floats>(from + i), to + i);
  for (; i < count; ++i) reinterpret_cast<BFloat16*>(to)[i] = from[i];
}

// Of `count` rows of fp32 or bf16, summed one after the other.
void mean(const Stored& of, int64_t row, int64_t count, float* to) {
  thread_local std::vector<float> next;
  next.resize(of.width);
  std::fill_n(to, of.width, 0.0f);
  for (int64_t i = row; i < row + count; ++i) {
    if (of.codes == Codes::BF16) widen_all(reinterpret_cast<const uint16_t*>(of.row(i)), of.width, next.data());
    else std::memcpy(next.data(), of.row(i), of.row_bytes);
    for (int64_t c = 0; c < of.width; ++c) to[c] += next[c];
  }
  for (int64_t c = 0; c < of.width; ++c) to[c] /= static_cast<float>(count);
}

// A row's channels to where their numbers are once codes are unpacked; the sum of all. What no channel has is zero.
float put_in_place(const float* channels, const Stored& stored, Floats* to) {
  auto* places = reinterpret_cast<float*>(to);
  const int64_t vectors = stored.vectors(), half = stored.width / 2;
  Floats sums = {};
  std::fill_n(to, vectors, Floats{});
  if (stored.codes != Codes::INT4) std::copy_n(channels, stored.width, places);
  else
    for (int64_t i = 0; i < half; i += LANES) {
      std::copy_n(channels + i, std::min(LANES, half - i), places + 2 * i);
      std::copy_n(channels + half + i, std::min(LANES, half - i), places + 2 * i + LANES);
    }
  for (int64_t v = 0; v < vectors; ++v) sums += to[v];
  return sum(sums);
}

void take_from_place(const Floats* from, const Stored& stored, float* channels) {
  const auto* places = reinterpret_cast<const float*>(from);
  const int64_t half = stored.width / 2;
  if (stored.codes != Codes::INT4) std::copy_n(places, stored.width, channels);
  else
    for (int64_t i = 0; i < half; i += LANES) {
      std::copy_n(places + 2 * i, std::min(LANES, half - i), channels + i);
      std::copy_n(places + 2 * i + LANES, std::min(LANES, half - i), channels + half + i);
    }
}
