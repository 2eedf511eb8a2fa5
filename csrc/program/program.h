// A network as a list of steps over one preallocated memory; the format of its description is in dsp.h.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "conv/layout.h"
#include "dsp.h"

namespace dsp {

// One tensor of one image. Its planes lie in the arena at `offset`, or in the caller's input.
struct Value {
  int64_t channels = 0, height = 0, width = 0;
  int64_t pad_h = 0, pad_w = 0;  // zeros kept around each plane, for the convolutions that read it
  int64_t pad_middle = 0;        // between a row's even and odd columns, where these lie apart
  Planes planes;
  int64_t offset = 0;
  int64_t last_use = 0;
  bool twice = false;  // there is a second one, of another image
  int64_t floats() const;
};

struct Step {
  dsp_program_op op = DSP_OP_CONV;
  std::vector<int64_t> inputs;  // a convolution's second input is its residual
  int32_t activation = 0;
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, ph = 0, pw = 0, dh = 1, dw = 1;
  bool include_pad = true;
  std::vector<float> weights, bias;
  // convolution
  bool settled = false;  // its residual is where its result goes, and stays as it is if nothing is added
  std::vector<int32_t> plan;
  ConvShape shape{};
  ConvLayout layout;
  TileSet whole[kMaxRowsLog + 1];
  TileSet last[kMaxRowsLog + 1];
  bool pairs = false;  // can take two images at once
  TileSet of_pairs[kMaxRowsLog + 1];
};

class Program {
 public:
  Program(const int64_t* words, int64_t words_numel, const float* floats, int64_t floats_numel);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void run(const float* in, float* out, int64_t batch, int threads);
  const Value& input() const { return values_.front(); }
  const Value& output() const { return values_[static_cast<size_t>(output_)]; }
  dsp_program_memory memory() const;

 private:
  struct Place;
  void parse(const int64_t* words, int64_t words_numel, const float* floats, int64_t floats_numel);
  void choose_padding();
  void choose_columns_apart();
  void build_steps();
  void choose_pairs();
  size_t overwritten(size_t v) const;
  void plan_memory();
  float* take_arena();
  void give_arena(float* arena);
  void run_images(const float* in, float* out, int64_t images, float* arena, int threads) const;
  void run_step(size_t i, const Place& at, int threads) const;
  void run_pair(size_t i, const Place& at) const;
  void run_conv(const Step& step, const Place& at, int64_t result, int threads) const;
  void fill_dead(const Step& step, const Place& at, int64_t result) const;
  void run_other(const Step& step, const Place& at, int64_t result, int64_t begin, int64_t end) const;
  int64_t units(const Step& step, int64_t result) const;

  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t output_ = 0;
  size_t first_pair_ = 0;  // the first step for which images wait for one another
  int64_t second_ = 0;     // from a value of the first image to that of the second
  int64_t arena_floats_ = 0;
  int64_t scratch_floats_ = 0;
  mutable std::mutex mutex_;
  std::vector<float*> free_arenas_;
  int64_t arenas_ = 0;
};

}  // namespace dsp
