// The kernels of the group penalty for one instruction set (DSP_ISA). Written with vectors of 64 bytes, which
// the compiler cuts to the width at hand, so that sums have the same order on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "assignment/kernel.h"
#include "core/simd.h"

namespace dsp {
namespace DSP_ISA {
namespace {

// Of weights in a block: they are touched twice.
constexpr int64_t kTileBytes = 256 * 1024;
constexpr int64_t kFlatTileBytes = 512 * 1024;

template <typename T>
constexpr T norm_floor();
template <>
constexpr float norm_floor<float>() {
  return 1e-15f;
}
template <>
constexpr double norm_floor<double>() {
  return 1e-100;
}

bool is_flat(dsp_lasso_op operation) {
  return operation != DSP_LASSO_HESSIAN && operation != DSP_LASSO_STEP_GRADIENT;
}

template <typename T>
int64_t block_width(int64_t filters, int64_t channels, int64_t taps, dsp_lasso_op operation) {
  constexpr int64_t lanes = kWideLanes<T>;
  const int64_t bytes = is_flat(operation) ? kFlatTileBytes : kTileBytes;
  int64_t width = bytes / static_cast<int64_t>(sizeof(T)) / (filters * taps) / lanes * lanes;
  if (width < lanes) width = lanes;
  const int64_t all = (channels + lanes - 1) / lanes * lanes;
  if (width >= all) return all;
  // Even blocks.
  const int64_t blocks = (all + width - 1) / width;
  return ((all + blocks - 1) / blocks + lanes - 1) / lanes * lanes;
}

// ---- per layer: what depends on the probabilities alone ----

// exp(x / 2) to within two units in the last place, as a loop that the compiler vectorises; 0 below the
// smallest normal number, so also at -inf; a NaN stays one.
DSP_INLINE void half_exponents(const float* x, float* out, int64_t count) {
  constexpr float lowest = -174.0f;
  constexpr float highest = 177.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float within = x[i] > lowest ? (x[i] < highest ? x[i] : highest) : lowest;
    const float y = within * 0.5f;
    const float n = std::nearbyint(y * 1.44269504088896341f);
    // y = n ln 2 + r, with ln 2 in two parts.
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float e = 1.9875691500e-4f;
    e = e * r + 1.3981999507e-3f;
    e = e * r + 8.3334519073e-3f;
    e = e * r + 4.1665795894e-2f;
    e = e * r + 1.6666665459e-1f;
    e = e * r + 5.0000001201e-1f;
    e = e * (r * r) + r + 1.0f;
    // 2^n in two factors: n reaches 128.
    const int32_t whole = static_cast<int32_t>(n);
    const int32_t low = whole >> 1;
    const int32_t bits[2] = {(low + 127) << 23, (whole - low + 127) << 23};
    float powers[2];
    std::memcpy(powers, bits, sizeof(powers));
    e = e * powers[0] * powers[1];
    e = x[i] <= lowest ? 0.0f : e;
    out[i] = x[i] == x[i] ? e : x[i];
  }
}

DSP_INLINE void half_exponents(const double* x, double* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = std::exp(x[i] / 2);
}

template <typename T>
void prepare(const LassoLayer& l, dsp_lasso_op operation) {
  const T* logs = static_cast<const T*>(l.logs);
  const T* towards = static_cast<const T*>(l.log_direction);
  T* squares = static_cast<T*>(l.squares);
  T* roots = static_cast<T*>(l.roots);
  T* halves = static_cast<T*>(l.halves);
  T* doubled = static_cast<T*>(l.doubled);
  const int64_t groups = l.groups;
  constexpr int64_t chunk = 256;
  T exponents[chunk];
  for (int64_t g = 0; g < groups; ++g) {
    double sum = 0;
    double change = 0;
    for (int64_t start = 0; start < l.filters; start += chunk) {
      const int64_t count = l.filters - start < chunk ? l.filters - start : chunk;
      half_exponents(logs + g * l.log_stride + start, exponents, count);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t o = start + i;
        const T root = exponents[i];
        const T p = root * root;
        squares[o * groups + g] = operation == DSP_LASSO_PROXIMAL ? p : p * p;
        roots[o * groups + g] = root;
        sum += static_cast<double>(root);
        if (towards != nullptr) {
          const T e = towards[g * l.log_direction_stride + o];
          const T half = root * e / 2;
          halves[o * groups + g] = half;
          doubled[o * groups + g] = 2 * p * p * e;
          change += static_cast<double>(half);
        }
      }
    }
    l.root_sum[g] = sum;
    l.size[g] = sum * sum;
    l.root_change[g] = change;
    l.size_change[g] = 2 * sum * change;
  }
}

// ---- per block ----

// out[c] = sum over the taps of a * b. Taps > 0: known to the compiler.
template <typename T, int Taps>
DSP_INLINE void tap_sums(const T* a, const T* b, T* out, int64_t count, int64_t taps) {
  if (Taps > 0) taps = Taps;
  for (int64_t c = 0; c < count; ++c) {
    const T* x = a + c * taps;
    const T* y = b + c * taps;
    T sum = 0;
    for (int64_t k = 0; k < taps; ++k) sum += x[k] * y[k];
    out[c] = sum;
  }
}

template <typename T>
void products(const LassoLayer& l, const T* a, const T* b, int64_t first, int64_t count, int64_t width,
              T* out) {
  const int64_t row = l.channels * l.taps;
  for (int64_t o = 0; o < l.filters; ++o) {
    T* target = out + o * width;
    if (l.tap_major || l.taps == 1) {
      const T* x = a + o * row + first;
      const T* y = b + o * row + first;
      for (int64_t c = 0; c < count; ++c) target[c] = x[c] * y[c];
      for (int64_t k = 1; k < l.taps; ++k) {
        const T* xk = x + k * l.channels;
        const T* yk = y + k * l.channels;
        for (int64_t c = 0; c < count; ++c) target[c] += xk[c] * yk[c];
      }
    } else {
      const T* x = a + o * row + first * l.taps;
      const T* y = b + o * row + first * l.taps;
      if (l.taps == 9) {
        tap_sums<T, 9>(x, y, target, count, 9);
      } else {
        tap_sums<T, 0>(x, y, target, count, l.taps);
      }
    }
    for (int64_t c = count; c < width; ++c) target[c] = 0;
  }
}

// out[g, c] = sum_o coefficient[o, g] rows[o, c]
template <typename T, int Count>
void mix_some(const T* coefficient, const T* rows, int64_t filters, int64_t groups, int64_t width, T* out) {
  constexpr int64_t lanes = kWideLanes<T>;
  for (int64_t c = 0; c < width; c += lanes) {
    Wide<T> sums[Count] = {};
    for (int64_t o = 0; o < filters; ++o) {
      const Wide<T> row = *reinterpret_cast<const Wide<T>*>(rows + o * width + c);
      for (int g = 0; g < Count; ++g) sums[g] += coefficient[o * groups + g] * row;
    }
    for (int g = 0; g < Count; ++g) *reinterpret_cast<Wide<T>*>(out + g * width + c) = sums[g];
  }
}

template <typename T>
void mix(const T* coefficient, const T* rows, int64_t filters, int64_t groups, int64_t width, T* out) {
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4)
    mix_some<T, 4>(coefficient + g, rows, filters, groups, width, out + g * width);
  switch (groups - g) {
    case 3:
      mix_some<T, 3>(coefficient + g, rows, filters, groups, width, out + g * width);
      break;
    case 2:
      mix_some<T, 2>(coefficient + g, rows, filters, groups, width, out + g * width);
      break;
    case 1:
      mix_some<T, 1>(coefficient + g, rows, filters, groups, width, out + g * width);
      break;
    default:
      break;
  }
}

