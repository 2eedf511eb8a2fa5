// An activation as the kernels take it. No standard library here: kernels include this.
#pragma once

#include <cstdint>

#include "dsp.h"

#define DSP_INFINITY __builtin_inff()

namespace dsp {

// A row of activations.def with its parameters filled in. Where it is a curve, the bounds are infinite.
struct Activation {
  int32_t kind = DSP_ACT_NONE;
  bool curve = false;
  float least = -DSP_INFINITY;
  float most = DSP_INFINITY;
  float parameters[DSP_ACT_PARAMETERS] = {0.0f, 0.0f};
};

// How many parameters `kind` takes. Throws Error where there is no such activation.
int activation_parameters(int32_t kind);
// Throws Error for a kind that there is not, and for a parameter that is no number. `parameters` may be null
// where the kind has none.
Activation make_activation(int32_t kind, const float* parameters);
// null: none
Activation make_activation(const dsp_activation* activation);
// Whether results of `before` stay what they are under `after`.
bool stay_under(const Activation& before, const Activation& after);

}  // namespace dsp
