// The kernels of norm/kernel.h for the instruction set that DSP_ISA names.
#pragma once

#include "core/activate.h"
#include "core/simd.h"
#include "norm/kernel.h"

namespace dsp {
namespace DSP_ISA {

// Sums stay in float for this many values a lane at most, then go to double.
constexpr int64_t kNormPart = 64;

template <typename Step>
DSP_INLINE void norm_rows(int64_t count, double sums[2], Step step) {
  int64_t i = 0;
  while (i < count) {
    Vec first[2] = {zero(), zero()};
    Vec second[2] = {zero(), zero()};
    const int64_t whole = (count - i) / (2 * kLanes);
    const int64_t rounds = whole < kNormPart ? whole : kNormPart;
    for (int64_t r = 0; r < rounds; ++r, i += 2 * kLanes) {
      step(i, kLanes, first[0], second[0]);
      step(i + kLanes, kLanes, first[1], second[1]);
    }
    if (rounds < kNormPart) {
      for (; i < count; i += kLanes) {
        const int64_t rest = count - i;
        step(i, rest < kLanes ? static_cast<int>(rest) : kLanes, first[0], second[0]);
      }
    }
    sums[0] += static_cast<double>(sum_lanes(add(first[0], first[1])));
    sums[1] += static_cast<double>(sum_lanes(add(second[0], second[1])));
  }
}

DSP_INLINE Vec norm_load(const float* p, int lanes) {
  return lanes == kLanes ? load(p) : load_lanes(p, lanes);
}

inline void norm_moments(const float* x, int64_t count, float shift, double sums[2]) {
  const Vec minus = set1(-shift);
  norm_rows(count, sums, [&](int64_t i, int lanes, Vec& first, Vec& second) {
    Vec v = add(norm_load(x + i, lanes), minus);
    if (lanes != kLanes) v = keep_lanes(v, lanes);
    first = add(first, v);
    second = fma(v, v, second);
  });
}

inline void norm_apply(float* y, const float* x, const float* residual, float scale, float shift,
                       int64_t count, const Activation& activation) {
  const Vec s = set1(scale);
  const Vec t = set1(shift);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    Vec v = x == nullptr ? t : fma(norm_load(x + i, lanes), s, t);
    if (residual != nullptr) v = add(v, norm_load(residual + i, lanes));
    v = activate(v, activation);
    if (lanes == kLanes)
      store(y + i, v);
    else
      store_lanes(y + i, v, lanes);
  }
}

// The gradient behind the activation: 0 where the output is not above 0.
DSP_INLINE Vec norm_masked(const NormGrad& a, int64_t i, int lanes, Vec x, Vec scale, Vec shift) {
  const Vec g = norm_load(a.grad + i, lanes);
  if (a.y != nullptr) return where_positive(norm_load(a.y + i, lanes), g);
  if (a.relu) return where_positive(fma(x, scale, shift), g);
  return g;
}

inline void norm_grad_sums(const NormGrad& a, int64_t count, double sums[2]) {
  const Vec minus = set1(-a.mean);
  const Vec scale = set1(a.scale);
  const Vec shift = set1(a.shift);
  norm_rows(count, sums, [&](int64_t i, int lanes, Vec& first, Vec& second) {
    const Vec x = a.x == nullptr ? zero() : norm_load(a.x + i, lanes);
    Vec g = norm_masked(a, i, lanes, x, scale, shift);
    if (lanes != kLanes) g = keep_lanes(g, lanes);
    first = add(first, g);
    second = fma(g, add(x, minus), second);
  });
}

inline void norm_grad(const NormGrad& a, float* dx, float* residual, float of_grad, float of_x, float rest,
                      int64_t count) {
  const Vec minus = set1(-a.mean);
  const Vec scale = set1(a.scale);
  const Vec shift = set1(a.shift);
  const Vec by_grad = set1(of_grad);
  const Vec by_x = set1(of_x);
  const Vec base = set1(rest);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int lanes = count - i < kLanes ? static_cast<int>(count - i) : kLanes;
    const Vec x = a.x == nullptr ? zero() : norm_load(a.x + i, lanes);
    const Vec g = norm_masked(a, i, lanes, x, scale, shift);
    const Vec d = fma(g, by_grad, fma(add(x, minus), by_x, base));
    if (lanes == kLanes) {
      if (dx != nullptr) store(dx + i, d);
      if (residual != nullptr) store(residual + i, g);
    } else {
      if (dx != nullptr) store_lanes(dx + i, d, lanes);
      if (residual != nullptr) store_lanes(residual + i, g, lanes);
    }
  }
}

inline const NormKernels* norm_kernels() {
  static const NormKernels table = {&norm_moments, &norm_apply, &norm_grad_sums, &norm_grad};
  return &table;
}

}  // namespace DSP_ISA
}  // namespace dsp
