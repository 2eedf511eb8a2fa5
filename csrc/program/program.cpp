#include "program/program.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <string>

#include "core/scratch.h"
#include "core/status.h"
#include "core/thread_pool.h"

namespace dsp {
namespace {

constexpr int64_t kSlack = 64;  // floats that a full vector may read beyond the last plane
constexpr int64_t kMostSteps = 1 << 20;
constexpr int64_t kMostSize = int64_t{1} << 31;
constexpr int64_t kChunkBytes = 24 * 1024;
constexpr int64_t kMostPadding = 8;  // more air than that is better made while copying

int64_t spread(int64_t floats) { return (((floats + 15) / 16) | 1) * 16; }

// Reads words and refuses to read beyond them.
class Reader {
 public:
  Reader(const int64_t* words, int64_t count) : words_(words), count_(count) {}
  int64_t next(int64_t least, int64_t most, const char* name) {
    if (at_ >= count_) fail(std::string("program: the step ends before its ") + name);
    const int64_t value = words_[at_++];
    if (value < least || value > most)
      fail(std::string("program: ") + name + " is " + std::to_string(value) + ", expected " +
           std::to_string(least) + " to " + std::to_string(most));
    return value;
  }
  int64_t left() const { return count_ - at_; }

 private:
  const int64_t* words_;
  int64_t count_;
  int64_t at_ = 0;
};

int64_t pooled(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
               bool ceil_mode) {
  const int64_t room = size + 2 * padding - dilation * (kernel - 1) - 1;
  if (room < 0) fail("program: the pooling window is larger than the padded input");
  int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // A window that would start in the right padding is left out, as torch does.
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  return out;
}

// Whether results of activation `before` stay what they are under activation `after` (codes as in dsp.h).
bool implies(int32_t before, int32_t after) {
  return after == 0 || before == after || (before == 2 && after == 1);
}

}  // namespace

int64_t Value::floats() const { return channels * planes.plane + kSlack; }

Program::Program(const int64_t* words, int64_t words_numel, const float* floats, int64_t floats_numel) {
  parse(words, words_numel, floats, floats_numel);
  choose_padding();
  build_steps();
  choose_pairs();
  plan_memory();
}

Program::~Program() {
  for (float* arena : free_arenas_) std::free(arena);
}

void Program::parse(const int64_t* words, int64_t words_numel, const float* floats, int64_t floats_numel) {
  require(words != nullptr && words_numel >= DSP_PROGRAM_HEADER, "program: the description is too short");
  require(floats_numel >= 0 && (floats != nullptr || floats_numel == 0), "program: floats is null");
  require(words[0] == DSP_PROGRAM_MAGIC, "program: the description does not start with the magic number");
  require(words[1] == 1, "program: the description's version is not 1");
  require(words[7] == words_numel, "program: the description's length is not what it says");
  const int64_t n_steps = words[5];
  require(n_steps >= 1 && n_steps <= kMostSteps, "program: the number of steps is not 1 to 2^20");
  const auto add_value = [&](int64_t channels, int64_t height, int64_t width) {
    const auto good = [](int64_t size) { return size >= 1 && size < kMostSize; };
    if (!good(channels) || !good(height) || !good(width))
      fail("program: a value has a size below 1 or too large");
    if (checked_mul(checked_mul(channels, height, "a value"), width, "a value") > kMostSize)
      fail("program: a value has more than 2^31 elements in one image");
    Value value;
    value.channels = channels;
    value.height = height;
    value.width = width;
    values_.push_back(value);
  };
  add_value(words[2], words[3], words[4]);
  require(words[6] >= 1 && words[6] <= n_steps, "program: the output is not the value of a step");
  output_ = words[6];

  const auto take = [&](int64_t at, int64_t count, const char* name) {
    if (at > floats_numel || count > floats_numel - at)
      fail(std::string("program: ") + name + " reaches beyond the floats");
    return std::vector<float>(floats + at, floats + at + count);
  };
  int64_t at = DSP_PROGRAM_HEADER;
  steps_.resize(static_cast<size_t>(n_steps));
  for (int64_t i = 0; i < n_steps; ++i) {
    if (words_numel - at < 2) fail("program: the description ends before step " + std::to_string(i));
    const int64_t length = words[at + 1];
    if (length < 2 || length > words_numel - at)
      fail("program: step " + std::to_string(i) + " has a wrong length");
    Reader read(words + at + 2, length - 2);
    Step& step = steps_[static_cast<size_t>(i)];
    if (words[at] < DSP_OP_CONV || words[at] > DSP_OP_AFFINE)
      fail("program: step " + std::to_string(i) + " has the unknown operation " + std::to_string(words[at]));
    step.op = static_cast<dsp_program_op>(words[at]);
    at += length;
    const auto value = [&](int64_t id) -> const Value& { return values_[static_cast<size_t>(id)]; };
    const auto input = [&] {
      const int64_t id = read.next(0, i, "input");
      step.inputs.push_back(id);
      return id;
    };
    const auto activation = [&] { step.activation = static_cast<int32_t>(read.next(0, 2, "activation")); };
    const auto kernel = [&](bool dilated) {
      step.kh = read.next(1, kMostSize - 1, "kernel_h");
      step.kw = read.next(1, kMostSize - 1, "kernel_w");
      step.sh = read.next(1, kMostSize - 1, "stride_h");
      step.sw = read.next(1, kMostSize - 1, "stride_w");
      step.ph = read.next(0, kMostSize - 1, "padding_h");
      step.pw = read.next(0, kMostSize - 1, "padding_w");
      if (!dilated) return;
      step.dh = read.next(1, kMostSize - 1, "dilation_h");
      step.dw = read.next(1, kMostSize - 1, "dilation_w");
    };
    const bool many = step.op == DSP_OP_CONCAT;
    const int64_t count_or_input = many ? read.next(1, kMostSteps, "count") : input();
    const Value x = value(many ? 0 : count_or_input);
    switch (step.op) {
      case DSP_OP_CONV: {
        const int64_t residual = read.next(-1, i, "residual");
        if (residual >= 0) step.inputs.push_back(residual);
        activation();
        kernel(true);
        const int64_t weight_at = read.next(0, floats_numel, "weight_at");
        const int64_t bias_at = read.next(-1, floats_numel, "bias_at");
        const int64_t plan_words = read.next(0, read.left(), "the plan's length");
        for (int64_t w = 0; w < plan_words; ++w)
          step.plan.push_back(
              static_cast<int32_t>(read.next(0, std::numeric_limits<int32_t>::max(), "plan word")));
        const Plan plan(step.plan.data(), plan_words);
        const dsp_conv2d_shape shape{1,       x.height, x.width, step.kh, step.kw, step.sh,
                                     step.sw, step.ph,  step.pw, step.dh, step.dw};
        step.shape = check_shape(&shape, plan);
        if (plan.in_channels() != x.channels)
          fail("program: a convolution's plan has other input channels than x");
        add_value(plan.out_channels(), step.shape.out_h, step.shape.out_w);
        if (residual >= 0) {
          const Value& added = value(residual);
          if (added.channels != plan.out_channels() || added.height != step.shape.out_h ||
              added.width != step.shape.out_w)
            fail("program: a convolution's residual has another shape than its output");
        }
        const int64_t numel = plan.pairs() * step.shape.taps();
        const std::vector<float> packed = take(weight_at, numel, "weight");
        step.weights.resize(packed.size());
        prepare_weights(plan, step.kh, step.kw, packed.data(), step.weights.data());
        if (bias_at >= 0) step.bias = take(bias_at, plan.out_channels(), "bias");
        break;
      }
      case DSP_OP_LINEAR: {
        activation();
        const int64_t features = read.next(1, kMostSize - 1, "out features");
        const int64_t weight_at = read.next(0, floats_numel, "weight_at");
        const int64_t bias_at = read.next(-1, floats_numel, "bias_at");
        if (x.height != 1 || x.width != 1) fail("program: linear needs a flat input");
        step.weights = take(weight_at, checked_mul(features, x.channels, "weight"), "weight");
        if (bias_at >= 0) step.bias = take(bias_at, features, "bias");
        add_value(features, 1, 1);
        break;
      }
      case DSP_OP_MAX_POOL:
      case DSP_OP_AVG_POOL: {
        const bool is_max = step.op == DSP_OP_MAX_POOL;
        kernel(is_max);
        const bool ceil_mode = read.next(0, 1, "ceil_mode") != 0;
        if (!is_max) step.include_pad = read.next(0, 1, "count_include_pad") != 0;
        if (step.ph > step.kh / 2 || step.pw > step.kw / 2)
          fail("program: pooling pads more than half its kernel");
        add_value(x.channels, pooled(x.height, step.kh, step.sh, step.ph, step.dh, ceil_mode),
                  pooled(x.width, step.kw, step.sw, step.pw, step.dw, ceil_mode));
        break;
      }
      case DSP_OP_ADAPTIVE_AVG_POOL: {
        const int64_t out_h = read.next(1, kMostSize - 1, "out_h");
        const int64_t out_w = read.next(1, kMostSize - 1, "out_w");
        add_value(x.channels, out_h, out_w);
        break;
      }
      case DSP_OP_ADD: {
        const Value& other = value(input());
        activation();
        if (other.channels != x.channels || other.height != x.height || other.width != x.width)
          fail("program: add of two shapes");
        add_value(x.channels, x.height, x.width);
        break;
      }
      case DSP_OP_ACTIVATION:
        activation();
        add_value(x.channels, x.height, x.width);
        break;
      case DSP_OP_CONCAT: {
        if (count_or_input != read.left()) fail("program: concat has another number of values than it says");
        int64_t channels = 0;
        const Value first = value(input());
        channels = first.channels;
        for (int64_t j = 1; j < count_or_input; ++j) {
          const Value& next = value(input());
          if (next.height != first.height || next.width != first.width) fail("program: concat of two sizes");
          channels += next.channels;
        }
        add_value(channels, first.height, first.width);
        break;
      }
      case DSP_OP_FLATTEN:
        add_value(x.channels * x.height * x.width, 1, 1);
        break;
      case DSP_OP_AFFINE: {
        const int64_t scale_at = read.next(0, floats_numel, "scale_at");
        const int64_t shift_at = read.next(0, floats_numel, "shift_at");
        activation();
        step.weights = take(scale_at, x.channels, "scale");
        step.bias = take(shift_at, x.channels, "shift");
        add_value(x.channels, x.height, x.width);
        break;
      }
    }
    if (read.left() != 0) fail("program: step " + std::to_string(i) + " has words to spare");
    for (const int64_t id : step.inputs) values_[static_cast<size_t>(id)].last_use = i;
    values_.back().last_use = i;
  }
  if (at != words_numel) fail("program: the description has words to spare");
  values_[static_cast<size_t>(output_)].last_use = n_steps;
}

// A convolution with stride 1 reads its input in place when the zeros around it are in place too. Such planes
// are written row by row, so rows have to fill vectors.
void Program::choose_padding() {
  for (const Step& step : steps_) {
    if (step.op != DSP_OP_CONV || step.sh != 1 || step.sw != 1) continue;
    Value& x = values_[static_cast<size_t>(step.inputs.front())];
    if (&x == &values_.front() || !rows_fit(x.width) || !rows_fit(step.shape.out_w)) continue;
    if (step.ph > kMostPadding || step.pw > kMostPadding) continue;
    x.pad_h = std::max(x.pad_h, step.ph);
    x.pad_w = std::max(x.pad_w, step.pw);
  }
  choose_columns_apart();
  for (size_t i = 0; i < values_.size(); ++i) {
    Value& value = values_[i];
    // The zeros right of a row are those left of the next.
    value.planes.pitch = value.width + value.pad_w + value.pad_middle;
    value.planes.origin = value.pad_h * value.planes.pitch + value.pad_w;
    value.planes.plane = (value.height + 2 * value.pad_h) * value.planes.pitch + value.pad_w;
    if (i > 0 && value.height * value.width > 1) value.planes.plane = spread(value.planes.plane);
  }
}

// A convolution with stride 2 reads its input in place where even and odd columns lie apart. A convolution's
// result can be written so if nobody else reads it.
void Program::choose_columns_apart() {
  std::vector<bool> apart(values_.size(), false);
  for (size_t i = 0; i < steps_.size(); ++i)
    apart[i + 1] = steps_[i].op == DSP_OP_CONV && values_[i + 1].width % kernels().lanes == 0 &&
                   !wide_taps(steps_[i].shape);
  apart[static_cast<size_t>(output_)] = false;
  for (const Step& step : steps_) {
    const bool fits = step.op == DSP_OP_CONV && step.sh == 2 && step.sw == 2 && rows_fit(step.shape.out_w) &&
                      step.ph <= kMostPadding && step.pw <= kMostPadding;
    for (size_t j = fits ? 1 : 0; j < step.inputs.size(); ++j)
      apart[static_cast<size_t>(step.inputs[j])] = false;
  }
  for (const Step& step : steps_) {
    if (step.op != DSP_OP_CONV || !apart[static_cast<size_t>(step.inputs.front())]) continue;
    Value& x = values_[static_cast<size_t>(step.inputs.front())];
    const int64_t half = x.width / 2;
    x.pad_h = std::max(x.pad_h, step.ph);
    for (int64_t kx = 0; kx < step.kw; ++kx) {
      const ColumnsApart columns = columns_apart(step.shape, kx);
      const int64_t left = -columns.first;
      const int64_t right = columns.first + step.shape.out_w - half;
      x.pad_w = std::max(x.pad_w, columns.odd ? right : left);
      x.pad_middle = std::max(x.pad_middle, columns.odd ? left : right);
    }
    x.planes.odd = half + x.pad_middle;
  }
}

// Where rows are half a vector, two images fill one: from there on they go through the steps together, and
// what is still needed there exists twice.
void Program::choose_pairs() {
  first_pair_ = steps_.size();
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    const Value& y = values_[i + 1];
    if (step.op != DSP_OP_CONV || step.layout.blocks.empty() || !step.layout.pairs_fit()) continue;
    if (step.inputs.size() > 1 && step.inputs[1] == 0) continue;  // the caller's images lie elsewhere
    step.pairs = true;
    first_pair_ = std::min(first_pair_, i);
    const int64_t residual_pitch =
        step.inputs.size() > 1 ? values_[static_cast<size_t>(step.inputs[1])].planes.pitch : 0;
    step.layout.build_tiles(step.shape.out_plane(), y.planes, residual_pitch, kChunkBytes, step.of_pairs, -1,
                            true);
  }
  if (first_pair_ == steps_.size()) return;
  for (size_t v = 1; v < values_.size(); ++v)
    values_[v].twice = values_[v].last_use >= static_cast<int64_t>(first_pair_);
}

