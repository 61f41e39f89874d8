// Sixteen numbers at a time, for `cached_attention_cpu.cpp`.

template <typename To, typename From>
INLINE To load(const From* from) {
  To to;
  std::memcpy(&to, from, sizeof to);
  return to;
}

INLINE Floats all(float x) { return x - Floats{}; }
INLINE Ints all(int32_t x) { return x - Ints{}; }

// sum + a * b, rounded once or twice, but the same wherever the compiler finds it.
INLINE Floats plus(Floats sum, Floats a, Floats b) {
#ifdef FOR_AVX512
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
  return sum + a * b;
#endif
}

INLINE Floats from_bf16(const uint8_t* from) {
#ifdef FOR_AVX512  // in one step what takes GCC four
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#else
  return (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16);
#endif
}

INLINE void to_bf16(Floats x, uint16_t* to) {
  const Ints bits = (Ints)x, nearest = bits + 0x7fff + (bits >> 16 & 1);
  const Halves halves = __builtin_convertvector((x == x ? nearest : bits | 0x400000) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// fp16 numbers in fp32; an infinity is no number either.
INLINE Floats widened(const uint16_t* from) {
#ifdef FOR_AVX512
  const auto x = (Floats)_mm512_cvtph_ps(load<__m256i>(from));
  return x + (x - x);
#else
  const Ints bits = __builtin_convertvector(load<Halves>(from), Ints), magnitude = bits & 0x7fff;
  const Floats finite = (Floats)((Ints)((Floats)(magnitude << 13) * 0x1p112f) | (bits & 0x8000) << 16);
  return magnitude >= 0x7c00 ? all(NOT_A_NUMBER) : finite;
#endif
}

// The codes of sixteen bytes; of packed ones the low and the high halves, in turn.
template <Codes CODES>
INLINE void convert(const uint8_t* bytes, Floats* to) {
#ifdef FOR_AVX512  // in one or two steps what takes GCC three
  const __m512i codes = CODES == Codes::INT8 ? _mm512_cvtepi8_epi32(load<__m128i>(bytes))
                                             : _mm512_cvtepu8_epi32(load<__m128i>(bytes));
  if constexpr (CODES == Codes::INT8) {
    to[0] = (Floats)_mm512_cvtepi32_ps(codes);
  } else {
    const __m512 numbers = (__m512)__builtin_convertvector(LANE, Floats);  // found by a code's four lowest bits
    to[0] = (Floats)_mm512_permutexvar_ps(codes, numbers);
    to[1] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), numbers);
  }
#else
  // By way of 16 bits: GCC 12 widens bytes to 32 one by one.
  if constexpr (CODES == Codes::INT8) {
    const Shorts codes = __builtin_convertvector(load<SignedBytes>(bytes), Shorts);
    to[0] = __builtin_convertvector(__builtin_convertvector(codes, Ints), Floats);
  } else {
    const Halves pair = __builtin_convertvector(load<Bytes>(bytes), Halves);
    to[0] = __builtin_convertvector(__builtin_convertvector(pair & 15, Ints), Floats);
    to[1] = __builtin_convertvector(__builtin_convertvector(pair >> 4, Ints), Floats);
  }
#endif
}

// What sixteen numbers, or packed bytes, stand for.
template <Codes CODES>
INLINE void unpack(const uint8_t* bytes, Floats* to) {
  if constexpr (CODES == Codes::FP32) *to = load<Floats>(bytes);
  else if constexpr (CODES == Codes::BF16) *to = from_bf16(bytes);
  else convert<CODES>(bytes, to);
}

// `COUNT` vectors of a row, from its vector `v`, which it has in full if `WHOLE`. What lies behind it is multiplied by
// zero, or left out; it must be there, and be a number.
template <Codes CODES, int COUNT, bool WHOLE>
INLINE void read(const Stored& from, const uint8_t* row, int64_t v, Floats* to) {
  constexpr int unit = vectors_at_once(CODES);
  constexpr int64_t size = LANES * bytes_of(CODES);
  const uint8_t* bytes = row + v / unit * size;
  for (int i = 0; i < COUNT; i += unit, bytes += size) {
    const int64_t left = row + from.row_bytes - bytes;
    if (WHOLE || left >= size || (size == LANES && bytes + size <= from.end)) {
      unpack<CODES>(bytes, to + i);
    } else {
      uint8_t copy[size] = {};
      for (int64_t byte = 0; byte < left; ++byte) copy[byte] = bytes[byte];
      unpack<CODES>(copy, to + i);
    }
  }
}

// The sums of sixteen vectors, in a tree: at each level a vector has the sums of twice as many, in half as many lanes.
Floats summed(Floats* x) {
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

// What `of` two vectors makes of all lanes.
template <typename Of>
INLINE float across(Floats x, const Of& of) {
  x = of(x, PICKED(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = of(x, PICKED(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  x = of(x, PICKED(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return of(x, PICKED(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))[0];
}
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE float largest(Floats x) { return across(x, [](Floats a, Floats b) INLINED { return larger(a, b); }); }
INLINE float sum(Floats x) { return across(x, [](Floats a, Floats b) INLINED { return a + b; }); }

INLINE Floats exponential(Floats x) {  // of what is not positive
  x = x < -87.0f ? all(-87.0f) : x;
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats sum = all(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) sum = sum * r + factor;
  return sum * (Floats)((__builtin_convertvector(whole, Ints) + 127) << 23);
}

// Steps of four rows, then what is left.
template <typename Step>
INLINE void by_four(int64_t rows, const Step& step) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) step(std::integral_constant<int, 4>(), row);
  if (rows - row == 3) step(std::integral_constant<int, 3>(), row);
  if (rows - row == 2) step(std::integral_constant<int, 2>(), row);
  if (rows - row == 1) step(std::integral_constant<int, 1>(), row);
}
