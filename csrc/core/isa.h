// The one choice of the instruction set that kernels run as.
#pragma once

#include "dsp.h"

namespace dsp {

enum class Isa { kGeneric, kAvx2, kAvx512 };

// The widest that this build has and this machine runs, or the lesser one that DSP_CPU_ISA asks for.
Isa cpu_isa();

// What each family of kernels has for it.
template <typename T>
T for_isa(T generic, [[maybe_unused]] T avx2, [[maybe_unused]] T avx512) {
  switch (cpu_isa()) {
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    case Isa::kGeneric:
      break;
  }
  return generic;
}

}  // namespace dsp

// Of the functions NAME_generic, NAME_avx2 and NAME_avx512, those that this build has.
#if defined(DSP_X86)
#define DSP_FOR_ISA(NAME) ::dsp::for_isa(&NAME##_generic, &NAME##_avx2, &NAME##_avx512)
#else
#define DSP_FOR_ISA(NAME) (&NAME##_generic)
#endif
