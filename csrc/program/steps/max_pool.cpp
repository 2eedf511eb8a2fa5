#include <algorithm>
#include <limits>

#include "conv/lanes/kernel.h"
#include "program/fields.h"
#include "program/steps/pooling.h"

namespace dsp {
namespace {

// NaN wins, as in torch.
float larger(float kept, float v) { return v <= kept ? kept : (kept != kept ? kept : v); }

class MaxPoolStep final : public ChannelStep {
 public:
  explicit MaxPoolStep(const Fields<DSP_OP_MAX_POOL>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    return pooled_shape(source.shape(f_.x), f_, f_.dilation_h, f_.dilation_w);
  }

  double cycles(const std::vector<Value>& values, Layout layout) const override {
    return pooling_cycles(values[static_cast<size_t>(result)], f_.kernel_h * f_.kernel_w, layout);
  }
  bool any_order() const override { return true; }

 protected:
  int64_t work(const Place& at) const override {
    return at.value(result).numel() * f_.kernel_h * f_.kernel_w;
  }
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(inputs[0]);
    const Shape& y = at.value(result);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t oy = 0; oy < y.height; ++oy) {
        float* to = out(c, oy);
        std::fill_n(to, y.width, -std::numeric_limits<float>::infinity());
        for (int64_t ky = 0; ky < f_.kernel_h; ++ky) {
          const int64_t iy = oy * f_.stride_h - f_.padding_h + ky * f_.dilation_h;
          if (iy >= 0 && iy < x.height) take_row(in(c, iy), x.width, to, y.width);
        }
      }
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& x = at.value(inputs[0]);
    const Value& y = at.value(result);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    const PixelRows<float> out = at.pixel_rows(result);
    for (int64_t oy = begin; oy < end; ++oy) {
      const Span rows = span_of(oy, f_.stride_h, f_.padding_h, f_.dilation_h, f_.kernel_h, x.height);
      for (int64_t ox = 0; ox < y.width; ++ox) {
        const Span columns = span_of(ox, f_.stride_w, f_.padding_w, f_.dilation_w, f_.kernel_w, x.width);
        lane_kernels().pool_max(out(oy) + ox * out.pixel, in(rows.first) + columns.first * in.pixel,
                                f_.dilation_h * in.row, f_.dilation_w * in.pixel, rows.count, columns.count,
                                y.channels);
      }
    }
  }

 private:
  void take_row(const float* from, int64_t in_width, float* to, int64_t out_width) const {
    const int64_t stride = f_.stride_w;
    for (int64_t kx = 0; kx < f_.kernel_w; ++kx) {
      const int64_t shift = kx * f_.dilation_w - f_.padding_w;
      const int64_t first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
      const int64_t room = in_width - 1 - shift;
      const int64_t last = room < 0 ? 0 : std::min(out_width, room / stride + 1);
      const float* shifted = from + shift;
      if (stride == 1) {
        for (int64_t ox = first; ox < last; ++ox) to[ox] = larger(to[ox], shifted[ox]);
      } else {
        for (int64_t ox = first; ox < last; ++ox) to[ox] = larger(to[ox], shifted[ox * stride]);
      }
    }
  }

  Fields<DSP_OP_MAX_POOL> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_MAX_POOL>& fields) {
  return std::make_unique<MaxPoolStep>(fields);
}

}  // namespace dsp
