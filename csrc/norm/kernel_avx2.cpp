#define DSP_ISA isa_avx2
#include "norm/kernel_impl.h"

namespace dsp {

const NormKernels* norm_avx2() { return isa_avx2::norm_kernels(); }

}  // namespace dsp
