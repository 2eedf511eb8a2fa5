#include "conv/planar/kernel.h"
#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

// One size of two that broadcast.
int64_t wider(int64_t a, int64_t b) {
  if (a != b && a != 1 && b != 1) fail("program: elementwise of two shapes");
  return a == 1 ? b : a;
}

class ElementwiseStep final : public ChannelStep {
 public:
  explicit ElementwiseStep(const Fields<DSP_OP_ELEMENTWISE>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& a = source.shape(f_.a);
    const Shape& b = source.shape(f_.b);
    same_ = a == b;
    return {wider(a.channels, b.channels), wider(a.height, b.height), wider(a.width, b.width)};
  }
  const Activation& activation() const override { return f_.activation; }
  // What is read again for every channel or pixel has its channels in order.
  bool any_order() const override { return same_; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Shape& a = at.value(inputs[0]);
    const Shape& b = at.value(inputs[1]);
    const Rows<const float> left = at.const_rows(inputs[0]);
    const Rows<const float> right = at.const_rows(inputs[1]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = 0; row < y.height; ++row)
        kernels().elementwise(f_.op, out(c, row), left(own(a.channels, c), own(a.height, row)),
                              right(own(b.channels, c), own(b.height, row)), y.width, own(a.width, 1),
                              own(b.width, 1), f_.activation);
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& y = at.value(result);
    const Value& a = at.value(inputs[0]);
    const Value& b = at.value(inputs[1]);
    const PixelRows<const float> left = at.const_pixel_rows(inputs[0]);
    const PixelRows<const float> right = at.const_pixel_rows(inputs[1]);
    const PixelRows<float> out = at.pixel_rows(result);
    if (same_) {
      const int64_t count = (y.width - 1) * out.pixel + y.channels;
      for (int64_t row = begin; row < end; ++row)
        kernels().elementwise(f_.op, out(row), left(row), right(row), count, 1, 1, f_.activation);
      return;
    }
    for (int64_t row = begin; row < end; ++row) {
      const float* from_a = left(own(a.height, row));
      const float* from_b = right(own(b.height, row));
      for (int64_t x = 0; x < y.width; ++x)
        kernels().elementwise(f_.op, out(row) + x * out.pixel, from_a + own(a.width, x) * left.pixel,
                              from_b + own(b.width, x) * right.pixel, y.channels, own(a.channels, 1),
                              own(b.channels, 1), f_.activation);
    }
  }

 private:
  static int64_t own(int64_t size, int64_t index) { return size == 1 ? 0 : index; }

  Fields<DSP_OP_ELEMENTWISE> f_;
  bool same_ = false;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_ELEMENTWISE>& fields) {
  return std::make_unique<ElementwiseStep>(fields);
}

}  // namespace dsp
