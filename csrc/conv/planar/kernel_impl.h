// The convolution's inner loops, compiled once per instruction set. No standard library here: an inline
// function of it, built with wide instructions, could be the copy that the linker keeps for everybody.
#pragma once

#include "conv/parts.h"
#include "conv/planar/kernel.h"
#include "core/activate.h"
#include "core/simd.h"

namespace dsp {
namespace DSP_ISA {

// What a block does rarely is out of line: a layer takes turns between several blocks, and the code of all of
// them should stay in the instruction cache.
__attribute__((noinline)) inline void finish_masked(const BlockArgs& a, const Tile& tile, const Vec* values,
                                                    int filters, int vectors) {
  for (int f = 0; f < filters; ++f) {
    const Vec bias = set1(a.bias[f]);
    float* to = a.out + tile.out + a.filters[f] * a.out_plane;
    const float* from =
        a.residual == nullptr ? nullptr : a.residual + tile.residual + a.filters[f] * a.residual_plane;
    for (int v = 0; v < vectors; ++v, to += a.out_step) {
      Vec value = add(*values++, bias);
      if (from != nullptr) {
        value = add(value, load_lanes(from, tile.lanes));
        from += a.residual_step;
      }
      store_lanes(to, activate(value, *a.activation), tile.lanes);
    }
  }
}

__attribute__((noinline)) inline void add_part(Vec* total, const Vec* part, int count) {
  for (int i = 0; i < count; ++i) total[i] = add(total[i], part[i]);
}

// MF filters x NR vectors in registers. Where a step is a column of taps the rows it loads serve several
// taps, which is what keeps blocks of one to three filters from waiting for loads.
template <int MF, int NR, int KIND, int MODE>
void block(const BlockArgs& a) {
  constexpr int KH = KIND == kTap ? 1 : 3;
  constexpr bool kBy2 = KIND == kColumnBy2 || KIND == kColumnBy2Top;
  constexpr int kStride = kBy2 ? 2 : 1;
  constexpr int kRows = kStride * (NR - 1) + KH;
  constexpr int kFirstRow = KIND == kColumnTop || KIND == kColumnBy2Top ? 1 : 0;
  constexpr int kLastRow = KIND == kColumnBottom ? kRows - 2 : kRows - 1;
  const int64_t in_step = a.in_step;
  const int64_t in_hi = a.in_hi;
  const int64_t length = part_terms(a.steps * KH) / KH;
  for (int64_t t = 0; t < a.n_tiles; ++t) {
    const Tile& tile = a.tiles[t];
    Vec acc[MF][NR];
    DSP_UNROLL
    for (int f = 0; f < MF; ++f) {
      DSP_UNROLL
      for (int v = 0; v < NR; ++v) acc[f][v] = zero();
    }
    const float* base = a.in + tile.in;
    const float* w = a.weights;
    const int64_t* offset = a.offsets;
    Vec total[MF * NR], part[MF * NR];
    int64_t s = 0;
    for (;;) {
      const int64_t end = a.steps - s > length ? s + length : a.steps;
      for (; s < end; ++s) {
        const float* p = base + offset[s];
        Vec x[kRows];
        const auto load_row = [&](int v) {
          const float* row = p + v * in_step;
          x[v] = MODE == kHalf ? load_half(row, row + in_hi)
                               : (MODE == kMasked ? load_lanes(row, tile.lanes) : load(row));
        };
        DSP_UNROLL
        for (int ky = 0; ky < KH; ++ky) {
          // Rows are loaded when they are needed: then those that are alive fit the registers. By 2 each tap
          // meets other rows than the one before.
          DSP_UNROLL
          for (int v = 0; v < NR; ++v) {
            const int row = kStride * v + ky;
            const bool fresh = ky == 0 || v == NR - 1 || kBy2;
            if (fresh && row >= kFirstRow && row <= kLastRow) load_row(row);
          }
          DSP_UNROLL
          for (int f = 0; f < MF; ++f) {
            const Vec value = set1(w[ky * MF + f]);
            DSP_UNROLL
            for (int v = 0; v < NR; ++v) {
              const int row = kStride * v + ky;
              if (row >= kFirstRow && row <= kLastRow) fma_to(acc[f][v], value, x[row]);
            }
          }
        }
        w += KH * MF;
      }
      if (s == a.steps) break;
      Vec* to = s == length ? total : part;
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        DSP_UNROLL
        for (int v = 0; v < NR; ++v) {
          to[f * NR + v] = acc[f][v];
          acc[f][v] = zero();
        }
      }
      if (s > length) add_part(total, part, MF * NR);
    }
    if (length < a.steps) {
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        DSP_UNROLL
        for (int v = 0; v < NR; ++v) acc[f][v] = add(total[f * NR + v], acc[f][v]);
      }
    }
    if (MODE == kFull && tile.lanes < kLanes) {
      Vec values[MF * NR];
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        DSP_UNROLL
        for (int v = 0; v < NR; ++v) values[f * NR + v] = acc[f][v];
      }
      finish_masked(a, tile, values, MF, NR);
      continue;
    }
    const Activation& activation = *a.activation;
    const Vec least = set1(activation.least);
    DSP_UNROLL
    for (int f = 0; f < MF; ++f) {
      const Vec bias = set1(a.bias[f]);
      DSP_UNROLL
      for (int v = 0; v < NR; ++v) acc[f][v] = add(acc[f][v], bias);
    }
    if (a.residual != nullptr) {
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        const float* from = a.residual + tile.residual + a.filters[f] * a.residual_plane;
        DSP_UNROLL
        for (int v = 0; v < NR; ++v, from += a.residual_step) {
          const Vec more = MODE == kHalf ? load_half_lanes(from, from + a.residual_hi, tile.lanes)
                                         : (MODE == kMasked ? load_lanes(from, tile.lanes) : load(from));
          acc[f][v] = add(acc[f][v], more);
        }
      }
    }
    DSP_UNROLL
    for (int f = 0; f < MF; ++f) {
      DSP_UNROLL
      for (int v = 0; v < NR; ++v) acc[f][v] = max(least, acc[f][v]);
    }
    if (activation.most < DSP_INFINITY) {
      const Vec most = set1(activation.most);
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        DSP_UNROLL
        for (int v = 0; v < NR; ++v) acc[f][v] = min(most, acc[f][v]);
      }
    }
    if (__builtin_expect(activation.curve, 0)) {
      Vec values[MF * NR];
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        DSP_UNROLL
        for (int v = 0; v < NR; ++v) values[f * NR + v] = acc[f][v];
      }
      apply_curve(values, MF * NR, activation);
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        DSP_UNROLL
        for (int v = 0; v < NR; ++v) acc[f][v] = values[f * NR + v];
      }
    }
    if (MODE == kFull && a.out_odd != 0) {
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) {
        float* to = a.out + tile.out + a.filters[f] * a.out_plane;
        DSP_UNROLL
        for (int v = 0; v < NR; ++v, to += a.out_step) store_apart(to, to + a.out_odd, acc[f][v]);
      }
      continue;
    }
    DSP_UNROLL
    for (int f = 0; f < MF; ++f) {
      float* to = a.out + tile.out + a.filters[f] * a.out_plane;
      DSP_UNROLL
      for (int v = 0; v < NR; ++v, to += a.out_step) {
        if (MODE == kHalf) {
          store_half_lanes(to, to + a.out_hi, acc[f][v], tile.lanes);
        } else if (MODE == kMasked) {
          store_lanes(to, acc[f][v], tile.lanes);
        } else {
          store(to, acc[f][v]);
        }
      }
    }
  }
}

