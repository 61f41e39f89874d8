// Causal attention of a training step in bf16, as `causal_attention_cpu.py` says: tiles of BLOCK queries by BLOCK keys, so
// that scores never leave the cache; backward computes them again from the sums that forward kept.
//
// A task is a key head and the queries that share it. What the products read is copied first: rows, which multiply, as
// they are; what is multiplied with two numbers that meet the same sum in each word, as VDPBF16PS and AMX want them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>

#include "products_amx.h"
#include "transpose_avx512.h"

namespace {

constexpr int64_t BLOCK = 64, ROWS = 4;
constexpr int64_t CHUNK = 4 * BLOCK;  // keys between two looks at a query's largest score
constexpr float INFINITE = std::numeric_limits<float>::infinity();

struct Free {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <typename T>
using Scratch = std::unique_ptr<T[], Free>;
template <typename T>
Scratch<T> scratch(int64_t size) {
  return Scratch<T>(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64))));
}

// One head's rows, `stride` numbers apart.
struct Rows {
  const uint16_t* data;
  int64_t stride;
};

Rows rows(const Heads& from, int64_t text, int64_t head) { return {from.at(text, head, 0), from.time}; }

struct Sizes {
  int64_t batch, heads, kv_heads, time, width, window;
  const int64_t* starts;  // (batch, time), or null

  // The first key that a query sees.
  int64_t begin(int64_t text, int64_t query) const {
    const int64_t by_window = window ? std::max<int64_t>(0, query - window + 1) : 0;
    return starts ? std::max(by_window, starts[text * time + query]) : by_window;
  }
  // The block of the first key that a block's queries see.
  int64_t first_block(int64_t text, int64_t block) const {
    int64_t first = block * BLOCK;
    for (int64_t r = 0; r < rows(block); ++r) first = std::min(first, begin(text, block * BLOCK + r));
    return first / BLOCK;
  }
  // Whether products are AMX's, which sum over 32 numbers at a time.
  bool amx() const { return width % TILES == 0 && may_use_amx(); }
  // Weights beyond a row's last one are zeros up to a multiple of this, since a product may read them.
  int64_t grain() const { return amx() ? TILES : LANES; }
  int64_t blocks() const { return (time + BLOCK - 1) / BLOCK; }
  int64_t group() const { return heads / kv_heads; }
  int64_t words() const { return width / 2; }
  // How many queries or keys a block has.
  int64_t rows(int64_t block) const { return std::min(BLOCK, time - block * BLOCK); }
};

// `count` rows next to each other, and zeros up to a whole block.
void copy_rows(Rows from, int64_t count, int64_t width, uint16_t* to) {
  for (int64_t r = 0; r < count; ++r) std::memcpy(to + r * width, from.data + r * from.stride, width * sizeof *to);
  std::memset(to + count * width, 0, (BLOCK - count) * width * sizeof *to);
}

// Of a block's rows of words: word w of each row next to each other.
WITH_BF16 void transpose_block(const uint16_t* rows, int64_t words, Pair* to) {
  const auto* from = reinterpret_cast<const Pair*>(rows);
  __m512i turned[LANES];
  for (int64_t r = 0; r < BLOCK; r += LANES)
    for (int64_t w = 0; w < words; w += LANES) {
      const int64_t count = std::min(LANES, words - w);
      const auto there = static_cast<__mmask16>((1u << count) - 1);
      for (int64_t i = 0; i < LANES; ++i) turned[i] = _mm512_maskz_loadu_epi32(there, from + (r + i) * words + w);
      transpose(turned);
      for (int64_t i = 0; i < count; ++i) _mm512_store_si512(to + (w + i) * BLOCK + r, turned[i]);
    }
}

