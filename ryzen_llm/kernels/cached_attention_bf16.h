// Attention of some queries over a span where they, keys and values are in bf16: sixteen pairs of numbers are multiplied
// at once, with sums in fp32 (AVX512-BF16). Of the softmax's weights bf16 is kept, as in FlashAttention.

#include "transpose_avx512.h"

constexpr int64_t AHEAD = 4096;  // bytes of the keys that are asked of memory before they are needed
constexpr int MOST_QUERIES = 8;  // whose sums stay in registers

bool has_pairs() { return __builtin_cpu_supports("avx512bf16"); }

INLINE __m512bh pairs_at(const void* from) { return (__m512bh)_mm512_loadu_si512(from); }
INLINE __m512bh pair_everywhere(const uint16_t* pair) { return (__m512bh)_mm512_set1_epi32(load<int32_t>(pair)); }
INLINE Floats plus_pairs(Floats sum, __m512bh a, __m512bh b) { return (Floats)_mm512_dpbf16_ps((__m512)sum, a, b); }

// The keys of a span, sixteen by sixteen, each pair of channels in a vector. Behind the last key is that key again.
void turn_keys(const Task& task, Ints* turned) {
  constexpr int64_t size = 2 * LANES * sizeof(uint16_t);
  for (int64_t k = 0; k < task.count; k += LANES)
    for (int64_t c = 0; c < task.keys.row_bytes; c += size, turned += LANES) {
      for (int64_t i = 0; i < LANES; ++i) {
        const int64_t row = task.row + std::min(k + i, task.count - 1);
        turned[i] = load<Ints>(task.keys.row(row) + c);
        _mm_prefetch(task.keys.row(row) + c + AHEAD, _MM_HINT_T0);
        _mm_prefetch(task.values.row(row) + c, _MM_HINT_T0);
      }
      transpose((__m512i*)turned);
    }
}

// Queries times keys, (ROWS, SPAN).
template <int ROWS>
INLINE void score_pairs(const Task& task, const Ints* turned, const uint16_t* queries, Floats* scores) {
  const int64_t width = task.keys.width, pairs = width / 2;
  for (int64_t part = 0; part * LANES < task.count; ++part, turned += pairs) {
    Floats even[ROWS] = {}, odd[ROWS] = {};
    for (int64_t p = 0; p < pairs; p += 2)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        even[r] = plus_pairs(even[r], pairs_at(turned + p), pair_everywhere(queries + r * width + 2 * p));
        odd[r] = plus_pairs(odd[r], pairs_at(turned + p + 1), pair_everywhere(queries + r * width + 2 * p + 2));
      }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) scores[r * PARTS + part] = even[r] + odd[r];
  }
}

