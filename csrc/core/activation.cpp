#include "core/activation.h"

#include <cmath>
#include <iterator>
#include <string>

#include "core/status.h"

namespace dsp {
namespace {

constexpr dsp_activation_info kTable[] = {
#define DSP_ACTIVATION(NAME, name, code, parameters) {#name, code, parameters},
#include "core/activations.def"
#undef DSP_ACTIVATION
};

constexpr bool in_order() {
  int32_t code = 0;
  for (const dsp_activation_info& row : kTable) {
    if (row.code != code++ || row.parameters < 0 || row.parameters > DSP_ACT_PARAMETERS) return false;
  }
  return true;
}
static_assert(in_order(), "activations.def: codes count from 0, parameters are at most DSP_ACT_PARAMETERS");

}  // namespace

int activation_parameters(int32_t kind) {
  if (kind >= 0 && kind < static_cast<int32_t>(std::size(kTable))) return kTable[kind].parameters;
  std::string text = "activation is " + std::to_string(kind) + ", expected";
  const char* separator = " ";
  for (const dsp_activation_info& row : kTable) {
    text += separator + std::to_string(row.code) + " (" + row.name + ")";
    separator = ", ";
  }
  fail(text);
}

Activation make_activation(int32_t kind, const float* parameters) {
  Activation activation;
  const int count = activation_parameters(kind);
  activation.kind = kind;
  for (int i = 0; i < count; ++i) {
    if (parameters == nullptr || std::isnan(parameters[i]))
      fail(std::string("a parameter of the activation ") + kTable[kind].name + " is no number");
    activation.parameters[i] = parameters[i];
  }
  [[maybe_unused]] const float* p = activation.parameters;
  switch (kind) {
#define DSP_CLAMP(NAME, name, code, parameters, lower, upper) \
  case DSP_ACT_##NAME:                                        \
    activation.least = lower;                                 \
    activation.most = upper;                                  \
    break;
#define DSP_CURVE(NAME, name, code, parameters) \
  case DSP_ACT_##NAME:                          \
    activation.curve = true;                    \
    break;
#include "core/activations.def"
    default:
      break;
  }
  return activation;
}

Activation make_activation(const dsp_activation* activation) {
  return activation == nullptr ? Activation{} : make_activation(activation->kind, activation->parameters);
}

bool stay_under(const Activation& before, const Activation& after) {
  if (after.curve) return false;
  if (before.curve) return after.kind == DSP_ACT_NONE;
  return after.least <= before.least && before.most <= after.most;
}

}  // namespace dsp

extern "C" {

int32_t dsp_activation_count(void) { return static_cast<int32_t>(std::size(dsp::kTable)); }

const dsp_activation_info* dsp_activation_at(int32_t index) {
  return index >= 0 && index < dsp_activation_count() ? dsp::kTable + index : nullptr;
}
}
