// The three directions of a convolution as one call each, and what they share.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "conv/plan.h"
#include "conv/planar/layout.h"
#include "core/activation.h"

namespace dsp {

// The tensors are contiguous, of the sizes that check_shape() found; a null bias or residual is none.
void conv_forward(const ConvShape& s, const Plan& plan, const float* x, const float* weight, bool prepared,
                  const float* bias, const float* residual, float* out, const Activation& activation,
                  int threads);
void conv_grad_input(const ConvShape& s, const Plan& plan, const float* grad, const float* weight,
                     float* grad_x, int threads);
void conv_grad_weight(const ConvShape& s, const Plan& plan, const float* grad, const float* x, float* grad_w,
                      int threads);

// What a call needs besides its arguments; kept per thread so that a call in a loop allocates nothing.
struct Workspace {
  ConvLayout layout;
  TileSet whole[kMaxRowsLog + 1];
  TileSet last[kMaxRowsLog + 1];
  std::vector<int32_t> transposed;
  std::vector<int32_t> atom_of, fresh, position;
  std::vector<int64_t> cursor, offsets, group_offsets;
  std::vector<float> partial;
  std::array<std::vector<float>, 2> phase;
};

Workspace& workspace();

// `weight` is prepared. Paddings may be below 0.
void convolve(Workspace& space, const ConvShape& s, const Plan& plan, const float* x, const float* weight,
              const float* bias, const float* residual, float* out, const Activation& activation,
              int threads);

}  // namespace dsp
