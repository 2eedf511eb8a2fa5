#include "program/step.h"

#include <algorithm>
#include <string>

#include "core/status.h"
#include "core/thread_pool.h"

namespace dsp {

Floats::Floats(const float* const* pieces, const int64_t* numel, int64_t count) {
  require(count >= 0 && ((pieces != nullptr && numel != nullptr) || count == 0), "program: floats is null");
  for (int64_t i = 0; i < count; ++i) {
    require(numel[i] >= 0 && (pieces[i] != nullptr || numel[i] == 0), "program: floats is null");
    pieces_.push_back(pieces[i]);
    ends_.push_back(checked_add(this->numel(), numel[i], "program: floats"));
  }
}

const float* Floats::find(int64_t at, int64_t count, const char* name) const {
  const auto piece = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), at) - ends_.begin());
  const bool there = count == 0 ? at <= numel() : piece < ends_.size() && count <= ends_[piece] - at;
  if (at < 0 || !there) fail(std::string("program: ") + name + " reaches beyond the floats");
  if (count == 0) return nullptr;
  return pieces_[piece] + (at - (piece == 0 ? 0 : ends_[piece - 1]));
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
