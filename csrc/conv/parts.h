// How long sums are cut into parts, the same for every engine.
#pragma once

#include <cstdint>

namespace dsp {

// Terms of a sum that are added one after the other. Sums of more go by equal parts: their error then grows
// with a part's length, not with the whole. Whole columns of three, so that engines that take columns of taps
// and those that take single ones give the same bits. Always inlined: kernels of several instruction sets
// use it.
constexpr int64_t kPartTerms = 240;
__attribute__((always_inline)) constexpr int64_t part_terms(int64_t terms) {
  const int64_t parts = (terms + kPartTerms - 1) / kPartTerms;
  return parts <= 1 ? terms : ((terms + parts - 1) / parts + 2) / 3 * 3;
}

}  // namespace dsp
