// One convolution with filters in vector lanes. A channel of the input is a distance, so any subset of the
// channels, in any order, of any layout, costs one offset a step.
#pragma once

#include <cstdint>
#include <vector>

#include "conv/lanes/kernel.h"
#include "conv/plan.h"

namespace dsp {

// Where the values of an image lie, in floats: channel c of pixel (y, x) is at
// origin + y * row + x * pixel + c * channel.
struct View {
  int64_t origin = 0, row = 0, pixel = 0, channel = 0;
};
// Channels last with zeros around the image: those right of a row are those left of the next. `pitch` is from
// one pixel to the next.
View channels_last(int64_t width, int64_t pad_h, int64_t pad_w, int64_t pitch);
int64_t channels_last_floats(int64_t height, int64_t width, int64_t pad_h, int64_t pad_w, int64_t pitch);

struct LaneBlock {
  int32_t vectors, filters;
  int64_t offset_begin, steps, part;
  int64_t weight_begin, filter_begin;
  int64_t cost;                 // of all blocks before
  int32_t channel;              // of the first filter
  int32_t piece_begin, pieces;  // 0: its filters are neighbours
  bool windows;                 // what the pieces are
};

class LaneConv {
 public:
  // in_place, out_place: where each channel of the input and of the output is stored; null: as numbered.
  void set_blocks(const Plan& plan, const ConvShape& s, const int32_t* in_place, const int32_t* out_place);
  // Channels of the output and of the residual must be neighbours (view.channel 1). False where they are not,
  // or the places do not fit 32 bits: then nothing can be run. The input has its padding around it: zeros.
  bool set_views(const Plan& plan, const View& in, const View& out, const View& residual);
  void set_bias(const float* values);  // one a filter, or null: zeros

  int64_t weight_floats() const { return weight_floats_; }
  // From GroupLayout's packed form to blocks, in the order in which they are read.
  void prepare(const Plan& plan, const float* packed, float* prepared) const;

  // All of one image on `threads` threads; the bits do not depend on their number. `out` may be `residual`.
  // settled: where nothing is added to the residual, it is in place already.
  void run(const float* in, const float* weights, const float* residual, float* out,
           const Activation& activation, bool settled, int threads) const;

  // The same for some of the pixels, on this thread.
  void run_pixels(const float* in, const float* weights, const float* residual, float* out,
                  const Activation& activation, bool settled, int64_t pixel, int64_t pixels) const;

  int64_t table_bytes() const;
  int64_t scratch_bytes() const;
  // Multiply-adds that are made, with those of lanes that are no filters.
  int64_t lane_products() const;

 private:
  void add_block(const std::vector<int32_t>& order, size_t first, int32_t filters, const int32_t* out_place);
  void run_blocks(const float* in, const float* weights, const float* residual, float* out,
                  const Activation& activation, bool settled, int64_t pixel, int64_t pixels,
                  size_t block_begin, size_t block_end) const;
  int64_t chunk_pixels() const;
  size_t block_share(int64_t part, int64_t parts) const;

  ConvShape s_{};
  View in_{}, out_{}, residual_{};
  std::vector<LaneBlock> blocks_;
  std::vector<int32_t> filters_;  // by block
  std::vector<int32_t> rows_;     // by block: the filter's number in its group
  std::vector<int32_t> groups_;   // of each block; -1: filters of no group
  std::vector<LanePiece> pieces_;
  std::vector<int32_t> offsets_;
  std::vector<int32_t> in_place_;
  std::vector<float> bias_;  // by block, vectors x lanes
  std::vector<int64_t> bias_begin_;
  int64_t weight_floats_ = 0;
  int64_t input_channels_ = 0;  // that anybody reads
};

}  // namespace dsp
