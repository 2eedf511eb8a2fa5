#include "conv/lanes/kernel.h"
#include "conv/planar/kernel.h"
#include "program/fields.h"

namespace dsp {
namespace {

class AdaptiveAvgPoolStep final : public ChannelStep {
 public:
  explicit AdaptiveAvgPoolStep(const Fields<DSP_OP_ADAPTIVE_AVG_POOL>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return {source.shape(f_.x).channels, f_.out_h, f_.out_w}; }

  // What is made of whole planes is flat.
  bool alike() const override { return f_.out_h != 1 || f_.out_w != 1; }
  bool any_order() const override { return true; }
  bool reads(size_t, Layout) const override { return true; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const KernelTable& k = kernels();
    const Shape& x = at.value(inputs[0]);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t oy = 0; oy < f_.out_h; ++oy) {
      const int64_t y0 = oy * x.height / f_.out_h;
      const int64_t y1 = ((oy + 1) * x.height + f_.out_h - 1) / f_.out_h;
      for (int64_t ox = 0; ox < f_.out_w; ++ox) {
        const int64_t x0 = ox * x.width / f_.out_w;
        const int64_t x1 = ((ox + 1) * x.width + f_.out_w - 1) / f_.out_w;
        const float pixels = static_cast<float>((y1 - y0) * (x1 - x0));
        const bool whole_rows = x1 - x0 == in.pitch;
        for (int64_t c = begin; c < end; ++c) {
          float sum = 0;
          if (whole_rows) {
            sum = k.sum(in(c, y0), (y1 - y0) * in.pitch);
          } else {
            for (int64_t iy = y0; iy < y1; ++iy) sum += k.sum(in(c, iy) + x0, x1 - x0);
          }
          out(c, oy)[ox] = sum / pixels;
        }
      }
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& x = at.value(inputs[0]);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    const PixelRows<float> out = at.pixel_rows(result);
    if (!alike() && !x.places.empty()) {
      std::vector<float> means(x.places.size());
      lane_kernels().plane_mean(means.data(), in(0), in.row, in.pixel, x.height, x.width, x.channels,
                                static_cast<float>(x.height * x.width), true);
      for (int64_t c = 0; c < x.channels; ++c) out(0)[c] = means[static_cast<size_t>(x.place(c))];
      return;
    }
    for (int64_t oy = begin; oy < end; ++oy) {
      const int64_t y0 = oy * x.height / f_.out_h;
      const int64_t y1 = ((oy + 1) * x.height + f_.out_h - 1) / f_.out_h;
      for (int64_t ox = 0; ox < f_.out_w; ++ox) {
        const int64_t x0 = ox * x.width / f_.out_w;
        const int64_t x1 = ((ox + 1) * x.width + f_.out_w - 1) / f_.out_w;
        lane_kernels().plane_mean(out(oy) + ox * out.pixel, in(y0) + x0 * in.pixel, in.row, in.pixel, y1 - y0,
                                  x1 - x0, x.channels, static_cast<float>((y1 - y0) * (x1 - x0)),
                                  x1 - x0 == x.width);
      }
    }
  }

 private:
  Fields<DSP_OP_ADAPTIVE_AVG_POOL> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_ADAPTIVE_AVG_POOL>& fields) {
  return std::make_unique<AdaptiveAvgPoolStep>(fields);
}

}  // namespace dsp
