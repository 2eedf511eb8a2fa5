#include "program/step.h"

#include <algorithm>
#include <string>

#include "core/status.h"
#include "core/thread_pool.h"

namespace dsp {

std::vector<float> Source::take(int64_t at, int64_t count, const char* name) const {
  if (at > numel_ || count > numel_ - at)
    fail(std::string("program: ") + name + " reaches beyond the floats");
  return std::vector<float>(floats_ + at, floats_ + at + count);
}

double Step::cycles(const std::vector<Value>&, Layout) const { return 0; }

int64_t Step::place_weights(float*) { return 0; }

const Activation& Step::activation() const {
  static const Activation none;
  return none;
}

void ChannelStep::run(const Place& at, int threads) const {
  const bool by_row = at.value(inputs.front()).layout == Layout::kLanes;
  const int64_t all = by_row ? rows(at) : count(at);
  const int64_t shares =
      threads <= 1 || work(at) < 32 * 1024 ? 1 : std::min<int64_t>(all, 2 * int64_t{threads});
  auto body = [&](int64_t share) {
    const int64_t begin = share * all / shares;
    const int64_t end = (share + 1) * all / shares;
    if (by_row) {
      run_rows(at, begin, end);
    } else {
      run_channels(at, begin, end);
    }
  };
  parallel_for(threads, shares, body);
}

}  // namespace dsp