// row[c] = base + sum_g coefficient[g] table[g, c]
template <typename T>
DSP_INLINE void spread(const T* coefficient, const T* table, int64_t groups, int64_t width, T base, T* row) {
  for (int64_t c = 0; c < width; c += kWideLanes<T>) {
    Wide<T> sum = base - Wide<T>{};
    for (int64_t g = 0; g < groups; ++g)
      sum += coefficient[g] * *reinterpret_cast<const Wide<T>*>(table + g * width + c);
    *reinterpret_cast<Wide<T>*>(row + c) = sum;
  }
}

// sum_c table[c] row[c]
template <typename T>
DSP_INLINE T dot(const T* table, const T* row, int64_t width) {
  Wide<T> sum = {};
  for (int64_t c = 0; c < width; c += kWideLanes<T>)
    sum += *reinterpret_cast<const Wide<T>*>(table + c) * *reinterpret_cast<const Wide<T>*>(row + c);
  return sum_wide<T>(sum);
}

// From L^2 in `norms`: L and 1/L, both 0 where L^2 is at most the floor; a NaN goes through.
template <typename T>
DSP_INLINE void invert(T* norms, T* inverse, int64_t count) {
  const T floor = norm_floor<T>() * norm_floor<T>();
  for (int64_t i = 0; i < count; ++i) {
    const T norm = std::sqrt(norms[i]);
    const bool dead = norms[i] <= floor;
    const T one = 1 / norm;
    norms[i] = dead ? T(0) : norm;
    inverse[i] = dead ? T(0) : one;
  }
}

template <typename T>
DSP_INLINE double row_total(const T* row, int64_t width) {
  double sum = 0;
  for (int64_t c = 0; c < width; ++c) sum += static_cast<double>(row[c]);
  return sum;
}

