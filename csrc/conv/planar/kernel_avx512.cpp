#define DSP_ISA isa_avx512
#include "conv/planar/kernel_impl.h"

namespace dsp {

KernelTable kernels_avx512() { return isa_avx512::make_table(); }

}  // namespace dsp
