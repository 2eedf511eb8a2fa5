#include "conv/planar/kernel.h"
#include "program/fields.h"

namespace dsp {
namespace {

class ActivationStep final : public ChannelStep {
 public:
  explicit ActivationStep(const Fields<DSP_OP_ACTIVATION>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return source.shape(f_.x); }
  const Activation& activation() const override { return f_.activation; }
  bool any_order() const override { return true; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c)
      kernels().fill(out(c, 0), out.pitch, 0, in(c, 0), in.pitch, 0.0f, y.height, y.width, f_.activation);
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& y = at.value(result);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    const PixelRows<float> out = at.pixel_rows(result);
    // What lies between the channels of two pixels goes along.
    const int64_t count = (y.width - 1) * out.pixel + y.channels;
    if (begin < end)
      kernels().fill(out(begin), out.row, 0, in(begin), in.row, 0.0f, end - begin, count, f_.activation);
  }

 private:
  Fields<DSP_OP_ACTIVATION> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_ACTIVATION>& fields) {
  return std::make_unique<ActivationStep>(fields);
}

}  // namespace dsp
