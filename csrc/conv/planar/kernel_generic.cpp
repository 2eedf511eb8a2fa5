#define DSP_ISA isa_generic
#include "conv/planar/kernel_impl.h"

namespace dsp {

KernelTable kernels_generic() { return isa_generic::make_table(); }

}  // namespace dsp
