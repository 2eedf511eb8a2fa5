#define DSP_ISA isa_avx512
#include "norm/kernel_impl.h"

namespace dsp {

const NormKernels* norm_avx512() { return isa_avx512::norm_kernels(); }

}  // namespace dsp
