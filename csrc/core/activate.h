// Activations on vectors, for the instruction set that DSP_ISA names.
#pragma once

#include "core/activation.h"
#include "core/simd.h"

namespace dsp {
namespace DSP_ISA {

// A curve of activations.def is one function here, `p` its parameters:
//     DSP_INLINE Vec curve_<name>(Vec v, const float* p)

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
