#include "program/layouts.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "program/copy.h"
#include "program/steps/conv.h"

namespace dsp {
namespace {

int64_t spread(int64_t floats) { return (((floats + 15) / 16) | 1) * 16; }

Value& at(Values* values, int64_t id) { return (*values)[static_cast<size_t>(id)]; }

// A convolution with stride 2 reads its input in place where even and odd columns lie apart. A convolution's
// result can be written so if nobody else reads it.
void choose_columns_apart(const Steps& steps, const std::vector<int64_t>& outputs, Values* values) {
  std::vector<bool> apart(values->size(), false);
  for (const auto& step : steps) {
    const ConvStep* conv = step->conv();
    apart[static_cast<size_t>(step->result)] = conv != nullptr && conv->can_write_apart();
  }
  for (const int64_t id : outputs) apart[static_cast<size_t>(id)] = false;
  for (const auto& step : steps) {
    const ConvStep* conv = step->conv();
    const bool fits = conv != nullptr && conv->can_read_apart() && conv->most_padding() <= kMostPadding;
    for (size_t j = fits ? 1 : 0; j < step->inputs.size(); ++j)
      apart[static_cast<size_t>(step->inputs[j])] = false;
  }
  for (const auto& step : steps) {
    const ConvStep* conv = step->conv();
    if (conv == nullptr || !apart[static_cast<size_t>(conv->inputs.front())]) continue;
    Value& x = at(values, conv->inputs.front());
    const ConvShape& s = conv->geometry();
    const int64_t half = x.width / 2;
    x.pad_h = std::max(x.pad_h, s.ph);
    for (int64_t kx = 0; kx < s.kw; ++kx) {
      const ColumnsApart columns = columns_apart(s, kx);
      const int64_t left = -columns.first;
      const int64_t right = columns.first + s.out_w - half;
      x.pad_w = std::max(x.pad_w, columns.odd ? right : left);
      x.pad_middle = std::max(x.pad_middle, columns.odd ? left : right);
    }
    x.planes.odd = half + x.pad_middle;
  }
}

// A convolution with stride 1 reads its input in place when the zeros around it are in place too. Such planes
// are written row by row, so rows have to fill vectors.
void choose_padding(const Steps& steps, Values* values) {
  for (const auto& step : steps) {
    const ConvStep* conv = step->conv();
    if (conv == nullptr || at(values, conv->inputs.front()).callers()) continue;
    const ConvShape& s = conv->geometry();
    Value& x = at(values, conv->inputs.front());
    if (conv->lanes()) {
      x.pad_h = std::max(x.pad_h, s.ph);
      x.pad_w = std::max(x.pad_w, s.pw);
      continue;
    }
    if (s.sh != 1 || s.sw != 1 || conv->most_padding() > kMostPadding) continue;
    if (!rows_fit(x.width) || !rows_fit(s.out_w)) continue;
    x.pad_h = std::max(x.pad_h, s.ph);
    x.pad_w = std::max(x.pad_w, s.pw);
  }
}

void place_planes(Values* values) {
  for (Value& value : *values) {
    if (value.layout == Layout::kLanes) {
      // Pixels some power of two apart would share a few sets of the cache.
      value.pixel = value.channels % 256 == 0 ? spread(value.channels) : (value.channels + 15) / 16 * 16;
      continue;
    }
    // The zeros right of a row are those left of the next.
    Planes& planes = value.planes;
    planes.pitch = value.width + value.pad_w + value.pad_middle;
    planes.origin = value.pad_h * planes.pitch + value.pad_w;
    planes.plane = (value.height + 2 * value.pad_h) * planes.pitch + value.pad_w;
    if (!value.callers() && value.height * value.width > 1) planes.plane = spread(planes.plane);
  }
}

// ---- which engine each convolution runs on ----

// Values that one layout must suit: what a step reads and makes alike, a sum and its residual.
class Classes {
 public:
  explicit Classes(size_t count) : parent_(count) {
    for (size_t i = 0; i < count; ++i) parent_[i] = i;
  }
  size_t of(size_t value) {
    while (parent_[value] != value) value = parent_[value] = parent_[parent_[value]];
    return value;
  }
  void join(size_t a, size_t b) { parent_[of(a)] = of(b); }

