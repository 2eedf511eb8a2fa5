// How windows of a kernel lie over an image: the one place where sizes are counted.
#pragma once

#include <cstdint>

namespace dsp {

// From the first pixel of the first window to the last that a window may start at; below 0: none fits.
inline int64_t window_room(int64_t size, int64_t kernel, int64_t padding, int64_t dilation) {
  return size + 2 * padding - dilation * (kernel - 1) - 1;
}

// How many windows lie along one side; at least one fits.
inline int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return window_room(size, kernel, padding, dilation) / stride + 1;
}

// The shape with what follows from it; all products are known to fit.
struct ConvShape {
  int64_t batch, height, width;
  int64_t kh, kw, sh, sw, ph, pw, dh, dw;
  int64_t out_h, out_w;
  int64_t in_channels, out_channels;
  int64_t taps() const { return kh * kw; }
  int64_t in_plane() const { return height * width; }
  int64_t out_plane() const { return out_h * out_w; }
  int64_t in_numel() const { return batch * in_channels * in_plane(); }
  int64_t out_numel() const { return batch * out_channels * out_plane(); }
};

}  // namespace dsp
