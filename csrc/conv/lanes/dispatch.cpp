#include <cstring>

#include "conv/kernel.h"
#include "conv/lanes/kernel.h"

namespace dsp {
namespace {

LaneKernels choose() {
#if defined(DSP_X86)
  if (std::strcmp(kernels().name, "avx512") == 0) return lane_kernels_avx512();
  if (std::strcmp(kernels().name, "avx2") == 0) return lane_kernels_avx2();
#endif
  return lane_kernels_generic();
}

}  // namespace

const LaneKernels& lane_kernels() {
  static const LaneKernels table = choose();
  return table;
}

}  // namespace dsp
