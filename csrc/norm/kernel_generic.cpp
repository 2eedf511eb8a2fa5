#define DSP_ISA isa_generic
#include "norm/kernel_impl.h"

namespace dsp {

const NormKernels* norm_generic() { return isa_generic::norm_kernels(); }

}  // namespace dsp
