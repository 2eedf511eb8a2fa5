#include "conv/lanes/kernel.h"
#include "core/isa.h"

namespace dsp {

const LaneKernels& lane_kernels() {
  static const LaneKernels table = DSP_FOR_ISA(lane_kernels)();
  return table;
}

}  // namespace dsp
