// The values that a program's steps read and make, and where they lie.
#pragma once

#include <cstdint>
#include <vector>

#include "conv/lanes/lane_conv.h"
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
  kLanes,   // pixel by pixel, `pixel` floats from one to the next: channels last
};

// One tensor of one image. It lies in the arena at `offset`, or is one of the caller's inputs.
struct Value : Shape {
  explicit Value(const Shape& shape) : Shape(shape) {}

  Layout layout = Layout::kPlanar;
  Planes planes;
  int64_t pad_h = 0, pad_w = 0;  // zeros kept around each plane, for the convolutions that read it
  int64_t pad_middle = 0;        // between a row's even and odd columns, where these lie apart
  int64_t pixel = 0;
  std::vector<int32_t> places;  // of the channels within a pixel, where they are not in order
  int64_t place(int64_t channel) const {
    return places.empty() ? channel : places[static_cast<size_t>(channel)];
  }
  int64_t input = -1;  // which of the caller's inputs it is; -1: none
  bool callers() const { return input >= 0; }
  int64_t offset = 0;
  int64_t made = 0;      // the step that makes it
  int64_t last_use = 0;  // the step that reads it last; the number of steps: the caller does
  bool second = false;   // there is one of a second image, too
  bool flat() const { return height == 1 && width == 1; }
  int64_t floats() const {
    return (layout == Layout::kLanes ? channels_last_floats(height, width, pad_h, pad_w, pixel)
                                     : channels * planes.plane) +
           kSlack;
  }
  // Not where even and odd columns lie apart.
  View view() const {
    return layout == Layout::kLanes ? channels_last(width, pad_h, pad_w, pixel)
                                    : View{planes.origin, planes.pitch, 1, planes.plane};
  }
};

// Planar rows: rows(channel, y) is where one starts.
template <typename T>
struct Rows {
  T* base;
  int64_t plane, pitch;
  T* operator()(int64_t channel, int64_t y) const { return base + channel * plane + y * pitch; }
};

// Rows of pixels: rows(y) is where one starts.
template <typename T>
struct PixelRows {
  T* base;
  int64_t row, pixel;
  T* operator()(int64_t y) const { return base + y * row; }
};

// Where the values of one image are.
struct Place {
  const std::vector<Value>& values;
  const float* const* in;  // the caller's inputs
  int64_t image;           // which of theirs
  float* arena;
  int64_t second;  // from a value of the first image to that of the second; 0 for the first

  const Value& value(int64_t id) const { return values[static_cast<size_t>(id)]; }
  float* write(int64_t id) const { return arena + value(id).offset + (value(id).second ? second : 0); }
  const float* read(int64_t id) const {
    const Value& v = value(id);
    return v.callers() ? in[v.input] + image * v.numel() : write(id);
  }
  Rows<float> rows(int64_t id) const { return rows_at(write(id), value(id).planes); }
  Rows<const float> const_rows(int64_t id) const { return rows_at(read(id), value(id).planes); }
  PixelRows<float> pixel_rows(int64_t id) const { return pixels_at(write(id), value(id).view()); }
  PixelRows<const float> const_pixel_rows(int64_t id) const { return pixels_at(read(id), value(id).view()); }

 private:
  template <typename T>
  static Rows<T> rows_at(T* base, const Planes& planes) {
    return {base + planes.origin, planes.plane, planes.pitch};
  }
  template <typename T>
  static PixelRows<T> pixels_at(T* base, const View& view) {
    return {base + view.origin, view.row, view.pixel};
  }
};

}  // namespace dsp
