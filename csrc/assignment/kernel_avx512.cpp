#define DSP_ISA isa_avx512
#include "assignment/kernel_impl.h"

namespace dsp {

const LassoKernels* lasso_avx512(int element) { return isa_avx512::lasso_kernels(element); }

}  // namespace dsp
