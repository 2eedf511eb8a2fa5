// The host's side of a device: errors as dsp::Error, a device set for the length of a call, launches.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "core/status.h"
#include "cuda/device.h"

#if !defined(DSP_EMULATE)
#include <cuda_runtime_api.h>
#endif

namespace dsp {
namespace cuda {

#if defined(DSP_EMULATE)

class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    if (device != 0) throw Error(DSP_NO_DEVICE, "no CUDA device " + std::to_string(device));
  }
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks_x, int64_t blocks_y, int threads, int64_t shared_bytes,
            void*, Arguments arguments) {
  emulation::run_grid(blocks_x, static_cast<int>(blocks_y), threads, static_cast<size_t>(shared_bytes),
                      [&] { kernel(arguments); });
}

inline void set_zero(void* to, int64_t bytes, void*) { std::memset(to, 0, static_cast<size_t>(bytes)); }

inline int32_t count_devices() { return 1; }

#else

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky must not meet the next call
  const bool none = error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver ||
                    error == cudaErrorInvalidDevice || error == cudaErrorInitializationError;
  throw Error(none ? DSP_NO_DEVICE : DSP_CUDA_ERROR,
              std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes `device` the current one and puts the old one back.
class DeviceScope {
 public:
  explicit DeviceScope(int32_t device) {
    check(cudaGetDevice(&before_), "no CUDA device can be used");
    if (device != before_) check(cudaSetDevice(device), "the CUDA device cannot be set");
    changed_ = device != before_;
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  ~DeviceScope() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks_x, int64_t blocks_y, int threads, int64_t shared_bytes,
            void* stream, Arguments arguments) {
  void* list[] = {&arguments};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                         dim3(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y)),
                         dim3(static_cast<unsigned>(threads)), list, static_cast<size_t>(shared_bytes),
                         static_cast<cudaStream_t>(stream)),
        "a kernel could not be launched");
}

inline void set_zero(void* to, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "memory could not be cleared");
}

inline int32_t count_devices() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "no CUDA device can be used");
  return count;
}

#endif

}  // namespace cuda
}  // namespace dsp