template <int MF, int NT, int MODE>
DSP_INLINE void grad_step(Vec (&acc)[MF][NT], const float* x, int64_t x_hi, const float* const (&grad)[MF],
                          int64_t grad_at, int64_t grad_hi, const int64_t* offsets, int lanes) {
  Vec g[MF];
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) {
    const float* from = grad[f] + grad_at;
    if (MODE == kHalf) {
      g[f] = load_half_lanes(from, from + grad_hi, lanes);
    } else if (MODE == kMasked) {
      g[f] = load_lanes(from, lanes);
    } else {
      g[f] = load(from);
    }
  }
  DSP_UNROLL
  for (int t = 0; t < NT; ++t) {
    const float* from = x + offsets[t];
    Vec value;
    if (MODE == kHalf) {
      value = load_half_lanes(from, from + x_hi, lanes);
    } else if (MODE == kMasked) {
      value = load_lanes(from, lanes);
    } else {
      value = load(from);
    }
    DSP_KEEP(value);
    DSP_UNROLL
    for (int f = 0; f < MF; ++f) acc[f][t] = fma(g[f], value, acc[f][t]);
  }
}

template <int MF, int NT>
void grad_block(const GradArgs& a) {
  Vec acc[MF][NT];
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) {
    DSP_UNROLL
    for (int t = 0; t < NT; ++t) acc[f][t] = zero();
  }
  int64_t offsets[NT];
  DSP_UNROLL
  for (int t = 0; t < NT; ++t) offsets[t] = a.offsets[t];
  // Images innermost: a tile's few registers of addresses then serve all of them.
  for (int64_t r = 0; r < a.n_runs; ++r) {
    const TileRun& run = a.runs[r];
    const int64_t vectors = int64_t{1} << run.rows_log;
    for (int64_t i = run.first; i < run.first + run.count; ++i) {
      const Tile& tile = a.tiles[i];
      const float* x = a.x + tile.in;
      const float* grad[MF];
      DSP_UNROLL
      for (int f = 0; f < MF; ++f) grad[f] = a.grad + a.filters[f] * a.grad_plane;
      const int64_t length = vectors * a.grad_step;
      int64_t start = tile.out;
      for (int64_t n = 0; n < a.images; ++n, x += a.x_image, start += a.grad_image) {
        const float* from = x;
        int64_t at = start;
        if (run.mode == kHalf) {
          for (; at < start + length; at += a.grad_step, from += a.x_step) {
            grad_step<MF, NT, kHalf>(acc, from, vectors * a.x_step, grad, at, vectors * a.grad_step, offsets,
                                     tile.lanes);
          }
        } else if (tile.lanes < kLanes) {
          for (; at < start + length; at += a.grad_step, from += a.x_step)
            grad_step<MF, NT, kMasked>(acc, from, 0, grad, at, 0, offsets, tile.lanes);
        } else {
          for (; at < start + length; at += a.grad_step, from += a.x_step)
            grad_step<MF, NT, kFull>(acc, from, 0, grad, at, 0, offsets, tile.lanes);
        }
      }
    }
  }
  // Unrolled like everything that touches acc: an index known only at run time would put it into memory.
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) {
    DSP_UNROLL
    for (int t = 0; t < NT; ++t) a.out[f * a.out_row + t] += sum_lanes(acc[f][t]);
  }
}

