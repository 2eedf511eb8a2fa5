#include "core/isa.h"

#include <cstdlib>
#include <cstring>

namespace dsp {
namespace {

#if defined(DSP_X86)
// For tests and comparisons.
bool allowed(Isa isa) {
  const char* wanted = std::getenv("DSP_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "avx512") == 0) return true;
  return std::strcmp(wanted, "avx2") == 0 && isa != Isa::kAvx512;
}

Isa choose() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !allowed(Isa::kAvx2))
    return Isa::kGeneric;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return wide && allowed(Isa::kAvx512) ? Isa::kAvx512 : Isa::kAvx2;
}
#else
Isa choose() { return Isa::kGeneric; }
#endif

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace dsp

extern "C" const char* dsp_cpu_isa(void) {
  switch (dsp::cpu_isa()) {
    case dsp::Isa::kAvx512:
      return "avx512";
    case dsp::Isa::kAvx2:
      return "avx2";
    case dsp::Isa::kGeneric:
      break;
  }
#if defined(__aarch64__)
  return "neon";
#else
  return "generic";
#endif
}