// The value in whose place result `v` may be written, or 0: a residual that nobody reads later lies like its
// sum with it, and is read where the sum is written.
size_t Program::overwritten(size_t v) const {
  const Step& step = steps_[v - 1];
  if (step.op != DSP_OP_CONV || step.inputs.size() < 2 || step.inputs[1] == step.inputs[0]) return 0;
  const Value& old = values_[static_cast<size_t>(step.inputs[1])];
  const Value& made = values_[v];
  const bool alike = old.pad_h == made.pad_h && old.pad_w == made.pad_w &&
                     old.planes.odd == made.planes.odd && old.planes.pitch == made.planes.pitch &&
                     old.planes.plane == made.planes.plane;
  const bool free = old.last_use == static_cast<int64_t>(v) - 1 && old.twice == made.twice;
  return alike && free ? static_cast<size_t>(step.inputs[1]) : 0;
}

// Offsets by liveness. Padded values share memory only with values of the same layout, because their zeros
// are written once, when an arena is made; the others go wherever there is room.
void Program::plan_memory() {
  struct Slot {
    int64_t pad_h, pad_w, pad_middle, height, width, floats, busy_until;
    std::vector<size_t> values;
  };
  int64_t begin = 0;
  for (const bool twice : {false, true}) {
    std::vector<Slot> slots;
    std::vector<size_t> plain;
    int64_t end = begin;
    for (size_t v = 1; v < values_.size(); ++v) {
      Value& value = values_[v];
      if (value.twice != twice) continue;
      const int64_t made = static_cast<int64_t>(v) - 1;
      const size_t old = overwritten(v);
      if (old != 0) steps_[v - 1].settled = implies(steps_[old - 1].activation, steps_[v - 1].activation);
      if (value.pad_h == 0 && value.pad_w == 0 && value.pad_middle == 0) {
        if (old != 0) {
          value.offset = values_[old].offset;
          plain.push_back(v);
          continue;
        }
        const int64_t size = (value.floats() + 15) / 16 * 16;
        std::vector<std::pair<int64_t, int64_t>> taken;
        for (const size_t other : plain) {
          if (values_[other].last_use >= made)
            taken.emplace_back(values_[other].offset, (values_[other].floats() + 15) / 16 * 16);
        }
        std::sort(taken.begin(), taken.end());
        int64_t at = begin;
        for (const auto& piece : taken) {
          if (piece.first >= at + size) break;
          at = std::max(at, piece.first + piece.second);
        }
        value.offset = at;
        end = std::max(end, at + size);
        plain.push_back(v);
        continue;
      }
      Slot* found = nullptr;
      for (Slot& slot : slots) {
        const bool vacant = old != 0 ? slot.values.back() == old : slot.busy_until < made;
        if (vacant && slot.pad_h == value.pad_h && slot.pad_w == value.pad_w &&
            slot.pad_middle == value.pad_middle && slot.height == value.height && slot.width == value.width) {
          found = &slot;
          break;
        }
      }
      if (found == nullptr) {
        slots.push_back({value.pad_h, value.pad_w, value.pad_middle, value.height, value.width, 0, 0, {}});
        found = &slots.back();
      }
      found->floats = std::max(found->floats, value.floats());
      found->busy_until = value.last_use;
      found->values.push_back(v);
    }
    for (const Slot& slot : slots) {
      for (const size_t v : slot.values) values_[v].offset = end;
      end += (slot.floats + 15) / 16 * 16;
    }
    if (twice) second_ = end - begin;
    begin = end;
  }
  arena_floats_ = begin + second_;
}

