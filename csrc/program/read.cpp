#include "program/read.h"

#include <iterator>
#include <limits>
#include <string>

#include "core/status.h"
#include "program/fields.h"

namespace dsp {
namespace {

constexpr int64_t kMostSteps = 1 << 20;

// Reads the words of one step and refuses to read beyond them. `last` is the last value before it.
class Reader {
 public:
  Reader(const int64_t* words, int64_t count, int64_t last, const Source& source)
      : words_(words), count_(count), last_(last), source_(source) {}

  int64_t next(int64_t least, int64_t most, const char* name) {
    if (at_ >= count_) fail(std::string("program: the step ends before its ") + name);
    const int64_t value = words_[at_++];
    if (value < least || value > most)
      fail(std::string("program: ") + name + " is " + std::to_string(value) + ", expected " +
           std::to_string(least) + " to " + std::to_string(most));
    return value;
  }
  int64_t value(const char* name) { return inputs.emplace_back(next(0, last_, name)); }
  int64_t maybe_value(const char* name) {
    const int64_t id = next(-1, last_, name);
    if (id >= 0) inputs.push_back(id);
    return id;
  }
  std::vector<int64_t> values(const char* name) {
    const int64_t count = next(1, kMostSteps, name);
    if (count != left()) fail(std::string("program: there are not as many ") + name + " as it says");
    std::vector<int64_t> ids;
    for (int64_t i = 0; i < count; ++i) ids.push_back(value(name));
    return ids;
  }
  Activation activation(const char* name) {
    const int64_t kind = next(0, dsp_activation_count() - 1, name);
    const int count = activation_parameters(static_cast<int32_t>(kind));
    if (count == 0) return make_activation(static_cast<int32_t>(kind), nullptr);
    const char* parameters = "the activation's parameters";
    const int64_t at = next(0, source_.floats().numel() - count, parameters);
    return make_activation(static_cast<int32_t>(kind), source_.floats().find(at, count, parameters));
  }
  int64_t floats(int64_t least, const char* name) { return next(least, source_.floats().numel(), name); }
  std::vector<int32_t> plan(const char* name) {
    const int64_t count = next(0, left() - 1, name);
    std::vector<int32_t> words;
    words.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i)
      words.push_back(static_cast<int32_t>(next(0, std::numeric_limits<int32_t>::max(), "a plan's word")));
    return words;
  }
  int64_t left() const { return count_ - at_; }

  std::vector<int64_t> inputs;