// out[c, k] = w[c, k] * f[c] (+ d[c, k] * h[c]), optionally keeping w.
template <typename T, int Taps>
DSP_INLINE void scale_taps(const T* w, const T* f, const T* d, const T* h, T* keep, T* out, int64_t count,
                           int64_t taps) {
  if (Taps > 0) taps = Taps;
  for (int64_t c = 0; c < count; ++c) {
    const T factor = f[c];
    if (keep != nullptr)
      for (int64_t k = 0; k < taps; ++k) keep[c * taps + k] = w[c * taps + k];
    if (d == nullptr) {
      for (int64_t k = 0; k < taps; ++k) out[c * taps + k] = w[c * taps + k] * factor;
    } else {
      const T other = h[c];
      for (int64_t k = 0; k < taps; ++k)
        out[c * taps + k] = w[c * taps + k] * factor + d[c * taps + k] * other;
    }
  }
}

template <typename T>
DSP_INLINE void scale_channels(const T* w, const T* f, const T* d, const T* h, T* keep, T* out,
                               int64_t count) {
  if (keep != nullptr) std::memcpy(keep, w, static_cast<size_t>(count) * sizeof(T));
  if (d == nullptr) {
    for (int64_t c = 0; c < count; ++c) out[c] = w[c] * f[c];
  } else {
    for (int64_t c = 0; c < count; ++c) out[c] = w[c] * f[c] + d[c] * h[c];
  }
}

template <typename T>
void write_row(const LassoLayer& l, int64_t o, int64_t first, int64_t count, const T* f, const T* h) {
  const int64_t row = o * l.channels * l.taps;
  const bool flat = l.tap_major || l.taps == 1;
  const int64_t at = flat ? row + first : row + first * l.taps;
  const T* w = static_cast<const T*>(l.weight) + at;
  const T* d = h == nullptr ? nullptr : static_cast<const T*>(l.direction) + at;
  T* keep = l.keep == nullptr ? nullptr : static_cast<T*>(l.keep) + at;
  T* out = static_cast<T*>(l.weight_out) + at;
  if (flat) {
    for (int64_t k = 0; k < l.taps; ++k) {
      const int64_t shift = k * l.channels;
      scale_channels<T>(w + shift, f, d == nullptr ? d : d + shift, h, keep == nullptr ? keep : keep + shift,
                        out + shift, count);
    }
  } else if (l.taps == 9) {
    scale_taps<T, 9>(w, f, d, h, keep, out, count, 9);
  } else {
    scale_taps<T, 0>(w, f, d, h, keep, out, count, l.taps);
  }
}

// ---- a block without S: everything in the order in which the weights lie ----
//
// For what needs only the norms and products with per-channel tables, S need not exist: the sum over the taps
// commutes with the sum over the filters, so norms are summed per element and folded once, and a table
// (groups, channels) is spread over the taps once. Rows are then read as they lie, in whole vectors.

#if defined(__AVX512F__)
constexpr int kRows = 4;
#else
constexpr int kRows = 2;
#endif

template <typename T>
DSP_INLINE void load(const T* at, Wide<T>* v) {
  std::memcpy(v, at, sizeof(*v));
}

template <typename T>
DSP_INLINE void load_some(const T* at, int64_t count, Wide<T>* v) {
  alignas(64) T a[kWideLanes<T>] = {};
  std::memcpy(a, at, static_cast<size_t>(count) * sizeof(T));
  std::memcpy(v, a, sizeof(*v));
}

template <typename T>
DSP_INLINE void store_some(const Wide<T>& v, int64_t count, T* at) {
  std::memcpy(at, &v, static_cast<size_t>(count) * sizeof(T));
}

// sums[g, c] += sum over Rows rows of p2[row, g] w[row, c]^2
template <typename T, int Rows, int Count>
void add_squares(const T* w, int64_t row, const T* p2, int64_t groups, int64_t length, int64_t width,
                 T* sums) {
  constexpr int64_t lanes = kWideLanes<T>;
  for (int64_t c = 0; c < length; c += lanes) {
    Wide<T> sum[Count];

    DSP_UNROLL
    for (int g = 0; g < Count; ++g) sum[g] = *reinterpret_cast<const Wide<T>*>(sums + g * width + c);
    for (int i = 0; i < Rows; ++i) {
      Wide<T> x;
      __builtin_prefetch(w + (i + Rows) * row + c);
      if (c + lanes <= length) {
        load<T>(w + i * row + c, &x);
      } else {
        load_some<T>(w + i * row + c, length - c, &x);
      }
      x *= x;

      DSP_UNROLL
      for (int g = 0; g < Count; ++g) sum[g] += p2[i * groups + g] * x;
    }

    DSP_UNROLL
    for (int g = 0; g < Count; ++g) *reinterpret_cast<Wide<T>*>(sums + g * width + c) = sum[g];
  }
}

