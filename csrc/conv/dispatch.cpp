#include <cstdlib>
#include <cstring>

#include "conv/kernel.h"
#include "conv/kernel_tables.h"
#include "dsp.h"

namespace dsp {
namespace {

// DSP_CPU_ISA asks for a lesser instruction set than the best, for tests and comparisons.
bool allowed(const char* isa) {
  const char* wanted = std::getenv("DSP_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return true;
  if (std::strcmp(wanted, "avx512") == 0) return true;
  if (std::strcmp(wanted, "avx2") == 0) return std::strcmp(isa, "avx512") != 0;
  return false;
}

KernelTable choose() {
#if defined(DSP_X86)
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma")) {
    return table_avx512("avx512");
  }
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return table_avx2("avx2");
#else
  static_cast<void>(&allowed);
#endif
#if defined(__aarch64__)
  return table_generic("neon");
#else
  return table_generic("generic");
#endif
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = choose();
  return table;
}

}  // namespace dsp

extern "C" const char* dsp_cpu_isa(void) { return dsp::kernels().name; }

extern "C" int64_t dsp_fma_rounds(int64_t rounds) {
  float sink = 0.0f;
  const int64_t flops = dsp::kernels().peak(rounds < 0 ? 0 : rounds, &sink);
  // Keeps the sums alive: they are used nowhere else.
  return sink < 0.0f ? 0 : flops;
}
