// Attention of some queries over a span, where the time goes in `cached_attention_cpu.cpp`.

// Queries times keys, (ROWS, SPAN), of which those that are not there are any number. If `WIDTH` is not
// zero, keys can be read in as many vectors, and queries stay in registers.
template <Codes CODES, int ROWS, int WIDTH>
INLINE void score(const Task& task, int64_t row, Floats* scores) {
  constexpr int unit = vectors_at_once(CODES);
  const int64_t vectors = WIDTH ? WIDTH : task.keys.vectors();
  const Floats* queries = task.queries + row * vectors;
  Floats kept[ROWS][WIDTH ? WIDTH : 1], sums[ROWS][LANES] = {};
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < WIDTH; ++v) kept[r][v] = queries[r * vectors + v];
  for (int64_t k = 0; k < task.count; k += LANES) {
    const uint8_t* bytes = task.keys.row(task.row + k);
    for (int64_t i = 0; i < std::min(LANES, task.count - k); ++i, bytes += task.keys.row_bytes) {
      constexpr int count = WIDTH ? WIDTH : unit;
      Floats sum[ROWS] = {};
      for (int64_t v = 0; v < vectors; v += count) {
        Floats key[count];
        read<CODES, count, (WIDTH > 0)>(task.keys, bytes, v, key);
        for (int c = 0; c < count; ++c)
          for (int r = 0; r < ROWS; ++r)
            sum[r] = plus(sum[r], WIDTH ? kept[r][c] : queries[r * vectors + v + c], key[c]);
      }
      for (int r = 0; r < ROWS; ++r) sums[r][i] = sum[r];
    }
    for (int r = 0; r < ROWS; ++r) scores[(row + r) * PARTS + k / LANES] = summed(sums[r]);
  }
}

// Vectors of a context whose sums stay in registers, for four queries at once.
#ifdef FOR_AVX512
constexpr int BLOCK = 4;
#else
constexpr int BLOCK = 2;
#endif

template <Codes CODES, int ROWS, int COUNT, bool WHOLE>
INLINE void mix_block(const Task& task, int64_t row, int64_t v, const float* weights) {
  const uint8_t* bytes = task.values.row(task.row);
  Floats sums[ROWS][COUNT], *context = task.context + row * task.values.vectors() + v;
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COUNT; ++c) sums[r][c] = context[r * task.values.vectors() + c];
  for (int64_t k = 0; k < task.count; ++k, bytes += task.values.row_bytes) {
    Floats value[COUNT];
    read<CODES, COUNT, WHOLE>(task.values, bytes, v, value);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COUNT; ++c) sums[r][c] = plus(sums[r][c], all(weights[(row + r) * SPAN + k]), value[c]);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COUNT; ++c) context[r * task.values.vectors() + c] = sums[r][c];
}

// The context has the weights times the values added to it, one after the other.
template <Codes CODES, int ROWS>
INLINE void mix(const Task& task, int64_t row, const float* weights) {
  constexpr int unit = vectors_at_once(CODES);
  const int64_t vectors = task.values.vectors(), whole = task.values.row_bytes / (LANES * bytes_of(CODES)) * unit;
  int64_t v = 0;
  for (; v + BLOCK <= whole; v += BLOCK) mix_block<CODES, ROWS, BLOCK, true>(task, row, v, weights);
  for (; v < vectors; v += unit) mix_block<CODES, ROWS, unit, false>(task, row, v, weights);
}

template <Codes CODES>
void score_all(const Task& task, Floats* scores) {
  // Heads of 64 channels, and those of them that are packed with finer ones.
  constexpr int usual = 4, fine = CODES == Codes::INT4 ? 6 : usual;
  constexpr int64_t size = LANES * bytes_of(CODES), row_bytes = usual / vectors_at_once(CODES) * size;
  const uint8_t* last = task.keys.row(task.row + task.count - 1);
  const bool fits = CODES == Codes::INT4 && last + fine / vectors_at_once(CODES) * size <= task.keys.end;
  by_four(task.rows, [&](auto n, int64_t row) INLINED {
    constexpr int ROWS = decltype(n)::value;
    if (task.keys.row_bytes == row_bytes) score<CODES, ROWS, usual>(task, row, scores);
    else if (fits && task.keys.vectors() == fine) score<CODES, ROWS, fine>(task, row, scores);
    else score<CODES, ROWS, 0>(task, row, scores);
  });
}
template <Codes CODES>
void mix_all(const Task& task, const float* weights) {
  by_four(task.rows, [&](auto n, int64_t row) INLINED { mix<CODES, decltype(n)::value>(task, row, weights); });
}

// The factors of a span's slots; what is missing is `otherwise`.
INLINE void widen(const uint16_t* from, int64_t row, int64_t count, float otherwise, Floats* to) {
  uint16_t halves[SPAN] = {};
  if (from) std::memcpy(halves, from + row, count * sizeof *halves);
  for (int64_t i = 0; i * LANES < count; ++i) to[i] = from ? widened(halves + i * LANES) : all(otherwise);
}

// What a span's slots hold beside codes, and the position of each, -1 of one that is not there.
struct Slots {
  Floats scale[PARTS], minimum[PARTS], value_scale[PARTS], value_minimum[PARTS];
  Ints held[PARTS];