template <typename T, int Count>
void all_squares(const T* w, int64_t row, const T* p2, int64_t filters, int64_t groups, int64_t length,
                 int64_t width, T* sums) {
  constexpr int rows = 8;
  int64_t o = 0;
  for (; o + rows <= filters; o += rows)
    add_squares<T, rows, Count>(w + o * row, row, p2 + o * groups, groups, length, width, sums);
  for (; o < filters; ++o)
    add_squares<T, 1, Count>(w + o * row, row, p2 + o * groups, groups, length, width, sums);
}

struct Pass {
  int64_t row, groups, length, width;
  bool past_caches;
};

// For Rows rows: dots[row, g] += sum_c table[g, c] w[row, c]^2, and
// out[row, c] = w[row, c] (base + sum_g p2[row, g] factors[g, c]); either may be left out.
template <typename T, int Rows, int Count, bool Dots, bool Write>
void pass_rows(const Pass& s, const T* w, const T* p2, const T* table, const T* factors, T base, T* dots,
               T* keep, T* out) {
  constexpr int64_t lanes = kWideLanes<T>;
  Wide<T> sum[Rows][Count] = {};
  for (int64_t c = 0; c < s.length; c += lanes) {
    const int64_t left = s.length - c;
    Wide<T> entry[Count];
    Wide<T> factor[Count];
    DSP_UNROLL
    for (int g = 0; g < Count; ++g) {
      if (Dots) entry[g] = *reinterpret_cast<const Wide<T>*>(table + g * s.width + c);
      if (Write) factor[g] = *reinterpret_cast<const Wide<T>*>(factors + g * s.width + c);
    }
    DSP_UNROLL
    for (int i = 0; i < Rows; ++i) {
      Wide<T> x;
      if (left >= lanes) {
        load<T>(w + i * s.row + c, &x);
      } else {
        load_some<T>(w + i * s.row + c, left, &x);
      }
      if (Write) {
        Wide<T> f = base - Wide<T>{};
        DSP_UNROLL
        for (int g = 0; g < Count; ++g) f += p2[i * s.groups + g] * factor[g];
        f *= x;
        if (left >= lanes) {
          if (keep != nullptr) std::memcpy(keep + i * s.row + c, &x, sizeof(x));
          if (s.past_caches) {
            stream_wide<T>(f, out + i * s.row + c);
          } else {
            std::memcpy(out + i * s.row + c, &f, sizeof(f));
          }
        } else {
          if (keep != nullptr) store_some<T>(x, left, keep + i * s.row + c);
          store_some<T>(f, left, out + i * s.row + c);
        }
      }
      if (Dots) {
        x *= x;
        DSP_UNROLL
        for (int g = 0; g < Count; ++g) sum[i][g] += entry[g] * x;
      }
    }
  }
  if (Dots) DSP_UNROLL
  for (int i = 0; i < Rows; ++i) DSP_UNROLL
  for (int g = 0; g < Count; ++g) dots[i * s.groups + g] += sum_wide<T>(sum[i][g]);
}

template <typename T, int Count, bool Dots, bool Write>
void pass_all(const Pass& s, int64_t filters, const T* w, const T* p2, const T* table, const T* factors,
              T base, T* dots, T* keep, T* out) {
  int64_t o = 0;
  const auto step = [&](auto run, int64_t rows) {
    run(s, w + o * s.row, p2 + o * s.groups, table, factors, base, Dots ? dots + o * s.groups : dots,
        keep == nullptr ? keep : keep + o * s.row, Write ? out + o * s.row : out);
    o += rows;
  };
  while (o + kRows <= filters) step(&pass_rows<T, kRows, Count, Dots, Write>, kRows);
  while (o < filters) step(&pass_rows<T, 1, Count, Dots, Write>, 1);
}

template <typename T, int Count>
void pass_some(const Pass& s, int64_t filters, const T* w, const T* p2, const T* table, const T* factors,
               T base, T* dots, T* keep, T* out) {
  if (dots != nullptr && out != nullptr) {
    pass_all<T, Count, true, true>(s, filters, w, p2, table, factors, base, dots, keep, out);
  } else if (dots != nullptr) {
    pass_all<T, Count, true, false>(s, filters, w, p2, table, factors, base, dots, keep, out);
  } else {
    pass_all<T, Count, false, true>(s, filters, w, p2, table, factors, base, dots, keep, out);
  }
}

// More groups than are handled at once: the factor of a row is made first.
template <typename T>
void write_many(const Pass& s, int64_t filters, const T* w, const T* p2, const T* factors, T base, T* row,
                T* keep, T* out) {
  for (int64_t o = 0; o < filters; ++o) {
    spread<T>(p2 + o * s.groups, factors, s.groups, s.width, base, row);
    const int64_t at = o * s.row;
    scale_channels<T>(w + at, row, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr),
                      keep == nullptr ? keep : keep + at, out + at, s.length);
  }
}

constexpr int kAtOnce = 4;

