// Products of bf16 matrices with AMX, of 32 rows and 32 pairs at a time: for what `products_avx512.h` is for, where a CPU
// has that unit.

#pragma once

#include "products_avx512.h"

constexpr int64_t TILE = 16, TILES = 2 * TILE;  // rows of a tile, which has 64 bytes in each; and of two

#if defined(__linux__) && __has_include(<amxbf16intrin.h>)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

// Whether this CPU has the unit and Linux lets this process use it, for which a process has to ask.
inline bool may_use_amx() {
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool may = [] {
    unsigned eax, ebx, ecx, edx = 0;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;  // not every compiler knows their names
    const bool known = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
    return known && edx & AMX_BF16 && edx & AMX_TILE && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
  }();
  return may;
}

// What is in memory is there for others before and after: to GCC its own instructions for tiles do not touch memory.
inline void settle(const void* written) { asm volatile("" ::"r"(written) : "memory"); }

// The calling thread's tiles while it is there, if it is to have any.
class Amx {
 public:
  WITH_AMX explicit Amx(bool used) : used_(used) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    } shapes;
    settle(&shapes);
    if (used_) _tile_loadconfig(&shapes);
  }
  WITH_AMX ~Amx() {
    if (used_) _tile_release();
  }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

 private:
  bool used_;
};

// to (TILES x TILES or, if not WIDE, TILE) = or += left (TILES x steps) right, steps a multiple of TILE.
template <bool ADD, bool WIDE>
WITH_AMX inline void multiply_tiles(Left left, const Pair* right, int64_t right_step, int64_t steps, float* to,
                                    int64_t to_row) {
  const int64_t to_bytes = to_row * sizeof *to, left_bytes = left.row * sizeof(Pair), right_bytes = right_step * sizeof(Pair);
  float* const below = to + TILE * to_row;
  settle(to);
  if (ADD) {
    _tile_loadd(0, to, to_bytes);
    _tile_loadd(2, below, to_bytes);
    if (WIDE) _tile_loadd(1, to + TILE, to_bytes);
    if (WIDE) _tile_loadd(3, below + TILE, to_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(2);
    _tile_zero(1);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; s += TILE) {
    const Pair *rows = left.data + s, *columns = right + s * right_step;
    _tile_loadd(4, rows, left_bytes);
    _tile_loadd(5, rows + TILE * left.row, left_bytes);
    _tile_loadd(6, columns, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (WIDE) {
      _tile_loadd(7, columns + TILE, right_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, to, to_bytes);
  _tile_stored(2, below, to_bytes);
  if (WIDE) _tile_stored(1, to + TILE, to_bytes);
  if (WIDE) _tile_stored(3, below + TILE, to_bytes);
  settle(to);
}
#else
#define WITH_AMX

inline bool may_use_amx() { return false; }
struct Amx {
  explicit Amx(bool) {}
};
template <bool ADD, bool WIDE>
inline void multiply_tiles(Left, const Pair*, int64_t, int64_t, float*, int64_t) {}
#endif
