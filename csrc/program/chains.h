// Convolutions whose pixels can go through all of them before the next pixels do.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "program/layouts.h"

namespace dsp {

// Steps [begin, end) run for `pixels` pixels of their results at a time; 0: one step, for all.
struct Chain {
  size_t begin, end;
  int64_t pixels;
};

// All steps in order. In a chain of several, each convolution but the first needs of each pixel that pixel
// alone: what one writes is in the cache when the next reads it. Only where whole values would not be. All
// values of a chain live from its begin to its end.
std::vector<Chain> find_chains(const Steps& steps, const Values& values);

}  // namespace dsp