// A block's columns of words, BLOCK / 2 in each, to rows of words.
WITH_BF16 void transpose_words(const Pair* from, Pair* to) {
  __m512i turned[LANES];
  for (int64_t w = 0; w < BLOCK / 2; w += LANES)
    for (int64_t r = 0; r < BLOCK; r += LANES) {
      for (int64_t i = 0; i < LANES; ++i) turned[i] = _mm512_load_si512(from + (w + i) * BLOCK + r);
      transpose(turned);
      for (int64_t i = 0; i < LANES; ++i) _mm512_store_si512(to + (r + i) * (BLOCK / 2) + w, turned[i]);
    }
}

// Of a block's rows: each two of them in words, a number of the first in the low half.
WITH_BF16 void pair(const uint16_t* rows, int64_t width, Pair* to) {
  for (int64_t r = 0; r < BLOCK; r += 2)
    for (int64_t c = 0; c < width; c += LANES) {
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(rows + r * width + c)));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_load_si256((const __m256i*)(rows + (r + 1) * width + c)));
      _mm512_store_si512(to + r / 2 * width + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

template <int VECTORS>
INLINE void multiply_tile(Left left, const Pair* right, int64_t right_step, int64_t steps, float* to, int64_t to_row,
                          bool add) {
  __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = add ? _mm512_load_ps(to + r * to_row + v * LANES) : _mm512_setzero_ps();
  add_products(left, right, right_step, steps, sums);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) _mm512_store_ps(to + r * to_row + v * LANES, sums[r][v]);
}

// What of a product is needed for four rows: columns, a multiple of LANES, and steps of the sum.
struct Needed {
  int64_t column, columns, step, steps;
};

// What a strip's first and last rows need is what all of them do, in multiples of TILE.
template <bool ADD, typename NeededBy>
WITH_AMX void multiply_with_amx(Left left, const Pair* right, int64_t right_step, float* to, int64_t to_row,
                                const NeededBy& needed) {
  for (int64_t r = 0; r < BLOCK; r += TILES) {
    const Needed first = needed(r), last = needed(r + TILES - ROWS);
    const Left rows{left.data + r * left.row + first.step, left.row, 1};
    for (int64_t c = first.column; c < last.columns; c += TILES) {
      const Pair* from = right + first.step * right_step + c;
      float* at = to + r * to_row + c;
      const int64_t steps = last.steps - first.step;
      if (c + TILES <= last.columns) multiply_tiles<ADD, true>(rows, from, right_step, steps, at, to_row);
      else multiply_tiles<ADD, false>(rows, from, right_step, steps, at, to_row);
    }
  }
}

// to (BLOCK x columns) = or += left (BLOCK x 2 steps) right (2 steps x columns), of which `needed` says how much.
template <bool ADD, typename NeededBy>
WITH_BF16 void multiply(bool amx, Left left, const Pair* right, int64_t right_step, float* to, int64_t to_row,
                        const NeededBy& needed) {
  if (amx) return multiply_with_amx<ADD>(left, right, right_step, to, to_row, needed);
  for (int64_t r = 0; r < BLOCK; r += ROWS) {
    const Needed of = needed(r);
    const Left rows{left.data + r * left.row + of.step * left.step, left.row, left.step};
    for (int64_t c = of.column; c < of.columns;) {
      const Pair* from = right + of.step * right_step + c;
      float* at = to + r * to_row + c;
      const int64_t vectors = std::min<int64_t>(4, (of.columns - c) / LANES), steps = of.steps - of.step;
      if (vectors == 4) multiply_tile<4>(rows, from, right_step, steps, at, to_row, ADD);
      else if (vectors == 3) multiply_tile<3>(rows, from, right_step, steps, at, to_row, ADD);
      else if (vectors == 2) multiply_tile<2>(rows, from, right_step, steps, at, to_row, ADD);
      else multiply_tile<1>(rows, from, right_step, steps, at, to_row, ADD);
      c += vectors * LANES;
    }
  }
}

// 2^x, to 2^-17 of it: weights are rounded to 2^-9.
INLINE __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(x, whole);
  __m512 y = _mm512_set1_ps(9.5701e-3f);
  for (float coefficient : {5.591786e-2f, 2.4024745e-1f, 6.9312181e-1f, 0.99999926f})
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(y, whole);
}

