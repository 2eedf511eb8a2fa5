#define DSP_ISA isa_generic
#include "conv/kernel_impl.h"
#include "conv/kernel_tables.h"

namespace dsp {

KernelTable table_generic(const char* name) { return isa_generic::make_table(name); }

}  // namespace dsp
