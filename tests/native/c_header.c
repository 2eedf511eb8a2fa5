/* dsp.h is a C header: this file fails to compile when it stops being one. */
#include <stdio.h>
#include <string.h>

#include "dsp.h"

int main(void) {
  const dsp_conv2d_shape shape = {1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1};
  if (dsp_abi_version() != DSP_ABI_VERSION) return 1;
  if (dsp_conv2d_forward(&shape, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1) != DSP_INVALID_ARGUMENT) return 2;
  if (strlen(dsp_last_error()) == 0) return 3;
  printf("%s: %s\n", dsp_cpu_isa(), dsp_last_error());
  return 0;
}
