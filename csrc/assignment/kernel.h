// The group penalty's work on one layer, and the table of functions that one instruction set offers for it.
// The mathematics is that of dsp_kernels/assignment/reference.py, in the same names.
#pragma once

#include <cstdint>

#include "dsp.h"

namespace dsp {

// One layer as the kernels see it: the caller's tensors and what the phases of a call hand on.
struct LassoLayer {
  const void* weight;
  const void* direction;
  void* weight_out;
  void* keep;
  int64_t filters, channels, taps;
  bool tap_major;  // (filters, taps, channels) in memory instead of (filters, channels, taps)
  const void* logs;
  int64_t log_stride;
  const void* log_direction;
  int64_t log_direction_stride;
  void* log_out;
  int64_t log_out_stride;
  double scale, amount;
  int groups;
  bool past_caches;  // the output is too large for the caches

  // A block is a run of channels with all filters; its results are summed in block order.
  int64_t block, blocks;
  // Filter-major (filters, groups): p^2, sqrt(p), and with a direction of the logs half = sqrt(p) E / 2 and
  // doubled = 2 p^2 E; for the proximal step `squares` holds p.
  void *squares, *roots, *halves, *doubled;
  // (groups): sum of sqrt(p), its square s, and their changes along E.
  double *root_sum, *size, *root_change, *size_change;
  // (blocks, groups, 2): the block's sums of L and of its change (or of L at the moved weights).
  double* sums;
  // (blocks, filters, groups): the block's part of the gradient for the logs.
  void* parts;
  double* penalty;  // or null
};

struct LassoKernels {
  void (*prepare)(const LassoLayer& layer, dsp_lasso_op operation);
  int64_t (*scratch_bytes)(const LassoLayer& layer, dsp_lasso_op operation);
  void (*block)(const LassoLayer& layer, dsp_lasso_op operation, int64_t index, char* scratch);
  void (*finish)(const LassoLayer& layer, dsp_lasso_op operation);
  int64_t (*block_width)(int64_t filters, int64_t channels, int64_t taps, dsp_lasso_op operation);
};

// Element type 0: float32, 1: float64.
using LassoTable = const LassoKernels* (*)(int element);
const LassoKernels* lasso_generic(int element);
const LassoKernels* lasso_avx2(int element);
const LassoKernels* lasso_avx512(int element);

}  // namespace dsp
