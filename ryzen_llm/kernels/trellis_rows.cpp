// Rows in trellis codes, made and multiplied with: `trellis_rows.py` says how they are laid out and what is computed.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "tensors.h"

namespace {

constexpr int STATE_BITS = 16, STATES = 1 << STATE_BITS, STATE_BYTES = STATE_BITS / 8;
constexpr uint32_t FACTOR = 34038481, OFFSET = 76625530;
constexpr int MEAN = 510;
constexpr float DEVIATION = 147.800537f;

inline float value_of(uint32_t state) {
  const uint32_t mixed = state * FACTOR + OFFSET;
  const uint32_t pairs = (mixed & 0x00ff00ffu) + (mixed >> 8 & 0x00ff00ffu);
  return static_cast<float>(static_cast<int>((pairs & 0xffff) + (pairs >> 16)) - MEAN) / DEVIATION;
}

// ---- Making codes: the M-algorithm, in which every path feeds its own errors back. ----

constexpr int PATHS = 128;
constexpr int BLOCK = 32;          // columns that are decided on together, a block after they were read
constexpr int WINDOW = 2 * BLOCK;  // columns in which paths may still differ
constexpr int SLOTS = 4 * PATHS;   // of the hash table
constexpr int CANDIDATES = (PATHS + 1) << 4;

struct Values {
  std::vector<float> sorted;
  std::vector<uint32_t> state;  // of each of `sorted`
  Values() : sorted(STATES), state(STATES) {
    std::iota(state.begin(), state.end(), 0);
    std::sort(state.begin(), state.end(), [](uint32_t a, uint32_t b) { return value_of(a) < value_of(b); });
    std::transform(state.begin(), state.end(), sorted.begin(), value_of);
  }
};

struct Paths {
  float errors[PATHS][WINDOW];  // of the columns from `first` on
  float cost[PATHS];
  uint32_t state[PATHS];
  int ancestor[PATHS];  // which path this one was when the block began
};

class Search {
 public:
  // `feedback` (size, size): row j has what an error in each column before j takes from column j's target.
  Search(const float* feedback, int size, int bits)
      : feedback_(feedback), size_(size), bits_(bits), choices_(1 << bits), target_(size), parent_(size * PATHS),
        states_(size * PATHS) {}

  void encode(const float* target, const Values& values, uint8_t* codes) {
    target_.assign(target, target + size_);
    first_ = 0;
    start(values);
    for (int j = 1; j < size_; ++j) {
      if (j % BLOCK == 0) {
        if (j >= WINDOW) decide(j);
        std::iota(now_->ancestor, now_->ancestor + count_, 0);
      }
      extend(j);
    }
    write(codes);
  }

 private:
  // The first state is free: those whose values are nearest.
  void start(const Values& values) {
    const auto at = std::lower_bound(values.sorted.begin(), values.sorted.end(), target_[0]) - values.sorted.begin();
    const int begin = std::clamp(static_cast<int>(at) - PATHS / 2, 0, STATES - PATHS);
    count_ = PATHS;
    for (int m = 0; m < PATHS; ++m) {
      const float error = (target_[0] - values.sorted[begin + m]) / feedback_[0];
      now_->errors[m][0] = error;
      now_->cost[m] = error * error;
      now_->state[m] = values.state[begin + m];
      now_->ancestor[m] = m;
      states_[m] = static_cast<uint16_t>(now_->state[m]);
    }
  }

