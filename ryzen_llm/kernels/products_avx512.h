// For ops in C++ that multiply matrices in bf16: VDPBF16PS adds the products of pairs of numbers that meet the same sum.

#pragma once

#include "bf16_avx512.h"

using Pair = uint32_t;  // two bf16 numbers, the first in the low half

// A left factor: pair s of row r is at data[r * row + s * step].
struct Left {
  const Pair* data;
  int64_t row, step;
};

// sums += left (ROWS x steps) right (steps x VECTORS * LANES), in registers. Steps of the right factor are `right_step`
// pairs apart and begin at multiples of 64 bytes; a pair of the left one goes to all lanes.
template <int ROWS, int VECTORS>
INLINE void add_products(Left left, const Pair* right, int64_t right_step, int64_t steps, __m512 (&sums)[ROWS][VECTORS]) {
  for (int64_t s = 0; s < steps; ++s) {
    __m512bh columns[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) columns[v] = (__m512bh)_mm512_load_si512(right + s * right_step + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(left.data[r * left.row + s * left.step]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, columns[v]);
    }
  }
}