// The lanes from `first` on of numbers from `begin` to `end`.
INLINE __mmask16 lanes(int64_t first, int64_t begin, int64_t end) {
  if (begin <= first && first + LANES <= end) return 0xffff;
  const int64_t from = std::clamp<int64_t>(begin - first, 0, LANES), to = std::clamp<int64_t>(end - first, 0, LANES);
  return static_cast<__mmask16>(from < to ? (1u << to) - (1u << from) : 0);
}

// One key head's keys and values as forward reads them.
struct Forward {
  const Sizes& sizes;
  Scratch<uint16_t> rows, queries, weights;
  Scratch<Pair> keys, values;
  Scratch<float> scores, context;
  float largest[BLOCK], sum[BLOCK];

  explicit Forward(const Sizes& s)
      : sizes(s),
        rows(scratch<uint16_t>(BLOCK * s.width)), queries(scratch<uint16_t>(BLOCK * s.width)),
        weights(scratch<uint16_t>(BLOCK * CHUNK)), keys(scratch<Pair>(s.blocks() * BLOCK * s.words())),
        values(scratch<Pair>(s.blocks() * BLOCK * s.words())), scores(scratch<float>(BLOCK * CHUNK)),
        context(scratch<float>(BLOCK * s.width)) {}

  void read(Rows k, Rows v) {
    for (int64_t block = 0; block < sizes.blocks(); ++block) {
      const int64_t first = block * BLOCK, at = first * sizes.words();
      copy_rows({k.data + first * k.stride, k.stride}, sizes.rows(block), sizes.width, rows.get());
      transpose_block(rows.get(), sizes.words(), &keys[at]);
      copy_rows({v.data + first * v.stride, v.stride}, sizes.rows(block), sizes.width, rows.get());
      pair(rows.get(), sizes.width, &values[at]);
    }
  }

  // One row's scores of the keys from `first` on become weights; what it has so far is brought to the new maximum.
  WITH_BF16 void weigh(int64_t query, int64_t begin, int64_t first, int64_t keys_here, float scale) {
    const int64_t r = query % BLOCK, end = query + 1;
    const float* row = &scores[r * CHUNK];
    const int64_t grain = sizes.grain(), seen = std::min(keys_here, (end - first + grain - 1) / grain * grain);
    __m512 most = _mm512_set1_ps(-INFINITE);
    for (int64_t c = 0; c < seen; c += LANES)
      most = _mm512_mask_max_ps(most, lanes(first + c, begin, end), most, _mm512_load_ps(row + c));
    const float before = largest[r];
    const float found = _mm512_reduce_max_ps(most) * scale, now = found <= before ? before : found;  // NaN is kept
    if (now == -INFINITE) {  // it sees none of these keys, and has seen none
      std::fill_n(&weights[r * CHUNK], seen, uint16_t{0});
      return;
    }
    const __m512 subtracted = _mm512_set1_ps(now), scaled = _mm512_set1_ps(scale);
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < seen; c += LANES) {
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(row + c), scaled, subtracted);
      const __m512 weight = _mm512_maskz_mov_ps(lanes(first + c, begin, end), power_of_two(x));
      total = _mm512_add_ps(total, weight);
      store_bf16(&weights[r * CHUNK + c], weight);
    }
    const float kept = before == -INFINITE ? 0 : std::exp2(before - now);
    largest[r] = now;
    sum[r] = sum[r] * kept + _mm512_reduce_add_ps(total);
    if (kept != 1)
      for (int64_t c = 0; c < sizes.width; c += LANES) {
        float* at = &context[r * sizes.width + c];
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(kept)));
      }
  }

  // A block of queries; `to` and `logs` are where its results go, `to_row` is from one query to the next.
  WITH_BF16 void attend(Rows q, int64_t text, int64_t block, uint16_t* to, int64_t to_row, float* logs) {
    const int64_t first_query = block * BLOCK, count = sizes.rows(block), width = sizes.width, words = sizes.words();
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(width));
    copy_rows({q.data + first_query * q.stride, q.stride}, count, width, queries.get());
    std::fill_n(largest, BLOCK, -INFINITE);
    std::fill_n(sum, BLOCK, 0.0f);
    std::fill_n(context.get(), BLOCK * width, 0.0f);
    const auto* query_words = reinterpret_cast<const Pair*>(queries.get());
    const auto* weight_words = reinterpret_cast<const Pair*>(weights.get());
    const int64_t seen = (block + 1) * BLOCK;
    const bool amx = sizes.amx();
    for (int64_t first = sizes.first_block(text, block) * BLOCK; first < seen; first += CHUNK) {
      const int64_t keys_here = std::min(CHUNK, seen - first);
      // Of the rows from r on, for the last of which only keys up to its own place matter.
      const auto visible = [&](int64_t r) { return std::min(keys_here, first_query + r + ROWS - first); };
      for (int64_t c = 0; c < keys_here; c += BLOCK)
        multiply<false>(amx, {query_words, words, 1}, &keys[(first + c) * words], BLOCK, &scores[c], CHUNK, [&](int64_t r) {
          return Needed{0, std::min(BLOCK, (visible(r) - c + LANES - 1) / LANES * LANES), 0, words};
        });
      for (int64_t r = 0; r < count; ++r)
        weigh(first_query + r, sizes.begin(text, first_query + r), first, keys_here, scale);
      multiply<true>(amx, {weight_words, CHUNK / 2, 1}, &values[first * words], width, context.get(), width,
                     [&](int64_t r) { return Needed{0, width, 0, visible(r) / 2}; });
    }
    for (int64_t r = 0; r < count; ++r) {
      const __m512 inverse = _mm512_set1_ps(1 / sum[r]);
      for (int64_t c = 0; c < width; c += LANES)
        store_bf16(to + r * to_row + c, _mm512_mul_ps(_mm512_load_ps(&context[r * width + c]), inverse));
      logs[r] = largest[r] + std::log2(sum[r]);
    }
  }
};

