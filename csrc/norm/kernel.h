// The rows of a batch normalisation, and the table of functions that one instruction set offers for them.
#pragma once

#include <cstdint>

#include "core/activation.h"

namespace dsp {

// Where the activation lets the gradient through, as both passes of the backward read it.
struct NormGrad {
  const float* grad;
  const float* x;  // null: 0 throughout
  const float* y;  // the output where the activation is read off it; else null
  bool relu;       // y null and relu: x * scale + shift > 0
  float scale, shift, mean;
};

struct NormKernels {
  // sums[0] += sum of (x - shift), sums[1] += sum of its square
  void (*moments)(const float* x, int64_t count, float shift, double sums[2]);
  // y = act(x * scale + shift + residual); residual may be null, and x where it is 0 throughout
  void (*apply)(float* y, const float* x, const float* residual, float scale, float shift, int64_t count,
                const Activation& activation);
  // sums[0] += sum of g, sums[1] += sum of g (x - mean), with g the gradient behind the activation
  void (*grad_sums)(const NormGrad& a, int64_t count, double sums[2]);
  // dx = g * of_grad + (x - mean) * of_x + rest; residual = g; dx and residual may be null
  void (*grad)(const NormGrad& a, float* dx, float* residual, float of_grad, float of_x, float rest,
               int64_t count);
};

const NormKernels* norm_generic();
const NormKernels* norm_avx2();
const NormKernels* norm_avx512();

}  // namespace dsp
