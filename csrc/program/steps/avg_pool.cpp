#include <algorithm>

#include "conv/lanes/kernel.h"
#include "program/fields.h"
#include "program/steps/pooling.h"

namespace dsp {
namespace {

class AvgPoolStep final : public ChannelStep {
 public:
  explicit AvgPoolStep(const Fields<DSP_OP_AVG_POOL>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return pooled_shape(source.shape(f_.x), f_, 1, 1); }

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
        const int64_t y0 = oy * f_.stride_h - f_.padding_h;
        const int64_t y1 = std::min(y0 + f_.kernel_h, x.height + f_.padding_h);
        const int64_t from_y = std::max<int64_t>(y0, 0);
        const int64_t to_y = std::min(y1, x.height);
        for (int64_t ox = 0; ox < y.width; ++ox) {
          const int64_t x0 = ox * f_.stride_w - f_.padding_w;
          const int64_t x1 = std::min(x0 + f_.kernel_w, x.width + f_.padding_w);
          const int64_t from_x = std::max<int64_t>(x0, 0);
          const int64_t to_x = std::min(x1, x.width);
          float sum = 0;
          for (int64_t iy = from_y; iy < to_y; ++iy) {
            const float* row = in(c, iy);
            for (int64_t ix = from_x; ix < to_x; ++ix) sum += row[ix];
          }
          const int64_t count = f_.count_include_pad != 0
                                    ? (y1 - y0) * (x1 - x0)
                                    : std::max<int64_t>(1, (to_y - from_y) * (to_x - from_x));
          out(c, oy)[ox] = sum / static_cast<float>(count);
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
      const Span rows = span_of(oy, f_.stride_h, f_.padding_h, 1, f_.kernel_h, x.height);
      const int64_t all_rows = std::min(f_.kernel_h, x.height + 2 * f_.padding_h - oy * f_.stride_h);
      for (int64_t ox = 0; ox < y.width; ++ox) {
        const Span columns = span_of(ox, f_.stride_w, f_.padding_w, 1, f_.kernel_w, x.width);
        const int64_t all_columns = std::min(f_.kernel_w, x.width + 2 * f_.padding_w - ox * f_.stride_w);
        const int64_t count = f_.count_include_pad != 0 ? all_rows * all_columns
                                                        : std::max<int64_t>(1, rows.count * columns.count);
        lane_kernels().pool_mean(out(oy) + ox * out.pixel, in(rows.first) + columns.first * in.pixel, in.row,
                                 in.pixel, rows.count, columns.count, y.channels, static_cast<float>(count));
      }
    }
  }

 private:
  Fields<DSP_OP_AVG_POOL> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_AVG_POOL>& fields) {
  return std::make_unique<AvgPoolStep>(fields);
}

}  // namespace dsp