// Elements of a row of the block that lie together, and that rounded up to whole vectors.
template <typename T>
int64_t segment_width(const LassoLayer& l) {
  constexpr int64_t lanes = kWideLanes<T>;
  return ((l.tap_major ? l.block : l.block * l.taps) + lanes - 1) / lanes * lanes;
}

// A block of the operations that need no products of filters: what its steps share.
template <typename T>
struct Flat {
  const LassoLayer& l;
  dsp_lasso_op operation;
  int64_t count, fold, segments;  // channels that are there; taps beside and behind one another
  Pass s;
  const T *weight, *p2;
  T *elements, *factors, *row;  // (groups, width): sums of squares, then the table; factors of the weights
  T *norm, *inverse;            // (groups, channels)
  T *dots, *out, *keep;         // or null
};

template <typename T>
void flat_norms(const Flat<T>& f, double* sums) {
  const LassoLayer& l = f.l;
  const Pass& s = f.s;
  const int64_t groups = l.groups;
  std::memset(f.elements, 0, static_cast<size_t>(groups * s.width) * sizeof(T));
  for (int64_t k = 0; k < f.segments; ++k) {
    const T* w = f.weight + k * l.channels;
    for (int64_t g = 0; g < groups; g += kAtOnce) {
      T* at = f.elements + g * s.width;
      const T* p2 = f.p2 + g;
      switch (groups - g) {
        case 1:
          all_squares<T, 1>(w, s.row, p2, l.filters, groups, s.length, s.width, at);
          break;
        case 2:
          all_squares<T, 2>(w, s.row, p2, l.filters, groups, s.length, s.width, at);
          break;
        case 3:
          all_squares<T, 3>(w, s.row, p2, l.filters, groups, s.length, s.width, at);
          break;
        default:
          all_squares<T, kAtOnce>(w, s.row, p2, l.filters, groups, s.length, s.width, at);
          break;
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t c = 0; c < l.block; ++c) {
      T sum = 0;
      if (c < f.count)
        for (int64_t k = 0; k < f.fold; ++k) sum += f.elements[g * s.width + c * f.fold + k];
      f.norm[g * l.block + c] = sum;
    }
  invert<T>(f.norm, f.inverse, groups * l.block);
  for (int64_t g = 0; g < groups; ++g) {
    sums[g * 2] = row_total<T>(f.norm + g * l.block, l.block);
    sums[g * 2 + 1] = 0;
  }
}

// What each element of a row is multiplied by, for the sums over it and for what is written.
template <typename T>
void flat_factors(const Flat<T>& f) {
  const int64_t groups = f.l.groups;
  const int64_t width = f.s.width;
  const T amount = static_cast<T>(f.l.amount);
  std::memset(f.elements, 0, static_cast<size_t>(2 * groups * width) * sizeof(T));
  for (int64_t g = 0; g < groups; ++g) {
    const T size = static_cast<T>(f.l.size[g]);
    for (int64_t c = 0; c < f.count; ++c) {
      const T ratio = size * f.inverse[g * f.l.block + c];
      T factor = amount * ratio;
      if (f.operation == DSP_LASSO_SHRINK) factor = -factor;
      if (f.operation == DSP_LASSO_PROXIMAL) {
        // A dead norm (0, not NaN) shrinks to nothing.
        factor = 1 - factor;
        if (f.norm[g * f.l.block + c] == 0 || factor < 0) factor = 0;
      }
      for (int64_t k = 0; k < f.fold; ++k) {
        f.elements[g * width + c * f.fold + k] = ratio;
        f.factors[g * width + c * f.fold + k] = factor;
      }
    }
  }
}

template <typename T>
void flat_passes(const Flat<T>& f) {
  const int64_t groups = f.l.groups;
  const int64_t filters = f.l.filters;
  const Pass& s = f.s;
  const T base = f.operation == DSP_LASSO_SHRINK ? T(1) : T(0);
  for (int64_t k = 0; k < f.segments; ++k) {
    const int64_t shift = k * f.l.channels;
    const T* w = f.weight + shift;
    T* to = f.out == nullptr ? f.out : f.out + shift;
    T* kept = f.keep == nullptr ? f.keep : f.keep + shift;
    if (groups > kAtOnce) {
      for (int64_t g = 0; g < groups && f.dots != nullptr; ++g)
        pass_some<T, 1>(s, filters, w, f.p2 + g, f.elements + g * s.width, f.factors, base, f.dots + g,
                        static_cast<T*>(nullptr), static_cast<T*>(nullptr));
      if (to != nullptr) write_many<T>(s, filters, w, f.p2, f.factors, base, f.row, kept, to);
      continue;
    }
    switch (groups) {
      case 1:
        pass_some<T, 1>(s, filters, w, f.p2, f.elements, f.factors, base, f.dots, kept, to);
        break;
      case 2:
        pass_some<T, 2>(s, filters, w, f.p2, f.elements, f.factors, base, f.dots, kept, to);
        break;
      case 3:
        pass_some<T, 3>(s, filters, w, f.p2, f.elements, f.factors, base, f.dots, kept, to);
        break;
      default:
        pass_some<T, kAtOnce>(s, filters, w, f.p2, f.elements, f.factors, base, f.dots, kept, to);
        break;
    }
  }
  if (f.dots != nullptr)
    for (int64_t i = 0; i < filters * groups; ++i) f.dots[i] *= f.p2[i];
#if defined(__AVX512F__) || defined(__AVX2__)
  if (s.past_caches) _mm_sfence();
#endif
}

template <typename T>
void block_flat(const LassoLayer& l, dsp_lasso_op operation, int64_t index, char* scratch) {
  const int64_t groups = l.groups;
  const int64_t first = index * l.block;
  const int64_t count = l.channels - first < l.block ? l.channels - first : l.block;
  const int64_t segments = l.tap_major ? l.taps : 1;
  const int64_t fold = l.tap_major ? 1 : l.taps;
  const Pass s = {l.channels * l.taps, groups, count * fold, segment_width<T>(l), false};
  T* elements = reinterpret_cast<T*>(scratch);
  T* factors = elements + groups * s.width;
  T* row = factors + groups * s.width;
  T* norm = row + s.width;
  Flat<T> f{l,
            operation,
            count,
            fold,
            segments,
            s,
            static_cast<const T*>(l.weight) + first * fold,
            static_cast<const T*>(l.squares),
            elements,
            factors,
            row,
            norm,
            norm + groups * l.block,
            nullptr,
            l.weight_out == nullptr ? nullptr : static_cast<T*>(l.weight_out) + first * fold,
            l.keep == nullptr ? nullptr : static_cast<T*>(l.keep) + first * fold};
  flat_norms<T>(f, l.sums + index * groups * 2);
  if (operation == DSP_LASSO_PENALTY) return;
  if (operation == DSP_LASSO_BACKWARD && l.parts != nullptr) {
    f.dots = static_cast<T*>(l.parts) + index * l.filters * groups;
    std::memset(f.dots, 0, static_cast<size_t>(l.filters * groups) * sizeof(T));
  }
  if (f.dots == nullptr && f.out == nullptr) return;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
  f.s.past_caches = l.past_caches && f.out != nullptr && reinterpret_cast<uintptr_t>(f.out) % 64 == 0 &&
                    s.row % line == 0 && (segments == 1 || l.channels % line == 0);
  flat_factors<T>(f);
  flat_passes<T>(f);
}

// ---- a block by way of S ----

// (filters, width) matrices and (groups, width) tables that a block needs.
constexpr int64_t kMatrices = 3;
constexpr int64_t kTables = 7;
constexpr int64_t kRowBuffers = 2;

template <typename T>
int64_t scratch_bytes(const LassoLayer& l, dsp_lasso_op operation) {
  const int64_t groups = l.groups;
  const int64_t count = is_flat(operation)
                            ? (2 * groups + 1) * segment_width<T>(l) + 2 * groups * l.block
                            : (kMatrices * l.filters + kTables * groups + kRowBuffers) * l.block;
  return count * static_cast<int64_t>(sizeof(T));
}

// A block by way of S = sum over taps of W^2: what its steps share. Matrices are (filters, width), tables
// (groups, width).
template <typename T>
struct Square {
  Square(const LassoLayer& layer, int64_t index, char* scratch)
      : l(layer),
        first(index * layer.block),
        count(layer.channels - first < layer.block ? layer.channels - first : layer.block),
        weight(static_cast<const T*>(layer.weight)),
        direction(static_cast<const T*>(layer.direction)),
        p2(static_cast<const T*>(layer.squares)),
        doubled(static_cast<const T*>(layer.doubled)),
        parts(layer.parts == nullptr ? nullptr
                                     : static_cast<T*>(layer.parts) + index * layer.filters * layer.groups),
        sums(layer.sums + index * layer.groups * 2) {
    T* next = reinterpret_cast<T*>(scratch);
    const auto take = [&](int64_t count_of_rows) {
      T* at = next;
      next += count_of_rows * layer.block;
      return at;
    };
    T** const matrices[] = {&S, &P, &moved};
    T** const tables[] = {&norm, &inverse, &ratio, &change, &ratio_change, &moved_norm, &moved_ratio};
    T** const rows[] = {&row, &row2};
    for (T** matrix : matrices) *matrix = take(layer.filters);
    for (T** table : tables) *table = take(layer.groups);
    for (T** one : rows) *one = take(1);
  }

  const LassoLayer& l;
  int64_t first, count;
  const T *weight, *direction, *p2, *doubled;
  T* parts;
  double* sums;
  T *S, *P, *moved;  // P: T = sum over taps of W D; moved: S at the moved weights
  T *norm, *inverse, *ratio, *change, *ratio_change, *moved_norm, *moved_ratio;
  T *row, *row2;
};

template <typename T>
void square_norms(const Square<T>& q) {
  const LassoLayer& l = q.l;
  const int64_t width = l.block;
  products<T>(l, q.weight, q.weight, q.first, q.count, width, q.S);
  mix<T>(q.p2, q.S, l.filters, l.groups, width, q.norm);
  invert<T>(q.norm, q.inverse, l.groups * width);
  for (int64_t g = 0; g < l.groups; ++g) {
    const T size = static_cast<T>(l.size[g]);
    for (int64_t c = 0; c < width; ++c) q.ratio[g * width + c] = size * q.inverse[g * width + c];
    q.sums[g * 2] = row_total<T>(q.norm + g * width, width);
    q.sums[g * 2 + 1] = 0;
  }
}

template <typename T>
void hessian(const Square<T>& q) {
  const LassoLayer& l = q.l;
  const int64_t width = l.block;
  const int64_t groups = l.groups;
  const int64_t filters = l.filters;
  const T amount = static_cast<T>(l.amount);
  const int64_t cells = groups * width;
  products<T>(l, q.weight, q.direction, q.first, q.count, width, q.P);
  mix<T>(q.p2, q.P, filters, groups, width, q.change);
  mix<T>(q.doubled, q.S, filters, groups, width, q.moved_norm);
  for (int64_t g = 0; g < groups; ++g) {
    const T size_change = static_cast<T>(l.size_change[g]);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      q.change[c] = (q.change[c] + q.moved_norm[c] / 2) * q.inverse[c];
      q.ratio_change[c] = size_change * q.inverse[c] - q.ratio[c] * (q.change[c] * q.inverse[c]);
    }
    q.sums[g * 2 + 1] = row_total<T>(q.change + g * width, width);
  }
  if (l.weight_out != nullptr) {
    for (int64_t i = 0; i < cells; ++i) {
      q.moved_norm[i] = amount * q.ratio[i];
      q.moved_ratio[i] = amount * q.ratio_change[i];
    }
    T* sum = q.moved;  // one more q.row
    for (int64_t o = 0; o < filters; ++o) {
      spread<T>(q.p2 + o * groups, q.moved_norm, groups, width, T(0), q.row2);
      spread<T>(q.p2 + o * groups, q.moved_ratio, groups, width, T(0), q.row);
      spread<T>(q.doubled + o * groups, q.moved_norm, groups, width, T(0), sum);
      for (int64_t c = 0; c < width; ++c) q.row[c] += sum[c];
      write_row<T>(l, o, q.first, q.count, q.row, q.row2);
    }
  }
  if (q.parts != nullptr)
    for (int64_t o = 0; o < filters; ++o)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = o * groups + g;
        const T a = dot<T>(q.ratio_change + g * width, q.S + o * width, width);
        const T b = dot<T>(q.ratio + g * width, q.P + o * width, width);
        const T e = dot<T>(q.ratio + g * width, q.S + o * width, width);
        q.parts[at] = q.p2[at] * (a + 2 * b) + q.doubled[at] * e;
      }
}