void Program::build_steps() {
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    if (step.op != DSP_OP_CONV) continue;
    const Plan plan(step.plan.data(), static_cast<int64_t>(step.plan.size()));
    const ConvShape& s = step.shape;
    const int64_t id = step.inputs.front();
    const Value& x = values_[static_cast<size_t>(id)];
    const Value& y = values_[i + 1];
    const Value* residual = step.inputs.size() > 1 ? &values_[static_cast<size_t>(step.inputs[1])] : nullptr;
    step.layout.set_blocks(plan, s);
    step.layout.set_bias(step.bias.empty() ? nullptr : step.bias.data());
    if (step.layout.blocks.empty()) continue;
    const bool unit = s.sh == 1 && s.sw == 1;
    const bool one = unit && s.kh == 1 && s.kw == 1 && s.ph == 0 && s.pw == 0;
    const bool packed = x.planes.pitch == x.width && y.planes.pitch == y.width && y.planes.odd == 0 &&
                        (residual == nullptr || residual->planes.pitch == residual->width);
    if (one && packed) {
      step.layout.set_direct_flat(s, plan, x.planes, id == 0);
    } else if (x.planes.odd != 0 ||
               (unit && id != 0 && x.pad_h >= s.ph && x.pad_w >= s.pw && rows_fit(s.out_w))) {
      step.layout.set_direct_rows(s, plan, x.planes);
    } else {
      step.layout.set_gathered(s, plan, 1, false);
      if (step.layout.flat() &&
          !(y.planes.pitch == y.width && (residual == nullptr || residual->planes.pitch == y.width)))
        fail("program: a convolution's kernel is too wide for its output");
      scratch_floats_ = std::max(scratch_floats_, step.layout.scratch_floats());
    }
    const int64_t plane = s.out_plane();
    const int64_t last_first = (step.layout.strips() - 1) * step.layout.strip_pixels;
    const int64_t residual_pitch = residual == nullptr ? 0 : residual->planes.pitch;
    step.layout.build_tiles(std::min(step.layout.strip_pixels, plane), y.planes, residual_pitch, kChunkBytes,
                            step.whole);
    step.layout.build_tiles(plane - last_first, y.planes, residual_pitch, kChunkBytes, step.last);
  }
}

