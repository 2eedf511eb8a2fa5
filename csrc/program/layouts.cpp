#include "program/layouts.h"

#include <algorithm>

#include "core/status.h"
#include "program/steps/conv.h"

namespace dsp {
namespace {

constexpr int64_t kMostPadding = 8;  // more air than that is better made while copying

int64_t spread(int64_t floats) { return (((floats + 15) / 16) | 1) * 16; }

Value& at(Values* values, int64_t id) { return (*values)[static_cast<size_t>(id)]; }

// A convolution with stride 2 reads its input in place where even and odd columns lie apart. A convolution's
// result can be written so if nobody else reads it.
void choose_columns_apart(const Steps& steps, int64_t output, Values* values) {
  std::vector<bool> apart(values->size(), false);
  for (const auto& step : steps) {
    const ConvStep* conv = step->conv();
    apart[static_cast<size_t>(step->result)] = conv != nullptr && conv->can_write_apart();
  }
  apart[static_cast<size_t>(output)] = false;
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
    if (conv == nullptr || conv->inputs.front() == 0) continue;
    const ConvShape& s = conv->geometry();
    Value& x = at(values, conv->inputs.front());
    if (s.sh != 1 || s.sw != 1 || conv->most_padding() > kMostPadding) continue;
    if (!rows_fit(x.width) || !rows_fit(s.out_w)) continue;
    x.pad_h = std::max(x.pad_h, s.ph);
    x.pad_w = std::max(x.pad_w, s.pw);
  }
}

void place_planes(Values* values) {
  for (Value& value : *values) {
    // The zeros right of a row are those left of the next.
    Planes& planes = value.planes;
    planes.pitch = value.width + value.pad_w + value.pad_middle;
    planes.origin = value.pad_h * planes.pitch + value.pad_w;
    planes.plane = (value.height + 2 * value.pad_h) * planes.pitch + value.pad_w;
    const bool callers = &value == &values->front();
    if (!callers && value.height * value.width > 1) planes.plane = spread(planes.plane);
  }
}

}  // namespace

void choose_layouts(const Steps& steps, int64_t output, Values* values) {
  for (const auto& step : steps) {
    // The layout that a value has is one in which its maker writes and all its readers read it.
    for (const int64_t id : step->inputs)
      if (!step->takes(at(values, id).layout)) fail("program: no layout suits all steps that use a value");
    if (!step->takes(at(values, step->result).layout))
      fail("program: no layout suits all steps that use a value");
  }
  choose_padding(steps, values);
  choose_columns_apart(steps, output, values);
  place_planes(values);
}

size_t choose_pairs(const Steps& steps, Values* values) {
  size_t first = steps.size();
  for (size_t i = 0; i < steps.size(); ++i) {
    ConvStep* conv = steps[i]->conv();
    if (conv != nullptr && conv->choose_pairs(*values)) first = std::min(first, i);
  }
  if (first == steps.size()) return first;
  for (size_t v = 1; v < values->size(); ++v)
    (*values)[v].second = (*values)[v].last_use >= static_cast<int64_t>(first);
  return first;
}

}  // namespace dsp
