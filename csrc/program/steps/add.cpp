#include "conv/planar/kernel.h"
#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

class AddStep final : public ChannelStep {
 public:
  explicit AddStep(const Fields<DSP_OP_ADD>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    if (!(source.shape(f_.a) == source.shape(f_.b))) fail("program: add of two shapes");
    return source.shape(f_.a);
  }
  const Activation& activation() const override { return f_.activation; }
  bool any_order() const override { return true; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<const float> a = at.const_rows(inputs[0]);
    const Rows<const float> b = at.const_rows(inputs[1]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = 0; row < y.height; ++row)
        kernels().add(out(c, row), a(c, row), b(c, row), y.width, f_.activation);
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& y = at.value(result);
    const PixelRows<const float> a = at.const_pixel_rows(inputs[0]);
    const PixelRows<const float> b = at.const_pixel_rows(inputs[1]);
    const PixelRows<float> out = at.pixel_rows(result);
    const int64_t count = (y.width - 1) * out.pixel + y.channels;
    for (int64_t row = begin; row < end; ++row) kernels().add(out(row), a(row), b(row), count, f_.activation);
  }

 private:
  Fields<DSP_OP_ADD> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_ADD>& fields) {
  return std::make_unique<AddStep>(fields);
}

}  // namespace dsp
