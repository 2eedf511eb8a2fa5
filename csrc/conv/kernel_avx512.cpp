#define DSP_ISA isa_avx512
#include "conv/kernel_impl.h"
#include "conv/kernel_tables.h"

namespace dsp {

KernelTable table_avx512(const char* name) { return isa_avx512::make_table(name); }

}  // namespace dsp
