// From a description's words to steps and values.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program/step.h"

namespace dsp {

struct Description {
  std::vector<Value> values;  // the inputs, then what each step makes
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<int64_t> outputs;
};

// Throws Error unless every word is as dsp.h and steps.def say and all shapes fit one another.
Description read_description(const int64_t* words, int64_t words_numel, const float* floats,
                             int64_t floats_numel);

}  // namespace dsp
