#define DSP_ISA isa_avx512
#include "conv/lanes/kernel_impl.h"

namespace dsp {

LaneKernels lane_kernels_avx512() { return isa_avx512::make_lane_kernels(); }

}  // namespace dsp
