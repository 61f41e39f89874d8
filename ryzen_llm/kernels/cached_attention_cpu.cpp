// Attention of a few queries over cached keys and values: `cached_attention.py` says what is computed.
//
// A task is a key head and SPAN slots, of which CHUNK at a time are unpacked to fp32, for all queries that share the
// head; softmax goes on from chunk to chunk, and the spans are put together at the end. Where spans and chunks begin and
// the order of all sums are the same for any number of queries, so that a query's result does not depend on the others.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "tensors.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed to inlined functions only
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace {

constexpr int64_t LANES = 16, CHUNK = 64, SPAN = 256;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Of sixteen numbers each: GCC makes of them what the function around them is compiled for.
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t SignedBytes __attribute__((vector_size(16)));

// Lanes of two vectors, by number.
#if defined(__clang__) || __GNUC__ >= 12
#define PICKED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICKED(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

enum class Codes { FP32, BF16, INT8, INT4 };

// Keys or values, (heads, slots, width), of all texts.
struct Stored {
  Codes codes = Codes::FP32;
  const uint8_t* bytes = nullptr;
  const uint8_t* end = nullptr;
  const uint16_t* scale = nullptr;    // fp16
  const uint16_t* minimum = nullptr;  // fp16
  int64_t width = 0, slots = 0, row_bytes = 0;

  // Vectors of a row once it is unpacked: its low and high halves begin with one each.
  int64_t vectors() const { return codes == Codes::INT4 ? 2 * vectors_of(row_bytes) : vectors_of(width); }
  int64_t place(int64_t channel) const {
    const int64_t half = width / 2;
    return codes == Codes::INT4 && channel >= half ? vectors_of(half) * LANES + channel - half : channel;
  }
  static int64_t vectors_of(int64_t numbers) { return (numbers + LANES - 1) / LANES; }
};

// Which positions a query sees, from the first to the last.
struct Seen {
  int32_t first, last;
};

// What the softmax of a query over a span has come to.
struct Sum {
  float highest = NOTHING, total = 0;
};

struct Task {
  Stored keys, values;
  int64_t row, count;     // the span's first row, in all heads' slots, and its slots
  const int32_t* held;    // which position each slot holds
  const Floats* queries;  // (rows, the keys' vectors)
  const float* query_sums;
  const Seen* seen;
  int64_t rows;
  Sum* sums;       // (rows)
  Floats* context;  // (rows, the values' vectors)
};

// Vectors at a boundary of their size, to which std::vector does not keep; zeros where they are new.
class Room {
 public:
  Floats* of(int64_t vectors) {
    const int64_t numbers = (vectors + 1) * LANES;
    if (static_cast<int64_t>(numbers_.size()) < numbers) numbers_.resize(numbers);
    const auto at = reinterpret_cast<uintptr_t>(numbers_.data());
    return reinterpret_cast<Floats*>((at + sizeof(Floats) - 1) / sizeof(Floats) * sizeof(Floats));
  }

 private:
  std::vector<float> numbers_;
};

struct Scratch {
  Floats *tile, *scores;
};

// GCC makes vectors into what the processor has before it inlines, so that all of this has to be compiled for each.
namespace anywhere {
#include "cached_attention_span.h"
}
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cached_attention_span.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
namespace avx512 {
#include "cached_attention_span.h"
}
#pragma GCC pop_options
#endif

auto fastest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) return avx512::attend;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::attend;
#endif
  return anywhere::attend;
}

Stored stored(const Tensor& codes, const std::optional<Tensor>& scale, const std::optional<Tensor>& minimum) {
  Stored found;
  const auto type = codes.scalar_type();
  STD_TORCH_CHECK(codes.dim() == 4 && codes.is_contiguous(), "cached_attention: codes are ", shape(codes),
                  ", expected four contiguous dimensions");
  int64_t size = 1;
  switch (type) {
    case ScalarType::Float: found.codes = Codes::FP32; size = 4; break;
    case ScalarType::BFloat16: found.codes = Codes::BF16; size = 2; break;
    case ScalarType::Char: found.codes = Codes::INT8; break;
    case ScalarType::Byte: found.codes = Codes::INT4; break;
    default: STD_TORCH_CHECK(false, "cached_attention: codes are ", type, ", expected fp32, bf16, int8 or uint8");
  }
  found.width = codes.size(3) * (found.codes == Codes::INT4 ? 2 : 1);
  found.slots = codes.size(2);
  found.row_bytes = codes.size(3) * size;
  found.bytes = static_cast<const uint8_t*>(codes.const_data_ptr());
  found.end = found.bytes + codes.numel() * size;
  for (const auto& [part, to] : {std::pair(&scale, &found.scale), std::pair(&minimum, &found.minimum)})
    if (part->has_value()) {
      const Tensor& factors = **part;
      STD_TORCH_CHECK(factors.scalar_type() == ScalarType::Half && factors.is_contiguous() &&
                          factors.numel() * codes.size(3) == codes.numel(),
                      "cached_attention: scale or minimum is ", shape(factors), " ", factors.scalar_type(),
                      ", expected contiguous fp16 for codes ", shape(codes));
      *to = static_cast<const uint16_t*>(factors.const_data_ptr());
    }
  return found;
}

