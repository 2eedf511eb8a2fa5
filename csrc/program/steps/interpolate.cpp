#include <algorithm>

#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

// One direction: from which of its own rows or columns on, and how much of the next.
struct Between {
  std::vector<int32_t> first;
  std::vector<float> share;

  int64_t count() const { return static_cast<int64_t>(first.size()); }
  int64_t at(int64_t i) const { return first[static_cast<size_t>(i)]; }
  float of_next(int64_t i) const { return share[static_cast<size_t>(i)]; }
};

Between between(const std::vector<int32_t>& first, int64_t size, int64_t floats_at, const Source& source) {
  for (const int32_t i : first)
    if (i >= size) fail("program: interpolate starts where x ends");
  return {first, source.take(floats_at, static_cast<int64_t>(first.size()), "shares")};
}

class InterpolateStep final : public ChannelStep {
 public:
  explicit InterpolateStep(const Fields<DSP_OP_INTERPOLATE>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& x = source.shape(f_.x);
    rows_ = between(f_.rows, x.height, f_.down_at, source);
    columns_ = between(f_.columns, x.width, f_.right_at, source);
    return {x.channels, rows_.count(), columns_.count()};
  }
  int64_t bytes() const override { return 8 * (rows_.count() + columns_.count()); }
  bool any_order() const override { return true; }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& x = at.value(inputs[0]);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t oy = 0; oy < rows_.count(); ++oy) {
        const int64_t y0 = rows_.at(oy);
        const float* upper = in(c, y0);
        const float* lower = in(c, std::min(y0 + 1, x.height - 1));
        const float down = rows_.of_next(oy);
        float* to = out(c, oy);
        for (int64_t ox = 0; ox < columns_.count(); ++ox) {
          const int64_t x0 = columns_.at(ox);
          const int64_t x1 = std::min(x0 + 1, x.width - 1);
          const float right = columns_.of_next(ox);
          to[ox] = mix(mix(upper[x0], upper[x1], right), mix(lower[x0], lower[x1], right), down);
        }
      }
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& x = at.value(inputs[0]);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    const PixelRows<float> out = at.pixel_rows(result);
    for (int64_t oy = begin; oy < end; ++oy) {
      const int64_t y0 = rows_.at(oy);
      const float* upper = in(y0);
      const float* lower = in(std::min(y0 + 1, x.height - 1));
      const float down = rows_.of_next(oy);
      for (int64_t ox = 0; ox < columns_.count(); ++ox) {
        const int64_t x0 = columns_.at(ox) * in.pixel;
        const int64_t x1 = std::min(columns_.at(ox) + 1, x.width - 1) * in.pixel;
        const float right = columns_.of_next(ox);
        float* to = out(oy) + ox * out.pixel;
        for (int64_t c = 0; c < x.channels; ++c)
          to[c] =
              mix(mix(upper[x0 + c], upper[x1 + c], right), mix(lower[x0 + c], lower[x1 + c], right), down);
      }
    }
  }

 private:
  // As torch: an infinity beside a share of 0 is NaN.
  static float mix(float a, float b, float of_b) { return (1.0f - of_b) * a + of_b * b; }

  Fields<DSP_OP_INTERPOLATE> f_;
  Between rows_, columns_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_INTERPOLATE>& fields) {
  return std::make_unique<InterpolateStep>(fields);
}

}  // namespace dsp
