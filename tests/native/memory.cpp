// The planner of a program's memory on random intervals: what lives at one time lies apart, frames keep their
// places to themselves, and the size is close to the best that many orders find.
#include "program/memory.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

namespace {

using dsp::Interval;
using dsp::MemoryPlan;

std::mt19937_64 engine(1);

int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(engine);
}

void check(bool good, const char* what, int round) {
  if (good) return;
  std::fprintf(stderr, "memory: round %d: %s\n", round, what);
  std::abort();
}

// As in networks: made in order, most read soon, some (residuals, concatenations) much later.
std::vector<Interval> random_intervals(bool framed) {
  std::vector<Interval> intervals;
  const int64_t count = between(1, 60);
  const int64_t most = between(0, 1) != 0 ? 40 : 4000;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = between(0, 9) < 7 ? between(1, 3) : between(1, count);
    const int64_t frame = framed ? std::max<int64_t>(0, between(-2, 3)) : 0;
    intervals.push_back({i, i + length, between(1, most), frame});
  }
  if (between(0, 1) != 0) std::shuffle(intervals.begin(), intervals.end(), engine);
  return intervals;
}

void check_plan(const std::vector<Interval>& intervals, const MemoryPlan& plan, int64_t alignment,
                int round) {
  check(plan.offsets.size() == intervals.size(), "an offset is missing", round);
  for (size_t a = 0; a < intervals.size(); ++a) {
    const Interval& x = intervals[a];
    const int64_t at = plan.offsets[a];
    check(at >= 0 && at % alignment == 0, "an offset is not aligned", round);
    check(at + x.size <= plan.size, "an interval reaches beyond the memory", round);
    for (size_t b = 0; b < a; ++b) {
      const Interval& y = intervals[b];
      const bool apart = at + x.size <= plan.offsets[b] || plan.offsets[b] + y.size <= at;
      const bool together = x.begin <= y.end && y.begin <= x.end;
      check(apart || !together, "two that live at one time overlap", round);
      check(apart || x.frame == y.frame, "two frames overlap", round);
      check(apart || x.frame == 0 || at == plan.offsets[b], "two of a frame start at different offsets",
            round);
    }
  }
}

// Of many orders, random ones among them.
int64_t best_found(const std::vector<Interval>& intervals, int64_t alignment,
                   MemoryPlan (*place)(const std::vector<Interval>&, int64_t, const std::vector<size_t>&)) {
  std::vector<size_t> order(intervals.size());
  std::iota(order.begin(), order.end(), size_t{0});
  int64_t best = place(intervals, alignment, order).size;
  const auto attempt = [&] { best = std::min(best, place(intervals, alignment, order).size); };
  const auto by = [&](auto key) {
    std::sort(order.begin(), order.end(),
              [&](size_t a, size_t b) { return key(intervals[a]) < key(intervals[b]); });
    attempt();
  };
  by([](const Interval& i) { return i.begin; });
  by([](const Interval& i) { return -i.size; });
  by([](const Interval& i) { return -i.size * (i.end - i.begin + 1); });
  by([](const Interval& i) { return i.end; });
  for (int i = 0; i < 100; ++i) {
    std::shuffle(order.begin(), order.end(), engine);
    attempt();
  }
  return best;
}

}  // namespace

int main() {
  double worst = 1;
  for (int round = 0; round < 150; ++round) {
    const int64_t alignment = int64_t{1} << between(0, 4);
    const std::vector<Interval> framed = random_intervals(true);
    check_plan(framed, dsp::plan_memory(framed, alignment), alignment, round);
    std::vector<Interval> intervals = random_intervals(false);
    const auto compare = [&](auto place) {
      const MemoryPlan plan = dsp::plan_memory(intervals, alignment);
      check_plan(intervals, plan, alignment, round);
      const int64_t best = best_found(intervals, alignment, place);
      worst = std::max(worst, static_cast<double>(plan.size) / static_cast<double>(best));
      check(plan.size * 100 <= best * 105, "another order needs 5% less", round);
    };
    compare(&dsp::place_in_order);
    for (Interval& i : intervals) i.frame = 7;
    compare(&dsp::seat_in_order);
  }
  std::printf("memory: at worst %.3f times the best of the orders\n", worst);
  return 0;
}
