// Activations on vectors, for the instruction set that DSP_ISA names.
#pragma once

#include "core/activation.h"
#include "core/simd.h"

namespace dsp {
namespace DSP_ISA {

// What is 32 bits wide in a vector's lanes, as whole numbers.
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));

DSP_INLINE Vec absolute(Vec v) { return reinterpret_cast<Vec>(reinterpret_cast<Bits>(v) & 0x7fffffffu); }
DSP_INLINE Vec with_sign(Vec v, Vec sign) {
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(v) | (reinterpret_cast<Bits>(sign) & 0x80000000u));
}

// v = n ln 2 + r with a whole number n and |r| <= ln 2 / 2; `excess` is n + 256. For -160 < v < 90, and NaN,
// which r is then too. ln 2 in two parts, the first so short that its products are exact.
struct Reduced {
  Vec r;
  Bits excess;
};
DSP_INLINE Reduced reduced(Vec v) {
  const Vec whole = set1(12582912.0f);  // 1.5 * 2^23: the sum's last bit is 1
  const Vec shifted = fma(v, set1(1.44269504f), whole);
  const Vec n = add(shifted, set1(-12582912.0f));
  const Vec r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), v));
  return {r, reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(whole) + 256u};
}
// e^r - 1, by a polynomial that was fitted to it: the relative error of 1 more is below 4e-9.
DSP_INLINE Vec expm1_near_0(Vec r) {
  Vec q = fma(set1(0.0013811640674248338f), r, set1(0.008370136842131615f));
  q = fma(q, r, set1(0.04166853055357933f));
  q = fma(q, r, set1(0.16666509211063385f));
  q = fma(q, r, set1(0.4999999403953552f));
  return fma(mul(r, r), q, r);
}
// 2^(n - 127), for 0 < n < 255
DSP_INLINE Vec power_of_2(Bits n) { return reinterpret_cast<Vec>(n << 23); }

DSP_INLINE Vec exp(Vec v) {
  const Reduced x = reduced(min(set1(89.0f), max(set1(-105.0f), v)));
  const Bits half = x.excess >> 1;  // in two factors: subnormal results, and infinite ones
  const Vec y = mul(add(set1(1.0f), expm1_near_0(x.r)), power_of_2(half - 1u));
  return mul(y, power_of_2(x.excess - half - 1u));
}
// For v < 60. Near 0 it is as exact as v.
DSP_INLINE Vec expm1(Vec v) {
  const Reduced x = reduced(max(set1(-60.0f), v));
  const Vec scale = power_of_2(x.excess - 129u);
  return fma(scale, expm1_near_0(x.r), add(scale, set1(-1.0f)));
}

// A curve of activations.def is one function here, `p` its parameters. At infinities they are what torch's
// are, which is NaN for some.
DSP_INLINE Vec curve_leaky_relu(Vec v, const float* p) {
  return fma(set1(p[0]), min(zero(), v), max(zero(), v));
}
DSP_INLINE Vec curve_hardsigmoid(Vec v, const float*) {
  return mul(min(set1(6.0f), max(zero(), add(v, set1(3.0f)))), set1(1.0f / 6.0f));
}
DSP_INLINE Vec curve_hardswish(Vec v, const float* p) { return mul(v, curve_hardsigmoid(v, p)); }
DSP_INLINE Vec curve_sigmoid(Vec v, const float*) {
  const Vec one = set1(1.0f);
  return div(one, add(one, exp(mul(v, set1(-1.0f)))));
}
DSP_INLINE Vec curve_silu(Vec v, const float*) { return div(v, add(set1(1.0f), exp(mul(v, set1(-1.0f))))); }
DSP_INLINE Vec curve_tanh(Vec v, const float*) {
  const Vec e = expm1(min(set1(40.0f), mul(set1(2.0f), absolute(v))));
  return with_sign(div(e, add(e, set1(2.0f))), v);
}
// v Phi(v) by erfc(a) = e^(-a a) t P(t), t = 1 / (1 + a / 2): P was fitted, its relative error is below 5e-8.
DSP_INLINE Vec curve_gelu(Vec v, const float*) {
  const Vec one = set1(1.0f);
  const Vec t = div(one, fma(absolute(v), set1(0.35355339f), one));
  Vec p = fma(set1(-0.059387993067502975f), t, set1(0.28613075613975525f));
  p = fma(p, t, set1(-0.4904188811779022f));
  p = fma(p, t, set1(0.281745582818985f));
  p = fma(p, t, set1(-0.02915547788143158f));
  p = fma(p, t, set1(0.2037547528743744f));
  p = fma(p, t, set1(0.24283474683761597f));
  p = fma(p, t, set1(0.2824121117591858f));
  p = fma(p, t, set1(0.2820843458175659f));
  const Vec tail = mul(mul(set1(0.5f), mul(p, t)), exp(mul(set1(-0.5f), mul(v, v))));  // Phi(-|v|)
  // Phi(v): the tail, or what it leaves of 1.
  const Vec positive = where_positive(v, one);
  return mul(v, fma(tail, fma(set1(-2.0f), positive, one), positive));
}
// v (1 + tanh(u)) / 2 = v / (1 + e^(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
DSP_INLINE Vec curve_gelu_tanh(Vec v, const float*) {
  const Vec u = mul(v, fma(mul(v, v), set1(-0.0713548163f), set1(-1.5957691216f)));
  return div(v, add(set1(1.0f), exp(u)));
}
// scale v where v > 0, else alpha (e^v - 1)
DSP_INLINE Vec curve_elu(Vec v, const float* p) {
  return fma(set1(p[0]), expm1(min(zero(), v)), mul(set1(p[1]), max(zero(), v)));
}
// v tanh(log(1 + e^v)) = v w / (w + 2), w = e^v (e^v + 2)
DSP_INLINE Vec curve_mish(Vec v, const float*) {
  const Vec e = exp(min(set1(20.0f), v));
  const Vec w = mul(e, add(e, set1(2.0f)));
  return mul(v, div(w, add(w, set1(2.0f))));
}

// Out of line: a kernel that has its results in registers puts them into memory for it.
__attribute__((noinline)) inline void apply_curve([[maybe_unused]] Vec* values, [[maybe_unused]] int count,
                                                  const Activation& a) {
  switch (a.kind) {
#define DSP_CLAMP(NAME, name, code, numbers, least, most)
#define DSP_CURVE(NAME, name, code, numbers)                                           \
  case DSP_ACT_##NAME:                                                                 \
    for (int i = 0; i < count; ++i) values[i] = curve_##name(values[i], a.parameters); \
    break;
#include "core/activations.def"
    default:
      break;
  }
}

DSP_INLINE Vec clamp(Vec v, const Activation& a) { return min(set1(a.most), max(set1(a.least), v)); }

DSP_INLINE Vec activate(Vec v, const Activation& a) {
  if (__builtin_expect(a.curve, 0)) {
    apply_curve(&v, 1, a);
    return v;
  }
  return clamp(v, a);
}

}  // namespace DSP_ISA
}  // namespace dsp
