// Errors inside the core: an Error is thrown, guard() at the ABI turns it into a status and a text.
#pragma once

#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "dsp.h"

namespace dsp {

class Error : public std::exception {
 public:
  Error(dsp_status status, std::string text) : status_(status), text_(std::move(text)) {}
  const char* what() const noexcept override { return text_.c_str(); }
  dsp_status status() const noexcept { return status_; }

 private:
  dsp_status status_;
  std::string text_;
};

[[noreturn]] void fail(const std::string& text);
void set_last_error(const char* text) noexcept;

inline void require(bool condition, const char* text) {
  if (!condition) fail(text);
}

int64_t checked_mul(int64_t a, int64_t b, const char* what);
int64_t checked_add(int64_t a, int64_t b, const char* what);

template <typename F>
dsp_status guard(F&& body) noexcept {
  try {
    body();
    return DSP_OK;
  } catch (const Error& error) {
    set_last_error(error.what());
    return error.status();
  } catch (const std::bad_alloc&) {
    set_last_error("out of memory");
    return DSP_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(error.what());
    return DSP_INTERNAL;
  } catch (...) {
    set_last_error("unknown error");
    return DSP_INTERNAL;
  }
}

}  // namespace dsp
