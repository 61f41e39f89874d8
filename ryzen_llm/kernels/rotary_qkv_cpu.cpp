// Queries, keys and values of a training step in bf16 from one projection, rotated, as `rotary_qkv_cpu.py` says.

#include <array>
#include <cstring>

#include "bf16_avx512.h"

namespace {

constexpr int64_t GRAIN = 32;  // tokens

// A token's heads, `size` numbers each and `from_step` and `to_step` apart, by the token's angles: forth, or back.
template <bool BACK>
WITH_BF16 void rotate(const uint16_t* from, int64_t from_step, uint16_t* to, int64_t to_step, int64_t heads, int64_t size,
                      const float* cos, const float* sin, float scale) {
  const int64_t half = size / 2;
  for (int64_t c = 0; c < half; c += LANES) {
    const __m512 by = _mm512_set1_ps(scale), x = _mm512_mul_ps(_mm512_loadu_ps(cos + c), by);
    const __m512 y = _mm512_mul_ps(_mm512_loadu_ps(sin + c), _mm512_set1_ps(BACK ? -scale : scale));
    for (int64_t h = 0; h < heads; ++h) {
      const __m512 first = load_bf16(from + h * from_step + c), second = load_bf16(from + h * from_step + half + c);
      store_bf16(to + h * to_step + c, _mm512_fmsub_ps(first, x, _mm512_mul_ps(second, y)));
      store_bf16(to + h * to_step + half + c, _mm512_fmadd_ps(second, x, _mm512_mul_ps(first, y)));
    }
  }
}

void copy(const uint16_t* from, int64_t from_step, uint16_t* to, int64_t to_step, int64_t heads, int64_t size) {
  for (int64_t h = 0; h < heads; ++h) std::memcpy(to + h * to_step, from + h * from_step, size * sizeof *to);
}

struct Table {
  Tensor cos, sin;

  Table(const Tensor& cos, const Tensor& sin, int64_t time, int64_t size)
      : cos(as(ScalarType::Float, cos)), sin(as(ScalarType::Float, sin)) {
    STD_TORCH_CHECK(size % (2 * LANES) == 0 && cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == time &&
                        sin.size(0) == time && cos.size(1) == size / 2 && sin.size(1) == size / 2,
                    "rotary_qkv needs a head_dim that is a multiple of 32, and tables (time, head_dim / 2); got ", size, ", ",
                    shape(cos), " and ", shape(sin));
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& projected, const Tensor& cos, const Tensor& sin, int64_t heads,
                                           int64_t kv_heads, double query_scale) {
  const int64_t all = heads + 2 * kv_heads;
  STD_TORCH_CHECK(projected.dim() == 3 && projected.scalar_type() == ScalarType::BFloat16 && heads > 0 && kv_heads > 0 &&
                      projected.size(2) % all == 0,
                  "rotary_qkv needs a bf16 projection (batch, time, heads * head_dim), got ", shape(projected));
  const int64_t batch = projected.size(0), time = projected.size(1), size = projected.size(2) / all;
  const Table table(cos, sin, time, size);
  const Tensor given = as(ScalarType::BFloat16, projected);
  std::array<Tensor, 3> results{torch::stable::new_empty(projected, {batch, time, heads, size}),
                                torch::stable::new_empty(projected, {batch, time, kv_heads, size}),
                                torch::stable::new_empty(projected, {batch, time, kv_heads, size})};
  const uint16_t* from = numbers(given);
  const float *x = table.cos.const_data_ptr<float>(), *y = table.sin.const_data_ptr<float>();
  uint16_t* to[3];
  for (int i = 0; i < 3; ++i) to[i] = writable(results[i]);
  parallel_for(0, batch * time, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const uint16_t *q = from + token * all * size, *k = q + heads * size, *v = k + kv_heads * size;
      const float *c = x + token % time * size / 2, *s = y + token % time * size / 2;
      rotate<false>(q, size, to[0] + token * heads * size, size, heads, size, c, s, static_cast<float>(query_scale));
      rotate<false>(k, size, to[1] + token * kv_heads * size, size, kv_heads, size, c, s, 1);
      copy(v, size, to[2] + token * kv_heads * size, size, kv_heads, size);
    }
  });
  return {results[0], results[1], results[2]};
}

Tensor backward(const Tensor& by_q, const Tensor& by_k, const Tensor& by_v, const Tensor& cos, const Tensor& sin,
                double query_scale) {
  const Heads q(by_q), k(by_k), v(by_v);
  const int64_t batch = by_q.size(0), time = by_q.size(2), size = by_q.size(3), all = q.heads + k.heads + v.heads;
  const Table table(cos, sin, time, size);
  Tensor result = torch::stable::new_empty(q.tensor, {batch, time, all * size});
  uint16_t* to = writable(result);
  const float *x = table.cos.const_data_ptr<float>(), *y = table.sin.const_data_ptr<float>();
  parallel_for(0, batch * time, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t text = token / time, t = token % time;
      uint16_t *to_q = to + token * all * size, *to_k = to_q + q.heads * size, *to_v = to_k + k.heads * size;
      const float *c = x + t * size / 2, *s = y + t * size / 2;
      rotate<true>(q.at(text, 0, t), q.head, to_q, size, q.heads, size, c, s, static_cast<float>(query_scale));
      rotate<true>(k.at(text, 0, t), k.head, to_k, size, k.heads, size, c, s, 1);
      copy(v.at(text, 0, t), v.head, to_v, size, v.heads, size);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def(
      "rotary_qkv_cpu(Tensor projected, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, float query_scale) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "rotary_qkv_cpu_backward(Tensor by_q, Tensor by_k, Tensor by_v, Tensor cos, Tensor sin, float query_scale) -> "
      "Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) {
  m.impl("rotary_qkv_cpu", TORCH_BOX(&forward));
  m.impl("rotary_qkv_cpu_backward", TORCH_BOX(&backward));
}
