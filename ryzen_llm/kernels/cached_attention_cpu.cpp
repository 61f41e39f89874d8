// New tokens' keys and values are stored, and attention of a few queries over all of them is computed, as
// `cached_attention.py` says.
//
// A task is a key head and SPAN slots, for all queries that share the head: codes become numbers in registers, where up to
// four queries use them. The spans are put together at the end. Where spans begin and the order of all sums are the same
// for any number of queries, so that a query's result does not depend on the others.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensors.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed within this file only
#define INLINED __attribute__((always_inline))
#define INLINE inline INLINED

namespace {

constexpr int64_t LANES = 16, SPAN = 128, PARTS = SPAN / LANES, ALIGNMENT = 64;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

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
constexpr Ints LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

enum class Codes { FP32, BF16, INT8, INT4 };

// Vectors that sixteen numbers or, where they are packed, sixteen bytes become.
constexpr int vectors_at_once(Codes codes) { return codes == Codes::INT4 ? 2 : 1; }
constexpr int bytes_of(Codes codes) { return codes == Codes::FP32 ? 4 : codes == Codes::BF16 ? 2 : 1; }

// Keys or values, (heads, slots, width), of all texts.
struct Stored {
  Codes codes = Codes::FP32;
  uint8_t* bytes = nullptr;
  const uint8_t* end = nullptr;
  uint16_t* scale = nullptr;    // fp16
  uint16_t* minimum = nullptr;  // fp16
  int64_t width = 0, slots = 0, row_bytes = 0;

  const uint8_t* row(int64_t i) const { return bytes + i * row_bytes; }
  // Vectors of a row once it is unpacked: of packed bytes one of the low halves, one of the high ones, and so on.
  int64_t vectors() const { return codes == Codes::INT4 ? 2 * vectors_of(row_bytes) : vectors_of(width); }
  static int64_t vectors_of(int64_t numbers) { return (numbers + LANES - 1) / LANES; }
};

// Which positions a query sees, from the first to the last.
struct Seen {
  int32_t first, last;
};

// Which position a slot holds: its own number and `round`, or in a ring one round less, if that is beyond the last.
struct Held {
  int32_t round = 0, last = std::numeric_limits<int32_t>::max(), ring = 0;
};

// What the softmax of a query over a span has come to.
struct Sum {
  float highest = NOTHING, total = 0;
};

// New tokens that are a tree: of each, which of them the text up to it is made of, (count, count) of ascending numbers.
struct Tail {
  int64_t first = 0, count = 0;  // slot of the first; none if they follow each other
  const int32_t* paths = nullptr;

  // Which new token is in a slot of a query's text, by the query's row.
  int64_t at(int64_t row, int64_t slot) const { return paths[row % count * count + slot - first]; }
};

struct Task {
  Stored keys, values;
  int64_t row, slot, count;  // the span's first row in all heads' slots, its first slot, and its slots
  Held held;
  Tail tail;
  const Floats* queries;  // (rows, the keys' vectors)
  const float* shifts;    // of a query's scores, times the slot's minimum if there is one
  const Seen* seen;
  int64_t rows;
  float factor;  // of scores
  Sum* sums;        // (rows)
  Floats* context;  // (rows, the values' vectors)

  // How many of its slots hold the same for all queries.
  int64_t common() const { return tail.count ? std::clamp<int64_t>(tail.first - slot, 0, count) : count; }
  // The new tokens, whichever span they are in.
  Task of_tail() const {
    Task task = *this;
    task.row += tail.first - slot, task.slot = tail.first, task.count = tail.count;
    return task;
  }
};

// (width, width) for each head, of one of two types; of neither if there is none.
struct Matrix {
  int64_t width = 0, step = 0;  // to the next head's
  const float* fp32 = nullptr;
  const uint16_t* fp16 = nullptr;

