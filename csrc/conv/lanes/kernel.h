// The convolution with filters in vector lanes: what its driver and its kernels share.
#pragma once

#include <cstdint>

#include "core/activation.h"

namespace dsp {

constexpr int kMaxLaneVectors = 4;  // vectors of filters in one block, at most
constexpr int kMaxLanePixels = 12;  // pixels of one tile, at most

// Where results go that are not neighbours. As runs: neighbouring lanes of one vector go to neighbouring
// channels. As windows: neighbouring results of a block, on their way through another vector, go to channels
// within one vector's length.
struct LanePiece {
  int32_t channel;  // of lane 0; of a run it may be below 0, where that lane is not meant
  uint32_t mask;    // which lanes are meant
  int32_t last;     // of runs, 1: the vector's last
  int32_t from;     // of windows: the first of the block's results that goes there
};

// One part of the sums of one block of filters, over neighbouring pixels.
struct LaneArgs {
  const float* in;
  const int32_t* offsets;  // where each step reads, in floats from a pixel's place
  int64_t steps;
  const float* weights;  // steps x vectors x lanes
  const char* ahead;     // read soon: fetched into the second-level cache, a line every second step
  const char* ahead_end;
  int64_t in_ahead;      // not 0: instead of those, what lies so far behind a tile's first pixel
  const int32_t* in_at;  // the pixels' places in `in`, `out` and `residual`
  const int32_t* out_at;
  const int32_t* residual_at;
  float* partial;  // pixels x vectors x lanes: sums so far
  bool first, last;
  // From here on: for the last part alone.
  float* out;
  const float* residual;  // may be null
  const float* bias;      // vectors x lanes
  int32_t tail;           // lanes of the last vector that are filters; all of them unless masks are free
  const Activation* activation;
  const LanePiece* pieces;  // one after the other; null: the results are neighbours, from `out` on
  int32_t windows;          // how many pieces there are; 0: they are runs
};

// `tiles` tiles of a fixed number of pixels, from number `pixel` on.
using LaneFn = void (*)(const LaneArgs& args, int64_t pixel, int64_t tiles);

// dst[c] = act(x[c] * scale[c] + shift[c])
using LaneAffineFn = void (*)(float* dst, const float* x, const float* scale, const float* shift,
                              int64_t channels, const Activation& activation);
// Over a window of pixels, `row` and `pixel` floats apart: the largest (NaN is larger than all; of none
// -infinity), or their sum, one after the other, through `count`.
using LanePoolMaxFn = void (*)(float* dst, const float* x, int64_t row, int64_t pixel, int64_t rows,
                               int64_t pixels, int64_t channels);
using LanePoolMeanFn = void (*)(float* dst, const float* x, int64_t row, int64_t pixel, int64_t rows,
                                int64_t pixels, int64_t channels, float count);
// The same mean with sums in the order of the planar engine's: over the whole window, or row by row.
using LanePlaneMeanFn = void (*)(float* dst, const float* x, int64_t row, int64_t pixel, int64_t rows,
                                 int64_t pixels, int64_t channels, float count, bool whole);

struct LaneKernels {
  int lanes;
  bool masks_are_free;  // the last vector of neighbouring results may have a tail
  int max_vectors;
  int max_pixels[kMaxLaneVectors + 1];  // by vectors
  LaneFn tiles[kMaxLaneVectors][kMaxLanePixels];
  LaneAffineFn affine;
  LanePoolMaxFn pool_max;
  LanePoolMeanFn pool_mean;
  LanePlaneMeanFn plane_mean;
};

LaneKernels lane_kernels_generic();
LaneKernels lane_kernels_avx2();
LaneKernels lane_kernels_avx512();
// Those of the instruction set in use.
const LaneKernels& lane_kernels();

}  // namespace dsp
