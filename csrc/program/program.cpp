#include "program/program.h"

#include <algorithm>
#include <cstdlib>

#include "core/pages.h"
#include "core/status.h"
#include "core/thread_pool.h"
#include "program/layouts.h"
#include "program/memory.h"
#include "program/read.h"
#include "program/steps/conv.h"

namespace dsp {

Program::Program(const int64_t* words, int64_t words_numel, const Floats& floats) {
  Description description = read_description(words, words_numel, floats);
  values_ = std::move(description.values);
  steps_ = std::move(description.steps);
  outputs_ = std::move(description.outputs);
  for (const Value& value : values_) inputs_ += value.callers() ? 1 : 0;
  choose_layouts(outputs_, &steps_, &values_);
  for (const auto& step : steps_) {
    if (ConvStep* conv = step->conv()) conv->lay_out(values_);
    scratch_floats_ = std::max(scratch_floats_, step->scratch_floats());
  }
  place_weights();
  chains_ = find_chains(steps_, values_);
  first_pair_ = choose_pairs(steps_, &values_);
  assign_memory();
}

Program::~Program() {
  for (float* arena : free_arenas_) std::free(arena);
}

void Program::place_weights() {
  const auto rounded = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  int64_t floats = 0;
  for (const auto& step : steps_) floats += rounded(step->place_weights(nullptr));
  weights_.reset(static_cast<float*>(take_pages(static_cast<size_t>(floats + 16) * sizeof(float))));
  float* to = weights_.get();
  for (const auto& step : steps_) to += rounded(step->place_weights(to));
}

// Padded values share memory only with values of the same layout, because their zeros are written once, when
// an arena is made. A value that is written in another's place is one with it.
void Program::assign_memory() {
  struct Frame {
    Layout layout;
    int64_t pixel, pad_h, pad_w, pad_middle, height, width;
    bool operator==(const Frame& o) const {
      return layout == o.layout && pixel == o.pixel && pad_h == o.pad_h && pad_w == o.pad_w &&
             pad_middle == o.pad_middle && height == o.height && width == o.width;
    }
  };
  std::vector<Frame> frames;
  const auto frame_of = [&](const Value& v) -> int64_t {
    if (v.pad_h == 0 && v.pad_w == 0 && v.pad_middle == 0) return 0;
    const Frame mine{v.layout, v.pixel, v.pad_h, v.pad_w, v.pad_middle, v.height, v.width};
    const auto found = std::find(frames.begin(), frames.end(), mine);
    const int64_t number = found - frames.begin() + 1;
    if (found == frames.end()) frames.push_back(mine);
    return number;
  };
  std::vector<Step*> maker(values_.size(), nullptr);
  std::vector<size_t> order;  // of values, as they are made
  for (const auto& step : steps_) {
    maker[static_cast<size_t>(step->result)] = step.get();
    order.push_back(static_cast<size_t>(step->result));
  }
  std::vector<int64_t> chain_begin, chain_end;  // by step
  for (const Chain& chain : chains_) {
    chain_begin.resize(chain.end, static_cast<int64_t>(chain.begin));
    chain_end.resize(chain.end, static_cast<int64_t>(chain.end) - 1);
  }
  chain_end.push_back(static_cast<int64_t>(steps_.size()));
  std::vector<size_t> interval_of(values_.size());
  int64_t begin = 0;
  for (const bool second : {false, true}) {
    std::vector<Interval> intervals;
    for (const size_t v : order) {
      const Value& value = values_[v];
      if (value.second != second) continue;
      ConvStep* conv = maker[v]->conv();
      const int64_t overwritten = conv == nullptr ? -1 : conv->overwrites(values_);
      if (overwritten >= 0) {
        const size_t old = static_cast<size_t>(overwritten);
        if (stay_under(maker[old]->activation(), conv->activation())) conv->set_residual_stays();
        interval_of[v] = interval_of[old];
        Interval& shared = intervals[interval_of[v]];
        shared.end = chain_end[static_cast<size_t>(value.last_use)];
        shared.size = std::max(shared.size, value.floats());
        continue;
      }
      interval_of[v] = intervals.size();
      intervals.push_back({chain_begin[static_cast<size_t>(value.made)],
                           chain_end[static_cast<size_t>(value.last_use)], value.floats(), frame_of(value)});
    }
    const MemoryPlan plan = plan_memory(intervals, 16);
    for (const size_t v : order) {
      if (values_[v].second == second) values_[v].offset = begin + plan.offsets[interval_of[v]];
    }
    if (second) second_ = plan.size;
    begin += plan.size;
  }
  arena_floats_ = begin + second_;
}

std::vector<dsp_program_step> Program::profile() {
  std::vector<double> seconds(steps_.size(), 0.0);
  std::vector<std::vector<float>> memory;
  std::vector<const float*> in;
  std::vector<float*> out;
  for (int64_t i = 0; i < inputs(); ++i)
    in.push_back(memory.emplace_back(static_cast<size_t>(input(i).numel()), 1.0f).data());
  for (int64_t i = 0; i < outputs(); ++i)
    out.push_back(memory.emplace_back(static_cast<size_t>(output(i).numel())).data());
  {
    const Lease arena(this);
    run_images(in.data(), out.data(), 0, 1, arena.floats, 1, seconds.data());
  }
  std::vector<dsp_program_step> made;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Value& y = values_[static_cast<size_t>(steps_[i]->result)];
    const ConvStep* conv = steps_[i]->conv();
    made.push_back({steps_[i]->operation,
                    y.layout == Layout::kLanes ? 1 : 0,
                    {y.channels, y.height, y.width},
                    conv == nullptr ? 0 : conv->macs(),
                    seconds[i]});
  }
  return made;
}

