#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

class ReorderStep final : public PlanarStep {
 public:
  explicit ReorderStep(const Fields<DSP_OP_REORDER>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape made{f_.channels, f_.height, f_.width};
    const int64_t plane = checked_mul(f_.height, f_.width, "reorder");
    if (checked_mul(f_.channels, plane, "reorder") != static_cast<int64_t>(f_.elements.size()))
      fail("program: reorder has not as many elements as its result");
    for (const int32_t element : f_.elements)
      if (element >= source.shape(f_.x).numel()) fail("program: reorder has elements that x does not have");
    return made;
  }
  int64_t bytes() const override { return static_cast<int64_t>(f_.elements.size() * sizeof(int32_t)); }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(inputs[0]);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    const int32_t* element = f_.elements.data() + begin * f_.height * f_.width;
    // Where x has the element before; the next is often in the same row.
    int64_t last = 0, column = 0;
    const float* row = in(0, 0);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t oy = 0; oy < f_.height; ++oy) {
        float* to = out(c, oy);
        for (int64_t ox = 0; ox < f_.width; ++ox) {
          const int64_t now = *element++;
          column += now - last;
          if (column < 0 || column >= x.width) {
            const int64_t number = now / x.width;
            column = now - number * x.width;
            row = in(number / x.height, number % x.height);
          }
          last = now;
          to[ox] = row[column];
        }
      }
    }
  }

 private:
  Fields<DSP_OP_REORDER> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_REORDER>& fields) {
  return std::make_unique<ReorderStep>(fields);
}

}  // namespace dsp
