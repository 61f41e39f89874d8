// Where the time goes in `cached_attention_cpu.cpp`, which includes this once for each kind of processor.

template <typename To, typename From>
INLINE To load(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

INLINE Floats all(float x) { return x - Floats{}; }
INLINE Ints all(int32_t x) { return x - Ints{}; }

// What a vector's bytes stand for; of packed bytes the low or the high codes.
template <Codes CODES>
INLINE Floats converted(const uint8_t* bytes, bool high) {
  if constexpr (CODES == Codes::FP32) return load<Floats>(bytes);
  if constexpr (CODES == Codes::BF16) return (Floats)(__builtin_convertvector(load<Halves>(bytes), Ints) << 16);
#ifdef __AVX512F__  // in two steps what takes GCC three
  const __m128i eight = load<__m128i>(bytes);
  if constexpr (CODES == Codes::INT8) return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(eight));
  const __m128i four = _mm_and_si128(high ? _mm_srli_epi16(eight, 4) : eight, _mm_set1_epi8(15));
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(four));
#else
  // By way of 16 bits: GCC 12 widens bytes to 32 one by one.
  if constexpr (CODES == Codes::INT8)
    return __builtin_convertvector(
        __builtin_convertvector(__builtin_convertvector(load<SignedBytes>(bytes), Shorts), Ints), Floats);
  const Halves pair = __builtin_convertvector(load<Bytes>(bytes), Halves);
  return __builtin_convertvector(__builtin_convertvector(high ? pair >> 4 : pair & 15, Ints), Floats);
#endif
}

template <Codes CODES>
INLINE void unpack(const Stored& from, int64_t row, int64_t count, Floats* tile) {
  constexpr int64_t number = CODES == Codes::FP32 ? 4 : CODES == Codes::BF16 ? 2 : 1, step = number * LANES;
  const int64_t vectors = from.vectors(), whole = from.row_bytes / step, left = from.row_bytes % step;
  const uint8_t* bytes = from.bytes + row * from.row_bytes;
  for (int64_t k = 0; k < count; ++k, tile += vectors, bytes += from.row_bytes) {
    Floats* high = tile + vectors / 2;
    for (int64_t line = 0; line < from.row_bytes; line += 64)  // of the next chunk
      __builtin_prefetch(bytes + CHUNK * from.row_bytes + line, 0, 2);
    for (int64_t v = 0; v < whole; ++v) {
      tile[v] = converted<CODES>(bytes + v * step, false);
      if (CODES == Codes::INT4) high[v] = converted<CODES>(bytes + v * step, true);
    }
    if (!left) continue;
    const uint8_t* last = bytes + whole * step;
    uint8_t rest[step] = {};
    // What lies behind a row is multiplied by zero, or left out; it must be there, and be a number.
    if (number > 1 || last + step > from.end) last = static_cast<uint8_t*>(std::memcpy(rest, last, left));
    tile[whole] = converted<CODES>(last, false);
    if (CODES == Codes::INT4) high[whole] = converted<CODES>(last, true);
  }
}

INLINE void unpack_any(const Stored& from, int64_t row, int64_t count, Floats* tile) {
  switch (from.codes) {
    case Codes::FP32: return unpack<Codes::FP32>(from, row, count, tile);
    case Codes::BF16: return unpack<Codes::BF16>(from, row, count, tile);
    case Codes::INT8: return unpack<Codes::INT8>(from, row, count, tile);
    case Codes::INT4: return unpack<Codes::INT4>(from, row, count, tile);
  }
}

// fp16 numbers in fp32; an infinity is no number either.
INLINE Floats widened(const uint16_t* from) {
  const Ints bits = __builtin_convertvector(load<Halves>(from), Ints), magnitude = bits & 0x7fff;
  const Floats finite = (Floats)((Ints)((Floats)(magnitude << 13) * 0x1p112f) | (bits & 0x8000) << 16);
  return magnitude >= 0x7c00 ? all(NOT_A_NUMBER) : finite;
}

