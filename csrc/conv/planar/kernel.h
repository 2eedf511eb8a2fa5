// What the drivers and the per-instruction-set kernels share: plain data and function pointers.
#pragma once

#include <cstdint>

#include "core/activation.h"

namespace dsp {

constexpr int kMaxFilters = 6;  // filters of one register block, at most
constexpr int kMaxRowsLog = 3;  // a block covers 1, 2, 4 or 8 vectors of pixels

enum TileMode : int32_t {
  kFull = 0,    // a vector is neighbouring pixels
  kHalf = 1,    // a vector is half a vector at `in` and half a vector at `in + in_hi`
  kMasked = 2,  // nothing beyond `lanes` may be read
};

// What a step of a block is: one tap, or a column of three, with stride 1 or 2. At a plane's edge one row of
// taps meets nothing but padding for a tile's first or last row of pixels: it is left out there.
enum StepKind : int32_t {
  kTap = 0,
  kColumn = 1,
  kColumnTop = 2,
  kColumnBottom = 3,
  kColumnBy2 = 4,
  kColumnBy2Top = 5,
  kStepKinds = 6,
};

// Where a block of pixel vectors starts, in floats from the base of channel 0.
struct Tile {
  int64_t in, out, residual;
  int32_t lanes;  // how many lanes of each vector (each half) are real
};

// Tiles of one kind, to be run one after the other with the same weights.
struct TileRun {
  int32_t rows_log;
  int32_t mode;
  int32_t column;  // the kind of step where steps are columns, else kTap
  int64_t first, count;
};

// One block of filters over a list of tiles.
struct BlockArgs {
  const float* in;
  float* out;
  const float* residual;               // may be null
  int64_t in_step;                     // from one row to the next; where a step is a tap, from one vector
  int64_t out_step, residual_step;     // from one vector of a tile to the next
  int64_t in_hi, out_hi, residual_hi;  // kHalf: from the first half vector to the second
  int64_t out_plane, residual_plane;
  int64_t out_odd;         // not 0: even columns go to `out`, odd ones so far behind them
  const int64_t* offsets;  // where each step reads, from the tile's start; a step is (channel, kx) or one tap
  int64_t steps;
  const float* weights;  // steps x taps of a step x filters
  const float* bias;     // one per filter of the block
  const int32_t* filters;
  const Tile* tiles;
  int64_t n_tiles;
  const Activation* activation;
};

using BlockFn = void (*)(const BlockArgs& args);

constexpr int kMaxGradFilters = 3;
constexpr int kMaxGradTaps = 9;

// Sums over pixels and images of filters' gradients times the inputs under them: one value per filter and
// tap.
struct GradArgs {
  const float* x;
  const float* grad;
  int64_t x_image, grad_image;  // from one image to the next
  int64_t images;
  int64_t x_step, grad_step;  // from one vector of a tile to the next
  int64_t grad_plane;
  const int64_t* offsets;  // of the taps, from a tile's place in x
  const int32_t* filters;
  float* out;  // added to: filter f, tap t at out[f * out_row + t]
  int64_t out_row;
  const Tile* tiles;  // tile.out is the place in grad
  const TileRun* runs;
  int64_t n_runs;
};
using GradFn = void (*)(const GradArgs& args);

// Rows of `count` values: value j of a row is from[j * stride] for j in [first, last), else 0. No more than
// `width` values may be read from `from + first * stride` on. Where `ahead` is not 0, the rows that lie so
// far behind those that are read are fetched into the second-level cache.
struct GatherArgs {
  float* dst;
  const float* from;
  int64_t dst_pitch, from_pitch;
  int64_t rows, count, first, last, width, stride, ahead;
};
using GatherFn = void (*)(const GatherArgs& args);
// dst[2 j] = even[j], dst[2 j + 1] = odd[j] for the `count` values of dst; a null source is 0 throughout
using ZipFn = void (*)(float* dst, const float* even, const float* odd, int64_t count);
// dst = act(value + residual) for rows of a plane; residual may be null. dst_odd: as out_odd above, for rows
// of whole vectors.
using FillFn = void (*)(float* dst, int64_t dst_pitch, int64_t dst_odd, const float* residual,
                        int64_t residual_pitch, float value, int64_t rows, int64_t width,
                        const Activation& activation);

// dst = act(a + b)
using AddFn = void (*)(float* dst, const float* a, const float* b, int64_t count,
                       const Activation& activation);
// dst = act(a * scale + shift)
using AffineFn = void (*)(float* dst, const float* a, float scale, float shift, int64_t count,
                          const Activation& activation);
// What a step of programs does with two values, element by element; PRELU: a, times b where a is negative.
enum Elementwise : int64_t { kAdd, kSubtract, kMultiply, kDivide, kMaximum, kMinimum, kPrelu, kElementwise };
// dst = act(a op b); from one element of a and b to the next are 1 or 0 floats
using ElementwiseFn = void (*)(int64_t op, float* dst, const float* a, const float* b, int64_t count,
                               int64_t a_step, int64_t b_step, const Activation& activation);
// out[o] = act(sum of w[o, i] x[i] + bias[o]) for o in [0, outputs); bias may be null
using LinearFn = void (*)(float* out, const float* x, const float* w, const float* bias, int64_t inputs,
                          int64_t outputs, const Activation& activation);
// The sum of count values, in a fixed order.
using SumFn = float (*)(const float* x, int64_t count);

// Multiply-adds on registers alone, as many as a core can start; returns how many FLOPs they were.
using PeakFn = int64_t (*)(int64_t rounds, float* sink);

struct KernelTable {
  int lanes;
  bool has_half;
  int max_filters;
  int rows_log[kMaxFilters + 1];  // by filters of the block: how many vectors a tile has at best
  // [filters - 1][rows_log][kind of step][mode]
  BlockFn block[kMaxFilters][kMaxRowsLog + 1][kStepKinds][3];
  // [filters - 1][0: one tap, 1: three taps, 2: nine taps]
  GradFn grad[kMaxGradFilters][3];
  int max_grad_taps;
  // [filters - 1]: all nine taps of a 3x3 kernel over tiles of 1, 2 or 4 rows; null where there are too few
  // registers
  GradFn grad_rows[2];
  GatherFn gather;
  ZipFn zip;
  FillFn fill;
  AddFn add;
  AffineFn affine;
  ElementwiseFn elementwise;
  LinearFn linear;
  SumFn sum;
  PeakFn peak;
};

const KernelTable& kernels();
KernelTable kernels_generic();
KernelTable kernels_avx2();
KernelTable kernels_avx512();

}  // namespace dsp