float* Program::take_arena() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_arenas_.empty()) {
      float* arena = free_arenas_.back();
      free_arenas_.pop_back();
      return arena;
    }
    free_arenas_.reserve(static_cast<size_t>(arenas_) + 1);
    ++arenas_;
  }
  const size_t bytes = (static_cast<size_t>(arena_floats_) * sizeof(float) + 4095) / 4096 * 4096 + 4096;
  float* arena = static_cast<float*>(std::aligned_alloc(4096, bytes));
  if (arena == nullptr) {
    std::lock_guard<std::mutex> lock(mutex_);
    --arenas_;
    throw std::bad_alloc();
  }
  std::memset(arena, 0, bytes);
  return arena;
}

void Program::give_arena(float* arena) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_arenas_.push_back(arena);  // take_arena() reserved the room
}

// Where the values of one image are.
struct Program::Place {
  const std::vector<Value>* values;
  const float* in;
  float* arena;
  int64_t second;  // 0 for the first of two
  const float* read(int64_t id) const { return id == 0 ? in : write(id); }
  float* write(int64_t id) const {
    const Value& value = (*values)[static_cast<size_t>(id)];
    return arena + value.offset + (value.twice ? second : 0);
  }
};

void Program::fill_dead(const Step& step, const Place& at, int64_t result) const {
  const Value& y = values_[static_cast<size_t>(result)];
  float* out = at.write(result) + y.planes.origin;
  for (const int32_t f : step.layout.dead) {
    const float* residual = nullptr;
    int64_t residual_pitch = 0;
    if (step.inputs.size() > 1) {
      const Planes& planes = values_[static_cast<size_t>(step.inputs[1])].planes;
      residual = at.read(step.inputs[1]) + planes.origin + f * planes.plane;
      residual_pitch = planes.pitch;
    }
    const float value = step.bias.empty() ? 0.0f : step.bias[static_cast<size_t>(f)];
    if (step.settled && value == 0.0f) continue;  // what is to be written is there
    kernels().fill(out + f * y.planes.plane, y.planes.pitch, y.planes.odd, residual, residual_pitch, value,
                   y.height, y.width, step.activation);
  }
}

