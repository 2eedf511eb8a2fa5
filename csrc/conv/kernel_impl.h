// The convolution's inner loops, compiled once per instruction set. No standard library here: an inline
// function of it, built with wide instructions, could be the copy that the linker keeps for everybody.
#pragma once

#include "conv/kernel.h"
#include "core/simd.h"

namespace dsp {
namespace DSP_ISA {

// MF filters x NR vectors in registers. With KH = 3 a step is one column of taps: the NR + 2 rows it loads
// serve all three taps, which is what keeps blocks of one to three filters from waiting for loads.
template <int MF, int NR, int KH, int MODE>
void block(const BlockArgs& a) {
  constexpr int kRows = NR + KH - 1;
  const int64_t in_step = a.in_step;
  const int64_t in_hi = a.in_hi;
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
    for (int64_t s = 0; s < a.steps; ++s) {
      const float* p = base + offset[s];
      Vec x[kRows];
      DSP_UNROLL
      for (int v = 0; v < kRows; ++v) {
        const float* row = p + v * in_step;
        if (MODE == kHalf) {
          x[v] = load_half(row, row + in_hi);
        } else if (MODE == kMasked) {
          x[v] = load_lanes(row, tile.lanes);
        } else {
          x[v] = load(row);
        }
      }
      DSP_UNROLL
      for (int ky = 0; ky < KH; ++ky) {
        DSP_UNROLL
        for (int f = 0; f < MF; ++f) {
          const Vec value = set1(w[ky * MF + f]);
          DSP_UNROLL
          for (int v = 0; v < NR; ++v) acc[f][v] = fma(value, x[v + ky], acc[f][v]);
        }
      }
      w += KH * MF;
    }
    DSP_UNROLL
    for (int f = 0; f < MF; ++f) {
      const Vec bias = set1(a.bias[f]);
      float* out = a.out + tile.out + a.filters[f] * a.out_plane;
      const float* residual =
          a.residual == nullptr ? nullptr : a.residual + tile.residual + a.filters[f] * a.residual_plane;
      DSP_UNROLL
      for (int v = 0; v < NR; ++v) {
        Vec value = add(acc[f][v], bias);
        float* to = out + v * a.out_step;
        if (MODE == kHalf) {
          if (residual != nullptr) {
            const float* from = residual + v * a.residual_step;
            value = add(value, load_half_lanes(from, from + a.residual_hi, tile.lanes));
          }
          store_half_lanes(to, to + a.out_hi, activate(value, a.activation), tile.lanes);
        } else if (tile.lanes == kLanes) {
          if (residual != nullptr) value = add(value, load(residual + v * a.residual_step));
          store(to, activate(value, a.activation));
        } else {
          if (residual != nullptr) value = add(value, load_lanes(residual + v * a.residual_step, tile.lanes));
          store_lanes(to, activate(value, a.activation), tile.lanes);
        }
      }
    }
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
    for (int64_t j = 0; j < a.first; ++j) dst[j] = 0;
    if (a.stride == 1) {
      copy_row(dst + a.first, from, real);
    } else if (a.stride == 2) {
      copy_even(dst + a.first, from, real, a.width);
    } else {
      for (int64_t j = 0; j < real; ++j) dst[a.first + j] = from[j * a.stride];
    }
    for (int64_t j = a.last; j < a.count; ++j) dst[j] = 0;
    dst += a.dst_pitch;
    from += a.from_pitch;
  }
}

inline void fill(float* dst, int64_t dst_pitch, const float* residual, int64_t residual_pitch, float value,
                 int64_t rows, int64_t width, int32_t activation) {
  const Vec base = set1(value);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      store(dst + i, activate(residual == nullptr ? base : add(base, load(residual + i)), activation));
    if (i < width) {
      const int rest = static_cast<int>(width - i);
      store_lanes(
          dst + i,
          activate(residual == nullptr ? base : add(base, load_lanes(residual + i, rest)), activation), rest);
    }
    dst += dst_pitch;
    if (residual != nullptr) residual += residual_pitch;
  }
}

inline void add_planes(float* dst, const float* a, const float* b, int64_t count, int32_t activation) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(dst + i, activate(add(load(a + i), load(b + i)), activation));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store_lanes(dst + i, activate(add(load_lanes(a + i, rest), load_lanes(b + i, rest)), activation), rest);
  }
}

inline void affine(float* dst, const float* a, float scale, float shift, int64_t count, int32_t activation) {
  const Vec s = set1(scale);
  const Vec t = set1(shift);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(dst + i, activate(fma(load(a + i), s, t), activation));
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    store_lanes(dst + i, activate(fma(load_lanes(a + i, rest), s, t), activation), rest);
  }
}

DSP_INLINE float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
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
DSP_INLINE void dot_rows(float* out, const float* x, const float* w, const float* bias, int64_t inputs,
                         int32_t activation) {
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
  for (int o = 0; o < MO; ++o) {
    float value = sum_lanes(acc[o]) + (bias == nullptr ? 0.0f : bias[o]);
    if (activation != 0 && value < 0) value = 0;
    if (activation == 2 && value > 6) value = 6;
    out[o] = value;
  }
}

inline void linear(float* out, const float* x, const float* w, const float* bias, int64_t inputs,
                   int64_t outputs, int32_t activation) {
  int64_t o = 0;
  for (; o + 4 <= outputs; o += 4)
    dot_rows<4>(out + o, x, w + o * inputs, bias == nullptr ? nullptr : bias + o, inputs, activation);
  for (; o < outputs; ++o)
    dot_rows<1>(out + o, x, w + o * inputs, bias == nullptr ? nullptr : bias + o, inputs, activation);
}

template <int MF, int NR, int NR_LOG>
void add_rows(KernelTable* table) {
  auto& entry = table->block[MF - 1][NR_LOG];
  entry[0][kFull] = &block<MF, NR, 1, kFull>;
  entry[1][kFull] = &block<MF, NR, 3, kFull>;
  if (kHasHalf) {
    entry[0][kHalf] = &block < MF, NR, 1, kHasHalf ? kHalf : kFull > ;
    entry[1][kHalf] = &block < MF, NR, 3, kHasHalf ? kHalf : kFull > ;
  }
  if (NR == 1) entry[0][kMasked] = &block<MF, 1, 1, kMasked>;
}

template <int MF>
void add_filters(KernelTable* table) {
  constexpr int kBestLog = kManyRegisters ? (MF == 1 ? 3 : 2) : (MF <= 2 ? 2 : 1);
  table->rows_log[MF] = kBestLog;
  add_rows<MF, 1, 0>(table);
  add_rows<MF, 2, 1>(table);
  if (kBestLog >= 2) add_rows<MF, kBestLog >= 2 ? 4 : 1, kBestLog >= 2 ? 2 : 0>(table);
  if (kBestLog >= 3) add_rows<MF, kBestLog >= 3 ? 8 : 1, kBestLog >= 3 ? 3 : 0>(table);
}

inline KernelTable make_table(const char* name) {
  KernelTable table{};
  table.name = name;
  table.lanes = kLanes;
  table.has_half = kHasHalf;
  table.max_filters = kManyRegisters ? 6 : 5;
  add_filters<1>(&table);
  add_filters<2>(&table);
  add_filters<3>(&table);
  add_filters<4>(&table);
  add_filters<5>(&table);
  if (kManyRegisters) add_filters<kManyRegisters ? 6 : 5>(&table);
  table.gather = &gather;
  table.fill = &fill;
  table.add = &add_planes;
  table.affine = &affine;
  table.linear = &linear;
  table.sum = &sum;
  return table;
}

}  // namespace DSP_ISA
}  // namespace dsp
