// How a program's values lie, chosen once for all steps.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "program/step.h"

namespace dsp {

using Values = std::vector<Value>;
using Steps = std::vector<std::unique_ptr<Step>>;

// The engine of each convolution, the layout of each value and within it what is kept around planes;
// `outputs` are what the caller gets. Adds steps that copy values where engines meet: from then on steps are
// in the order in which they run, and what a step makes is the value that it says.
void choose_layouts(const std::vector<int64_t>& outputs, Steps* steps, Values* values);

// Where rows are half a vector, two images fill one: from the step that is returned on they go through the
// steps together, and what is still needed there exists twice. The number of steps: nowhere.
size_t choose_pairs(const Steps& steps, Values* values);

}  // namespace dsp
