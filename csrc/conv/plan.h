// The plan tensor, checked once and then read without further checks.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "core/status.h"
#include "dsp.h"

namespace dsp {

struct Group {
  int32_t n_channels;
  int32_t n_filters;
  const int32_t* channels;
  const int32_t* filters;
  int64_t weight_pairs;  // where the weights start, in (filter, channel) pairs
};

class Plan {
 public:
  // Throws Error unless every word of the plan is as dsp.h says.
  Plan(const int32_t* words, int64_t numel);
  // For words that this library has written itself.
  static Plan trusted(const int32_t* words) { return Plan(words); }

  int32_t in_channels() const { return words_[1]; }
  int32_t out_channels() const { return words_[2]; }
  int32_t n_groups() const { return words_[3]; }
  int32_t pairs() const { return words_[4]; }
  int32_t live_filters() const { return words_[6]; }
  const int32_t* words() const { return words_; }
  Group group(int32_t index) const {
    const int32_t* entry = words_ + DSP_PLAN_HEADER + int64_t{index} * DSP_PLAN_GROUP;
    return {entry[0], entry[1], words_ + entry[2], words_ + entry[3], entry[4]};
  }

 private:
  explicit Plan(const int32_t* words) : words_(words) {}
  const int32_t* words_;
};

ConvShape check_shape(const dsp_conv2d_shape* shape, const Plan& plan);

// Throws unless `pointer` may hold `numel` values and `numel` is what is expected.
void check_tensor(const void* pointer, int64_t numel, int64_t expected, const char* name);

}  // namespace dsp
