#define DSP_ISA isa_avx2
#include "conv/planar/kernel_impl.h"

namespace dsp {

KernelTable kernels_avx2() { return isa_avx2::make_table(); }

}  // namespace dsp
