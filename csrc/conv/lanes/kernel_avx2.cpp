#define DSP_ISA isa_avx2
#include "conv/lanes/kernel_impl.h"

namespace dsp {

LaneKernels lane_kernels_avx2() { return isa_avx2::make_lane_kernels(); }

}  // namespace dsp