void Program::run_conv(const Step& step, const Place& at, int64_t result, int threads) const {
  const ConvLayout& layout = step.layout;
  const ConvShape& s = step.shape;
  const Value& x = values_[static_cast<size_t>(step.inputs.front())];
  const Value& y = values_[static_cast<size_t>(result)];
  const float* in = at.read(step.inputs.front());
  float* out = at.write(result);
  const float* residual = nullptr;
  Planes residual_planes{};
  if (step.inputs.size() > 1) {
    residual = at.read(step.inputs[1]);
    residual_planes = values_[static_cast<size_t>(step.inputs[1])].planes;
  }
  fill_dead(step, at, result);
  if (layout.blocks.empty()) return;
  const int64_t n_blocks = static_cast<int64_t>(layout.blocks.size());
  const int64_t slots = static_cast<int64_t>(layout.used_channels.size());
  const int64_t strips = layout.strips();
  const auto strip_run = [&](int64_t strip, int64_t chunk0, int64_t chunk1, int64_t block0, int64_t block1,
                             const float* from) {
    const int64_t first = strip * layout.strip_pixels;
    const int64_t row = layout.flat() ? 0 : first / s.out_w;
    const int64_t out_at = layout.flat() ? first : row * y.planes.pitch;
    const int64_t residual_at = layout.flat() ? first : row * residual_planes.pitch;
    layout.run(strip == strips - 1 ? step.last : step.whole, chunk0, chunk1, block0, block1, from,
               step.weights.data(), layout.bias.data(), out + out_at, y.planes,
               residual == nullptr ? nullptr : residual + residual_at, residual_planes, step.activation);
  };
  const auto pixels_of = [&](int64_t strip) {
    return strip == strips - 1 ? s.out_plane() - strip * layout.strip_pixels : layout.strip_pixels;
  };
  const size_t scratch_bytes = static_cast<size_t>(layout.scratch_floats()) * sizeof(float);

  if (threads <= 1 || strips >= threads) {
    auto body = [&](int64_t strip) {
      const float* from = in;
      if (layout.gathered()) {
        float* scratch = reinterpret_cast<float*>(task_scratch().reserve(scratch_bytes));
        layout.gather(in, x.planes, strip * layout.strip_pixels, pixels_of(strip), 0, slots, scratch);
        from = scratch;
      }
      const TileSet* sets = strip == strips - 1 ? step.last : step.whole;
      strip_run(strip, 0, layout.chunks(sets), 0, n_blocks, from);
    };
    parallel_for(threads, strips, body);
    return;
  }
  // One image on several threads: all of them read the same copy of the input.
  for (int64_t strip = 0; strip < strips; ++strip) {
    const float* from = in;
    if (layout.gathered()) {
      float* scratch = reinterpret_cast<float*>(call_scratch().reserve(scratch_bytes));
      const int64_t shares = std::min<int64_t>(slots, 2 * threads);
      auto gather = [&](int64_t share) {
        layout.gather(in, x.planes, strip * layout.strip_pixels, pixels_of(strip), share * slots / shares,
                      (share + 1) * slots / shares, scratch);
      };
      parallel_for(threads, shares, gather);
      from = scratch;
    }
    const TileSet* sets = strip == strips - 1 ? step.last : step.whole;
    const int64_t chunks = layout.chunks(sets);
    const int64_t wanted = 3 * int64_t{threads};
    const int64_t chunk_parts = std::min(chunks, wanted);
    const int64_t block_parts = std::min(n_blocks, (wanted + chunk_parts - 1) / chunk_parts);
    auto body = [&](int64_t task) {
      const int64_t c = task / block_parts;
      const int64_t b = task % block_parts;
      strip_run(strip, c * chunks / chunk_parts, (c + 1) * chunks / chunk_parts,
                layout.block_share(b, block_parts), layout.block_share(b + 1, block_parts), from);
    };
    parallel_for(threads, chunk_parts * block_parts, body);
  }
}

