#define DSP_ISA isa_generic
#include "conv/lanes/kernel_impl.h"

namespace dsp {

LaneKernels lane_kernels_generic() { return isa_generic::make_lane_kernels(); }

}  // namespace dsp
