#include <algorithm>

#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

class ConstantStep final : public Step {
 public:
  explicit ConstantStep(const Fields<DSP_OP_CONSTANT>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape made{f_.channels, f_.height, f_.width};
    const int64_t plane = checked_mul(f_.height, f_.width, "a constant");
    content_ = source.take(f_.content_at, checked_mul(f_.channels, plane, "a constant"), "content");
    return made;
  }
  bool alike() const override { return false; }
  int64_t bytes() const override { return bytes_of(content_); }
  void run(const Place& at, int) const override {
    const Rows<float> out = at.rows(result);
    const float* from = content_.data();
    for (int64_t c = 0; c < f_.channels; ++c) {
      for (int64_t row = 0; row < f_.height; ++row, from += f_.width)
        std::copy(from, from + f_.width, out(c, row));
    }
  }

 private:
  Fields<DSP_OP_CONSTANT> f_;
  std::vector<float> content_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_CONSTANT>& fields) {
  return std::make_unique<ConstantStep>(fields);
}

}  // namespace dsp