  explicit operator bool() const { return fp32 || fp16; }
  Matrix of(int64_t head) const {
    return {width, step, fp32 ? fp32 + head * step : nullptr, fp16 ? fp16 + head * step : nullptr};
  }
  float at(int64_t i) const { return fp32 ? fp32[i] : static_cast<float>(reinterpret_cast<const Half*>(fp16)[i]); }
};

// Vectors at a boundary of their size, to which std::vector does not keep; any numbers at first.
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

#include "cached_attention_encode.h"

// What has the most to do is compiled for the processor, the rest for any: a product and a sum rounded at once would
// store other bytes than PyTorch does.
#ifdef FOR_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#elif defined(FOR_AVX2)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "cached_attention_vectors.h"
#include "cached_attention_rotate.h"
#include "cached_attention_span.h"
#if defined(FOR_AVX512) || defined(FOR_AVX2)
#pragma GCC pop_options
#endif
#ifdef FOR_AVX512
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include "cached_attention_bf16.h"
#pragma GCC pop_options
#endif
#include "cached_attention_call.h"

// Stores those of the new tokens that are the first ones as they are.
void keep_first(const Call& call, const Side& side) {
  thread_local std::vector<float> given;
  const int64_t width = side.given.width;
  given.resize(call.time * width);
  for (int64_t i = 0; i < call.texts_heads(); ++i) {
    const int64_t text = i / call.kv_heads;
    if (call.position(text, 0) >= call.num_sinks) continue;
    side.given.read(text, i % call.kv_heads, 1, given.data());
    for (int64_t t = 0; t < call.time && call.position(text, t) < call.num_sinks; ++t)
      encode(&given[t * width], width, side.sinks, i * call.num_sinks + call.position(text, t), nullptr);
  }
}

// Finds what is taken from all keys but those of the first tokens.
void find_offsets(Call& call) {
  if (!call.offset && !call.num_sinks) return;
  const int64_t width = call.queries.width;
  call.offsets.resize(call.texts_heads() * width);
  for (int64_t i = 0; i < call.texts_heads(); ++i) {
    float* offset = &call.offsets[i * width];
    if (call.offset) std::copy_n(call.offset + i % call.kv_heads * width, width, offset);
    else mean(call.keys.sinks, i * call.num_sinks, call.num_sinks, offset);
  }
}

// Stores what is new of a head, less its offset if there is one.
void append(const Call& call, const Side& side, const float* offset, int64_t text, int64_t head) {
  thread_local std::vector<float> given, turned, room;
  const int64_t width = side.given.width, row = text * call.kv_heads + head;
  given.resize(call.time * width), turned.resize(call.time * width), room.resize(width);
  side.given.read(text, head, 1, given.data());
  for (int64_t t = 0; t < call.time && offset; ++t)
    for (int64_t c = 0; c < width && call.position(text, t) >= call.num_sinks; ++c) given[t * width + c] -= offset[c];
  if (side.matrix) multiply(side.matrix.of(head), given.data(), call.time, turned.data()), given.swap(turned);
  for (int64_t t = 0; t < call.time; ++t)
    encode(&given[t * width], width, side.slots, row * side.slots.slots + call.slot(text, t), room.data());
}

// Turns the queries of a key head against what is stored: they are divided by sqrt(head_dim), too.
void prepare(Call& call, int64_t text, int64_t head) {
  thread_local std::vector<float> given, turned;
  const int64_t width = call.queries.width, row = (text * call.kv_heads + head) * call.rows;
  const Stored &slots = call.keys.slots, &sinks = call.keys.sinks;
  given.resize(call.rows * width), turned.resize(call.rows * width);
  call.queries.read(text, head * call.groups, call.groups, given.data());
  if (call.by_pairs) {  // exactly what they are; scores are divided then
    std::copy(given.begin(), given.end(), reinterpret_cast<float*>(call.prepared + row * slots.vectors()));
    return;
  }
  for (float& x : given) x *= call.factor();
  for (int64_t r = 0; r < call.rows && call.num_sinks; ++r) {
    const float *query = &given[r * width], *offset = &call.offsets[row / call.rows * width];
    put_in_place(query, sinks, call.prepared_for_sinks + (row + r) * sinks.vectors());
    // Later keys are without the offset, which takes the same from all scores of a query. One that sees none of them
    // is spared that: its result is not to depend on first tokens that come after it.
    if (call.position(text, r % call.time) >= call.num_sinks)
      call.shifts_of_sinks[row + r] = -sum_of(width, [&](int64_t c) { return query[c] * offset[c]; });
  }
  if (call.query_matrix) multiply(call.query_matrix.of(head), given.data(), call.rows, turned.data()), given.swap(turned);
  else if (call.keys.rotated) hadamard(given.data(), call.rows * width, width);
  const int64_t fine = slots.width - width;
  for (int64_t r = 0; r < call.rows; ++r) {
    const float* channels = &given[r * width];
    if (fine) {  // whose codes are 16 * h + l, of which h comes before the low half, l before the high one
      const float* split = channels + fine + (width - fine) / 2;
      turned.clear();
      for (int64_t c = 0; c < fine; ++c) turned.push_back(channels[c] * (16.0f / 17));
      turned.insert(turned.end(), channels + fine, split);
      for (int64_t c = 0; c < fine; ++c) turned.push_back(channels[c] * (1.0f / 17));
      turned.insert(turned.end(), split, channels + width);
      channels = turned.data();
    }
    const float sum = put_in_place(channels, slots, call.prepared + (row + r) * slots.vectors());
    call.shifts[row + r] = slots.minimum ? sum : 0;
  }
}

void attend_to_span(Call& call, int64_t i) {
  thread_local Room scores;
  const int64_t head = i / call.spans, span = i % call.spans, text = head / call.kv_heads;
  const bool in_sinks = span == call.in_slots;
  Task task;
  task.keys = in_sinks ? call.keys.sinks : call.keys.slots;
  task.values = in_sinks ? call.values.sinks : call.values.slots;
  task.slot = in_sinks ? 0 : span * SPAN;
  task.row = head * task.keys.slots + task.slot;
  task.count = in_sinks ? call.num_sinks : std::min(SPAN, call.used - task.slot);
  if (call.ring && !in_sinks) {
    const int64_t last = call.position(text, call.time - 1);
    task.held = {static_cast<int32_t>(last - last % call.ring), static_cast<int32_t>(last),
                 static_cast<int32_t>(call.ring)};
  }
  if (call.tree && !in_sinks) task.tail = {call.position(text, 0), call.time, &call.paths[text * call.time * call.time]};
  task.queries = (in_sinks ? call.prepared_for_sinks : call.prepared) + head * call.rows * task.keys.vectors();
  task.shifts = (in_sinks ? call.shifts_of_sinks : call.shifts).data() + head * call.rows;
  task.seen = (in_sinks ? call.seen_of_sinks : call.seen).data() + text * call.rows;
  task.rows = call.rows, task.factor = call.by_pairs ? call.factor() : 1;
  task.sums = call.sums.data() + i * call.rows;
  task.context = call.contexts + i * call.rows * call.context_vectors();
#ifdef FOR_AVX512
  if (call.by_pairs) return attend_pairs(task, scores.of(room_for_pairs(task)));
#endif
  Floats* const room = scores.of(2 * call.rows * PARTS);
  attend(task, room, room + call.rows * PARTS);
}

// The spans' contexts of one query of a key head, weighted by `shares`.
const Floats* gather(const Call& call, int64_t head, int64_t row, const Stored& values, const float* shares, int64_t begin,
                    int64_t end) {
  thread_local Room room;
  Floats* sums = room.of(values.vectors());
  std::fill_n(sums, values.vectors(), Floats{});
  for (int64_t s = begin; s < end; ++s) {
    const Floats* contexts = call.contexts + (head * call.spans + s) * call.rows * call.context_vectors();
    add(contexts + row * values.vectors(), shares[s], values.vectors(), sums);
  }
  return sums;
}

// Puts a key head's spans together, (rows, width).
void combine(const Call& call, int64_t head, float* to) {
  thread_local std::vector<float> shares;
  const Stored &slots = call.values.slots, &sinks = call.values.sinks;
  const int64_t width = call.values.given.width;
  shares.resize(call.rows * call.spans);
  for (int64_t r = 0; r < call.rows; ++r) {
    const auto sum_of = [&](int64_t span) { return call.sums[(head * call.spans + span) * call.rows + r]; };
    float *share = &shares[r * call.spans], highest = NOTHING, total = 0;
    for (int64_t s = 0; s < call.spans; ++s) highest = std::max(highest, sum_of(s).highest);
    for (int64_t s = 0; s < call.spans; ++s)
      total += (share[s] = std::exp(sum_of(s).highest - highest)) * sum_of(s).total;
    for (int64_t s = 0; s < call.spans; ++s) share[s] /= total;
    take_from_place(gather(call, head, r, slots, share, 0, call.in_slots), slots, to + r * width);
  }
  if (call.values.rotated) hadamard(to, call.rows * width, width);
  for (int64_t r = 0; r < call.rows && call.num_sinks; ++r) {
    const Floats* sums = gather(call, head, r, sinks, &shares[r * call.spans], call.in_slots, call.spans);
    for (int64_t c = 0; c < width; ++c) to[r * width + c] += reinterpret_cast<const float*>(sums)[c];
  }
}

void write(const Tensor& y, int64_t from, const float* x, int64_t count) {
  if (y.scalar_type() == ScalarType::Float)
    std::memcpy(static_cast<float*>(y.mutable_data_ptr()) + from, x, count * sizeof *x);
  else
    round_all(x, count, static_cast<uint16_t*>(y.mutable_data_ptr()) + from);
}

// (batch, time, heads, width), typed like the queries, which are (batch, heads, time, width) as keys and values are.
Tensor append_and_attend(const Tensor& queries, const Tensor& new_keys, const Tensor& new_values, const Tensor& memory,
                         const Tensor& positions, const std::optional<Tensor>& ancestors, int64_t key_codes,
                         int64_t value_codes, int64_t sink_codes, int64_t sinks, int64_t fine, int64_t ring,
                         int64_t window, bool rotated_keys, bool rotated_values, bool transformed) {
  Call call = {Given(queries), {Given(new_keys)}, {Given(new_values)}};
  const int64_t width = call.queries.width;
  call.batch = queries.size(0), call.kv_heads = call.keys.given.heads, call.time = call.queries.time;
  call.groups = call.queries.heads / std::max<int64_t>(call.kv_heads, 1), call.rows = call.groups * call.time;
  call.ring = ring, call.window = window, call.num_sinks = sinks;
  check(call, queries, new_keys, new_values, positions, fine, static_cast<Codes>(key_codes) == Codes::INT4);
  call.positions = positions.const_data_ptr<int64_t>();
  call.text_step = positions.size(0) == 1 ? 0 : positions.stride(0), call.step = positions.stride(1);
  if (ancestors) find_paths(call, *ancestors);
  const int64_t taken = find_fixed(call, memory, static_cast<Codes>(sink_codes), transformed);
  find_slots(call, memory, taken, static_cast<Codes>(key_codes), static_cast<Codes>(value_codes), fine);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t t = 0; t < call.time; ++t)
      STD_TORCH_CHECK(call.position(b, t) >= 0 && call.slot(b, t) < call.keys.slots.slots,
                      "append_and_attend: position ", call.position(b, t), " is not in the ", call.keys.slots.slots,
                      " slots");
  call.keys.rotated = rotated_keys, call.values.rotated = rotated_values;
  if (rotated_keys && !transformed) call.keys.matrix = hadamard_matrix(width);
  if (rotated_values) call.values.matrix = hadamard_matrix(width);
#ifdef FOR_AVX512
  const auto in_bf16 = [](const Stored& stored) { return stored.codes == Codes::BF16; };
  call.by_pairs = has_pairs() && call.queries.bf16 && in_bf16(call.keys.slots) && in_bf16(call.values.slots) &&
                  width % (2 * LANES) == 0 && !sinks && !rotated_keys && !rotated_values && !transformed;
#endif