 private:
  const int64_t* words_;
  int64_t count_, last_;
  const Source& source_;
  int64_t at_ = 0;
};

// clang-format off
#define DSP_STEP(NAME, name, code) \
  std::unique_ptr<Step> read_##name(Reader& read) { Fields<DSP_OP_##NAME> fields;
#define DSP_VALUE(x) fields.x = read.value(#x);
#define DSP_MAYBE_VALUE(x) fields.x = read.maybe_value(#x);
#define DSP_VALUES(x) fields.x = read.values(#x);
#define DSP_INT(x, least, most) fields.x = read.next(least, most, #x);
#define DSP_ACT(x) fields.x = read.activation(#x);
#define DSP_FLOATS(x) fields.x##_at = read.floats(0, #x);
#define DSP_MAYBE_FLOATS(x) fields.x##_at = read.floats(-1, #x);
#define DSP_PLAN(x) fields.x = read.plan(#x);
#define DSP_END(NAME, name) return make_step(fields); }
#include "program/steps.def"
// clang-format on

std::unique_ptr<Step> read_step(int64_t operation, Reader& read) {
  switch (operation) {
#define DSP_STEP(NAME, name, code) \
  case code:                       \
    return read_##name(read);
#include "program/steps.def"
    default:
      return nullptr;
  }
}

Value checked_value(const Shape& shape) {
  const auto good = [](int64_t size) { return size >= 1 && size < kMostSize; };
  if (!good(shape.channels) || !good(shape.height) || !good(shape.width))
    fail("program: a value has a size below 1 or too large");
  if (checked_mul(checked_mul(shape.channels, shape.height, "a value"), shape.width, "a value") > kMostSize)
    fail("program: a value has more than 2^31 elements in one image");
  return Value(shape);
}

// The table that the interface shows.
// clang-format off
#define DSP_STEP(NAME, name, code) constexpr dsp_step_field kFieldsOf_##name[] = {
#define DSP_VALUE(x) {#x, DSP_FIELD_VALUE, 0, 0},
#define DSP_MAYBE_VALUE(x) {#x, DSP_FIELD_MAYBE_VALUE, 0, 0},
#define DSP_VALUES(x) {#x, DSP_FIELD_VALUES, 0, 0},
#define DSP_INT(x, least, most) {#x, DSP_FIELD_INT, least, most},
#define DSP_ACT(x) {#x, DSP_FIELD_ACTIVATION, 0, 0},
#define DSP_FLOATS(x) {#x, DSP_FIELD_FLOATS, 0, 0},
#define DSP_MAYBE_FLOATS(x) {#x, DSP_FIELD_MAYBE_FLOATS, 0, 0},
#define DSP_PLAN(x) {#x, DSP_FIELD_PLAN, 0, 0},
#define DSP_END(NAME, name) };
#include "program/steps.def"
// clang-format on

constexpr dsp_step_info kSteps[] = {
#define DSP_STEP(NAME, name, code) \
  {#name, code, static_cast<int32_t>(std::size(kFieldsOf_##name)), kFieldsOf_##name},
#include "program/steps.def"
};

}  // namespace

int64_t description_steps(const int64_t* words, int64_t words_numel) {
  require(words != nullptr && words_numel >= DSP_PROGRAM_HEADER, "program: the description is too short");
  require(words[0] == DSP_PROGRAM_MAGIC, "program: the description does not start with the magic number");
  if (words[1] != DSP_PROGRAM_VERSION)
    fail("program: the description's version is " + std::to_string(words[1]) + ", expected " +
         std::to_string(DSP_PROGRAM_VERSION));
  require(words[5] == words_numel, "program: the description's length is not what it says");
  const int64_t n_inputs = words[2], n_steps = words[3], n_outputs = words[4];
  require(n_steps >= 1 && n_steps <= kMostSteps, "program: the number of steps is not 1 to 2^20");
  require(n_inputs >= 1 && n_inputs <= kMostSteps, "program: the number of inputs is not 1 to 2^20");
  require(n_outputs >= 1 && n_outputs <= n_steps, "program: the number of outputs is not 1 to that of steps");
  require(words_numel - DSP_PROGRAM_HEADER >= 3 * n_inputs + n_outputs,
          "program: the description ends before its steps");
  return DSP_PROGRAM_HEADER + 3 * n_inputs + n_outputs;
}

std::vector<Shape> description_inputs(const int64_t* words, int64_t words_numel) {
  description_steps(words, words_numel);
  std::vector<Shape> shapes;
  for (const int64_t* at = words + DSP_PROGRAM_HEADER; shapes.size() < static_cast<size_t>(words[2]); at += 3)
    shapes.push_back({at[0], at[1], at[2]});
  return shapes;
}

std::vector<int64_t> description_for(const int64_t* words, int64_t words_numel,
                                     const std::vector<Shape>& inputs) {
  require(inputs.size() == description_inputs(words, words_numel).size(),
          "program: the description has another number of inputs");
  std::vector<int64_t> changed(words, words + words_numel);
  auto at = changed.begin() + DSP_PROGRAM_HEADER;
  for (const Shape& shape : inputs) {
    *at++ = shape.channels;
    *at++ = shape.height;
    *at++ = shape.width;
  }
  return changed;
}

Description read_description(const int64_t* words, int64_t words_numel, const Floats& floats) {
  description_steps(words, words_numel);
  const int64_t n_inputs = words[2], n_steps = words[3], n_outputs = words[4];
  Description d;
  int64_t at = DSP_PROGRAM_HEADER;
  for (int64_t i = 0; i < n_inputs; ++i, at += 3) {
    d.values.push_back(checked_value({words[at], words[at + 1], words[at + 2]}));
    d.values.back().input = i;
  }
  for (int64_t i = 0; i < n_outputs; ++i, ++at) {
    require(words[at] >= n_inputs && words[at] < n_inputs + n_steps,
            "program: an output is not the value of a step");
    d.outputs.push_back(words[at]);
  }
  const Source source(d.values, floats);
  for (int64_t i = 0; i < n_steps; ++i) {
    const std::string name = "program: step " + std::to_string(i);
    if (words_numel - at < 2) fail("program: the description ends before step " + std::to_string(i));
    const int64_t length = words[at + 1];
    if (length < 2 || length > words_numel - at) fail(name + " has a wrong length");
    Reader read(words + at + 2, length - 2, n_inputs + i - 1, source);
    std::unique_ptr<Step> step = read_step(words[at], read);
    if (step == nullptr) fail(name + " has the unknown operation " + std::to_string(words[at]));
    if (read.left() != 0) fail(name + " has words to spare");
    step->inputs = std::move(read.inputs);
    step->result = n_inputs + i;
    step->operation = static_cast<int32_t>(words[at]);
    Value made = checked_value(step->shape(source));
    made.last_use = i;
    for (const int64_t id : step->inputs) d.values[static_cast<size_t>(id)].last_use = i;
    d.values.push_back(made);
    d.steps.push_back(std::move(step));
    at += length;
  }
  if (at != words_numel) fail("program: the description has words to spare");
  for (const int64_t id : d.outputs) d.values[static_cast<size_t>(id)].last_use = n_steps;
  return d;
}

}  // namespace dsp

extern "C" {

int32_t dsp_step_count(void) { return static_cast<int32_t>(std::size(dsp::kSteps)); }

const dsp_step_info* dsp_step_at(int32_t index) {
  return index >= 0 && index < dsp_step_count() ? dsp::kSteps + index : nullptr;
}
}
