#include "program/copy.h"

#include <algorithm>
#include <cstring>

#include "core/thread_pool.h"

namespace dsp {
namespace {

constexpr int64_t kTile = 16;  // a cache line of floats each way

class CopyStep final : public Step {
 public:
  CopyStep(int64_t from, int64_t to) {
    inputs = {from};
    result = to;
  }
  Shape shape(const Source& source) override { return source.shape(inputs[0]); }
  bool alike() const override { return false; }
  bool reads(size_t, Layout) const override { return true; }
  void run(const Place& at, int threads) const override {
    const Value& x = at.value(inputs[0]);
    const Value& made = at.value(result);
    const View from = x.view();
    const View to = made.view();
    const float* in = at.read(inputs[0]) + from.origin;
    float* out = at.write(result) + to.origin;
    auto body = [&](int64_t y) { copy_row(x, in + y * from.row, from, made, out + y * to.row, to); };
    parallel_for(x.numel() < 32 * 1024 ? 1 : threads, x.height, body);
  }

 private:
  static void copy_row(const Value& x, const float* in, const View& from, const Value& made, float* out,
                       const View& to) {
    if (from.pixel == 1 && to.pixel == 1) {
      for (int64_t c = 0; c < x.channels; ++c)
        std::memcpy(out + c * to.channel, in + c * from.channel,
                    static_cast<size_t>(x.width) * sizeof(float));
      return;
    }
    for (int64_t c0 = 0; c0 < x.channels; c0 += kTile) {
      const int64_t c1 = std::min(c0 + kTile, x.channels);
      for (int64_t p0 = 0; p0 < x.width; p0 += kTile) {
        const int64_t p1 = std::min(p0 + kTile, x.width);
        for (int64_t c = c0; c < c1; ++c) {
          const float* source = in + x.place(c) * from.channel;
          float* target = out + made.place(c) * to.channel;
          for (int64_t p = p0; p < p1; ++p) target[p * to.pixel] = source[p * from.pixel];
        }
      }
    }
  }
};

}  // namespace

std::unique_ptr<Step> make_copy_step(int64_t from, int64_t to) {
  return std::make_unique<CopyStep>(from, to);
}

}  // namespace dsp