dsp_program_memory Program::memory() const {
  dsp_program_memory memory{};
  for (const auto& step : steps_) memory.weight_bytes += step->bytes();
  memory.arena_bytes = arena_floats_ * static_cast<int64_t>(sizeof(float));
  memory.scratch_bytes = scratch_floats_ * static_cast<int64_t>(sizeof(float));
  std::lock_guard<std::mutex> lock(mutex_);
  memory.arenas = arenas_;
  return memory;
}

}  // namespace dsp

struct dsp_program {
  dsp::Program program;
};

namespace dsp {
namespace {

void tell_shape(const Shape& of, int64_t shape[3]) {
  require(shape != nullptr, "shape is null");
  shape[0] = of.channels;
  shape[1] = of.height;
  shape[2] = of.width;
}

}  // namespace
}  // namespace dsp

extern "C" {

dsp_status dsp_program_create(const int64_t* words, int64_t words_numel, const float* floats,
                              int64_t floats_numel, dsp_program** program) {
  return dsp_program_create_from(words, words_numel, &floats, &floats_numel, 1, program);
}

dsp_status dsp_program_create_from(const int64_t* words, int64_t words_numel, const float* const* floats,
                                   const int64_t* floats_numel, int64_t pieces, dsp_program** program) {
  return dsp::guard([&] {
    dsp::require(program != nullptr, "program is null");
    *program = new dsp_program{{words, words_numel, dsp::Floats(floats, floats_numel, pieces)}};
  });
}

dsp_status dsp_program_run(dsp_program* program, const float* const* in, const int64_t* in_numel,
                           float* const* out, const int64_t* out_numel, int64_t batch, int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    require(program != nullptr, "program is null");
    require(batch >= 0, "batch is negative");
    require(threads >= 1, "threads is below 1");
    require(in != nullptr && in_numel != nullptr && out != nullptr && out_numel != nullptr,
            "in, out or their sizes are null");
    for (int64_t i = 0; i < program->program.inputs(); ++i) {
      const int64_t numel = checked_mul(batch, program->program.input(i).numel(), "the size of in");
      check_tensor(in[i], in_numel[i], numel, "in");
    }
    for (int64_t i = 0; i < program->program.outputs(); ++i) {
      const int64_t numel = checked_mul(batch, program->program.output(i).numel(), "the size of out");
      check_tensor(out[i], out_numel[i], numel, "out");
    }
    const auto run = [&] { program->program.run(in, out, batch, threads); };
    with_team(threads, run);
  });
}

int64_t dsp_program_inputs(const dsp_program* program) {
  return program == nullptr ? 0 : program->program.inputs();
}

int64_t dsp_program_outputs(const dsp_program* program) {
  return program == nullptr ? 0 : program->program.outputs();
}

dsp_status dsp_program_input(const dsp_program* program, int64_t index, int64_t shape[3]) {
  return dsp::guard([&] {
    dsp::require(index >= 0 && index < dsp_program_inputs(program), "the program has no such input");
    dsp::tell_shape(program->program.input(index), shape);
  });
}

dsp_status dsp_program_output(const dsp_program* program, int64_t index, int64_t shape[3]) {
  return dsp::guard([&] {
    dsp::require(index >= 0 && index < dsp_program_outputs(program), "the program has no such output");
    dsp::tell_shape(program->program.output(index), shape);
  });
}

dsp_status dsp_program_memory_use(const dsp_program* program, dsp_program_memory* memory) {
  return dsp::guard([&] {
    dsp::require(program != nullptr && memory != nullptr, "program or memory is null");
    *memory = program->program.memory();
  });
}

dsp_status dsp_program_profile(dsp_program* program, dsp_program_step* steps, int64_t steps_numel,
                               int64_t* count) {
  return dsp::guard([&] {
    using namespace dsp;
    require(program != nullptr && count != nullptr, "program or count is null");
    *count = program->program.step_count();
    if (steps_numel == 0) return;
    require(steps != nullptr && steps_numel >= *count, "steps has no room for all of them");
    const std::vector<dsp_program_step> made = program->program.profile();
    std::copy(made.begin(), made.end(), steps);
  });
}

void dsp_program_destroy(dsp_program* program) { delete program; }

}  // extern "C"
