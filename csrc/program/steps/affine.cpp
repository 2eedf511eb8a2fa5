#include "conv/lanes/kernel.h"
#include "conv/planar/kernel.h"
#include "program/fields.h"

namespace dsp {
namespace {

class AffineStep final : public ChannelStep {
 public:
  explicit AffineStep(const Fields<DSP_OP_AFFINE>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& x = source.shape(f_.x);
    scale_ = source.take(f_.scale_at, x.channels, "scale");
    shift_ = source.take(f_.shift_at, x.channels, "shift");
    return x;
  }
  int64_t bytes() const override { return bytes_of(scale_) + bytes_of(shift_); }
  const Activation& activation() const override { return f_.activation; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = 0; row < y.height; ++row)
        kernels().affine(out(c, row), in(c, row), scale_[static_cast<size_t>(c)],
                         shift_[static_cast<size_t>(c)], y.width, f_.activation);
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& y = at.value(result);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    const PixelRows<float> out = at.pixel_rows(result);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t x = 0; x < y.width; ++x)
        lane_kernels().affine(out(row) + x * out.pixel, in(row) + x * in.pixel, scale_.data(), shift_.data(),
                              y.channels, f_.activation);
    }
  }

 private:
  Fields<DSP_OP_AFFINE> f_;
  std::vector<float> scale_, shift_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_AFFINE>& fields) {
  return std::make_unique<AffineStep>(fields);
}

}  // namespace dsp