// A 3x3 kernel with stride 1: a vector of the input serves the three rows of taps, against three rows of
// gradient.
template <int MF, int NR, int MODE>
DSP_INLINE void grad_rows_tile(Vec (&acc)[MF][9], const float* x, int64_t x_step,
                               const float* const (&grad)[MF], int64_t at, int64_t grad_step,
                               const int64_t* columns, int lanes) {
  Vec g[MF][NR];
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) {
    DSP_UNROLL
    for (int v = 0; v < NR; ++v) {
      const float* from = grad[f] + at + v * grad_step;
      if (MODE == kHalf) {
        g[f][v] = load_half_lanes(from, from + NR * grad_step, lanes);
      } else if (MODE == kMasked) {
        g[f][v] = load_lanes(from, lanes);
      } else {
        g[f][v] = load(from);
      }
      DSP_KEEP(g[f][v]);
    }
  }
  DSP_UNROLL
  for (int r = 0; r < NR + 2; ++r) {
    DSP_UNROLL
    for (int kx = 0; kx < 3; ++kx) {
      const float* from = x + r * x_step + columns[kx];
      Vec value;
      if (MODE == kHalf) {
        value = load_half_lanes(from, from + NR * x_step, lanes);
      } else if (MODE == kMasked) {
        value = load_lanes(from, lanes);
      } else {
        value = load(from);
      }
      DSP_KEEP(value);
      DSP_UNROLL
      for (int ky = 0; ky < 3; ++ky) {
        if (r - ky < 0 || r - ky >= NR) continue;
        DSP_UNROLL
        for (int f = 0; f < MF; ++f) acc[f][ky * 3 + kx] = fma(g[f][r - ky], value, acc[f][ky * 3 + kx]);
      }
    }
  }
}

