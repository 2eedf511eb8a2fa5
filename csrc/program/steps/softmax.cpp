#include <cmath>
#include <limits>

#include "program/fields.h"

namespace dsp {
namespace {

class SoftmaxStep final : public PlanarStep {
 public:
  explicit SoftmaxStep(const Fields<DSP_OP_SOFTMAX>& fields) : f_(fields) {}

  Shape shape(const Source& source) override { return source.shape(f_.x); }

 protected:
  int64_t count(const Place& at) const override {
    return f_.over_channels != 0 ? at.value(result).height : at.value(result).channels;
  }
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(inputs[0]);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t i = begin; i < end; ++i) {
      if (f_.over_channels == 0) {
        share(in, out, {i, i + 1, 0, x.height, 0, x.width});
        continue;
      }
      for (int64_t column = 0; column < x.width; ++column)
        share(in, out, {0, x.channels, i, i + 1, column, column + 1});
    }
  }

 private:
  struct Box {
    int64_t c0, c1, y0, y1, x0, x1;
  };

  template <typename F>
  static void each(const Box& box, F f) {
    for (int64_t c = box.c0; c < box.c1; ++c) {
      for (int64_t y = box.y0; y < box.y1; ++y) {
        for (int64_t x = box.x0; x < box.x1; ++x) f(c, y, x);
      }
    }
  }
  // A NaN makes all of them NaN, and so does an infinite value.
  static void share(const Rows<const float>& in, const Rows<float>& out, const Box& box) {
    float most = -std::numeric_limits<float>::infinity();
    each(box, [&](int64_t c, int64_t y, int64_t x) { most = most < in(c, y)[x] ? in(c, y)[x] : most; });
    double sum = 0;
    each(box, [&](int64_t c, int64_t y, int64_t x) {
      const float e = std::exp(in(c, y)[x] - most);
      out(c, y)[x] = e;
      sum += static_cast<double>(e);
    });
    each(box, [&](int64_t c, int64_t y, int64_t x) {
      out(c, y)[x] = static_cast<float>(static_cast<double>(out(c, y)[x]) / sum);
    });
  }

  Fields<DSP_OP_SOFTMAX> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_SOFTMAX>& fields) {
  return std::make_unique<SoftmaxStep>(fields);
}

}  // namespace dsp
