#include <algorithm>
#include <cstring>

#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

class ConcatStep final : public ChannelStep {
 public:
  explicit ConcatStep(const Fields<DSP_OP_CONCAT>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    Shape sum = source.shape(f_.values.front());
    sum.channels = 0;
    for (const int64_t id : f_.values) {
      const Shape& part = source.shape(id);
      if (part.height != sum.height || part.width != sum.width) fail("program: concat of two sizes");
      sum.channels += part.channels;
    }
    return sum;
  }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<float> out = at.rows(result);
    const size_t bytes = static_cast<size_t>(y.width) * sizeof(float);
    int64_t channel = 0;
    for (const int64_t id : inputs) {
      const int64_t channels = at.value(id).channels;
      const Rows<const float> in = at.const_rows(id);
      for (int64_t c = std::max(begin - channel, int64_t{0}); c < std::min(end - channel, channels); ++c) {
        for (int64_t row = 0; row < y.height; ++row) std::memcpy(out(channel + c, row), in(c, row), bytes);
      }
      channel += channels;
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const PixelRows<float> out = at.pixel_rows(result);
    int64_t channel = 0;
    for (const int64_t id : inputs) {
      const Value& part = at.value(id);
      const PixelRows<const float> in = at.const_pixel_rows(id);
      const size_t bytes = static_cast<size_t>(part.channels) * sizeof(float);
      for (int64_t row = begin; row < end; ++row) {
        for (int64_t x = 0; x < part.width; ++x)
          std::memcpy(out(row) + x * out.pixel + channel, in(row) + x * in.pixel, bytes);
      }
      channel += part.channels;
    }
  }

 private:
  Fields<DSP_OP_CONCAT> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_CONCAT>& fields) {
  return std::make_unique<ConcatStep>(fields);
}

}  // namespace dsp