// How many pieces a step other than a convolution can be cut into.
int64_t Program::units(const Step& step, int64_t result) const {
  const Value& y = values_[static_cast<size_t>(result)];
  return step.op == DSP_OP_FLATTEN ? values_[static_cast<size_t>(step.inputs.front())].channels : y.channels;
}

void Program::run_other(const Step& step, const Place& at, int64_t result, int64_t begin, int64_t end) const {
  const KernelTable& k = kernels();
  const Value& x = values_[static_cast<size_t>(step.inputs.front())];
  const Value& y = values_[static_cast<size_t>(result)];
  const float* in = at.read(step.inputs.front()) + x.planes.origin;
  float* out = at.write(result) + y.planes.origin;
  const auto in_row = [&](int64_t c, int64_t row) { return in + c * x.planes.plane + row * x.planes.pitch; };
  const auto out_row = [&](int64_t c, int64_t row) {
    return out + c * y.planes.plane + row * y.planes.pitch;
  };
  switch (step.op) {
    case DSP_OP_CONV:
      break;
    case DSP_OP_LINEAR: {
      // Channels of flat values lie next to each other.
      k.linear(out + begin, in, step.weights.data() + begin * x.channels,
               step.bias.empty() ? nullptr : step.bias.data() + begin, x.channels, end - begin,
               step.activation);
      break;
    }
    case DSP_OP_MAX_POOL:
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t oy = 0; oy < y.height; ++oy) {
          float* to = out_row(c, oy);
          for (int64_t ox = 0; ox < y.width; ++ox) to[ox] = -std::numeric_limits<float>::infinity();
          for (int64_t ky = 0; ky < step.kh; ++ky) {
            const int64_t iy = oy * step.sh - step.ph + ky * step.dh;
            if (iy < 0 || iy >= x.height) continue;
            const float* from = in_row(c, iy);
            for (int64_t kx = 0; kx < step.kw; ++kx) {
              const int64_t shift = kx * step.dw - step.pw;
              const int64_t first = shift >= 0 ? 0 : (-shift + step.sw - 1) / step.sw;
              const int64_t last =
                  x.width - 1 - shift < 0 ? 0 : std::min(y.width, (x.width - 1 - shift) / step.sw + 1);
              const float* shifted = from + shift;
              // NaN wins, as in torch.
              if (step.sw == 1) {
                for (int64_t ox = first; ox < last; ++ox) {
                  const float v = shifted[ox];
                  to[ox] = v <= to[ox] ? to[ox] : (to[ox] != to[ox] ? to[ox] : v);
                }
              } else {
                for (int64_t ox = first; ox < last; ++ox) {
                  const float v = shifted[ox * step.sw];
                  to[ox] = v <= to[ox] ? to[ox] : (to[ox] != to[ox] ? to[ox] : v);
                }
              }
            }
          }
        }
      }
      break;
    case DSP_OP_AVG_POOL:
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t oy = 0; oy < y.height; ++oy) {
          const int64_t y0 = oy * step.sh - step.ph;
          const int64_t y1 = std::min(y0 + step.kh, x.height + step.ph);
          for (int64_t ox = 0; ox < y.width; ++ox) {
            const int64_t x0 = ox * step.sw - step.pw;
            const int64_t x1 = std::min(x0 + step.kw, x.width + step.pw);
            const int64_t from_y = std::max<int64_t>(y0, 0);
            const int64_t to_y = std::min(y1, x.height);
            const int64_t from_x = std::max<int64_t>(x0, 0);
            const int64_t to_x = std::min(x1, x.width);
            float sum = 0;
            for (int64_t iy = from_y; iy < to_y; ++iy) {
              const float* row = in_row(c, iy);
              for (int64_t ix = from_x; ix < to_x; ++ix) sum += row[ix];
            }
            const int64_t count = step.include_pad ? (y1 - y0) * (x1 - x0)
                                                   : std::max<int64_t>(1, (to_y - from_y) * (to_x - from_x));
            out_row(c, oy)[ox] = sum / static_cast<float>(count);
          }
        }
      }
      break;
    case DSP_OP_ADAPTIVE_AVG_POOL:
      for (int64_t oy = 0; oy < y.height; ++oy) {
        const int64_t y0 = oy * x.height / y.height;
        const int64_t y1 = ((oy + 1) * x.height + y.height - 1) / y.height;
        for (int64_t ox = 0; ox < y.width; ++ox) {
          const int64_t x0 = ox * x.width / y.width;
          const int64_t x1 = ((ox + 1) * x.width + y.width - 1) / y.width;
          const float pixels = static_cast<float>((y1 - y0) * (x1 - x0));
          for (int64_t c = begin; c < end; ++c) {
            float sum = 0;
            if (x1 - x0 == x.planes.pitch) {
              sum = k.sum(in_row(c, y0), (y1 - y0) * x.planes.pitch);
            } else {
              for (int64_t iy = y0; iy < y1; ++iy) sum += k.sum(in_row(c, iy) + x0, x1 - x0);
            }
            out_row(c, oy)[ox] = sum / pixels;
          }
        }
      }
      break;
    case DSP_OP_ADD: {
      const Value& b = values_[static_cast<size_t>(step.inputs[1])];
      const float* other = at.read(step.inputs[1]) + b.planes.origin;
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t row = 0; row < y.height; ++row)
          k.add(out_row(c, row), in_row(c, row), other + c * b.planes.plane + row * b.planes.pitch, y.width,
                step.activation);
      }
      break;
    }
    case DSP_OP_ACTIVATION:
      for (int64_t c = begin; c < end; ++c) {
        k.fill(out_row(c, 0), y.planes.pitch, 0, in_row(c, 0), x.planes.pitch, 0.0f, y.height, y.width,
               step.activation);
      }
      break;
    case DSP_OP_CONCAT: {
      int64_t channel = 0;
      for (const int64_t id : step.inputs) {
        const Value& part = values_[static_cast<size_t>(id)];
        const float* from = at.read(id) + part.planes.origin;
        for (int64_t c = std::max(begin - channel, int64_t{0}); c < std::min(end - channel, part.channels);
             ++c) {
          for (int64_t row = 0; row < y.height; ++row)
            std::memcpy(out_row(channel + c, row), from + c * part.planes.plane + row * part.planes.pitch,
                        static_cast<size_t>(y.width) * sizeof(float));
        }
        channel += part.channels;
      }
      break;
    }
    case DSP_OP_FLATTEN:
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t row = 0; row < x.height; ++row)
          std::memcpy(out + (c * x.height + row) * x.width, in_row(c, row),
                      static_cast<size_t>(x.width) * sizeof(float));
      }
      break;
    case DSP_OP_AFFINE:
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t row = 0; row < y.height; ++row)
          k.affine(out_row(c, row), in_row(c, row), step.weights[static_cast<size_t>(c)],
                   step.bias[static_cast<size_t>(c)], y.width, step.activation);
      }
      break;
  }
}

