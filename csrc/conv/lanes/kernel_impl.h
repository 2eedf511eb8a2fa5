// Filters in vector lanes, pixels broadcast: the inner loops, compiled once per instruction set. No standard
// library here (see conv/planar/kernel_impl.h).
#pragma once

#include "conv/lanes/kernel.h"
#include "core/activate.h"
#include "core/simd.h"

namespace dsp {
namespace DSP_ISA {

// Results that are not whole vectors side by side. Out of line: it is long, and the loops come first.
__attribute__((noinline)) inline void lane_scatter(const LaneArgs& a, int64_t pixel, int pixels,
                                                   const float* values, int width) {
  const bool curve = a.activation->curve;
  const Vec least = set1(a.activation->least);
  const Vec most = set1(a.activation->most);
  for (int p = 0; p < pixels; ++p, values += width) {
    float* to = a.out + a.out_at[pixel + p];
    const float* from = a.residual == nullptr ? nullptr : a.residual + a.residual_at[pixel + p];
    for (int32_t i = 0; i < a.windows; ++i) {
      const LanePiece window = a.pieces[i];
      Vec v = load_expand(values + window.from, window.mask);
      if (from != nullptr) v = add(v, merge_mask(zero(), from + window.channel, window.mask));
      if (__builtin_expect(curve, 0)) apply_curve(&v, 1, *a.activation);
      store_mask(to + window.channel, min(most, max(least, v)), window.mask);
    }
    if (a.windows != 0) continue;
    const LanePiece* piece = a.pieces;
    for (int f = 0; f < width; f += kLanes) {
      Vec v = load(values + f);
      if (from != nullptr) {
        Vec more = zero();
        for (const LanePiece* i = piece;; ++i) {
          more = merge_mask(more, from + i->channel, i->mask);
          if (i->last != 0) break;
        }
        v = add(v, more);
      }
      if (__builtin_expect(curve, 0)) apply_curve(&v, 1, *a.activation);
      v = min(most, max(least, v));
      for (bool more = true; more; ++piece) {
        store_mask(to + piece->channel, v, piece->mask);
        more = piece->last == 0;
      }
    }
  }
}

// P pixels x F vectors of filters in registers. A step is one channel under one tap. Loads go to the load
// ports alone and no scalar sum is made in the loop: on some processors those would take the multipliers'
// places.
template <int P, int F>
void lane_tiles(const LaneArgs& a, int64_t pixel, int64_t tiles) {
  constexpr int kWidth = F * kLanes;
  const int64_t pairs = a.steps / 2;
  const char* ahead = a.ahead;
  for (; tiles > 0; --tiles, pixel += P) {
    Vec acc[P][F];
    const float* x[P];
    DSP_UNROLL
    for (int p = 0; p < P; ++p) {
      x[p] = a.in + a.in_at[pixel + p];
      DSP_UNROLL
      for (int f = 0; f < F; ++f) acc[p][f] = zero();
    }
    const float* w = a.weights;
    const int32_t* offset = a.offsets;
    const auto step = [&](int64_t o, const float* weights) __attribute__((always_inline)) {
      Vec value[F];
      DSP_UNROLL
      for (int f = 0; f < F; ++f) {
        value[f] = load(weights + f * kLanes);
        DSP_KEEP(value[f]);
      }
      DSP_UNROLL
      for (int p = 0; p < P; ++p) {
        Vec pixels = set1(x[p][o]);
        DSP_KEEP(pixels);
        DSP_UNROLL
        for (int f = 0; f < F; ++f) fma_to(acc[p][f], pixels, value[f]);
      }
    };
    if (a.in_ahead != 0) ahead = reinterpret_cast<const char*>(x[0] + a.in_ahead);
    const int64_t line = a.in_ahead != 0 || ahead < a.ahead_end ? 64 : 0;
    for (int64_t i = 0; i < pairs; ++i) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += line;
      step(offset[0], w);
      step(offset[1], w + kWidth);
      offset += 2;
      w += 2 * kWidth;
    }
    if (a.steps % 2 != 0) step(offset[0], w);
    float* partial = a.partial + pixel * kWidth;
    if (!a.first) {
      DSP_UNROLL
      for (int p = 0; p < P; ++p) {
        DSP_UNROLL
        for (int f = 0; f < F; ++f) acc[p][f] = add(load(partial + p * kWidth + f * kLanes), acc[p][f]);
      }
    }
    if (!a.last) {
      DSP_UNROLL
      for (int p = 0; p < P; ++p) {
        DSP_UNROLL
        for (int f = 0; f < F; ++f) store(partial + p * kWidth + f * kLanes, acc[p][f]);
      }
      continue;
    }
    Vec bias[F];
    DSP_UNROLL
    for (int f = 0; f < F; ++f) bias[f] = load(a.bias + f * kLanes);
    if (a.pieces != nullptr) {
      float values[P * kWidth];
      DSP_UNROLL
      for (int p = 0; p < P; ++p) {
        DSP_UNROLL
        for (int f = 0; f < F; ++f) store(values + p * kWidth + f * kLanes, add(acc[p][f], bias[f]));
      }
      lane_scatter(a, pixel, P, values, kWidth);
      continue;
    }
    const Vec least = set1(a.activation->least);
    const Vec most = set1(a.activation->most);
    DSP_UNROLL
    for (int p = 0; p < P; ++p) {
      float* to = a.out + a.out_at[pixel + p];
      DSP_UNROLL
      for (int f = 0; f < F; ++f) acc[p][f] = add(acc[p][f], bias[f]);
      if (a.residual != nullptr) {
        const float* from = a.residual + a.residual_at[pixel + p];
        DSP_UNROLL
        for (int f = 0; f < F; ++f) {
          const float* at = from + f * kLanes;
          acc[p][f] = add(acc[p][f], kMasksAreFree && f == F - 1 ? load_lanes(at, a.tail) : load(at));
        }
      }
      if (__builtin_expect(a.activation->curve, 0)) {
        Vec values[F];
        DSP_UNROLL
        for (int f = 0; f < F; ++f) values[f] = acc[p][f];
        apply_curve(values, F, *a.activation);
        DSP_UNROLL
        for (int f = 0; f < F; ++f) acc[p][f] = values[f];
      }
      DSP_UNROLL
      for (int f = 0; f < F; ++f) {
        const Vec result = min(most, max(least, acc[p][f]));
        if (kMasksAreFree && f == F - 1) {
          store_lanes(to + f * kLanes, result, a.tail);
        } else {
          store(to + f * kLanes, result);
        }
      }
    }
  }
}

// body(channel, lanes) for vectors of channels, the last one with fewer lanes.
template <typename F>
DSP_INLINE void each_vector(int64_t channels, const F& body) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) body(c, kLanes);
  if (c < channels) body(c, static_cast<int>(channels - c));
}
DSP_INLINE Vec load_some(const float* p, int lanes) {
  return lanes == kLanes ? load(p) : load_lanes(p, lanes);
}
DSP_INLINE void store_some(float* p, Vec v, int lanes) {
  if (lanes == kLanes) {
    store(p, v);
  } else {
    store_lanes(p, v, lanes);
  }
}