  thread_local Room query_room, context_room;
  call.shifts.resize(call.texts_heads() * call.rows), call.shifts_of_sinks.resize(call.shifts.size());
  const int64_t key_vectors = call.keys.slots.vectors(), rows = call.texts_heads() * call.rows;
  call.prepared = query_room.of(rows * (key_vectors + call.keys.sinks.vectors()));
  call.prepared_for_sinks = call.prepared + rows * key_vectors;
  for (const Side* side : {&call.keys, &call.values}) keep_first(call, *side);
  find_offsets(call);
  // Of a head: its keys, its values, its queries. Matrices are read from memory, by all threads.
  parallel_for(0, 3 * call.texts_heads(), transformed ? 1 : 3 * call.grain(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t text = i / 3 / call.kv_heads, head = i / 3 % call.kv_heads;
      const float* offset = call.offsets.empty() ? nullptr : &call.offsets[i / 3 * width];
      if (i % 3 == 0) append(call, call.keys, offset, text, head);
      else if (i % 3 == 1) append(call, call.values, nullptr, text, head);
      else prepare(call, text, head);
    }
  });

  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t r = 0; r < call.rows; ++r) {
      const int64_t at = call.position(b, r % call.time), first = window ? std::max<int64_t>(at - window + 1, 0) : 0;
      call.seen.push_back({static_cast<int32_t>(std::max(first, call.num_sinks)), static_cast<int32_t>(at)});
      call.seen_of_sinks.push_back({static_cast<int32_t>(first), static_cast<int32_t>(at)});
      call.used = std::max(call.used, ring ? call.keys.slots.slots : at + 1);
    }
  }
  call.in_slots = (call.used + SPAN - 1) / SPAN, call.spans = call.in_slots + (call.num_sinks > 0);
  call.sums.resize(rows * call.spans);
  call.contexts = context_room.of(rows * call.spans * call.context_vectors());
  parallel_for(0, call.texts_heads() * call.spans, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) attend_to_span(call, i);
  });

  Tensor y = torch::stable::new_empty(queries, {call.batch, call.time, call.queries.heads, width});
  parallel_for(0, call.texts_heads(), call.grain(), [&](int64_t begin, int64_t end) {
    std::vector<float> context(call.rows * width);
    for (int64_t i = begin; i < end; ++i) {
      combine(call, i, context.data());
      for (int64_t r = 0; r < call.rows; ++r) {
        const int64_t token = i / call.kv_heads * call.time + r % call.time;
        const int64_t head = i % call.kv_heads * call.groups + r / call.time;
        write(y, (token * call.queries.heads + head) * width, &context[r * width], width);
      }
    }
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def(
      "append_and_attend(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) memory, Tensor positions, "
      "Tensor? ancestors, int key_codes, int value_codes, int sink_codes, int sinks, int fine, int ring, int window, "
      "bool rotated_keys, bool rotated_values, bool transformed) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) { m.impl("append_and_attend", TORCH_BOX(&append_and_attend)); }
