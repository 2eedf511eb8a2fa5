#include "conv/planar/kernel.h"
#include "program/fields.h"

namespace dsp {
namespace {

class ActivationStep final : public ChannelStep {
 public:
  explicit ActivationStep(const Fields<DSP_OP_ACTIVATION>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return source.shape(f_.x); }
  const Activation& activation() const override { return f_.activation; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<const float> in = at.const_rows(f_.x);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c)
      kernels().fill(out(c, 0), out.pitch, 0, in(c, 0), in.pitch, 0.0f, y.height, y.width, f_.activation);
  }

 private:
  Fields<DSP_OP_ACTIVATION> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_ACTIVATION>& fields) {
  return std::make_unique<ActivationStep>(fields);
}

}  // namespace dsp