// The factors of a chunk's rows; what is missing is `otherwise`.
INLINE void widen(const uint16_t* from, int64_t row, int64_t count, float otherwise, Floats* to) {
  uint16_t halves[CHUNK] = {};
  if (from) std::memcpy(halves, from + row, count * sizeof *halves);
  for (int64_t i = 0; i < CHUNK / LANES; ++i) to[i] = from ? widened(halves + i * LANES) : all(otherwise);
}

// The sums of sixteen vectors, in a tree: at each level a vector has the sums of twice as many, in half as many lanes.
INLINE Floats summed(Floats* x) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    x[i] = PICKED(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           PICKED(x[2 * i], x[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    x[i] = PICKED(x[2 * i], x[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           PICKED(x[2 * i], x[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    x[i] = PICKED(x[2 * i], x[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
           PICKED(x[2 * i], x[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  return PICKED(x[0], x[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         PICKED(x[0], x[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

INLINE Floats exponential(Floats x) {  // of what is not positive
  x = x < -87.0f ? all(-87.0f) : x;
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats sum = all(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) sum = sum * r + factor;
  return sum * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

template <int ROWS>
INLINE void score(const Task& task, const Floats* tile, int64_t row, int64_t count, Floats* scores) {
  const int64_t vectors = task.keys.vectors();
  const Floats* queries = task.queries + row * vectors;
  for (int64_t k = 0; k < count; k += LANES) {
    Floats sums[ROWS][LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      const Floats* key = tile + (k + i) * vectors;
      Floats sum[ROWS] = {};
      for (int64_t v = 0; v < vectors; ++v)
        for (int r = 0; r < ROWS; ++r) sum[r] += queries[r * vectors + v] * key[v];
      for (int r = 0; r < ROWS; ++r) sums[r][i] = sum[r];
    }
    for (int r = 0; r < ROWS; ++r) scores[(row + r) * (CHUNK / LANES) + k / LANES] = summed(sums[r]);
  }
}

template <int ROWS>
INLINE void mix(const Task& task, const Floats* tile, int64_t row, int64_t count, const Floats* weights) {
  const int64_t vectors = task.values.vectors();
  const float* weight = reinterpret_cast<const float*>(weights) + row * CHUNK;
  Floats* context = task.context + row * vectors;
  for (int64_t v = 0; v < vectors; ++v) {
    Floats even[ROWS] = {}, odd[ROWS] = {};
    for (int64_t k = 0; k < count; k += 2)
      for (int r = 0; r < ROWS; ++r) {
        even[r] += weight[r * CHUNK + k] * tile[k * vectors + v];
        odd[r] += weight[r * CHUNK + k + 1] * tile[(k + 1) * vectors + v];
      }
    for (int r = 0; r < ROWS; ++r) context[r * vectors + v] += even[r] + odd[r];
  }
}

template <typename Step>
INLINE void by_four(int64_t rows, const Step& step) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) step(std::integral_constant<int, 4>(), row);
  if (rows - row == 3) step(std::integral_constant<int, 3>(), row);
  if (rows - row == 2) step(std::integral_constant<int, 2>(), row);
  if (rows - row == 1) step(std::integral_constant<int, 1>(), row);
}

void attend(const Task& task, const Scratch& scratch) {
  constexpr int64_t most_parts = CHUNK / LANES;
  const int64_t key_vectors = task.keys.vectors(), value_vectors = task.values.vectors();
  Floats *tile = scratch.tile, *scores = scratch.scores;
  for (int64_t start = 0; start < task.count; start += CHUNK) {
    const int64_t count = std::min(CHUNK, task.count - start), row = task.row + start;
    // Slots that are not there have zeros, whose scores are hidden and whose weights are zero.
    const int64_t parts = (count + LANES - 1) / LANES;
    std::fill(tile + count * key_vectors, tile + parts * LANES * key_vectors, Floats{});
    unpack_any(task.keys, row, count, tile);
    Floats scale[most_parts], minimum[most_parts];
    widen(task.keys.scale, row, count, 1, scale);
    widen(task.keys.minimum, row, count, 0, minimum);
    by_four(task.rows, [&](auto n, int64_t r) INLINED { score<decltype(n)::value>(task, tile, r, count, scores); });
    std::fill(tile + count * value_vectors, tile + parts * LANES * value_vectors, Floats{});
    unpack_any(task.values, row, count, tile);
    Floats value_scale[most_parts], value_minimum[most_parts];
    widen(task.values.scale, row, count, 1, value_scale);
    widen(task.values.minimum, row, count, 0, value_minimum);
    Ints held[most_parts];
    for (int64_t i = 0; i < parts; ++i) {
      const Ints place = LANE + static_cast<int32_t>(i * LANES), slot = place + static_cast<int32_t>(task.slot + start);
      const Ints round = slot + task.held.round;  // as if it had been written in this round of the ring
      held[i] = place < static_cast<int32_t>(count) ? round > task.held.last ? round - task.held.ring : round : all(-1);
    }
    for (int64_t r = 0; r < task.rows; ++r) {
      Floats* s = scores + r * most_parts;
      Floats most = all(NOTHING), spoilt = {};
      for (int64_t i = 0; i < parts; ++i) {
        const Ints hidden = (held[i] < task.seen[r].first) | (held[i] > task.seen[r].last);
        s[i] = hidden ? all(NOTHING) : s[i] * scale[i] + task.query_sums[r] * minimum[i];
        most = s[i] > most ? s[i] : most;
        spoilt += hidden ? Floats{} : s[i] - s[i];  // NaN of what is not finite, which no comparison would find
      }
      float highest = task.sums[r].highest, not_a_number = 0;
      for (int64_t i = 0; i < LANES; ++i) highest = std::max(highest, most[i]), not_a_number += spoilt[i];
      if (std::isnan(not_a_number)) task.sums[r] = {highest = std::max(highest, 0.0f), not_a_number};
      if (highest == NOTHING) {
        for (int64_t i = 0; i < parts; ++i) s[i] = Floats{};
        continue;
      }
      const float shrink = std::exp(task.sums[r].highest - highest);
      Floats total = {}, common = {};
      for (int64_t i = 0; i < parts; ++i) {
        const Floats p = s[i] == NOTHING ? Floats{} : exponential(s[i] - highest);
        total += p;
        common += p * value_minimum[i];
        s[i] = p * value_scale[i];
      }
      float sum = 0, shared = 0;
      for (int64_t i = 0; i < LANES; ++i) sum += total[i], shared += common[i];
      task.sums[r] = {highest, task.sums[r].total * shrink + sum};
      Floats* context = task.context + r * value_vectors;
      for (int64_t v = 0; v < value_vectors; ++v) context[v] = context[v] * shrink + shared;
    }
    by_four(task.rows,
            [&](auto n, int64_t r) INLINED { mix<decltype(n)::value>(task, tile, r, (count + 1) / 2 * 2, scores); });
  }
}

// `to` += `share` * `from`.
void add(const Floats* from, float share, int64_t vectors, Floats* to) {
  for (int64_t v = 0; v < vectors; ++v) to[v] += share * from[v];
}

template <int ROWS, int VECTORS>
INLINE void multiply_columns(const Matrix& matrix, const float* x, int64_t column, float* to) {
  Floats sums[ROWS][VECTORS] = {};
  for (int64_t i = 0; i < matrix.width; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t at = i * matrix.width + column + v * LANES;
      const Floats factor = matrix.fp32 ? load<Floats>(matrix.fp32 + at) : widened(matrix.fp16 + at);
      for (int r = 0; r < ROWS; ++r) sums[r][v] += x[r * matrix.width + i] * factor;
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
