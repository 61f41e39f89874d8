// How one vector is stored, for `cached_attention_cpu.cpp`: as `cache/int8.py` and `cache/int4.py` say, to the bit.

inline float to_whole(float x) { return (x + 12582912.0f) - 12582912.0f; }  // the nearest, of less than 2^22

inline uint16_t bits_of(float x) { return Half(x).x; }
inline float as_stored(float x) { return Half(x); }

constexpr float LEAST_SCALE = 0x1p-14f;  // fp16's smallest normal number

inline float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// What `of` makes of `start` and all numbers, in eight lanes, so that the compiler takes vectors.
template <typename Number, typename Get, typename Of>
inline Number reduced(Number start, int64_t count, const Get& number, const Of& of) {
  Number lanes[8];
  std::fill_n(lanes, 8, start);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int lane = 0; lane < 8; ++lane) lanes[lane] = of(lanes[lane], number(i + lane));
  for (; i < count; ++i) lanes[0] = of(lanes[0], number(i));
  for (int lane = 1; lane < 8; ++lane) lanes[0] = of(lanes[0], lanes[lane]);
  return lanes[0];
}
template <typename Get>
inline auto largest_of(int64_t count, const Get& number) {
  return reduced(number(0), count, number, [](auto a, auto b) { return a > b ? a : b; });
}
template <typename Get>
inline auto sum_of(int64_t count, const Get& number) {
  return reduced(decltype(number(0))(), count, number, [](auto a, auto b) { return a + b; });
}

inline void encode_int8(const float* x, int64_t width, int8_t* codes, uint16_t* scale) {
  const float most = largest_of(width, [&](int64_t c) { return std::abs(x[c]); });
  *scale = bits_of(std::max(most / 127, LEAST_SCALE));
  const float step = as_stored(std::max(most / 127, LEAST_SCALE));
  for (int64_t c = 0; c < width; ++c) codes[c] = static_cast<int8_t>(to_whole(clamped(x[c] / step, -127, 127)));
}

// The place of each channel on the grid, from 0 to 15; of the first `fine` in steps of a seventeenth.
inline void place(const float* x, int64_t width, int64_t fine, float scale, float minimum, float* places) {
  for (int64_t c = 0; c < width; ++c) places[c] = clamped((x[c] - minimum) / scale, 0, 15);
  for (int64_t c = 0; c < fine; ++c) places[c] = to_whole(places[c] * 17) / 17;
  for (int64_t c = fine; c < width; ++c) places[c] = to_whole(places[c]);
}

inline void encode_int4(const float* x, int64_t width, int64_t fine, float* places, uint8_t* codes, uint16_t* scale,
                        uint16_t* minimum) {
  const float high = largest_of(width, [&](int64_t c) { return x[c]; });
  const float low = -largest_of(width, [&](int64_t c) { return -x[c]; }), spread = high - low;
  float step = as_stored(std::max(0.96f * spread / 15, LEAST_SCALE)), least = as_stored(low + 0.02f * spread);
  place(x, width, fine, step, least, places);
  const double middle = sum_of(width, [&](int64_t c) -> double { return places[c]; }) / width;
  const double mean = sum_of(width, [&](int64_t c) -> double { return x[c]; }) / width;
  const double product = sum_of(width, [&](int64_t c) { return (places[c] - middle) * x[c]; });
  const double square = sum_of(width, [&](int64_t c) { return (places[c] - middle) * (places[c] - middle); });
  const double slope = product / std::max(square, 1e-6);
  const auto fitted = static_cast<float>(std::max<double>(slope, LEAST_SCALE));
  *scale = bits_of(fitted), *minimum = bits_of(static_cast<float>(mean - slope * middle));
  step = as_stored(fitted), least = as_stored(static_cast<float>(mean - slope * middle));
  place(x, width, fine, step, least, places);
  for (int64_t c = 0; c < fine; ++c) {
    const auto both = static_cast<uint8_t>(to_whole(places[c] * 17));
    *codes++ = both >> 4 | (both & 15) << 4;
  }
  const int64_t half = (width - fine) / 2;
  for (int64_t c = fine; c < fine + half; ++c)
    *codes++ = static_cast<uint8_t>(places[c]) | static_cast<uint8_t>(places[c + half]) << 4;
}

// The vector `x` into a row. What holds NaN or an infinity is read back as NaN, which nothing after it can hide.
inline void encode(const float* x, int64_t width, const Stored& to, int64_t row, float* room) {
  uint8_t* codes = to.bytes + row * to.row_bytes;
  if (to.codes == Codes::FP32) std::memcpy(codes, x, width * sizeof *x);
  if (to.codes == Codes::BF16)
    for (int64_t c = 0; c < width; ++c) reinterpret_cast<BFloat16*>(codes)[c] = x[c];
  if (!to.scale) return;
  if (sum_of(width, [&](int64_t c) { return x[c] - x[c]; }) != 0) {
    to.scale[row] = bits_of(NOT_A_NUMBER);
    if (to.minimum) to.minimum[row] = bits_of(NOT_A_NUMBER);
  } else if (to.codes == Codes::INT8) {
    encode_int8(x, width, reinterpret_cast<int8_t*>(codes), to.scale + row);
  } else {
    encode_int4(x, width, to.width - width, room, codes, to.scale + row, to.minimum + row);
  }
}
