#include <cstring>

#include "program/fields.h"

namespace dsp {
namespace {

class FlattenStep final : public ChannelStep {
 public:
  explicit FlattenStep(const Fields<DSP_OP_FLATTEN>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return {source.shape(f_.x).numel(), 1, 1}; }

  bool alike() const override { return false; }
  bool reads(size_t, Layout) const override { return true; }

 protected:
  int64_t count(const Place& at) const override { return at.value(inputs[0]).channels; }
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(inputs[0]);
    const Rows<const float> in = at.const_rows(inputs[0]);
    float* out = at.rows(result).base;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = 0; row < x.height; ++row)
        std::memcpy(out + (c * x.height + row) * x.width, in(c, row),
                    static_cast<size_t>(x.width) * sizeof(float));
    }
  }
  int64_t rows(const Place& at) const override { return at.value(inputs[0]).height; }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& x = at.value(inputs[0]);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    float* out = at.rows(result).base;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t column = 0; column < x.width; ++column) {
        const float* from = in(row) + column * in.pixel;
        for (int64_t c = 0; c < x.channels; ++c)
          out[(c * x.height + row) * x.width + column] = from[x.place(c)];
      }
    }
  }

 private:
  Fields<DSP_OP_FLATTEN> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_FLATTEN>& fields) {
  return std::make_unique<FlattenStep>(fields);
}

}  // namespace dsp
