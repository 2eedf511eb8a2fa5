#include "program/chains.h"

#include <algorithm>
#include <cstdlib>

#include "program/steps/conv.h"

namespace dsp {
namespace {

// Of the second-level cache: weights that stay there, and what some pixels' values may take besides. Below
// the latter whole values stay there by themselves.
constexpr int64_t kWeightBytes = 640 * 1024;
constexpr int64_t kValueBytes = 448 * 1024;
constexpr int64_t kLeastPixels = 48;
constexpr int64_t kPixelUnit = 24;  // whole tiles of any number of vectors

// DSP_CPU_CHAIN, a number of bytes, stands for kValueBytes: with 1 even small images go through chains, for
// tests.
int64_t value_bytes() {
  const char* wanted = std::getenv("DSP_CPU_CHAIN");
  const int64_t bytes = wanted == nullptr ? 0 : std::atoll(wanted);
  return bytes > 0 ? bytes : kValueBytes;
}

class Finder {
 public:
  Finder(const Steps& steps, const Values& values) : steps_(steps), values_(values) {}

  Chain from(size_t begin) const {
    const ConvStep* head = conv(begin);
    if (head == nullptr) return {begin, begin + 1, 0};
    std::vector<int64_t> ids;
    int64_t weights = head->weight_floats() * 4;
    add(*head, &ids);
    size_t end = begin + 1;
    for (; end < steps_.size(); ++end) {
      const ConvStep* next = conv(end);
      if (next == nullptr || !next->pointwise() || next->geometry().out_h != head->geometry().out_h ||
          next->geometry().out_w != head->geometry().out_w)
        break;
      // The head reads pixels nearby, after others' turn: nothing may be written over them by then.
      const int64_t old = next->overwrites(values_);
      if (old >= 0 && std::find(head->inputs.begin(), head->inputs.end(), old) != head->inputs.end()) break;
      weights += next->weight_floats() * 4;
      if (weights > kWeightBytes) break;
      add(*next, &ids);
    }
    int64_t pixel_bytes = 0;
    for (const int64_t id : ids) pixel_bytes += values_[static_cast<size_t>(id)].pixel * 4;
    const int64_t plane = head->geometry().out_plane();
    if (end == begin + 1 || pixel_bytes * plane <= 2 * budget_) return {begin, begin + 1, 0};
    const int64_t most = std::max(kLeastPixels, budget_ / pixel_bytes);
    const int64_t turns = (plane + most - 1) / most;
    const int64_t pixels = (plane + turns - 1) / turns;
    return {begin, end, (pixels + kPixelUnit - 1) / kPixelUnit * kPixelUnit};
  }

 private:
  const ConvStep* conv(size_t step) const {
    const ConvStep* found = steps_[step]->conv();
    return found != nullptr && found->lanes() ? found : nullptr;
  }
  static void add(const ConvStep& step, std::vector<int64_t>* ids) {
    for (const int64_t id : step.inputs) add(id, ids);
    add(step.result, ids);
  }
  static void add(int64_t id, std::vector<int64_t>* ids) {
    if (std::find(ids->begin(), ids->end(), id) == ids->end()) ids->push_back(id);
  }
  const Steps& steps_;
  const Values& values_;
  const int64_t budget_ = value_bytes();
};

}  // namespace

std::vector<Chain> find_chains(const Steps& steps, const Values& values) {
  const Finder find(steps, values);
  std::vector<Chain> chains;
  for (size_t i = 0; i < steps.size(); i = chains.back().end) chains.push_back(find.from(i));
  return chains;
}

}  // namespace dsp