  // Each path by every code; of those that meet in a state the best; of all the PATHS best.
  WITH_AVX2 void extend(int j) {
    const float* row = feedback_ + static_cast<int64_t>(j) * size_ + first_;
    const int length = j - first_, bits = bits_, choices = choices_, top = STATE_BITS - bits, paths = count_;
    const float weight = 1 / row[length];
    int candidates = 0;
    std::fill(slot_, slot_ + SLOTS, -1);
    for (int m = 0; m < paths; ++m) {
      const float* errors = now_->errors[m];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < length; ++i) sum += row[i] * errors[i];
      const float target = target_[j] - sum, cost = now_->cost[m];
      const uint32_t kept = now_->state[m] >> bits;
      uint32_t at = (kept * 2654435761u >> 16) % SLOTS;
      while (slot_[at] >= 0 && key_[at] != kept) at = (at + 1) % SLOTS;
      const bool met = slot_[at] >= 0;
      float *costs = cost_ + candidates, *errs = error_ + candidates;
#pragma omp simd
      for (int c = 0; c < choices; ++c) {
        errs[c] = (target - value_of(kept | static_cast<uint32_t>(c) << top)) * weight;
        costs[c] = cost + errs[c] * errs[c];
      }
      if (!met) {
        key_[at] = kept;
        slot_[at] = candidates;
        std::fill(from_ + candidates, from_ + candidates + choices, m);
        candidates += choices;
        continue;
      }
      for (int c = 0; c < choices; ++c) {
        const int other = slot_[at] + c;
        if (costs[c] >= cost_[other]) continue;
        cost_[other] = costs[c];
        error_[other] = errs[c];
        from_[other] = m;
      }
    }
    const float most = threshold(candidates);
    int count = 0;
    for (int q = 0; q < candidates && count < PATHS; ++q) {
      if (cost_[q] > most) continue;
      const int m = from_[q];
      std::memcpy(next_->errors[count], now_->errors[m], sizeof(float) * length);
      next_->errors[count][length] = error_[q];
      next_->cost[count] = cost_[q];
      next_->state[count] = now_->state[m] >> bits | static_cast<uint32_t>(q & (choices - 1)) << top;
      next_->ancestor[count] = now_->ancestor[m];
      parent_[j * PATHS + count] = static_cast<uint8_t>(m);
      states_[j * PATHS + count] = static_cast<uint16_t>(next_->state[count]);
      ++count;
    }
    count_ = count;
    std::swap(now_, next_);
  }

  // A cost that about PATHS of the candidates do not exceed, by bisection.
  WITH_AVX2 float threshold(int candidates) const {
    float low = std::numeric_limits<float>::infinity(), high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int q = 0; q < candidates; ++q) {
      low = std::min(low, cost_[q]);
      high = std::max(high, cost_[q]);
    }
    if (candidates <= PATHS) return high;
    for (int attempt = 0; attempt < 14; ++attempt) {
      const float middle = low + (high - low) * (attempt < 3 ? 0.25f : 0.5f);
      int within = 0;
#pragma omp simd reduction(+ : within)
      for (int q = 0; q < candidates; ++q) within += cost_[q] <= middle;
      (within <= PATHS ? low : high) = middle;
      if (within <= PATHS && within > PATHS - PATHS / 32) break;
    }
    return low;
  }

  // Decide on the block before the last as the best path has it, and drop the paths that have another one.
  WITH_AVX2 void decide(int j) {
    const int best = static_cast<int>(std::min_element(now_->cost, now_->cost + count_) - now_->cost);
    const int ancestor = now_->ancestor[best];
    const float* errors = now_->errors[best];
    for (int i = j; i < size_; ++i) {
      const float* row = feedback_ + static_cast<int64_t>(i) * size_ + first_;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int c = 0; c < BLOCK; ++c) sum += row[c] * errors[c];
      target_[i] -= sum;
    }
    int kept = 0;
    uint8_t* parent = &parent_[(j - 1) * PATHS];
    uint16_t* states = &states_[(j - 1) * PATHS];
    for (int m = 0; m < count_; ++m) {
      if (now_->ancestor[m] != ancestor) continue;
      std::memmove(now_->errors[kept], now_->errors[m] + BLOCK, sizeof(float) * BLOCK);
      now_->cost[kept] = now_->cost[m];
      now_->state[kept] = now_->state[m];
      parent[kept] = parent[m];
      states[kept] = states[m];
      ++kept;
    }
    count_ = kept;
    first_ += BLOCK;
  }

  void write(uint8_t* codes) const {
    std::memset(codes, 0, STATE_BYTES + size_ * bits_ / 8);
    int m = static_cast<int>(std::min_element(now_->cost, now_->cost + count_) - now_->cost);
    for (int j = size_ - 1; j >= 0; --j) {
      const uint32_t state = states_[j * PATHS + m];
      const uint32_t code = state >> (STATE_BITS - bits_);
      const int bit = STATE_BITS + j * bits_;
      codes[bit / 8] |= static_cast<uint8_t>(code << bit % 8);
      if (bit % 8 + bits_ > 8) codes[bit / 8 + 1] |= static_cast<uint8_t>(code >> (8 - bit % 8));
      if (j == 0) {
        const uint32_t before = state << bits_;
        codes[0] |= static_cast<uint8_t>(before);
        codes[1] |= static_cast<uint8_t>(before >> 8);
      }
      m = parent_[j * PATHS + m];
    }
  }

  const float* feedback_;
  const int size_, bits_, choices_;
  int first_ = 0, count_ = 0;
  std::vector<float> target_;
  std::vector<uint8_t> parent_;
  std::vector<uint16_t> states_;
  float cost_[CANDIDATES], error_[CANDIDATES];  // of the candidates
  int from_[CANDIDATES];                         // the path before each
  Paths both_[2];
  Paths *now_ = &both_[0], *next_ = &both_[1];
  uint32_t key_[SLOTS];
  int slot_[SLOTS];
};

