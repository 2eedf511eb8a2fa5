#include "program/memory.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <numeric>
#include <utility>

namespace dsp {
namespace {

// Above this many, orders other than that of time are not tried.
constexpr size_t kMostToReorder = 2048;
constexpr size_t kMostRounds = 512;
constexpr size_t kMostWork = 1 << 21;  // an order takes time by the square of the number

bool meet(const Interval& a, const Interval& b) { return a.begin <= b.end && b.begin <= a.end; }

int64_t rounded(int64_t size, int64_t alignment) { return (size + alignment - 1) / alignment * alignment; }

// The most that is alive at one time: no plan is smaller.
int64_t least_size(const std::vector<Interval>& intervals, int64_t alignment) {
  std::map<int64_t, int64_t> changes;
  for (const Interval& i : intervals) {
    changes[i.begin] += rounded(i.size, alignment);
    changes[i.end + 1] -= rounded(i.size, alignment);
  }
  int64_t alive = 0;
  int64_t most = 0;
  for (const auto& change : changes) most = std::max(most, alive += change.second);
  return most;
}

using Order = std::vector<size_t>;
using Place = MemoryPlan (*)(const std::vector<Interval>&, int64_t, const Order&);

// Numbers that look random and are the same in every run.
class Draw {
 public:
  size_t operator()(size_t below) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<size_t>(state_ >> 33) % below;
  }

 private:
  uint64_t state_ = 1;
};

// Changes the order one by one: the one at the top of the memory is placed earlier, or any one elsewhere, and
// that stays unless it costs.
MemoryPlan climb(const std::vector<Interval>& intervals, int64_t alignment, Place place, Order order,
                 size_t rounds, int64_t least) {
  MemoryPlan best = place(intervals, alignment, order);
  const size_t count = order.size();
  Draw draw;
  for (size_t round = 0; round < rounds && best.size != least; ++round) {
    size_t from = draw(count);
    size_t to = draw(count);
    if (round % 3 == 0) {
      const auto end_of = [&](size_t index) {
        return best.offsets[index] + rounded(intervals[index].size, alignment);
      };
      for (size_t i = 0; i < count; ++i)
        if (end_of(order[i]) == best.size) from = i;
      to = draw(from + 1);
    }
    Order tried(order);
    const auto at = [&](size_t i) { return tried.begin() + static_cast<std::ptrdiff_t>(i); };
    if (to < from) {
      std::rotate(at(to), at(from), at(from) + 1);
    } else {
      std::rotate(at(from), at(from) + 1, at(to) + 1);
    }
    MemoryPlan plan = place(intervals, alignment, tried);
    if (plan.size > best.size) continue;
    best = std::move(plan);
    order = std::move(tried);
  }
  return best;
}

// The order of time, and where that leaves gaps the best of several.
MemoryPlan best_of_orders(const std::vector<Interval>& intervals, int64_t alignment, Place place) {
  const auto sorted_by = [&](auto key) {
    Order order(intervals.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return key(intervals[a]) < key(intervals[b]); });
    return order;
  };
  const auto length = [](const Interval& i) { return i.end - i.begin + 1; };
  const auto area = [&](const Interval& i) {
    return static_cast<double>(i.size) * static_cast<double>(length(i));
  };
  const Order by_time = sorted_by([](const Interval& i) { return i.begin; });
  MemoryPlan best = place(intervals, alignment, by_time);
  const int64_t least = least_size(intervals, alignment);
  const size_t count = intervals.size();
  if (best.size == least || count > kMostToReorder) return best;
  const Order starts[] = {by_time, sorted_by([](const Interval& i) { return -i.size; }),
                          sorted_by([&](const Interval& i) { return std::make_pair(-length(i), -i.size); }),
                          sorted_by([&](const Interval& i) { return -area(i); }),
                          sorted_by([](const Interval& i) { return -i.end; })};
  const size_t rounds = std::min(kMostRounds, kMostWork / (count * count));
  for (const Order& start : starts) {
    MemoryPlan plan = climb(intervals, alignment, place, start, rounds, least);
    if (plan.size < best.size) best = std::move(plan);
  }
  return best;
}

}  // namespace

MemoryPlan place_in_order(const std::vector<Interval>& intervals, int64_t alignment,
                          const std::vector<size_t>& order) {
  MemoryPlan plan;
  plan.offsets.assign(intervals.size(), 0);
  Order placed;  // by offset
  for (const size_t index : order) {
    const Interval& mine = intervals[index];
    const int64_t size = rounded(mine.size, alignment);
    int64_t at = 0;
    for (const size_t other : placed) {
      if (!meet(intervals[other], mine)) continue;
      if (plan.offsets[other] >= at + size) break;
      at = std::max(at, plan.offsets[other] + rounded(intervals[other].size, alignment));
    }
    plan.offsets[index] = at;
    plan.size = std::max(plan.size, at + size);
    const auto later = [&](int64_t offset, size_t other) { return offset < plan.offsets[other]; };
    placed.insert(std::upper_bound(placed.begin(), placed.end(), at, later), index);
  }
  return plan;
}

MemoryPlan seat_in_order(const std::vector<Interval>& intervals, int64_t alignment,
                         const std::vector<size_t>& order) {
  struct Seat {
    int64_t size = 0;
    Order members;
  };
  std::vector<Seat> seats;
  for (const size_t index : order) {
    const Interval& mine = intervals[index];
    // What it would have to grow by, and of those that need not grow the smallest.
    const auto cost = [&](const Seat& seat) {
      return std::make_pair(std::max(mine.size - seat.size, int64_t{0}), seat.size);
    };
    Seat* found = nullptr;
    for (Seat& seat : seats) {
      const bool vacant = std::none_of(seat.members.begin(), seat.members.end(),
                                       [&](size_t other) { return meet(intervals[other], mine); });
      if (vacant && (found == nullptr || cost(seat) < cost(*found))) found = &seat;
    }
    if (found == nullptr) found = &seats.emplace_back();
    found->size = std::max(found->size, mine.size);
    found->members.push_back(index);
  }
  MemoryPlan plan;
  plan.offsets.assign(intervals.size(), 0);
  for (const Seat& seat : seats) {
    for (const size_t index : seat.members) plan.offsets[index] = plan.size;
    plan.size += rounded(seat.size, alignment);
  }
  return plan;
}

MemoryPlan plan_memory(const std::vector<Interval>& intervals, int64_t alignment) {
  MemoryPlan plan;
  plan.offsets.assign(intervals.size(), 0);
  std::map<int64_t, Order> frames;
  for (size_t i = 0; i < intervals.size(); ++i) frames[intervals[i].frame].push_back(i);
  for (const auto& [frame, members] : frames) {
    std::vector<Interval> own;
    for (const size_t i : members) own.push_back(intervals[i]);
    const MemoryPlan part = best_of_orders(own, alignment, frame == 0 ? &place_in_order : &seat_in_order);
    for (size_t j = 0; j < members.size(); ++j) plan.offsets[members[j]] = plan.size + part.offsets[j];
    plan.size += part.size;
  }
  return plan;
}

}  // namespace dsp
