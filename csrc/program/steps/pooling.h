// What pooling steps share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "program/step.h"

namespace dsp {

// How many windows lie along one side, as torch counts them.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode);

// Of a window's positions along one side, those in the image: there may be none.
struct Span {
  int64_t first, count;
};
inline Span span_of(int64_t window, int64_t stride, int64_t padding, int64_t dilation, int64_t kernel,
                    int64_t size) {
  const int64_t start = window * stride - padding;
  const int64_t skipped = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  const int64_t end = start >= size ? 0 : (size - 1 - start) / dilation + 1;
  const int64_t count = std::min(kernel, end) - skipped;
  return count > 0 ? Span{start + skipped * dilation, count} : Span{0, 0};
}

// As measured with AVX-512: planar rows are taken value by value.
inline double pooling_cycles(const Shape& made, int64_t window, Layout layout) {
  return static_cast<double>(made.numel()) * static_cast<double>(window) *
         (layout == Layout::kPlanar ? 1.2 : 0.25);
}

template <typename F>
Shape pooled_shape(const Shape& x, const F& f, int64_t dilation_h, int64_t dilation_w) {
  if (f.padding_h > f.kernel_h / 2 || f.padding_w > f.kernel_w / 2)
    fail("program: pooling pads more than half its kernel");
  const bool ceil_mode = f.ceil_mode != 0;
  return {x.channels, pooled_size(x.height, f.kernel_h, f.stride_h, f.padding_h, dilation_h, ceil_mode),
          pooled_size(x.width, f.kernel_w, f.stride_w, f.padding_w, dilation_w, ceil_mode)};
}

}  // namespace dsp
