// What every step of a program is. The kinds are in steps.def and steps/, one file each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/activation.h"
#include "dsp.h"
#include "program/value.h"

namespace dsp {

constexpr int64_t kMostSize = int64_t{1} << 31;
constexpr int64_t kMostPadding = 8;  // more air than that around a value is better made while copying

// The caller's floats: pieces of memory, counted through as if they lay one after the other.
class Floats {
 public:
  Floats(const float* const* pieces, const int64_t* numel, int64_t count);
  Floats(const float* only, int64_t numel) : Floats(&only, &numel, 1) {}
  int64_t numel() const { return ends_.empty() ? 0 : ends_.back(); }
  // Throws Error where they reach beyond the piece that they begin in.
  const float* find(int64_t at, int64_t count, const char* name) const;

 private:
  std::vector<const float*> pieces_;
  std::vector<int64_t> ends_;
};

// What a step is made from: the values before it, and the caller's floats, which stay until all steps have
// placed their weights.
class Source {
 public:
  Source(const std::vector<Value>& values, const Floats& floats) : values_(values), floats_(floats) {}
  const Shape& shape(int64_t id) const { return values_[static_cast<size_t>(id)]; }
  const Floats& floats() const { return floats_; }
  // Throws Error where they reach beyond the caller's.
  std::vector<float> take(int64_t at, int64_t count, const char* name) const {
    const float* from = floats_.find(at, count, name);
    return std::vector<float>(from, from + count);
  }

 private:
  const std::vector<Value>& values_;
  const Floats& floats_;
};

class ConvStep;

class Step {
 public:
  Step() = default;
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  virtual ~Step() = default;

  std::vector<int64_t> inputs;  // in the order of its fields
  int64_t result = 0;
  int32_t operation = 0;  // its code; 0: a copy into another layout

  // Checks its inputs' shapes, finds its weights, and says the shape of the result. Called once, first.
  virtual Shape shape(const Source& source) = 0;
  // Whether its result and all its inputs lie alike; else it says by `reads` what it takes.
  virtual bool alike() const { return true; }
  // Whether it is the same step for channels in any order.
  virtual bool any_order() const { return false; }
  virtual bool reads(size_t input, Layout layout) const {
    return input < inputs.size() && layout == Layout::kPlanar;
  }
  // What it keeps: weights, biases, tables.
  virtual int64_t bytes() const { return 0; }
  virtual int64_t scratch_floats() const { return 0; }
  // How many floats its prepared weights are; they are written to `to`, unless that is null, and read there.
  virtual int64_t place_weights(float* to);
  virtual const Activation& activation() const;
  // About what it takes with its values planar, or with channels last, in cycles, where these differ much.
  virtual double cycles(const std::vector<Value>& values, Layout layout) const;
  virtual void run(const Place& at, int threads) const = 0;
  virtual ConvStep* conv() { return nullptr; }
};

// A step that makes its result channel by channel, or row by row where its first input has channels last: so
// on any number of threads.
class ChannelStep : public Step {
 public:
  void run(const Place& at, int threads) const final;

 protected:
  virtual void run_rows(const Place& at, int64_t begin, int64_t end) const = 0;
  virtual int64_t rows(const Place& at) const { return at.value(result).height; }
  virtual void run_channels(const Place& at, int64_t begin, int64_t end) const = 0;
  // How many there are, and what all of them take, in multiply-adds or so.
  virtual int64_t count(const Place& at) const { return at.value(result).channels; }
  virtual int64_t work(const Place& at) const { return at.value(result).numel(); }
};

// A step's weights: the caller's until they are prepared, then where those of all steps are. There is no copy
// in between, as the weights of a network may be most of what memory there is.
class Weights {
 public:
  Weights() = default;
  Weights(const float* given, int64_t count) : given_(given), count_(count) {}
  // How many they are when they are prepared.
  int64_t count() const { return count_; }
  void set_count(int64_t count) { count_ = count; }
  const float* data() const { return placed_; }
  // `prepare(given, to)` writes them.
  template <class F>
  void place(float* to, F&& prepare) {
    prepare(given_, to);
    given_ = nullptr;
    placed_ = to;
  }

 private:
  const float* given_ = nullptr;
  const float* placed_ = nullptr;
  int64_t count_ = 0;
};

// One that reads and writes channel by channel alone; where values lie otherwise, copies stand before it.
class PlanarStep : public ChannelStep {
 public:
  bool alike() const final { return false; }

 protected:
  void run_rows(const Place&, int64_t, int64_t) const final {}
};

inline int64_t bytes_of(const std::vector<float>& values) {
  return static_cast<int64_t>(values.size() * sizeof(float));
}

}  // namespace dsp