// Gradients by one key head's keys and values, and by the queries that share it.
struct Backward {
  const Sizes& sizes;
  Scratch<uint16_t> key_rows, value_rows, query_rows, upstream_rows, weights, slopes;
  Scratch<Pair> key_pairs, query_columns, upstream_columns, query_pairs, upstream_pairs, slope_pairs, slope_columns;
  Scratch<float> scores, products, by_query, by_key, by_value;
  alignas(64) float logs[BLOCK], means[BLOCK];
  alignas(64) int32_t begins[BLOCK];

  explicit Backward(const Sizes& s)
      : sizes(s),
        key_rows(scratch<uint16_t>(s.blocks() * BLOCK * s.width)),
        value_rows(scratch<uint16_t>(s.blocks() * BLOCK * s.width)), query_rows(scratch<uint16_t>(BLOCK * s.width)),
        upstream_rows(scratch<uint16_t>(BLOCK * s.width)), weights(scratch<uint16_t>(BLOCK * BLOCK)),
        slopes(scratch<uint16_t>(BLOCK * BLOCK)), key_pairs(scratch<Pair>(s.blocks() * BLOCK * s.words())),
        query_columns(scratch<Pair>(BLOCK * s.words())), upstream_columns(scratch<Pair>(BLOCK * s.words())),
        query_pairs(scratch<Pair>(BLOCK * s.words())), upstream_pairs(scratch<Pair>(BLOCK * s.words())),
        slope_pairs(scratch<Pair>(BLOCK * BLOCK / 2)), slope_columns(scratch<Pair>(BLOCK * BLOCK / 2)),
        scores(scratch<float>(BLOCK * BLOCK)), products(scratch<float>(BLOCK * BLOCK)), by_query(scratch<float>(BLOCK * s.width)),
        by_key(scratch<float>(s.blocks() * BLOCK * s.width)), by_value(scratch<float>(s.blocks() * BLOCK * s.width)) {}

