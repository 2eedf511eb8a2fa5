#define DSP_ISA isa_avx2
#include "assignment/kernel_impl.h"

namespace dsp {

const LassoKernels* lasso_avx2(int element) { return isa_avx2::lasso_kernels(element); }

}  // namespace dsp