inline void lane_affine(float* dst, const float* x, const float* scale, const float* shift, int64_t channels,
                        const Activation& activation) {
  each_vector(channels, [&](int64_t c, int lanes) {
    const Vec v = fma(load_some(x + c, lanes), load_some(scale + c, lanes), load_some(shift + c, lanes));
    store_some(dst + c, activate(v, activation), lanes);
  });
}

inline void lane_pool_max(float* dst, const float* x, int64_t row, int64_t pixel, int64_t rows,
                          int64_t pixels, int64_t channels) {
  each_vector(channels, [&](int64_t c, int lanes) {
    Vec most = set1(-__builtin_inff());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < pixels; ++j)
        most = max_nan(most, load_some(x + i * row + j * pixel + c, lanes));
    }
    store_some(dst + c, most, lanes);
  });
}

inline void lane_pool_mean(float* dst, const float* x, int64_t row, int64_t pixel, int64_t rows,
                           int64_t pixels, int64_t channels, float count) {
  each_vector(channels, [&](int64_t c, int lanes) {
    Vec total = zero();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < pixels; ++j) total = add(total, load_some(x + i * row + j * pixel + c, lanes));
    }
    store_some(dst + c, div(total, set1(count)), lanes);
  });
}

// The sums of planes, in the planar engine's order: its vector of pixels is here as many vectors of channels.
inline void lane_plane_mean(float* dst, const float* x, int64_t row, int64_t pixel, int64_t rows,
                            int64_t pixels, int64_t channels, float count, bool whole) {
  const int64_t length = whole ? rows * pixels : pixels;
  const int64_t by_four = length - length % (4 * kLanes), by_one = length - length % kLanes;
  each_vector(channels, [&](int64_t c, int lanes) {
    Vec total = zero(), part[4 * kLanes];
    const auto clear = [&] {
      for (Vec& v : part) v = zero();
    };
    const auto sum = [&] {
      for (int i = 0; i < kLanes; ++i)
        part[i] = add(add(part[i], part[kLanes + i]), add(part[2 * kLanes + i], part[3 * kLanes + i]));
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) part[i] = add(part[i], part[i + half]);
      }
      return part[0];
    };
    clear();
    int64_t n = 0;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < pixels; ++j, ++n) {
        const int64_t at = n < by_four ? n % (4 * kLanes) : (n < by_one ? n % kLanes : kLanes + n % kLanes);
        part[at] = add(part[at], load_some(x + i * row + j * pixel + c, lanes));
      }
      if (whole) continue;
      total = add(total, sum());
      clear();
      n = 0;
    }
    store_some(dst + c, div(whole ? sum() : total, set1(count)), lanes);
  });
}

template <int F, int P, int MOST>
struct AddTiles {
  static void to(LaneKernels* table) {
    table->tiles[F - 1][P - 1] = &lane_tiles<P, F>;
    AddTiles<F, P + 1, MOST>::to(table);
  }
};
template <int F, int MOST>
struct AddTiles<F, MOST, MOST> {
  static void to(LaneKernels* table) {
    table->tiles[F - 1][MOST - 1] = &lane_tiles<MOST, F>;
    table->max_pixels[F] = MOST;
  }
};

// Accumulators, the weights of a step and one pixel fill the registers.
inline LaneKernels make_lane_kernels() {
  LaneKernels table{};
  table.lanes = kLanes;
  table.masks_are_free = kMasksAreFree;
  table.max_vectors = kManyRegisters ? 4 : 2;
  table.affine = &lane_affine;
  table.pool_max = &lane_pool_max;
  table.pool_mean = &lane_pool_mean;
  table.plane_mean = &lane_plane_mean;
  AddTiles<1, 1, 12>::to(&table);
  AddTiles<2, 1, kManyRegisters ? 12 : 6>::to(&table);
  if (kManyRegisters) {
    AddTiles<kManyRegisters ? 3 : 1, 1, kManyRegisters ? 8 : 12>::to(&table);
    AddTiles<kManyRegisters ? 4 : 1, 1, kManyRegisters ? 6 : 12>::to(&table);
  }
  return table;
}

}  // namespace DSP_ISA
}  // namespace dsp