  void read(Rows k, Rows v) {
    for (int64_t block = 0; block < sizes.blocks(); ++block) {
      const int64_t first = block * BLOCK;
      copy_rows({k.data + first * k.stride, k.stride}, sizes.rows(block), sizes.width, &key_rows[first * sizes.width]);
      copy_rows({v.data + first * v.stride, v.stride}, sizes.rows(block), sizes.width, &value_rows[first * sizes.width]);
      pair(&key_rows[first * sizes.width], sizes.width, &key_pairs[first * sizes.words()]);
    }
    std::fill_n(by_key.get(), sizes.blocks() * BLOCK * sizes.width, 0.0f);
    std::fill_n(by_value.get(), sizes.blocks() * BLOCK * sizes.width, 0.0f);
  }

  // A row's upstream gradient times its context: the mean that the softmax's gradient takes off.
  WITH_BF16 float mean_of(const uint16_t* upstream, const uint16_t* context) const {
    __m512 total = _mm512_setzero_ps();
    for (int64_t c = 0; c < sizes.width; c += LANES)
      total = _mm512_fmadd_ps(load_bf16(upstream + c), load_bf16(context + c), total);
    return _mm512_reduce_add_ps(total);
  }

  // Sixteen queries' weights of two keys, and the gradients by their scores.
  INLINE void differentiate(int64_t key, int64_t first_query, int64_t c, float scale) {
    const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const int64_t r = key % BLOCK, at = r * BLOCK + c;
    __m512 weight[2], slope[2];
#pragma GCC unroll 2
    for (int64_t odd = 0; odd < 2; ++odd) {
      const int64_t from = at + odd * BLOCK;
      const __m512 x = _mm512_fmsub_ps(_mm512_load_ps(&scores[from]), _mm512_set1_ps(scale), _mm512_load_ps(logs + c));
      const __m512 less = _mm512_sub_ps(_mm512_load_ps(&products[from]), _mm512_load_ps(means + c));
      const __mmask16 seen = _mm512_mask_cmple_epi32_mask(lanes(first_query + c, key + odd, sizes.time),
                                                          _mm512_load_si512(begins + c),
                                                          _mm512_set1_epi32(static_cast<int>(key + odd)));
      weight[odd] = _mm512_maskz_mov_ps(seen, power_of_two(x));
      slope[odd] = _mm512_maskz_mul_ps(seen, weight[odd], less);
    }
    store_both(&weights[at], (__m512i)_mm512_cvtne2ps_pbh(weight[1], weight[0]));
    const auto slopes_of = (__m512i)_mm512_cvtne2ps_pbh(slope[1], slope[0]);
    store_both(&slopes[at], slopes_of);
    _mm512_store_si512(&slope_pairs[r / 2 * BLOCK + c], _mm512_permutexvar_epi16(turns, slopes_of));
  }
  INLINE static void store_both(uint16_t* to, __m512i rows) {
    _mm256_store_si256((__m256i*)to, _mm512_castsi512_si256(rows));
    _mm256_store_si256((__m256i*)(to + BLOCK), _mm512_extracti64x4_epi64(rows, 1));
  }