 private:
  std::vector<size_t> parent_;
};

// What the caller gives lies in planes; where these are few, lanes read them as they lie.
constexpr int64_t kFewPlanes = 16;
bool few_planes(const Value& value) { return value.callers() && value.channels <= kFewPlanes; }

constexpr double kCyclesToConvert = 1.5;  // a value
constexpr double kCyclesToPad = 0.3;
constexpr size_t kMostWork = 1 << 20;  // steps looked at in one round of trying

class Engines {
 public:
  Engines(const Steps& steps, const Values& values)
      : steps_(steps), values_(values), sums_(values.size()), alike_(values.size()) {
    for (const auto& step : steps) {
      const ConvStep* conv = step->conv();
      for (size_t j = 0; j < step->inputs.size(); ++j) {
        if (conv != nullptr ? j == 1 : step->alike()) join(&sums_, step->inputs[j], step->result);
        if (conv == nullptr && step->alike()) join(&alike_, step->inputs[j], step->result);
      }
    }
    can_.assign(values.size(), true);
    for (const auto& step : steps) {
      const ConvStep* conv = step->conv();
      // What neither goes along with its inputs nor is a convolution writes planes.
      if (conv != nullptr ? !conv->can_run_in_lanes(values) : !step->alike())
        can_[index(step->result)] = false;
    }
    lanes_.assign(values.size(), false);
    for (auto& cost : cost_) cost.assign(values.size(), 0.0);
    for (const auto& step : steps) {
      const ConvStep* conv = step->conv();
      for (int lanes = 0; conv != nullptr && lanes < 2; ++lanes)
        cost_[lanes][index(conv->result)] = conv->engine_cycles(lanes != 0);
    }
  }

  void set_all(bool lanes) {
    for (size_t c = 0; c < lanes_.size(); ++c) lanes_[c] = lanes && may(c);
  }
  // Turns over what one layout suits best, and parts of it, as long as that pays.
  void climb() {
    std::vector<std::vector<size_t>> moves;
    for (Classes* classes : {&sums_, &alike_}) {
      std::vector<std::vector<size_t>> members(values_.size());
      for (size_t v = 0; v < values_.size(); ++v)
        if (may(v)) members[classes->of(v)].push_back(v);
      for (auto& list : members)
        if (!list.empty()) moves.push_back(std::move(list));
    }
    for (size_t v = 0; v < values_.size(); ++v)
      if (may(v)) moves.push_back({v});
    if (moves.size() * steps_.size() > kMostWork) return;
    double best = cycles();
    for (bool better = true; better;) {
      better = false;
      for (const std::vector<size_t>& move : moves) {
        const std::vector<bool> before = lanes_;
        for (const size_t v : move) lanes_[v] = !before[move.front()];
        const double now = cycles();
        if (now < best * 0.9999) {
          best = now;
          better = true;
        } else {
          lanes_ = before;
        }
      }
    }
  }
  Layout layout(int64_t value) const { return lanes_[index(value)] ? Layout::kLanes : Layout::kPlanar; }
  // Results of one pixel lie the same way in both.
  bool runs_in_lanes(const ConvStep& conv) const {
    if (!flat(conv.result)) return layout(conv.result) == Layout::kLanes;
    return can_[index(conv.result)] && (all_lanes || layout(conv.inputs.front()) == Layout::kLanes ||
                                        cost_[1][index(conv.result)] < cost_[0][index(conv.result)]);
  }
  double cycles() const {
    double sum = 0;
    std::vector<char> converted(values_.size(), 0);
    for (const auto& step : steps_) {
      const ConvStep* conv = step->conv();
      if (conv == nullptr) {
        sum += step->cycles(values_, layout(step->result));
        for (size_t j = 0; j < step->inputs.size(); ++j) {
          const int64_t id = step->inputs[j];
          const bool differs = step->alike() && layout(id) != layout(step->result);
          if (differs || !step->reads(j, layout(id))) sum += convert(id, layout(id), &converted);
        }
        continue;
      }
      const bool lanes = runs_in_lanes(*conv);
      sum += cost_[lanes ? 1 : 0][index(conv->result)];
      const int64_t x = conv->inputs.front();
      if (lanes ? layout(x) == Layout::kPlanar && conv->most_padding() > 0 : layout(x) == Layout::kLanes)
        sum += convert(x, layout(x), &converted);
      for (size_t j = 1; j < conv->inputs.size(); ++j) {
        const int64_t id = conv->inputs[j];
        if (layout(id) != layout(conv->result)) sum += convert(id, layout(id), &converted);
      }
    }
    return sum;
  }
  bool all_lanes = false;