Tensor trellis_encode(const Tensor& target, const Tensor& feedback, int64_t bits) {
  const bool shaped = target.dim() == 2 && feedback.dim() == 2 && feedback.size(0) == target.size(1) &&
                      feedback.size(1) == target.size(1) && target.size(1) > 0 && target.size(1) % 8 == 0;
  STD_TORCH_CHECK(shaped && bits >= 1 && bits <= 4 && target.scalar_type() == ScalarType::Float &&
                      feedback.scalar_type() == ScalarType::Float,
                  "trellis_encode: target ", shape(target), " and feedback ", shape(feedback), " of ", bits,
                  " bits, which do not fit");
  const Tensor targets = as(ScalarType::Float, target), rows_of_feedback = as(ScalarType::Float, feedback);
  const int64_t rows = target.size(0), size = target.size(1), bytes = STATE_BYTES + size * bits / 8;
  Tensor codes = torch::stable::new_empty(target, {rows, bytes}, ScalarType::Byte);
  static const Values values;
  auto* to = codes.mutable_data_ptr<uint8_t>();
  const auto *from = targets.const_data_ptr<float>(), *back = rows_of_feedback.const_data_ptr<float>();
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    Search search(back, static_cast<int>(size), static_cast<int>(bits));
    for (int64_t row = begin; row < end; ++row) search.encode(from + row * size, values, to + row * bytes);
  });
  return codes;
}

#ifdef __x86_64__

// ---- The values, and their product with one x. ----

constexpr int64_t AHEAD = 2048;  // bytes that are asked of memory before they are needed

// The sums of the bytes of eight mixed states, whose columns' codes begin at `bytes`; reads up to 2 bytes too far.
template <int BITS>
WITH_AVX2 inline __m256i byte_sums(const uint8_t* bytes) {
  constexpr int skipped = 4 * BITS / 8, rest = 4 * BITS % 8;
  int32_t low, high;
  std::memcpy(&low, bytes, sizeof low);
  std::memcpy(&high, bytes + skipped, sizeof high);
  const __m256i words = _mm256_set_m128i(_mm_set1_epi32(high), _mm_set1_epi32(low));
  const __m256i shifts = _mm256_setr_epi32(BITS, 2 * BITS, 3 * BITS, 4 * BITS, rest + BITS, rest + 2 * BITS,
                                           rest + 3 * BITS, rest + 4 * BITS);
  const __m256i states = _mm256_and_si256(_mm256_srlv_epi32(words, shifts), _mm256_set1_epi32(STATES - 1));
  const __m256i mixed = _mm256_add_epi32(_mm256_mullo_epi32(states, _mm256_set1_epi32(static_cast<int>(FACTOR))),
                                         _mm256_set1_epi32(static_cast<int>(OFFSET)));
  return _mm256_madd_epi16(_mm256_maddubs_epi16(mixed, _mm256_set1_epi8(1)), _mm256_set1_epi16(1));
}

template <int BITS>
WITH_AVX2 float row_dot(const uint8_t* codes, const float* x, int64_t size) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  int64_t j = 0;
  for (; j + 16 <= size; j += 16, codes += 2 * BITS) {
    sums[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte_sums<BITS>(codes)), _mm256_loadu_ps(x + j), sums[0]);
    sums[1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte_sums<BITS>(codes + BITS)), _mm256_loadu_ps(x + j + 8), sums[1]);
  }
  if (j < size)
    sums[0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(byte_sums<BITS>(codes)), _mm256_loadu_ps(x + j), sums[0]);
  const __m256 both = _mm256_add_ps(sums[0], sums[1]);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// Calls `run` for each row, with its bytes where four more can be read.