template <int MF>
void grad_rows(const GradArgs& a) {
  Vec acc[MF][9];
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) {
    DSP_UNROLL
    for (int t = 0; t < 9; ++t) acc[f][t] = zero();
  }
  const int64_t columns[3] = {a.offsets[0], a.offsets[1], a.offsets[2]};
  const float* grad[MF];
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) grad[f] = a.grad + a.filters[f] * a.grad_plane;
  for (int64_t r = 0; r < a.n_runs; ++r) {
    const TileRun& run = a.runs[r];
    for (int64_t i = run.first; i < run.first + run.count; ++i) {
      const Tile& tile = a.tiles[i];
      const float* x = a.x + tile.in;
      int64_t at = tile.out;
      const int lanes = tile.lanes;
#define DSP_GRAD_IMAGES(NR, MODE)                                            \
  for (int64_t n = 0; n < a.images; ++n, x += a.x_image, at += a.grad_image) \
  grad_rows_tile<MF, NR, MODE>(acc, x, a.x_step, grad, at, a.grad_step, columns, lanes)
      if (run.mode == kHalf) {
        if (run.rows_log == 2) {
          DSP_GRAD_IMAGES(4, kHalf);
        } else if (run.rows_log == 1) {
          DSP_GRAD_IMAGES(2, kHalf);
        } else {
          DSP_GRAD_IMAGES(1, kHalf);
        }
      } else if (run.rows_log == 2 && lanes == kLanes) {
        DSP_GRAD_IMAGES(4, kFull);
      } else if (run.rows_log == 2) {
        DSP_GRAD_IMAGES(4, kMasked);
      } else if (run.rows_log == 1) {
        DSP_GRAD_IMAGES(2, kMasked);
      } else {
        DSP_GRAD_IMAGES(1, kMasked);
      }
#undef DSP_GRAD_IMAGES
    }
  }
  DSP_UNROLL
  for (int f = 0; f < MF; ++f) {
    DSP_UNROLL
    for (int t = 0; t < 9; ++t) a.out[f * a.out_row + t] += sum_lanes(acc[f][t]);
  }
}

DSP_INLINE void copy_row(float* dst, const float* from, int64_t count) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(dst + j, load(from + j));
  if (j < count) {
    const int rest = static_cast<int>(count - j);
    store_lanes(dst + j, load_lanes(from + j, rest), rest);
  }
}

// Few values, as a rule: a call of memset would take longer.
DSP_INLINE void clear_row(float* dst, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes)
    store_lanes(dst + j, zero(), static_cast<int>(count - j < kLanes ? count - j : kLanes));
}

// Every second of at most `width` values.
DSP_INLINE void copy_even(float* dst, const float* from, int64_t count, int64_t width) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t left = width - 2 * j;
    const float* at = from + 2 * j;
    const int rest = static_cast<int>(count - j < kLanes ? count - j : kLanes);
    if (left >= 2 * kLanes && rest == kLanes) {
      store(dst + j, even(load(at), load(at + kLanes)));
    } else {
      const int low = static_cast<int>(left < kLanes ? left : kLanes);
      const int high = static_cast<int>(left < kLanes ? 0 : (left < 2 * kLanes ? left - kLanes : kLanes));
      const Vec b = high > 0 ? load_lanes(at + kLanes, high) : zero();
      store_lanes(dst + j, even(load_lanes(at, low), b), rest);
    }
  }
}

