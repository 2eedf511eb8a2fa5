// What pooling steps share.
#pragma once

#include <cstdint>

#include "core/status.h"
#include "program/step.h"

namespace dsp {

// How many windows lie along one side, as torch counts them.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode);

template <typename F>
Shape pooled_shape(const Shape& x, const F& f, int64_t dilation_h, int64_t dilation_w) {
  if (f.padding_h > f.kernel_h / 2 || f.padding_w > f.kernel_w / 2)
    fail("program: pooling pads more than half its kernel");
  const bool ceil_mode = f.ceil_mode != 0;
  return {x.channels, pooled_size(x.height, f.kernel_h, f.stride_h, f.padding_h, dilation_h, ceil_mode),
          pooled_size(x.width, f.kernel_w, f.stride_w, f.padding_w, dilation_w, ceil_mode)};
}

}  // namespace dsp
