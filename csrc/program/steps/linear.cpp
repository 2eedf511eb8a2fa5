#include <algorithm>

#include "conv/planar/kernel.h"
#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

class LinearStep final : public PlanarStep {
 public:
  explicit LinearStep(const Fields<DSP_OP_LINEAR>& fields) : fields_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& x = source.shape(fields_.x);
    if (x.height != 1 || x.width != 1) fail("program: linear needs a flat input");
    features_ = x.channels;
    const int64_t numel = checked_mul(fields_.features, features_, "weight");
    weight_ = {source.floats().find(fields_.weight_at, numel, "weight"), numel};
    if (fields_.bias_at >= 0) bias_ = source.take(fields_.bias_at, fields_.features, "bias");
    return {fields_.features, 1, 1};
  }
  int64_t bytes() const override {
    return weight_.count() * static_cast<int64_t>(sizeof(float)) + bytes_of(bias_);
  }
  int64_t place_weights(float* to) override {
    const auto copy = [&](const float* given, float* prepared) {
      std::copy(given, given + weight_.count(), prepared);
    };
    if (to != nullptr) weight_.place(to, copy);
    return weight_.count();
  }
  const Activation& activation() const override { return fields_.activation; }

 protected:
  int64_t work(const Place&) const override { return weight_.count(); }
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    // Channels of flat values lie next to each other.
    kernels().linear(at.rows(result).base + begin, at.const_rows(inputs[0]).base,
                     weight_.data() + begin * features_, bias_.empty() ? nullptr : bias_.data() + begin,
                     features_, end - begin, fields_.activation);
  }

 private:
  Fields<DSP_OP_LINEAR> fields_;
  int64_t features_ = 0;
  Weights weight_;
  std::vector<float> bias_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_LINEAR>& fields) {
  return std::make_unique<LinearStep>(fields);
}

}  // namespace dsp