inline void gather(const GatherArgs& a) {
  const float* from = a.from + a.first * a.stride;
  float* dst = a.dst;
  const int64_t real = a.last - a.first;
  for (int64_t row = 0; row < a.rows; ++row) {
    if (a.ahead != 0) {
      for (int64_t j = 0; j < a.width; j += 16) __builtin_prefetch(from + a.ahead + j, 0, 2);
    }
    clear_row(dst, a.first);
    if (a.stride == 1) {
      copy_row(dst + a.first, from, real);
    } else if (a.stride == 2) {
      copy_even(dst + a.first, from, real, a.width);
    } else {
      for (int64_t j = 0; j < real; ++j) dst[a.first + j] = from[j * a.stride];
    }
    clear_row(dst + a.last, a.count - a.last);
    dst += a.dst_pitch;
    from += a.from_pitch;
  }
}

inline void zip_rows(float* dst, const float* even_values, const float* odd_values, int64_t count) {
  for (int64_t i = 0, j = 0; i < count; i += 2 * kLanes, j += kLanes) {
    const int64_t evens = (count - i + 1) / 2;
    const int64_t odds = (count - i) / 2;
    const auto some = [&](const float* from, int64_t left) {
      if (from == nullptr || left <= 0) return zero();
      return left >= kLanes ? load(from + j) : load_lanes(from + j, static_cast<int>(left));
    };
    const Vec a = some(even_values, evens);
    const Vec b = some(odd_values, odds);
    const int64_t left = count - i;
    if (left >= 2 * kLanes) {
      store(dst + i, zip_low(a, b));
      store(dst + i + kLanes, zip_high(a, b));
      continue;
    }
    store_lanes(dst + i, zip_low(a, b), static_cast<int>(left < kLanes ? left : kLanes));
    if (left > kLanes) store_lanes(dst + i + kLanes, zip_high(a, b), static_cast<int>(left - kLanes));
  }
}

template <bool ADDS, bool APART>
void fill_rows(float* dst, int64_t dst_pitch, int64_t dst_odd, const float* residual, int64_t residual_pitch,
               float value, int64_t rows, int64_t width, const Activation& activation) {
  const Vec base = set1(value);
  const Vec constant = activate(base, activation);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      const Vec result = ADDS ? activate(add(base, load(residual + i)), activation) : constant;
      if (APART) {
        store_apart(dst + i / 2, dst + i / 2 + dst_odd, result);
      } else {
        store(dst + i, result);
      }
    }
    if (!APART && i < width) {
      const int rest = static_cast<int>(width - i);
      const Vec result = ADDS ? activate(add(base, load_lanes(residual + i, rest)), activation) : constant;
      store_lanes(dst + i, result, rest);
    }
    dst += dst_pitch;
    if (ADDS) residual += residual_pitch;
  }
}

inline void fill(float* dst, int64_t dst_pitch, int64_t dst_odd, const float* residual,
                 int64_t residual_pitch, float value, int64_t rows, int64_t width,
                 const Activation& activation) {
  const auto run = residual == nullptr ? (dst_odd == 0 ? &fill_rows<false, false> : &fill_rows<false, true>)
                                       : (dst_odd == 0 ? &fill_rows<true, false> : &fill_rows<true, true>);
  run(dst, dst_pitch, dst_odd, residual, residual_pitch, value, rows, width, activation);
}

inline void add_planes(float* dst, const float* a, const float* b, int64_t count,
                       const Activation& activation) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(dst + i, activate(add(load(a + i), load(b + i)), activation));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store_lanes(dst + i, activate(add(load_lanes(a + i, rest), load_lanes(b + i, rest)), activation), rest);
  }
}

inline void affine(float* dst, const float* a, float scale, float shift, int64_t count,
                   const Activation& activation) {
  const Vec s = set1(scale);
  const Vec t = set1(shift);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, activate(fma(load(a + i), s, t), activation));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store_lanes(dst + i, activate(fma(load_lanes(a + i, rest), s, t), activation), rest);
  }
}

template <int64_t OP>
DSP_INLINE Vec combine(Vec a, Vec b) {
  const Vec minus = set1(-1.0f);
  if (OP == kAdd) return add(a, b);
  if (OP == kSubtract) return fma(b, minus, a);
  if (OP == kMultiply) return mul(a, b);
  if (OP == kDivide) return div(a, b);
  if (OP == kMaximum) return max_nan(a, b);
  if (OP == kMinimum) return mul(minus, max_nan(mul(minus, a), mul(minus, b)));
  return fma(b, min(zero(), a), max(zero(), a));
}