  Slots() {}  // any numbers
  INLINE explicit Slots(const Task& task) {
    widen(task.keys.scale, task.row, task.count, task.factor, scale);
    widen(task.keys.minimum, task.row, task.count, 1, minimum);
    widen(task.values.scale, task.row, task.count, 1, value_scale);
    widen(task.values.minimum, task.row, task.count, 0, value_minimum);
    for (int64_t i = 0; i * LANES < task.count; ++i) {
      const Ints place = LANE + static_cast<int32_t>(i * LANES), slot = place + static_cast<int32_t>(task.slot);
      const Ints round = slot + task.held.round;  // as if it had been written in this round of the ring
      const Ints position = round > task.held.last ? round - task.held.ring : round;
      held[i] = place < static_cast<int32_t>(task.count) ? position : all(-1);
    }
  }
};

// Softmax over a span, but for the division by its sum: the scores of a query become what its values' codes are
// weighted by, and the context what their minima add up to.
INLINE void weigh(const Task& task, const Slots& slots, int64_t row, Floats* scores) {
  const int64_t parts = (task.count + LANES - 1) / LANES, vectors = task.values.vectors();
  Floats most = all(NOTHING), spoilt = {};
  for (int64_t i = 0; i < parts; ++i) {
    const Ints hidden = (slots.held[i] < task.seen[row].first) | (slots.held[i] > task.seen[row].last);
    scores[i] = hidden ? all(NOTHING) : scores[i] * slots.scale[i] + task.shifts[row] * slots.minimum[i];
    most = larger(scores[i], most);
    spoilt += hidden ? Floats{} : scores[i] - scores[i];  // NaN of what is not finite, which no comparison would find
  }
  const float not_a_number = sum(spoilt), highest = std::isnan(not_a_number) ? 0 : largest(most);
  Floats total = {}, common = {};
  for (int64_t i = 0; i < parts; ++i) {
    const Floats p = scores[i] == NOTHING ? Floats{} : exponential(scores[i] - highest);
    total += p;
    common += p * slots.value_minimum[i];
    scores[i] = p * slots.value_scale[i];
  }
  task.sums[row] = {highest, sum(total) + not_a_number};
  std::fill_n(task.context + row * vectors, vectors, all(sum(common)));
}

// Where new tokens are a tree, a query has those of its own text in its slots, as if no others had come with them. What
// it does not see may be any number.
INLINE void put_tail(const Task& task, int64_t row, const Slots& of_tail, const Floats* tail_scores, Slots& slots,
                     Floats* scores) {
  const int64_t seen = std::min<int64_t>(task.count, task.seen[row].last + 1 - task.slot);
  for (int64_t k = task.common(); k < seen; ++k) {
    const int64_t i = task.tail.at(row, task.slot + k);
    const auto put = [&](const Floats* from, Floats* to) INLINED {
      reinterpret_cast<float*>(to)[k] = reinterpret_cast<const float*>(from)[i];
    };
    put(tail_scores, scores);
    put(of_tail.scale, slots.scale), put(of_tail.minimum, slots.minimum);
    put(of_tail.value_scale, slots.value_scale), put(of_tail.value_minimum, slots.value_minimum);
  }
}

void score_all(const Task& task, Floats* scores) {
  switch (task.keys.codes) {
    case Codes::FP32: return score_all<Codes::FP32>(task, scores);
    case Codes::BF16: return score_all<Codes::BF16>(task, scores);
    case Codes::INT8: return score_all<Codes::INT8>(task, scores);
    case Codes::INT4: return score_all<Codes::INT4>(task, scores);
  }
}

void mix_all(const Task& task, const float* weights) {
  switch (task.values.codes) {
    case Codes::FP32: return mix_all<Codes::FP32>(task, weights);
    case Codes::BF16: return mix_all<Codes::BF16>(task, weights);
    case Codes::INT8: return mix_all<Codes::INT8>(task, weights);
    case Codes::INT4: return mix_all<Codes::INT4>(task, weights);
  }
}

void attend(const Task& task, Floats* scores, Floats* tail_scores) {
  score_all(task, scores);
  Slots slots(task);
  const auto* weights = reinterpret_cast<const float*>(scores);
  if (task.common() == task.count) {
    for (int64_t row = 0; row < task.rows; ++row) weigh(task, slots, row, scores + row * PARTS);
    return mix_all(task, weights);
  }
  const Task tail = task.of_tail();
  const Slots of_tail(tail);
  score_all(tail, tail_scores);
  for (int64_t row = 0; row < task.rows; ++row) {
    put_tail(task, row, of_tail, tail_scores + row * PARTS, slots, scores + row * PARTS);
    weigh(task, slots, row, scores + row * PARTS);
  }
  Task part = task;
  part.count = task.common();
  mix_all(part, weights);
  part.rows = part.count = 1;
  for (int64_t row = 0; row < task.rows; ++row)
    for (int64_t k = task.common(); k < task.count && task.slot + k <= task.seen[row].last; ++k) {
      part.row = tail.row + task.tail.at(row, task.slot + k);
      part.context = task.context + row * task.values.vectors();
      mix_all(part, weights + row * SPAN + k);
    }
}

// `to` += `share` * `from`.
void add(const Floats* from, float share, int64_t vectors, Floats* to) {
  for (int64_t v = 0; v < vectors; ++v) to[v] += share * from[v];
}
