#include "conv/planar/kernel.h"
#include "core/isa.h"
#include "dsp.h"

namespace dsp {

const KernelTable& kernels() {
  static const KernelTable table = DSP_FOR_ISA(kernels)();
  return table;
}

}  // namespace dsp

extern "C" int64_t dsp_fma_rounds(int64_t rounds) {
  float sink = 0.0f;
  const int64_t flops = dsp::kernels().peak(rounds < 0 ? 0 : rounds, &sink);
  // Keeps the sums alive: they are used nowhere else.
  return sink < 0.0f ? 0 : flops;
}