template <int64_t OP>
void elementwise_row(float* dst, const float* a, const float* b, int64_t count, int64_t a_step,
                     int64_t b_step, const Activation& activation) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int some = static_cast<int>(count - i < kLanes ? count - i : kLanes);
    const Vec u = a_step == 0 ? set1(*a) : (some == kLanes ? load(a + i) : load_lanes(a + i, some));
    const Vec v = b_step == 0 ? set1(*b) : (some == kLanes ? load(b + i) : load_lanes(b + i, some));
    const Vec made = activate(combine<OP>(u, v), activation);
    if (some == kLanes) {
      store(dst + i, made);
    } else {
      store_lanes(dst + i, made, some);
    }
  }
}

inline void elementwise(int64_t op, float* dst, const float* a, const float* b, int64_t count, int64_t a_step,
                        int64_t b_step, const Activation& activation) {
  constexpr decltype(&elementwise_row<kAdd>) rows[kElementwise] = {
      &elementwise_row<kAdd>,    &elementwise_row<kSubtract>, &elementwise_row<kMultiply>,
      &elementwise_row<kDivide>, &elementwise_row<kMaximum>,  &elementwise_row<kMinimum>,
      &elementwise_row<kPrelu>,
  };
  rows[op](dst, a, b, count, a_step, b_step, activation);
}

inline float sum(const float* x, int64_t count) {
  Vec acc[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    DSP_UNROLL
    for (int j = 0; j < 4; ++j) acc[j] = add(acc[j], load(x + i + j * kLanes));
  }
  for (; i + kLanes <= count; i += kLanes) acc[0] = add(acc[0], load(x + i));
  if (i < count) acc[1] = add(acc[1], load_lanes(x + i, static_cast<int>(count - i)));
  return sum_lanes(add(add(acc[0], acc[1]), add(acc[2], acc[3])));
}

template <int MO>
DSP_INLINE void dot_rows(float* out, const float* x, const float* w, const float* bias, int64_t inputs) {
  Vec acc[MO];
  DSP_UNROLL
  for (int o = 0; o < MO; ++o) acc[o] = zero();
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes) {
    const Vec value = load(x + i);
    DSP_UNROLL
    for (int o = 0; o < MO; ++o) acc[o] = fma(value, load(w + o * inputs + i), acc[o]);
  }
  if (i < inputs) {
    const int rest = static_cast<int>(inputs - i);
    const Vec value = load_lanes(x + i, rest);
    DSP_UNROLL
    for (int o = 0; o < MO; ++o) acc[o] = fma(value, load_lanes(w + o * inputs + i, rest), acc[o]);
  }
  for (int o = 0; o < MO; ++o) out[o] = sum_lanes(acc[o]) + (bias == nullptr ? 0.0f : bias[o]);
}

inline void linear(float* out, const float* x, const float* w, const float* bias, int64_t inputs,
                   int64_t outputs, const Activation& activation) {
  int64_t o = 0;
  for (; o + 4 <= outputs; o += 4)
    dot_rows<4>(out + o, x, w + o * inputs, bias == nullptr ? nullptr : bias + o, inputs);
  for (; o < outputs; ++o)
    dot_rows<1>(out + o, x, w + o * inputs, bias == nullptr ? nullptr : bias + o, inputs);
  for (int64_t i = 0; i < outputs; i += kLanes) {
    const int count = static_cast<int>(outputs - i < kLanes ? outputs - i : kLanes);
    store_lanes(out + i, activate(load_lanes(out + i, count), activation), count);
  }
}

inline int64_t peak(int64_t rounds, float* sink) {
  constexpr int kChains = 12;  // more than latency times units, and they fit 16 registers
  Vec sums[kChains];
  DSP_UNROLL
  for (int i = 0; i < kChains; ++i) sums[i] = set1(static_cast<float>(i));
  Vec a = set1(0.5f), b = set1(1.0f);
  for (int64_t round = 0; round < rounds; ++round) {
    DSP_KEEP(a);
    DSP_KEEP(b);
    DSP_UNROLL
    for (int i = 0; i < kChains; ++i) {
      sums[i] = fma(sums[i], a, b);
      DSP_KEEP(sums[i]);
    }
  }
  DSP_UNROLL
  for (int i = 1; i < kChains; ++i) sums[0] = add(sums[0], sums[i]);
  float lanes[kLanes];
  store(lanes, sums[0]);
  *sink = lanes[0];
  return rounds * kChains * kLanes * 2;
}