 private:
  static size_t index(int64_t value) { return static_cast<size_t>(value); }
  bool flat(int64_t value) const { return values_[index(value)].flat(); }
  bool callers(size_t value) const { return values_[value].callers(); }
  bool may(size_t c) const { return !callers(c) && can_[c] && !values_[c].flat(); }
  void join(Classes* classes, int64_t a, int64_t b) const {
    if (!callers(index(a)) && !callers(index(b)) && !flat(a) && !flat(b)) classes->join(index(a), index(b));
  }
  double convert(int64_t id, Layout from, std::vector<char>* converted) const {
    char& mark = (*converted)[index(id)];
    if (mark != 0) return 0;
    mark = 1;
    const double numel = static_cast<double>(values_[index(id)].numel());
    return numel *
           (few_planes(values_[index(id)]) && from == Layout::kPlanar ? kCyclesToPad : kCyclesToConvert);
  }

  const Steps& steps_;
  const Values& values_;
  Classes sums_, alike_;
  std::vector<bool> can_, lanes_;
  std::vector<double> cost_[2];
};

// DSP_CPU_ENGINE asks for one engine wherever it can run, for tests and comparisons.
void choose_engines(const Steps& steps, Values* values) {
  Engines engines(steps, *values);
  const char* wanted = std::getenv("DSP_CPU_ENGINE");
  const bool planar = wanted != nullptr && std::strcmp(wanted, "planar") == 0;
  engines.all_lanes = wanted != nullptr && std::strcmp(wanted, "lanes") == 0;
  Engines other(engines);
  other.set_all(!planar);
  if (!planar && !engines.all_lanes) {
    engines.climb();
    other.climb();
  }
  Engines& best = engines.cycles() < other.cycles() && !engines.all_lanes ? engines : other;
  for (const auto& step : steps) {
    at(values, step->result).layout = best.layout(step->result);
    if (step->conv() != nullptr && !planar) step->conv()->set_lanes(best.runs_in_lanes(*step->conv()));
  }
}

// Between two steps that lay a value differently stands one that copies it. Steps are put into the order in
// which they run.
void convert(Steps* steps, Values* values) {
  Steps ordered;
  // By value: its copies, planar and with channels last.
  std::vector<std::array<int64_t, 2>> copies(values->size(), {0, 0});
  const auto copy_of = [&](int64_t id, Layout layout) {
    int64_t& copy = copies[static_cast<size_t>(id)][static_cast<size_t>(layout)];
    if (copy == 0) {
      copy = static_cast<int64_t>(values->size());
      Value made{Shape(at(values, id))};
      made.layout = layout;
      values->push_back(made);
      ordered.push_back(make_copy_step(id, copy));
    }
    return copy;
  };
  for (auto& step : *steps) {
    ConvStep* conv = step->conv();
    for (size_t j = 0; j < step->inputs.size(); ++j) {
      int64_t& id = step->inputs[j];
      const Layout has = at(values, id).layout;
      Layout needs = has;
      if (conv != nullptr && j == 0) {
        if (!conv->lanes()) {
          needs = Layout::kPlanar;
        } else if (has == Layout::kPlanar && conv->most_padding() > 0) {
          if (few_planes(at(values, id))) {  // the caller's image with its padding
            id = copy_of(id, Layout::kPlanar);
            continue;
          }
          needs = Layout::kLanes;
        }
      } else if (conv != nullptr || step->alike()) {
        needs = at(values, step->result).layout;
      } else if (!step->reads(j, has)) {
        needs = Layout::kPlanar;
      }
      if (needs != has) id = copy_of(id, needs);
    }
    ordered.push_back(std::move(step));
  }
  *steps = std::move(ordered);
}

// Where channels last are stored: so that each convolution's groups of filters are neighbours, or few runs of
// neighbours where a value is a sum of several convolutions with groups of their own. Any order costs a
// reading convolution the same.
void choose_places(const Steps& steps, Values* values) {
  Classes classes(values->size());
  std::vector<char> fixed(values->size(), 0);
  const auto lanes = [&](int64_t id) {
    return at(values, id).layout == Layout::kLanes && !at(values, id).flat();
  };
  for (const auto& step : steps) {
    const bool conv = step->conv() != nullptr;
    for (size_t j = 0; j < step->inputs.size(); ++j) {
      if ((conv ? j == 1 : step->alike()) && lanes(step->inputs[j]) && lanes(step->result))
        classes.join(static_cast<size_t>(step->inputs[j]), static_cast<size_t>(step->result));
    }
  }
  for (const auto& step : steps) {
    if (step->conv() != nullptr || !step->alike() || step->any_order()) continue;
    fixed[classes.of(static_cast<size_t>(step->result))] = 1;
    for (const int64_t id : step->inputs) fixed[classes.of(static_cast<size_t>(id))] = 1;
  }
  // By class: of each channel the groups of all the convolutions that make it, in reflected order: from one
  // to the next as few of them change as can be.
  std::vector<std::vector<std::vector<int32_t>>> keys(values->size());
  for (const auto& step : steps) {
    if (step->conv() == nullptr || !lanes(step->result)) continue;
    const size_t c = classes.of(static_cast<size_t>(step->result));
    if (fixed[c] != 0) continue;
    const std::vector<int32_t> groups = step->conv()->groups_of_filters();
    keys[c].resize(groups.size());
    for (size_t f = 0; f < groups.size(); ++f) keys[c][f].push_back(groups[f]);
  }
  for (size_t c = 0; c < keys.size(); ++c) {
    if (keys[c].empty()) continue;
    for (std::vector<int32_t>& key : keys[c]) {
      bool back = false;
      for (int32_t& digit : key) {
        const bool odd = digit % 2 != 0;
        if (back) digit = -digit;
        back = back != odd;
      }
    }
    std::vector<int32_t> order(keys[c].size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      return keys[c][static_cast<size_t>(a)] < keys[c][static_cast<size_t>(b)];
    });
    if (std::is_sorted(order.begin(), order.end())) continue;
    std::vector<int32_t> places(order.size());
    for (size_t i = 0; i < order.size(); ++i) places[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
    for (size_t v = 0; v < values->size(); ++v) {
      if (classes.of(v) == c) (*values)[v].places = places;
    }
  }
}

}  // namespace

void choose_layouts(const std::vector<int64_t>& outputs, Steps* steps, Values* values) {
  choose_engines(*steps, values);
  convert(steps, values);
  for (size_t i = 0; i < steps->size(); ++i) {
    const Step& step = *(*steps)[i];
    for (size_t j = 0; j < step.inputs.size(); ++j)
      at(values, step.inputs[j]).last_use = static_cast<int64_t>(i);
    at(values, step.result).made = at(values, step.result).last_use = static_cast<int64_t>(i);
  }
  for (const int64_t id : outputs) at(values, id).last_use = static_cast<int64_t>(steps->size());
  choose_places(*steps, values);
  choose_padding(*steps, values);
  choose_columns_apart(*steps, outputs, values);
  place_planes(values);
}

size_t choose_pairs(const Steps& steps, Values* values) {
  size_t first = steps.size();
  for (size_t i = 0; i < steps.size(); ++i) {
    ConvStep* conv = steps[i]->conv();
    if (conv != nullptr && conv->choose_pairs(*values)) first = std::min(first, i);
  }
  if (first == steps.size()) return first;
  for (Value& value : *values)
    value.second = !value.callers() && value.last_use >= static_cast<int64_t>(first);
  return first;
}

}  // namespace dsp
