// What a call of `cached_attention_cpu.cpp` is given: where everything lies, and whether it fits.

// What a model gives, (batch, heads, time, width), of fp32 or bf16.
struct Given {
  int64_t heads, time, width;
  bool bf16;
  const void* data;
  int64_t steps[4];

  explicit Given(const Tensor& x)
      : heads(x.size(1)), time(x.size(2)), width(x.size(3)), bf16(x.scalar_type() == ScalarType::BFloat16),
        data(x.const_data_ptr()), steps{x.stride(0), x.stride(1), x.stride(2), x.stride(3)} {}

  // All tokens of some heads of a text, (count * time, width).
  void read(int64_t text, int64_t head, int64_t count, float* to) const {
    for (int64_t h = head; h < head + count; ++h)
      for (int64_t t = 0; t < time; ++t, to += width) {
        const int64_t from = text * steps[0] + h * steps[1] + t * steps[2];
        const auto* halves = static_cast<const BFloat16*>(data) + from;
        const auto* numbers = static_cast<const float*>(data) + from;
        if (bf16 && steps[3] == 1) widen_all(reinterpret_cast<const uint16_t*>(halves), width, to);
        else
          for (int64_t c = 0; c < width; ++c) to[c] = bf16 ? static_cast<float>(halves[c * steps[3]]) : numbers[c * steps[3]];
      }
  }
};

// A layer's keys, or its values.
struct Side {
  Given given;
  Stored slots, sinks;
  Matrix matrix;  // that vectors are multiplied by before they are encoded
  bool rotated = false;  // by Hadamard's matrix, which undoes itself
};

struct Call {
  Given queries;
  Side keys, values;
  Matrix query_matrix;
  bool by_pairs = false;  // queries, keys and values are multiplied in bf16
  int64_t batch, kv_heads, groups, time, rows, ring, window, num_sinks = 0;
  const int64_t* positions = nullptr;
  int64_t text_step = 0, step = 0;
  bool tree = false;
  std::vector<int32_t> paths;  // (batch, time, time), see `Tail`
  const float* offset = nullptr;  // (kv_heads, width), given with the matrices
  // What follows is worked out from these.
  int64_t used = 0, in_slots = 0, spans = 0;
  Floats *prepared = nullptr, *prepared_for_sinks = nullptr, *contexts = nullptr;
  std::vector<float> offsets, shifts, shifts_of_sinks;  // offsets: (batch, kv_heads, width), taken from later keys
  std::vector<Seen> seen, seen_of_sinks;
  std::vector<Sum> sums;

  int64_t position(int64_t text, int64_t t) const { return positions[text * text_step + t * step]; }
  int64_t slot(int64_t text, int64_t t) const {
    if (tree) return position(text, 0) + t;
    return ring ? position(text, t) % ring : position(text, t);
  }
  int64_t texts_heads() const { return batch * kv_heads; }
  int64_t context_vectors() const { return std::max(values.slots.vectors(), values.sinks.vectors()); }

  float factor() const { return 1 / std::sqrt(static_cast<float>(queries.width)); }

  // A thread is not woken for less than sixteen rows.
  int64_t grain() const { return 16 / rows + 1; }
};

// `memory` from its beginning: first tokens, (2, batch, heads, sinks, width), and the keys' offset and matrices, each
// from a multiple of ALIGNMENT on. How many bytes that is.
int64_t find_fixed(Call& call, const Tensor& memory, Codes sink_codes, bool transformed) {
  auto* const begin = static_cast<uint8_t*>(memory.mutable_data_ptr());
  const int64_t width = call.queries.width;
  int64_t taken = 0;
  const auto take = [&](int64_t numbers, int64_t size) {
    auto* const at = begin + taken;
    taken = (taken + numbers * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
  };
  if (call.num_sinks) {
    STD_TORCH_CHECK(call.num_sinks > 0 && (sink_codes == Codes::FP32 || sink_codes == Codes::BF16),
                    "append_and_attend: ", call.num_sinks, " sinks of another type, expected none or more, fp32 or bf16");
    const int64_t numbers = call.texts_heads() * call.num_sinks * width;
    auto* at = take(2 * numbers, bytes_of(sink_codes));
    for (Side* side : {&call.keys, &call.values}) {
      Stored& stored = side->sinks;
      stored.codes = sink_codes, stored.width = width, stored.slots = call.num_sinks;
      stored.row_bytes = width * bytes_of(sink_codes), stored.bytes = at;
      stored.end = at += numbers * bytes_of(sink_codes);
    }
  }
  if (transformed) {
    call.offset = reinterpret_cast<const float*>(take(call.kv_heads * width, sizeof(float)));
    for (Matrix* matrix : {&call.keys.matrix, &call.query_matrix})
      *matrix = {width, width * width, nullptr,
                 reinterpret_cast<const uint16_t*>(take(call.kv_heads * width * width, sizeof(uint16_t)))};
  }
  return taken;
}

// Then the slots' codes, scale and minimum, those of wider numbers first.
void find_slots(Call& call, const Tensor& memory, int64_t taken, Codes key_codes, Codes value_codes, int64_t fine) {
  struct Part {
    int64_t size, numbers;
    void** at;
  };
  std::vector<Part> parts;
  const auto add = [&](Stored& stored, Codes codes, int64_t width) {
    const int64_t size = bytes_of(codes);
    stored.codes = codes, stored.width = width;
    stored.row_bytes = codes == Codes::INT4 ? width / 2 : width * size;
    parts.push_back({size, stored.row_bytes / size, reinterpret_cast<void**>(&stored.bytes)});
    if (codes >= Codes::INT8) parts.push_back({2, 1, reinterpret_cast<void**>(&stored.scale)});
    if (codes == Codes::INT4) parts.push_back({2, 1, reinterpret_cast<void**>(&stored.minimum)});
  };
  Stored &keys = call.keys.slots, &values = call.values.slots;
  add(keys, key_codes, call.queries.width + fine);
  add(values, value_codes, call.queries.width);
  int64_t of_slot = 0;
  for (const Part& part : parts) of_slot += part.size * part.numbers * call.texts_heads();
  keys.slots = values.slots = std::max<int64_t>(memory.numel() - taken, 0) / of_slot;
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Byte && memory.dim() == 1 && memory.is_contiguous() &&
                      memory.numel() == taken + of_slot * keys.slots,
                  "append_and_attend: memory is ", shape(memory), " ", memory.scalar_type(),
                  ", expected contiguous bytes, ", taken, " and ", of_slot, " a slot");
  auto* at = static_cast<uint8_t*>(memory.mutable_data_ptr()) + taken;
  for (const int64_t size : {4, 2, 1})
    for (const Part& part : parts)
      if (part.size == size) *part.at = at, at += size * part.numbers * call.texts_heads() * keys.slots;
  for (Stored* stored : {&keys, &values})
    stored->end = stored->bytes + call.texts_heads() * keys.slots * stored->row_bytes;
}