// The derivative along the direction, at the moved weights.
template <typename T>
void step_gradient_along(const Square<T>& q) {
  const LassoLayer& l = q.l;
  const int64_t width = l.block;
  const int64_t groups = l.groups;
  const int64_t filters = l.filters;
  const T amount = static_cast<T>(l.amount);
  const int64_t cells = groups * width;
  // T = sum over taps of W (D - amount M' W'), with W' = f W.
  for (int64_t o = 0; o < filters; ++o) {
    spread<T>(q.p2 + o * groups, q.moved_ratio, groups, width, T(0), q.row);
    for (int64_t c = 0; c < width; ++c) q.P[o * width + c] *= -amount * q.row[c];
  }
  {
    // The weights' own products, added q.row by q.row.
    LassoLayer one = l;
    one.filters = 1;
    for (int64_t o = 0; o < filters; ++o) {
      const int64_t at = o * l.channels * l.taps;
      products<T>(one, q.weight + at, q.direction + at, q.first, q.count, width, q.row);
      for (int64_t c = 0; c < width; ++c) q.P[o * width + c] += q.row[c];
    }
  }
  mix<T>(q.p2, q.P, filters, groups, width, q.change);
  for (int64_t i = 0; i < cells; ++i) {
    q.change[i] *= q.inverse[i];
    q.ratio_change[i] = -q.ratio[i] * (q.change[i] * q.inverse[i]);
  }
  for (int64_t g = 0; g < groups; ++g) q.sums[g * 2 + 1] = row_total<T>(q.change + g * width, width);
  for (int64_t o = 0; o < filters; ++o)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = o * groups + g;
      const T a = dot<T>(q.moved_ratio + g * width, q.moved + o * width, width);
      const T b = dot<T>(q.ratio_change + g * width, q.S + o * width, width);
      const T e = dot<T>(q.ratio + g * width, q.P + o * width, width);
      q.parts[at] = q.p2[at] * (a + b + 2 * e);
    }
}

