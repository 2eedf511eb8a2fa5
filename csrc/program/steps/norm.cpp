#include <cmath>

#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

class NormStep final : public PlanarStep {
 public:
  explicit NormStep(const Fields<DSP_OP_NORM>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& x = source.shape(f_.x);
    if (f_.groups != 0 && x.channels % f_.groups != 0) fail("program: norm of other groups than channels");
    eps_ = static_cast<double>(source.take(f_.eps_at, 1, "eps").front());
    if (f_.scale_at >= 0) scale_ = source.take(f_.scale_at, x.channels, "scale");
    if (f_.shift_at >= 0) shift_ = source.take(f_.shift_at, x.channels, "shift");
    return x;
  }
  int64_t bytes() const override { return bytes_of(scale_) + bytes_of(shift_); }

 protected:
  int64_t count(const Place& at) const override {
    return f_.groups == 0 ? at.value(result).height : f_.groups;
  }
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(inputs[0]);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    const int64_t channels = f_.groups == 0 ? x.channels : x.channels / f_.groups;
    for (int64_t i = begin; i < end; ++i) {
      if (f_.groups != 0) {
        normalise(in, out, {i * channels, (i + 1) * channels, 0, x.height, 0, x.width});
        continue;
      }
      for (int64_t column = 0; column < x.width; ++column)
        normalise(in, out, {0, channels, i, i + 1, column, column + 1});
    }
  }

 private:
  struct Box {
    int64_t c0, c1, y0, y1, x0, x1;
    double count() const { return static_cast<double>((c1 - c0) * (y1 - y0) * (x1 - x0)); }
  };

  // Of the values less `less`, to the given power.
  static double sum(const Rows<const float>& in, const Box& box, double less, bool squared) {
    double all = 0;
    for (int64_t c = box.c0; c < box.c1; ++c) {
      for (int64_t y = box.y0; y < box.y1; ++y) {
        const float* row = in(c, y);
        double part[4] = {0, 0, 0, 0};
        for (int64_t x = box.x0; x < box.x1; ++x) {
          const double v = static_cast<double>(row[x]) - less;
          part[x & 3] += squared ? v * v : v;
        }
        all += (part[0] + part[1]) + (part[2] + part[3]);
      }
    }
    return all;
  }
  void normalise(const Rows<const float>& in, const Rows<float>& out, const Box& box) const {
    const double mean = sum(in, box, 0, false) / box.count();
    const double by = 1 / std::sqrt(sum(in, box, mean, true) / box.count() + eps_);
    for (int64_t c = box.c0; c < box.c1; ++c) {
      const double scale = scale_.empty() ? by : by * static_cast<double>(scale_[static_cast<size_t>(c)]);
      const double shift = shift_.empty() ? 0 : static_cast<double>(shift_[static_cast<size_t>(c)]);
      for (int64_t y = box.y0; y < box.y1; ++y) {
        const float* from = in(c, y);
        float* to = out(c, y);
        for (int64_t x = box.x0; x < box.x1; ++x)
          to[x] = static_cast<float>((static_cast<double>(from[x]) - mean) * scale + shift);
      }
    }
  }

  Fields<DSP_OP_NORM> f_;
  double eps_ = 0;
  std::vector<float> scale_, shift_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_NORM>& fields) {
  return std::make_unique<NormStep>(fields);
}

}  // namespace dsp