template <typename Run>
void for_each_row(const Tensor& codes, const Run& run) {
  const int64_t rows = codes.size(0), bytes = codes.size(1);
  const auto* all = codes.const_data_ptr<uint8_t>();
  parallel_for(0, rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end && row < rows - 1; ++row) {
      for (int64_t line = 0; line < bytes; line += 64) _mm_prefetch(all + row * bytes + AHEAD + line, _MM_HINT_T0);
      run(row, all + row * bytes);
    }
  });
  if (!rows) return;
  std::vector<uint8_t> last(bytes + sizeof(int32_t));
  std::memcpy(last.data(), all + (rows - 1) * bytes, bytes);
  run(rows - 1, last.data());
}

void check(const Tensor& codes, int64_t size, int64_t bits) {
  STD_TORCH_CHECK(codes.dim() == 2 && bits >= 1 && bits <= 4 && codes.scalar_type() == ScalarType::Byte &&
                      size % 8 == 0 && codes.size(1) == STATE_BYTES + size * bits / 8,
                  "codes are ", shape(codes), " ", codes.scalar_type(), " of ", bits, " bits for ", size,
                  " columns, which do not fit");
}

Tensor trellis_dot(const Tensor& x, const Tensor& codes, int64_t bits) {
  check(codes, x.numel(), bits);
  const Tensor numbers = as(ScalarType::Float, x), in_rows = as(ScalarType::Byte, codes);
  Tensor y = torch::stable::new_empty(x, {codes.size(0)}, ScalarType::Float);
  const auto* from = numbers.const_data_ptr<float>();
  auto* to = y.mutable_data_ptr<float>();
  const int64_t size = x.numel();
  const float common = MEAN * std::accumulate(from, from + size, 0.0f);
  const auto dot = bits == 1 ? row_dot<1> : bits == 2 ? row_dot<2> : bits == 3 ? row_dot<3> : row_dot<4>;
  for_each_row(in_rows, [&](int64_t row, const uint8_t* at) { to[row] = (dot(at, from, size) - common) / DEVIATION; });
  return y;
}

template <int BITS>
WITH_AVX2 void row_values(const uint8_t* codes, float* values, int64_t size) {
  for (int64_t j = 0; j < size; j += 8, codes += BITS) {
    const __m256i centred = _mm256_sub_epi32(byte_sums<BITS>(codes), _mm256_set1_epi32(MEAN));
    _mm256_storeu_ps(values + j, _mm256_div_ps(_mm256_cvtepi32_ps(centred), _mm256_set1_ps(DEVIATION)));
  }
}

Tensor trellis_values(const Tensor& codes, int64_t bits) {
  const bool countable = codes.dim() == 2 && bits > 0;
  const int64_t size = countable ? (codes.size(1) - STATE_BYTES) * 8 / bits : 0;
  check(codes, size, bits);
  const Tensor in_rows = as(ScalarType::Byte, codes);
  Tensor values = torch::stable::new_empty(codes, {codes.size(0), size}, ScalarType::Float);
  auto* to = values.mutable_data_ptr<float>();
  const auto write = bits == 1 ? row_values<1> : bits == 2 ? row_values<2> : bits == 3 ? row_values<3> : row_values<4>;
  for_each_row(in_rows, [&](int64_t row, const uint8_t* at) { write(at, to + row * size, size); });
  return values;
}

#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ryzen_llm, m) {
  m.def("trellis_encode(Tensor target, Tensor feedback, int bits) -> Tensor");
  m.def("trellis_dot(Tensor x, Tensor codes, int bits) -> Tensor");
  m.def("trellis_values(Tensor codes, int bits) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(ryzen_llm, CPU, m) {
  m.impl("trellis_encode", TORCH_BOX(&trellis_encode));
#ifdef __x86_64__
  m.impl("trellis_dot", TORCH_BOX(&trellis_dot));
  m.impl("trellis_values", TORCH_BOX(&trellis_values));
#endif
}