void Program::run_step(size_t i, const Place& at, int threads) const {
  const Step& step = steps_[i];
  const int64_t result = static_cast<int64_t>(i) + 1;
  if (step.op == DSP_OP_CONV) {
    run_conv(step, at, result, threads);
    return;
  }
  const int64_t count = units(step, result);
  const Value& y = values_[i + 1];
  const int64_t work = step.op == DSP_OP_LINEAR ? static_cast<int64_t>(step.weights.size())
                                                : y.channels * y.height * y.width * step.kh * step.kw;
  const int64_t shares = threads <= 1 || work < 32 * 1024 ? 1 : std::min<int64_t>(count, 2 * threads);
  auto body = [&](int64_t share) {
    run_other(step, at, result, share * count / shares, (share + 1) * count / shares);
  };
  parallel_for(threads, shares, body);
}

// A step of two images. `at` is the first's place.
void Program::run_pair(size_t i, const Place& at) const {
  const Step& step = steps_[i];
  const int64_t result = static_cast<int64_t>(i) + 1;
  Place other = at;
  other.second = second_;
  fill_dead(step, at, result);
  fill_dead(step, other, result);
  const bool adds = step.inputs.size() > 1;
  step.layout.run(
      step.of_pairs, 0, step.layout.chunks(step.of_pairs), 0, static_cast<int64_t>(step.layout.blocks.size()),
      at.read(step.inputs.front()), step.weights.data(), step.layout.bias.data(), at.write(result),
      values_[i + 1].planes, adds ? at.read(step.inputs[1]) : nullptr,
      adds ? values_[static_cast<size_t>(step.inputs[1])].planes : Planes{}, step.activation, second_);
}

