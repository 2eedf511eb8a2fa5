#include <algorithm>
#include <string>

#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

void check_numbers(const std::vector<int32_t>& numbers, int64_t size, const char* name) {
  for (const int32_t number : numbers)
    if (number > size) fail(std::string("program: gather has ") + name + " that x does not have");
}

int64_t count_of(const std::vector<int32_t>& numbers) { return static_cast<int64_t>(numbers.size()); }

class GatherStep final : public ChannelStep {
 public:
  explicit GatherStep(const Fields<DSP_OP_GATHER>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& x = source.shape(f_.x);
    check_numbers(f_.channels, x.channels, "channels");
    check_numbers(f_.rows, x.height, "rows");
    check_numbers(f_.columns, x.width, "columns");
    fill_ = source.take(f_.fill_at, 1, "fill").front();
    columns_ = runs_of(f_.columns);
    channels_ = runs_of(f_.channels);
    return {count_of(f_.channels), count_of(f_.rows), count_of(f_.columns)};
  }
  int64_t bytes() const override {
    return (count_of(f_.channels) + count_of(f_.rows) + count_of(f_.columns)) * 4 +
           static_cast<int64_t>((columns_.size() + channels_.size()) * sizeof(Run));
  }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t channel = number(f_.channels, c);
      for (int64_t oy = 0; oy < y.height; ++oy) {
        const int64_t row = number(f_.rows, oy);
        float* to = out(c, oy);
        if (channel < 0 || row < 0) {
          std::fill(to, to + y.width, fill_);
        } else {
          copy_runs(columns_, to, in(channel, row));
        }
      }
    }
  }
  void run_rows(const Place& at, int64_t begin, int64_t end) const override {
    const Value& y = at.value(result);
    const PixelRows<const float> in = at.const_pixel_rows(inputs[0]);
    const PixelRows<float> out = at.pixel_rows(result);
    for (int64_t oy = begin; oy < end; ++oy) {
      const int64_t row = number(f_.rows, oy);
      for (int64_t ox = 0; ox < y.width; ++ox) {
        float* to = out(oy) + ox * out.pixel;
        const int64_t column = number(f_.columns, ox);
        if (row < 0 || column < 0) {
          std::fill(to, to + y.channels, fill_);
        } else {
          copy_runs(channels_, to, in(row) + column * in.pixel);
        }
      }
    }
  }

 private:
  // Neighbours there that are neighbours here; `from` below 0: they are filled.
  struct Run {
    int64_t to, from, count;
  };

  static int64_t number(const std::vector<int32_t>& numbers, int64_t i) {
    return numbers[static_cast<size_t>(i)] - int64_t{1};
  }
  static std::vector<Run> runs_of(const std::vector<int32_t>& numbers) {
    std::vector<Run> runs;
    for (int64_t i = 0; i < count_of(numbers); ++i) {
      const int64_t from = number(numbers, i);
      if (!runs.empty()) {
        Run& last = runs.back();
        if (from < 0 ? last.from < 0 : last.from >= 0 && from == last.from + last.count) {
          ++last.count;
          continue;
        }
      }
      runs.push_back({i, from, 1});
    }
    return runs;
  }
  void copy_runs(const std::vector<Run>& runs, float* to, const float* from) const {
    for (const Run& run : runs) {
      if (run.count == 1 && run.from >= 0) {
        to[run.to] = from[run.from];
      } else if (run.from < 0) {
        std::fill(to + run.to, to + run.to + run.count, fill_);
      } else {
        std::copy(from + run.from, from + run.from + run.count, to + run.to);
      }
    }
  }

  Fields<DSP_OP_GATHER> f_;
  float fill_ = 0;
  std::vector<Run> columns_, channels_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_GATHER>& fields) {
  return std::make_unique<GatherStep>(fields);
}

}  // namespace dsp