// The contexts have the weights, (ROWS, SPAN) in bf16, times the values added to them, from slot `begin` to `end`, two by
// two; `at` finds a slot's row.
template <int ROWS, typename At>
INLINE void mix_pairs(const Task& task, int64_t begin, int64_t end, const uint16_t* weights, const At& at, Floats* contexts) {
  const int64_t vectors = task.values.vectors();
  for (int64_t v = 0; v < vectors; v += 2) {
    Floats low[ROWS], high[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Floats* context = contexts + r * vectors + v;
      low[r] = PICKED(context[0], context[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      high[r] = PICKED(context[0], context[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    for (int64_t k = begin; k < end; k += 2) {
      const __m512i first = _mm512_loadu_si512(task.values.row(at(k)) + v * LANES * sizeof(uint16_t));
      const __m512i second = _mm512_loadu_si512(task.values.row(at(std::min(k + 1, end - 1))) + v * LANES * sizeof(uint16_t));
      const auto lows = (__m512bh)_mm512_unpacklo_epi16(first, second), highs = (__m512bh)_mm512_unpackhi_epi16(first, second);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh weight = pair_everywhere(weights + r * SPAN + k);
        low[r] = plus_pairs(low[r], lows, weight), high[r] = plus_pairs(high[r], highs, weight);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      Floats* context = contexts + r * vectors + v;
      context[0] = PICKED(low[r], high[r], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      context[1] = PICKED(low[r], high[r], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    }
  }
}

// The nearest numbers in bf16.
INLINE void round_pairs(const Floats* x, int64_t vectors, uint16_t* to) {
  for (int64_t v = 0; v < vectors; v += 2)
    _mm512_storeu_si512(to + v * LANES, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[v + 1], (__m512)x[v]));
}

// What all queries of a span have in common; the tail is there if new tokens are a tree.
struct Span {
  Slots slots, of_tail;
  Ints *turned, *turned_tail;
};

template <int ROWS>
void attend_rows(const Task& task, Span& span, int64_t row, Floats* room) {
  const int64_t vectors = task.keys.vectors(), common = task.common();
  Floats* const tail_scores = room + ROWS * PARTS;
  auto* const rounded = reinterpret_cast<uint16_t*>(tail_scores + ROWS * PARTS);  // queries, then weights
  round_pairs(task.queries + row * vectors, ROWS * vectors, rounded);  // which they are already
  score_pairs<ROWS>(task, span.turned, rounded, room);
  const Task tail = task.of_tail();
  if (common < task.count) score_pairs<ROWS>(tail, span.turned_tail, rounded, tail_scores);
  for (int r = 0; r < ROWS; ++r) {
    Floats* const scores = room + r * PARTS;
    if (common < task.count) put_tail(task, row + r, span.of_tail, tail_scores + r * PARTS, span.slots, scores);
    weigh(task, span.slots, row + r, scores);
    std::fill(scores + (task.count + LANES - 1) / LANES, scores + PARTS, Floats{});
  }
  round_pairs(room, ROWS * PARTS, rounded);
  Floats* const contexts = task.context + row * task.values.vectors();
  if (common == task.count)
    return mix_pairs<ROWS>(task, 0, common, rounded, [&](int64_t k) INLINED { return task.row + k; }, contexts);
  const int64_t even = common / 2 * 2;
  mix_pairs<ROWS>(task, 0, even, rounded, [&](int64_t k) INLINED { return task.row + k; }, contexts);
  for (int r = 0; r < ROWS; ++r) {
    const int64_t seen = std::min<int64_t>(task.count, task.seen[row + r].last + 1 - task.slot);
    const auto at = [&](int64_t k) INLINED {
      return k < common ? task.row + k : tail.row + task.tail.at(row + r, task.slot + k);
    };
    mix_pairs<1>(task, even, seen, rounded + r * SPAN, at, contexts + r * task.values.vectors());
  }
}

void attend_pairs(const Task& task, Floats* room) {
  const int64_t turned = PARTS * task.keys.width / 2;
  Span span = {Slots(task), Slots(), reinterpret_cast<Ints*>(room), reinterpret_cast<Ints*>(room + turned)};
  turn_keys(task, span.turned);
  if (task.common() < task.count) {
    const Task tail = task.of_tail();
    span.of_tail = Slots(tail);
    turn_keys(tail, span.turned_tail);
  }
  room += 2 * turned;
  int64_t row = 0;
  for (; row + MOST_QUERIES <= task.rows; row += MOST_QUERIES) attend_rows<MOST_QUERIES>(task, span, row, room);
  for (; row + 4 <= task.rows; row += 4) attend_rows<4>(task, span, row, room);
  if (task.rows - row == 3) attend_rows<3>(task, span, row, room);
  if (task.rows - row == 2) attend_rows<2>(task, span, row, room);
  if (task.rows - row == 1) attend_rows<1>(task, span, row, room);
}

// Vectors of room that `attend_pairs` needs.
int64_t room_for_pairs(const Task& task) {
  return PARTS * task.keys.width + MOST_QUERIES * (2 * PARTS + std::max(task.keys.vectors(), PARTS));
}