// What `hadamard` of `hadamard.py` multiplies by, the same for all heads.
Matrix hadamard_matrix(int64_t width) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) != width * width) {
    const int64_t block = std::gcd(width, int64_t{256});
    kept.assign(width * width, 0);
    for (int64_t i = 0; i < width; ++i)
      for (int64_t j = i / block * block; j < (i / block + 1) * block; ++j)
        kept[i * width + j] = (__builtin_parityll(i % block & j % block) ? -1 : 1) / std::sqrt(static_cast<float>(block));
  }
  return {width, 0, kept.data(), nullptr};
}

void check(const Call& call, const Tensor& queries, const Tensor& new_keys, const Tensor& new_values,
           const Tensor& positions, int64_t fine, bool packed) {
  for (const Tensor* x : {&queries, &new_keys, &new_values})
    STD_TORCH_CHECK((x->scalar_type() == ScalarType::Float || x->scalar_type() == ScalarType::BFloat16) &&
                        x->scalar_type() == queries.scalar_type() && x->dim() == 4 && x->size(0) == call.batch &&
                        x->size(2) == call.time && x->size(3) == call.queries.width,
                    "append_and_attend: queries, keys or values are ", shape(*x), " ", x->scalar_type(),
                    ", expected fp32 or bf16, all of one type, batch, time and width");
  STD_TORCH_CHECK(call.batch > 0 && call.rows > 0 && call.queries.heads == call.groups * call.kv_heads &&
                      call.values.given.heads == call.kv_heads &&
                      positions.dim() == 2 && positions.scalar_type() == ScalarType::Long &&
                      positions.size(1) == call.time &&
                      (positions.size(0) == 1 || positions.size(0) == call.batch) &&
                      (packed ? fine >= 0 && fine <= call.queries.width : fine == 0),
                  "append_and_attend: queries ", shape(queries), ", keys ", shape(new_keys), ", values ",
                  shape(new_values), ", ", fine, " fine channels and positions ", shape(positions), " ",
                  positions.scalar_type(), " do not fit");
}

// What the bits of `ancestors` say. Where all tokens follow each other, there is no tree.
void find_paths(Call& call, const Tensor& ancestors) {
  STD_TORCH_CHECK(ancestors.dim() == 2 && ancestors.size(0) == call.batch && ancestors.size(1) == call.time &&
                      ancestors.scalar_type() == ScalarType::Long && ancestors.is_contiguous() && call.time <= 32,
                  "append_and_attend: ancestors are ", shape(ancestors), " ", ancestors.scalar_type(), ", expected [",
                  call.batch, ", ", call.time, "] int64, contiguous, of at most 32 tokens");
  const int64_t* bits = ancestors.const_data_ptr<int64_t>();
  call.paths.resize(call.batch * call.time * call.time);
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t t = 0; t < call.time; ++t) {
      const int64_t seen = bits[b * call.time + t], depth = __builtin_popcountll(seen) - 1;
      STD_TORCH_CHECK(seen >> t == 1 && seen & 1 && call.position(b, t) - call.position(b, 0) == depth &&
                          (depth == t || (call.position(b, 0) >= call.num_sinks && !call.ring)),
                      "append_and_attend: token ", t, " at position ", call.position(b, t), " with ancestors ", seen,
                      ", expected itself and others before it, of which the first one at ", call.position(b, 0),
                      " is one, as many as it is further; no tree is in a ring buffer or among the first ", call.num_sinks);
      int32_t* path = &call.paths[(b * call.time + t) * call.time];
      for (int64_t i = 0; i <= t; ++i)
        if (seen >> i & 1) *path++ = static_cast<int32_t>(i);
      call.tree |= depth < t;
    }
}