// (batch, time, heads, head_dim), typed like the queries, which are (batch, heads, time, the keys' width).
Tensor cached_attention(const Tensor& queries, const Tensor& key_codes, const std::optional<Tensor>& key_scale,
                        const std::optional<Tensor>& key_minimum, const Tensor& value_codes,
                        const std::optional<Tensor>& value_scale, const std::optional<Tensor>& value_minimum,
                        const std::optional<Tensor>& sink_keys, const std::optional<Tensor>& sink_values,
                        const Tensor& positions, int64_t ring, int64_t window) {
  struct Part {
    Stored keys, values;
  };
  const bool bf16 = queries.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((bf16 || queries.scalar_type() == ScalarType::Float) && queries.dim() == 4 &&
                      positions.dim() == 2 && positions.scalar_type() == ScalarType::Long,
                  "cached_attention: queries are ", shape(queries), " ", queries.scalar_type(), ", expected four ",
                  "dimensions of fp32 or bf16, and positions ", shape(positions), " int64");
  const Part slots = {stored(key_codes, key_scale, key_minimum), stored(value_codes, value_scale, value_minimum)};
  std::vector<Tensor> held_here;  // so that the memory stays
  Part sinks;
  int64_t num_sinks = 0;
  if (sink_keys.has_value()) {
    for (const auto* part : {&sink_keys, &sink_values}) held_here.push_back(as((*part)->scalar_type(), **part));
    sinks = {stored(held_here[0], {}, {}), stored(held_here[1], {}, {})};
    num_sinks = sinks.keys.slots;
  }
  const int64_t batch = queries.size(0), heads = queries.size(1), time = queries.size(2), width = queries.size(3);
  const int64_t kv_heads = key_codes.size(1), groups = heads / kv_heads, rows = groups * time;
  const int64_t head_dim = slots.values.width;
  STD_TORCH_CHECK(key_codes.size(0) == batch && heads % kv_heads == 0 && slots.keys.width == width &&
                      value_codes.size(0) == batch && value_codes.size(1) == kv_heads &&
                      slots.values.slots == slots.keys.slots && positions.size(1) == time &&
                      (positions.size(0) == 1 || positions.size(0) == batch) &&
                      (!num_sinks || (sinks.keys.width == width && sinks.values.width == head_dim)),
                  "cached_attention: queries ", shape(queries), ", keys ", shape(key_codes), ", values ",
                  shape(value_codes), " and positions ", shape(positions), " do not fit");
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const int64_t text_step = positions.size(0) == 1 ? 0 : positions.stride(0), step = positions.stride(1);
  const auto position_of = [&](int64_t text, int64_t t) { return position[text * text_step + t * step]; };

  int64_t used = ring ? slots.keys.slots : 0;
  for (int64_t b = 0; b < batch && !ring; ++b) used = std::max(used, position_of(b, time - 1) + 1);
  used = std::min(used, slots.keys.slots);
  const int64_t in_slots = (used + SPAN - 1) / SPAN, spans = in_slots + (num_sinks > 0), texts_heads = batch * kv_heads;

  // What each query is and sees, and what each slot holds.
  const int64_t key_vectors = std::max(slots.keys.vectors(), sinks.keys.vectors());
  const int64_t value_vectors = std::max(slots.values.vectors(), sinks.values.vectors());
  Room query_room, context_room;
  Floats* prepared = query_room.of(texts_heads * rows * (slots.keys.vectors() + sinks.keys.vectors()));
  Floats* prepared_sinks = prepared + texts_heads * rows * slots.keys.vectors();
  std::vector<float> query_sums(texts_heads * rows);
  std::vector<Seen> seen(2 * batch * rows);
  std::vector<int32_t> held(batch * used + num_sinks);
  const int64_t steps[4] = {queries.stride(0), queries.stride(1), queries.stride(2), queries.stride(3)};
  const auto* fp32_queries = static_cast<const float*>(queries.const_data_ptr());
  const auto* bf16_queries = static_cast<const BFloat16*>(queries.const_data_ptr());
  const float factor = 1 / std::sqrt(static_cast<float>(head_dim));
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < time; ++t)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = position_of(b, t), first = window ? std::max<int64_t>(at - window + 1, 0) : 0;
        seen[b * rows + g * time + t] = {static_cast<int32_t>(std::max(first, num_sinks)), static_cast<int32_t>(at)};
        seen[(batch + b) * rows + g * time + t] = {static_cast<int32_t>(first), static_cast<int32_t>(at)};
      }
    const int64_t last = position_of(b, time - 1);
    for (int64_t s = 0; s < used; ++s) {
      const int64_t round = ring ? s + last - last % ring : s;
      held[b * used + s] = static_cast<int32_t>(ring && round > last ? round - ring : round);
    }
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < time; ++t) {
        const int64_t row = (b * kv_heads + h / groups) * rows + h % groups * time + t;
        const int64_t from = b * steps[0] + h * steps[1] + t * steps[2];
        auto* to = reinterpret_cast<float*>(prepared + row * slots.keys.vectors());
        auto* to_sinks = reinterpret_cast<float*>(prepared_sinks + row * sinks.keys.vectors());
        for (int64_t c = 0; c < width; ++c) {
          const int64_t at = from + c * steps[3];
          const float x = (bf16 ? static_cast<float>(bf16_queries[at]) : fp32_queries[at]) * factor;
          to[slots.keys.place(c)] = x;
          if (num_sinks) to_sinks[sinks.keys.place(c)] = x;
          query_sums[row] += x;
        }
      }
  }
  std::iota(held.end() - num_sinks, held.end(), 0);

  std::vector<Sum> sums(texts_heads * spans * rows);
  Floats* contexts = context_room.of(texts_heads * spans * rows * value_vectors);
  const auto run = fastest();
  parallel_for(0, texts_heads * spans, 1, [&](int64_t begin, int64_t end) {
    thread_local Room tile, scores;
    const Scratch scratch = {tile.of(CHUNK * std::max(key_vectors, value_vectors)), scores.of(rows * (CHUNK / LANES))};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / spans, span = i % spans, text = head / kv_heads;
      const bool in_sinks = span == in_slots;
      const Part& part = in_sinks ? sinks : slots;
      const int64_t start = in_sinks ? 0 : span * SPAN;
      Task task = {part.keys, part.values};
      task.row = head * part.keys.slots + start;
      task.count = in_sinks ? num_sinks : std::min(SPAN, used - start);
      task.held = in_sinks ? held.data() + batch * used : held.data() + text * used + start;
      task.queries = (in_sinks ? prepared_sinks : prepared) + head * rows * part.keys.vectors();
      task.query_sums = query_sums.data() + head * rows;
      task.seen = seen.data() + ((in_sinks ? batch : 0) + text) * rows;
      task.rows = rows;
      task.sums = sums.data() + i * rows;
      task.context = contexts + i * rows * value_vectors;
      run(task, scratch);
    }
  });

  Tensor y = torch::stable::new_empty(queries, {batch, time, heads, head_dim}, queries.scalar_type());
  auto* fp32_context = static_cast<float*>(y.mutable_data_ptr());
  auto* bf16_context = static_cast<BFloat16*>(y.mutable_data_ptr());
  std::vector<float> row(head_dim);
  for (int64_t head = 0; head < texts_heads; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      float highest = NOTHING, total = 0;
      for (int64_t s = 0; s < spans; ++s) highest = std::max(highest, sums[(head * spans + s) * rows + r].highest);
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t s = 0; s < spans; ++s) {
        const Sum& sum = sums[(head * spans + s) * rows + r];
        if (sum.highest == NOTHING) continue;
        const float share = std::exp(sum.highest - highest);
        const Stored& values = s == in_slots ? sinks.values : slots.values;
        const auto* from =
            reinterpret_cast<const float*>(contexts + (head * spans + s) * rows * value_vectors + r * values.vectors());
        total += share * sum.total;
        for (int64_t c = 0; c < head_dim; ++c) row[c] += share * from[values.place(c)];
      }
      const int64_t text = head / kv_heads, of_head = head % kv_heads * groups + r / time;
      const int64_t to = ((text * time + r % time) * heads + of_head) * head_dim;
      for (int64_t c = 0; c < head_dim; ++c)
        if (bf16)
          bf16_context[to + c] = row[c] / total;
        else
          fp32_context[to + c] = row[c] / total;
    }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def(
      "cached_attention(Tensor queries, Tensor key_codes, Tensor? key_scale, Tensor? key_minimum, Tensor value_codes, "
      "Tensor? value_scale, Tensor? value_minimum, Tensor? sink_keys, Tensor? sink_values, Tensor positions, int ring, "
      "int window) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("cached_attention", TORCH_BOX(&cached_attention)); }