  // A block of queries; where its gradient goes is `to_row` from one query to the next.
  WITH_BF16 void pass(Rows q, Rows upstream, Rows context, const float* kept, int64_t text, int64_t block, uint16_t* to,
                      int64_t to_row) {
    const int64_t first_query = block * BLOCK, count = sizes.rows(block), width = sizes.width, words = sizes.words();
    const float root = 1 / std::sqrt(static_cast<float>(width)), scale = 1.44269504f * root;
    copy_rows({q.data + first_query * q.stride, q.stride}, count, width, query_rows.get());
    copy_rows({upstream.data + first_query * upstream.stride, upstream.stride}, count, width, upstream_rows.get());
    transpose_block(query_rows.get(), words, query_columns.get());
    transpose_block(upstream_rows.get(), words, upstream_columns.get());
    pair(query_rows.get(), width, query_pairs.get());
    pair(upstream_rows.get(), width, upstream_pairs.get());
    for (int64_t r = 0; r < BLOCK; ++r) {
      logs[r] = r < count ? kept[r] : 0;
      begins[r] = r < count ? static_cast<int32_t>(sizes.begin(text, first_query + r)) : 0;
      means[r] = r < count ? mean_of(&upstream_rows[r * width], context.data + (first_query + r) * context.stride) : 0;
    }
    std::fill_n(by_query.get(), BLOCK * width, 0.0f);
    const auto* weight_words = reinterpret_cast<const Pair*>(weights.get());
    const auto* slope_words = reinterpret_cast<const Pair*>(slopes.get());
    const bool amx = sizes.amx();
    const int64_t grain = sizes.grain();
    for (int64_t other = sizes.first_block(text, block); other <= block; ++other) {
      const int64_t first_key = other * BLOCK;
      const auto* key_words = reinterpret_cast<const Pair*>(&key_rows[first_key * width]);
      const auto* value_words = reinterpret_cast<const Pair*>(&value_rows[first_key * width]);
      // Of the same block, a key matters to the queries from its own place on.
      const bool same = other == block;
      const auto columns = [&](int64_t r) { return Needed{same ? r / grain * grain : 0, BLOCK, 0, words}; };
      const auto later = [&](int64_t r) { return Needed{0, width, same ? r / 2 : 0, BLOCK / 2}; };
      const auto earlier = [&](int64_t r) { return Needed{0, width, 0, same ? (r + ROWS) / 2 : BLOCK / 2}; };
      multiply<false>(amx, {key_words, words, 1}, query_columns.get(), BLOCK, scores.get(), BLOCK, columns);
      multiply<false>(amx, {value_words, words, 1}, upstream_columns.get(), BLOCK, products.get(), BLOCK, columns);
      for (int64_t r = 0; r < BLOCK; r += 2)
        for (int64_t c = columns(r).column; c < BLOCK; c += LANES) differentiate(first_key + r, first_query, c, scale);
      const Left by_rows{weight_words, BLOCK / 2, 1}, slopes_by_rows{slope_words, BLOCK / 2, 1};
      multiply<true>(amx, by_rows, upstream_pairs.get(), width, &by_value[first_key * width], width, later);
      multiply<true>(amx, slopes_by_rows, query_pairs.get(), width, &by_key[first_key * width], width, later);
      if (amx) transpose_words(slope_pairs.get(), slope_columns.get());
      const Left slopes_by_columns = amx ? Left{slope_columns.get(), BLOCK / 2, 1} : Left{slope_pairs.get(), 1, BLOCK};
      multiply<true>(amx, slopes_by_columns, &key_pairs[first_key * words], width, by_query.get(), width, earlier);
    }
    write(by_query.get(), count, root, to, to_row);
  }

  WITH_BF16 void write(const float* from, int64_t count, float scale, uint16_t* to, int64_t to_row) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < sizes.width; c += LANES)
        store_bf16(to + r * to_row + c,
                   _mm512_mul_ps(_mm512_load_ps(from + r * sizes.width + c), _mm512_set1_ps(scale)));
  }
};

