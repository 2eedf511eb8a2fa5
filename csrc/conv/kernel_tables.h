// The tables of the instruction sets that this build has.
#pragma once

#include "conv/kernel.h"

namespace dsp {

KernelTable table_generic(const char* name);
KernelTable table_avx2(const char* name);
KernelTable table_avx512(const char* name);

}  // namespace dsp
