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
Description read_description(const int64_t* words, int64_t words_numel, const Floats& floats);

// Of a description's header alone, which is checked: where its steps begin, the inputs' shapes, and the same
// description for inputs of other shapes.
int64_t description_steps(const int64_t* words, int64_t words_numel);
std::vector<Shape> description_inputs(const int64_t* words, int64_t words_numel);
std::vector<int64_t> description_for(const int64_t* words, int64_t words_numel,
                                     const std::vector<Shape>& inputs);

}  // namespace dsp
