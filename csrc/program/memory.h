// Where values that live for a while go in one memory. Nothing but numbers here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dsp {

// Something that lives from time `begin` to time `end`, both included.
struct Interval {
  int64_t begin = 0, end = 0;
  int64_t size = 0;
  // Intervals of one frame keep something around them that only they leave alone (zeros at the edges of
  // planes): the memory of a frame other than 0 is used by no other frame at any time.
  int64_t frame = 0;
};

struct MemoryPlan {
  std::vector<int64_t> offsets;  // of each interval
  int64_t size = 0;
};

// Intervals that live at one time do not overlap, and those of one frame (other than 0) share whole places:
// they start at the same offset or lie apart. Offsets are multiples of `alignment`.
MemoryPlan plan_memory(const std::vector<Interval>& intervals, int64_t alignment);

// What it is made of: intervals are placed in the given order, each at the lowest offset that is free while
// it lives, or in the place that has to grow least.
MemoryPlan place_in_order(const std::vector<Interval>& intervals, int64_t alignment,
                          const std::vector<std::size_t>& order);
MemoryPlan seat_in_order(const std::vector<Interval>& intervals, int64_t alignment,
                         const std::vector<std::size_t>& order);

}  // namespace dsp
