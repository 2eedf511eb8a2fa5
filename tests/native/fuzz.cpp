#include <cstdio>

#include "dsp.h"

int main() { return dsp_abi_version() == DSP_ABI_VERSION ? 0 : 1; }
