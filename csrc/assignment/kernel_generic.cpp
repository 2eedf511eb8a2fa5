#define DSP_ISA isa_generic
#include "assignment/kernel_impl.h"

namespace dsp {

const LassoKernels* lasso_generic(int element) { return isa_generic::lasso_kernels(element); }

}  // namespace dsp
