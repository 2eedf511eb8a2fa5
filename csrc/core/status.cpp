#include "core/status.h"

#include <cstring>

namespace dsp {
namespace {

thread_local char last_error[512] = "";

}  // namespace

void set_last_error(const char* text) noexcept {
  std::strncpy(last_error, text, sizeof(last_error) - 1);
  last_error[sizeof(last_error) - 1] = '\0';
}

void fail(const std::string& text) { throw Error(DSP_INVALID_ARGUMENT, text); }

int64_t checked_mul(int64_t a, int64_t b, const char* what) {
  int64_t result = 0;
  if (__builtin_mul_overflow(a, b, &result)) fail(std::string(what) + " overflows 64 bits");
  return result;
}

int64_t checked_add(int64_t a, int64_t b, const char* what) {
  int64_t result = 0;
  if (__builtin_add_overflow(a, b, &result)) fail(std::string(what) + " overflows 64 bits");
  return result;
}

}  // namespace dsp

extern "C" {

const char* dsp_last_error(void) { return dsp::last_error; }

int32_t dsp_abi_version(void) { return DSP_ABI_VERSION; }
}
