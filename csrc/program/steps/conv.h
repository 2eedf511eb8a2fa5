// A convolution of a program. Other steps need no header: layouts are chosen for convolutions.
#pragma once

#include <cstdint>
#include <vector>

#include "conv/lanes/lane_conv.h"
#include "conv/planar/layout.h"
#include "program/fields.h"
#include "program/step.h"

namespace dsp {

class ConvStep final : public Step {
 public:
  explicit ConvStep(const Fields<DSP_OP_CONV>& fields) : fields_(fields) {}

  Shape shape(const Source& source) override;
  int64_t bytes() const override;
  int64_t place_weights(float* to) override;
  int64_t scratch_floats() const override;
  bool alike() const override { return false; }
  bool reads(size_t input, Layout layout) const override;
  const Activation& activation() const override { return fields_.activation; }
  void run(const Place& at, int threads) const override;
  // In lanes: some pixels of the result, on this thread.
  void run_pixels(const Place& at, int64_t pixel, int64_t pixels) const;
  ConvStep* conv() override { return this; }

  // ---- what the choice of layouts asks; then laid out, once ----
  const ConvShape& geometry() const { return shape_; }
  // Each pixel of the result needs that pixel of the input alone.
  bool pointwise() const {
    const ConvShape& s = shape_;
    return s.taps() == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0;
  }
  int64_t weight_floats() const { return weights_.count(); }
  int64_t macs() const;  // that its structure needs, of one image
  int64_t most_padding() const;
  // Whether its result, or its input, may have even and odd columns apart.
  bool can_write_apart() const;
  bool can_read_apart() const;
  // Which engine it runs on, and what that takes about, in cycles.
  void set_lanes(bool lanes) { lanes_ = lanes; }
  bool lanes() const { return lanes_; }
  bool can_run_in_lanes(const std::vector<Value>& values) const;
  double engine_cycles(bool lanes) const;
  // The group of each of its filters; those of none come last.
  std::vector<int32_t> groups_of_filters() const;
  void lay_out(const std::vector<Value>& values);

  // Lays out for two images at once where that pays.
  bool choose_pairs(const std::vector<Value>& values);
  bool pairs() const { return pairs_; }
  // Two images, the second one's values `second` floats behind the first's.
  void run_pair(const Place& first, int64_t second) const;

  // The value in whose place the result may be written, or -1: a residual that nobody reads later lies like
  // its sum with it, and is read where the sum is written.
  int64_t overwrites(const std::vector<Value>& values) const;
  // The residual is where the result goes, and stays as it is if nothing is added.
  void set_residual_stays() { residual_stays_ = true; }

 private:
  struct Tensors;
  Tensors tensors(const Place& at) const;
  bool adds() const { return inputs.size() > 1; }
  int64_t residual() const { return inputs[1]; }
  void lay_out_lanes(const std::vector<Value>& values);
  void fill_dead(const Tensors& t) const;
  int64_t pixels_of(int64_t strip) const;
  const TileSet* tiles_of(int64_t strip) const;
  void run_strip(const Tensors& t, int64_t strip, int64_t chunk_begin, int64_t chunk_end, int64_t block_begin,
                 int64_t block_end, const float* from) const;
  void run_strips(const Tensors& t, int threads) const;
  void share_strips(const Tensors& t, int threads) const;

  Fields<DSP_OP_CONV> fields_;
  Weights weights_;
  std::vector<float> bias_;
  ConvShape shape_{};
  ConvLayout layout_;
  TileSet whole_[kMaxRowsLog + 1];
  TileSet last_[kMaxRowsLog + 1];
  bool lanes_ = false;
  LaneConv lane_conv_;
  bool residual_stays_ = false;
  bool pairs_ = false;
  TileSet of_pairs_[kMaxRowsLog + 1];
};

}  // namespace dsp
