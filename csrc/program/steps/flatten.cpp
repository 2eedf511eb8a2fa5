#include <cstring>

#include "program/fields.h"

namespace dsp {
namespace {

class FlattenStep final : public ChannelStep {
 public:
  explicit FlattenStep(const Fields<DSP_OP_FLATTEN>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return {source.shape(f_.x).numel(), 1, 1}; }

 protected:
  int64_t count(const Place& at) const override { return at.value(f_.x).channels; }
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(f_.x);
    const Rows<const float> in = at.const_rows(f_.x);
    float* out = at.rows(result).base;
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = 0; row < x.height; ++row)
        std::memcpy(out + (c * x.height + row) * x.width, in(c, row),
                    static_cast<size_t>(x.width) * sizeof(float));
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