template <int MF, int NR, int MODE, bool EDGES>
void add_kinds(BlockFn (&entry)[kStepKinds][3]) {
  entry[kTap][MODE] = &block<MF, NR, kTap, MODE>;
  entry[kColumn][MODE] = &block<MF, NR, kColumn, MODE>;
  entry[kColumnTop][MODE] = &block < MF, NR, EDGES ? kColumnTop : kColumn, MODE > ;
  entry[kColumnBottom][MODE] = &block < MF, NR, EDGES ? kColumnBottom : kColumn, MODE > ;
  entry[kColumnBy2][MODE] = &block<MF, NR, kColumnBy2, MODE>;
  entry[kColumnBy2Top][MODE] = &block < MF, NR, EDGES ? kColumnBy2Top : kColumnBy2, MODE > ;
}

template <int MF, int NR, int NR_LOG, bool EDGES>
void add_rows(KernelTable* table) {
  auto& entry = table->block[MF - 1][NR_LOG];
  add_kinds<MF, NR, kFull, EDGES>(entry);
  add_kinds<MF, NR, kHasHalf ? kHalf : kFull, EDGES>(entry);
  if (NR == 1) entry[kTap][kMasked] = &block<MF, 1, kTap, kMasked>;
}

template <int MF>
void add_filters(KernelTable* table) {
  constexpr int kBestLog = kManyRegisters ? (MF == 1 ? 3 : 2) : (MF <= 2 ? 2 : 1);
  table->rows_log[MF] = kBestLog;
  add_rows<MF, 1, 0, false>(table);
  add_rows<MF, 2, 1, kBestLog == 1>(table);
  if (kBestLog >= 2) add_rows<MF, kBestLog >= 2 ? 4 : 1, kBestLog >= 2 ? 2 : 0, kBestLog == 2>(table);
  if (kBestLog >= 3) add_rows<MF, kBestLog >= 3 ? 8 : 1, kBestLog >= 3 ? 3 : 0, kBestLog == 3>(table);
}

inline KernelTable make_table() {
  KernelTable table{};
  table.lanes = kLanes;
  table.has_half = kHasHalf;
  table.max_filters = kManyRegisters ? 6 : 5;
  add_filters<1>(&table);
  add_filters<2>(&table);
  add_filters<3>(&table);
  add_filters<4>(&table);
  add_filters<5>(&table);
  if (kManyRegisters) add_filters<kManyRegisters ? 6 : 5>(&table);
  table.grad[0][0] = &grad_block<1, 1>;
  table.grad[1][0] = &grad_block<2, 1>;
  table.grad[2][0] = &grad_block<3, 1>;
  table.grad[0][1] = &grad_block<1, 3>;
  table.grad[1][1] = &grad_block<2, 3>;
  table.grad[2][1] = &grad_block<3, 3>;
  if (kManyRegisters) {
    table.grad[0][2] = &grad_block < 1, kManyRegisters ? 9 : 3 > ;
    table.grad[1][2] = &grad_block < 2, kManyRegisters ? 9 : 3 > ;
    table.grad[2][2] = &grad_block < 3, kManyRegisters ? 9 : 3 > ;
  }
  table.grad_rows[0] = &grad_rows<1>;
  table.grad_rows[1] = kManyRegisters ? &grad_rows < kManyRegisters ? 2 : 1 > : nullptr;
  table.max_grad_taps = kManyRegisters ? 9 : 3;
  table.gather = &gather;
  table.zip = &zip_rows;
  table.fill = &fill;
  table.add = &add_planes;
  table.affine = &affine;
  table.elementwise = &elementwise;
  table.linear = &linear;
  table.sum = &sum;
  table.peak = &peak;
  return table;
}

}  // namespace DSP_ISA
}  // namespace dsp