// One image, or two: these go one after the other until they can share vectors.
void Program::run_images(const float* in, float* out, int64_t images, float* arena, int threads) const {
  const int64_t in_image = input().channels * input().height * input().width;
  const Place at[2] = {{&values_, in, arena, 0}, {&values_, in + (images - 1) * in_image, arena, second_}};
  const size_t alone = images == 1 ? steps_.size() : first_pair_;
  for (int64_t n = 0; n < images; ++n) {
    for (size_t i = 0; i < alone; ++i) run_step(i, at[n], threads);
  }
  for (size_t i = alone; i < steps_.size(); ++i) {
    if (steps_[i].pairs) {
      run_pair(i, at[0]);
      continue;
    }
    for (const Place& place : at) run_step(i, place, threads);
  }
  const Value& y = output();
  for (int64_t n = 0; n < images; ++n) {
    const float* from = at[n].read(output_) + y.planes.origin;
    for (int64_t c = 0; c < y.channels; ++c) {
      for (int64_t row = 0; row < y.height; ++row, out += y.width)
        std::memcpy(out, from + c * y.planes.plane + row * y.planes.pitch,
                    static_cast<size_t>(y.width) * sizeof(float));
    }
  }
}

void Program::run(const float* in, float* out, int64_t batch, int threads) {
  const int64_t in_image = input().channels * input().height * input().width;
  const int64_t out_image = output().channels * output().height * output().width;
  const auto some = [&](int64_t n, int64_t images, int inner) {
    struct Lease {
      Program* program;
      float* arena;
      ~Lease() { program->give_arena(arena); }
    } lease{this, take_arena()};
    run_images(in + n * in_image, out + n * out_image, images, lease.arena, inner);
  };
  // Whole images side by side while every thread has one, two at a time where that helps; what is left over
  // is shared layer by layer.
  const int64_t whole = threads <= 1 ? batch : batch / threads * threads;
  const int64_t pairs = first_pair_ < steps_.size() ? whole / threads / 2 * threads : 0;
  auto body = [&](int64_t task) {
    if (task < pairs) {
      some(2 * task, 2, 1);
    } else {
      some(pairs + task, 1, 1);
    }
  };
  parallel_for(threads, whole - pairs, body);
  for (int64_t n = whole; n < batch; ++n) some(n, 1, threads);
}

dsp_program_memory Program::memory() const {
  dsp_program_memory memory{};
  for (const Step& step : steps_) {
    memory.weight_bytes += static_cast<int64_t>((step.weights.size() + step.bias.size()) * sizeof(float));
    memory.weight_bytes +=
        static_cast<int64_t>(step.plan.size() * sizeof(int32_t)) + step.layout.table_bytes();
    for (const TileSet* sets : {step.whole, step.last, step.of_pairs}) {
      for (int log = 0; log <= kMaxRowsLog; ++log)
        memory.weight_bytes += static_cast<int64_t>(sets[log].tiles.size() * sizeof(Tile));
    }
  }
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

extern "C" {

dsp_status dsp_program_create(const int64_t* words, int64_t words_numel, const float* floats,
                              int64_t floats_numel, dsp_program** program) {
  return dsp::guard([&] {
    dsp::require(program != nullptr, "program is null");
    *program = new dsp_program{{words, words_numel, floats, floats_numel}};
  });
}

dsp_status dsp_program_run(dsp_program* program, const float* in, int64_t in_numel, float* out,
                           int64_t out_numel, int64_t batch, int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    require(program != nullptr, "program is null");
    require(batch >= 0, "batch is negative");
    require(threads >= 1, "threads is below 1");
    const Value& x = program->program.input();
    const Value& y = program->program.output();
    check_tensor(in, in_numel, checked_mul(batch, x.channels * x.height * x.width, "the size of in"), "in");
    check_tensor(out, out_numel, checked_mul(batch, y.channels * y.height * y.width, "the size of out"),
                 "out");
    const auto run = [&] { program->program.run(in, out, batch, threads); };
    with_team(threads, run);
  });
}

dsp_status dsp_program_output(const dsp_program* program, int64_t shape[3]) {
  return dsp::guard([&] {
    dsp::require(program != nullptr && shape != nullptr, "program or shape is null");
    const dsp::Value& y = program->program.output();
    shape[0] = y.channels;
    shape[1] = y.height;
    shape[2] = y.width;
  });
}

dsp_status dsp_program_memory_use(const dsp_program* program, dsp_program_memory* memory) {
  return dsp::guard([&] {
    dsp::require(program != nullptr && memory != nullptr, "program or memory is null");
    *memory = program->program.memory();
  });
}

void dsp_program_destroy(dsp_program* program) { delete program; }

}  // extern "C"
