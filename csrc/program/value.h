// The values that a program's steps read and make, and where they lie.
#pragma once

#include <cstdint>
#include <vector>

#include "conv/planar/layout.h"

namespace dsp {

constexpr int64_t kSlack = 64;  // floats that a full vector may read beyond the last plane

struct Shape {
  int64_t channels = 0, height = 0, width = 0;
  int64_t numel() const { return channels * height * width; }
  bool operator==(const Shape& other) const {
    return channels == other.channels && height == other.height && width == other.width;
  }
};

// How the elements of one image follow one another.
enum class Layout : int32_t {
  kPlanar,  // channel by channel, `planes` says where rows are
};

// One tensor of one image. It lies in the arena at `offset`, or in the caller's input.
struct Value : Shape {
  explicit Value(const Shape& shape) : Shape(shape) {}

  Layout layout = Layout::kPlanar;
  Planes planes;
  int64_t pad_h = 0, pad_w = 0;  // zeros kept around each plane, for the convolutions that read it
  int64_t pad_middle = 0;        // between a row's even and odd columns, where these lie apart
  int64_t offset = 0;
  int64_t last_use = 0;  // the step that reads it last; the number of steps: the caller does
  bool second = false;   // there is one of a second image, too
  int64_t floats() const { return channels * planes.plane + kSlack; }
};

// Planar rows: rows(channel, y) is where one starts.
template <typename T>
struct Rows {
  T* base;
  int64_t plane, pitch;
  T* operator()(int64_t channel, int64_t y) const { return base + channel * plane + y * pitch; }
};

// Where the values of one image are.
struct Place {
  const std::vector<Value>& values;
  const float* in;
  float* arena;
  int64_t second;  // from a value of the first image to that of the second; 0 for the first

  const Value& value(int64_t id) const { return values[static_cast<size_t>(id)]; }
  float* write(int64_t id) const { return arena + value(id).offset + (value(id).second ? second : 0); }
  const float* read(int64_t id) const { return id == 0 ? in : write(id); }
  Rows<float> rows(int64_t id) const { return rows_at(write(id), value(id).planes); }
  Rows<const float> const_rows(int64_t id) const { return rows_at(read(id), value(id).planes); }

 private:
  template <typename T>
  static Rows<T> rows_at(T* base, const Planes& planes) {
    return {base + planes.origin, planes.plane, planes.pitch};
  }
};

}  // namespace dsp
