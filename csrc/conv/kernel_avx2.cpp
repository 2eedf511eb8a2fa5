#define DSP_ISA isa_avx2
#include "conv/kernel_impl.h"
#include "conv/kernel_tables.h"

namespace dsp {

KernelTable table_avx2(const char* name) { return isa_avx2::make_table(name); }

}  // namespace dsp