template <typename T>
void step_gradient(const Square<T>& q) {
  const LassoLayer& l = q.l;
  const int64_t width = l.block;
  const int64_t groups = l.groups;
  const int64_t filters = l.filters;
  const T amount = static_cast<T>(l.amount);
  const int64_t cells = groups * width;
  for (int64_t i = 0; i < cells; ++i) q.change[i] = -amount * q.ratio[i];
  for (int64_t o = 0; o < filters; ++o) {
    spread<T>(q.p2 + o * groups, q.change, groups, width, T(1), q.row);
    for (int64_t c = 0; c < width; ++c) {
      const T s = q.S[o * width + c];
      q.moved[o * width + c] = s * q.row[c] * q.row[c];
      q.P[o * width + c] = s * q.row[c];
    }
  }
  mix<T>(q.p2, q.moved, filters, groups, width, q.moved_norm);
  invert<T>(q.moved_norm, q.moved_ratio, cells);
  for (int64_t g = 0; g < groups; ++g) {
    const T size = static_cast<T>(l.size[g]);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) q.moved_ratio[c] *= size;
    q.sums[g * 2] = row_total<T>(q.moved_norm + g * width, width);
  }
  if (q.direction == nullptr) {
    for (int64_t o = 0; o < filters; ++o)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = o * groups + g;
        q.parts[at] = q.p2[at] * dot<T>(q.moved_ratio + g * width, q.moved + o * width, width);
      }
    return;
  }
  step_gradient_along<T>(q);
}