Sizes check(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& starts, int64_t window) {
  bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && window >= 0;
  for (const Tensor* tensor : {&q, &k, &v})
    fits = fits && tensor->scalar_type() == ScalarType::BFloat16 && tensor->stride(3) == 1;
  for (int64_t i : {0, 1, 2, 3}) fits = fits && k.size(i) == v.size(i) && (i == 1 || q.size(i) == k.size(i));
  fits = fits && q.size(3) % LANES == 0 && k.size(1) > 0 && q.size(1) % k.size(1) == 0;
  STD_TORCH_CHECK(fits, "causal_attention needs bf16 queries (batch, heads, time, head_dim) and keys and values of a ",
                  "divisor of the heads, head_dim a multiple of 16 and contiguous; got ", shape(q), ", ", shape(k), " and ",
                  shape(v));
  STD_TORCH_CHECK(!starts || (starts->dim() == 2 && starts->size(0) == q.size(0) && starts->size(1) == q.size(2) &&
                              starts->scalar_type() == ScalarType::Long && starts->is_contiguous()),
                  "causal_attention needs int64 starts (batch, time), contiguous; got ", starts ? shape(*starts) : "");
  return {q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), window, starts ? starts->const_data_ptr<int64_t>() : nullptr};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& starts, int64_t window) {
  const Sizes s = check(q, k, v, starts, window);
  Tensor context = torch::stable::new_empty(q, {s.batch, s.time, s.heads, s.width});
  Tensor logs = torch::stable::new_empty(q, {s.batch, s.heads, s.time}, ScalarType::Float);
  uint16_t* to = writable(context);
  auto* to_logs = static_cast<float*>(logs.mutable_data_ptr());
  const Heads queries(q), keys(k), values(v);
  parallel_for(0, s.batch * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    const Amx tiles(s.amx());
    Forward work(s);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t text = i / s.kv_heads, kv = i % s.kv_heads;
      work.read(rows(keys, text, kv), rows(values, text, kv));
      for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); ++h)
        for (int64_t block = 0; block < s.blocks(); ++block) {
          const int64_t token = text * s.time + block * BLOCK;
          work.attend(rows(queries, text, h), text, block, to + (token * s.heads + h) * s.width, s.heads * s.width,
                      to_logs + (text * s.heads + h) * s.time + block * BLOCK);
        }
    }
  });
  return {context, logs};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& upstream, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const std::optional<Tensor>& starts, const Tensor& context,
                                            const Tensor& logs, int64_t window) {
  const Sizes s = check(q, k, v, starts, window);
  const Tensor given = as(ScalarType::BFloat16, upstream), result = as(ScalarType::BFloat16, context);
  Tensor by_q = torch::stable::new_empty(q, {s.batch, s.time, s.heads, s.width});
  Tensor by_k = torch::stable::new_empty(q, {s.batch, s.time, s.kv_heads, s.width});
  Tensor by_v = torch::stable::new_empty(q, {s.batch, s.time, s.kv_heads, s.width});
  uint16_t *to_q = writable(by_q), *to_k = writable(by_k), *to_v = writable(by_v);
  const Heads queries(q), keys(k), values(v);
  const auto* from = numbers(given);
  const auto* contexts = numbers(result);
  const auto* kept = static_cast<const float*>(logs.const_data_ptr());
  parallel_for(0, s.batch * s.kv_heads, 1, [&](int64_t begin, int64_t end) {
    const Amx tiles(s.amx());
    Backward work(s);
    const int64_t row = s.heads * s.width, kv_row = s.kv_heads * s.width;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t text = i / s.kv_heads, kv = i % s.kv_heads;
      work.read(rows(keys, text, kv), rows(values, text, kv));
      for (int64_t h = kv * s.group(); h < (kv + 1) * s.group(); ++h) {
        const int64_t head = (text * s.time * s.heads + h) * s.width;
        for (int64_t block = 0; block < s.blocks(); ++block)
          work.pass(rows(queries, text, h), {from + head, row}, {contexts + head, row},
                    kept + (text * s.heads + h) * s.time + block * BLOCK, text, block, to_q + head + block * BLOCK * row, row);
      }
      const int64_t head = (text * s.time * s.kv_heads + kv) * s.width;
      work.write(work.by_key.get(), s.time, 1 / std::sqrt(static_cast<float>(s.width)), to_k + head, kv_row);
      work.write(work.by_value.get(), s.time, 1, to_v + head, kv_row);
    }
  });
  return {by_q, by_k, by_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def("causal_attention(Tensor q, Tensor k, Tensor v, Tensor? starts, int window) -> (Tensor, Tensor)");
  m.def(
      "causal_attention_backward(Tensor upstream, Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor context, "
      "Tensor logs, int window) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&forward));
  m.impl("causal_attention_backward", TORCH_BOX(&backward));
}