template <typename T>
void block_square(const LassoLayer& l, dsp_lasso_op operation, int64_t index, char* scratch) {
  const Square<T> q(l, index, scratch);
  square_norms<T>(q);
  if (operation == DSP_LASSO_HESSIAN) hessian<T>(q);
  if (operation == DSP_LASSO_STEP_GRADIENT) step_gradient<T>(q);
}

template <typename T>
void block(const LassoLayer& l, dsp_lasso_op operation, int64_t index, char* scratch) {
  if (is_flat(operation)) {
    block_flat<T>(l, operation, index, scratch);
  } else {
    block_square<T>(l, operation, index, scratch);
  }
}

// ---- per layer: the blocks' results in their order ----

template <typename T>
void finish(const LassoLayer& l, dsp_lasso_op operation) {
  const int64_t groups = l.groups;
  const T* roots = static_cast<const T*>(l.roots);
  const T* halves = static_cast<const T*>(l.halves);
  T* parts = static_cast<T*>(l.parts);
  const int64_t cells = l.filters * groups;
  if (parts != nullptr)
    for (int64_t b = 1; b < l.blocks; ++b)
      for (int64_t i = 0; i < cells; ++i) parts[i] += parts[b * cells + i];
  double penalty = 0;
  for (int64_t g = 0; g < groups; ++g) {
    double norms = 0;
    double changes = 0;
    for (int64_t b = 0; b < l.blocks; ++b) {
      norms += l.sums[(b * groups + g) * 2];
      changes += l.sums[(b * groups + g) * 2 + 1];
    }
    penalty +=
        operation == DSP_LASSO_HESSIAN ? l.size_change[g] * norms + l.size[g] * changes : l.size[g] * norms;
    if (parts == nullptr || l.log_out == nullptr) continue;
    const bool hessian = operation == DSP_LASSO_HESSIAN;
    const double factor = operation == DSP_LASSO_STEP_GRADIENT ? l.scale : l.amount;
    const double slope =
        hessian ? changes * l.root_sum[g] + norms * l.root_change[g] : (norms + changes) * l.root_sum[g];
    const double bend = norms * l.root_sum[g];
    T* out = static_cast<T*>(l.log_out) + g * l.log_out_stride;
    for (int64_t o = 0; o < l.filters; ++o) {
      const int64_t at = o * groups + g;
      double sum = static_cast<double>(parts[at]) + slope * static_cast<double>(roots[at]);
      if (hessian) sum += bend * static_cast<double>(halves[at]);
      out[o] = static_cast<T>(factor * sum);
    }
  }
  if (l.penalty != nullptr) *l.penalty = l.scale * penalty;
}

template <typename T>
const LassoKernels* kernels_of() {
  static const LassoKernels table = {&prepare<T>, &scratch_bytes<T>, &block<T>, &finish<T>, &block_width<T>};
  return &table;
}

}  // namespace

inline const LassoKernels* lasso_kernels(int element) {
  return element == 0 ? kernels_of<float>() : kernels_of<double>();
}

}  // namespace DSP_ISA
}  // namespace dsp
