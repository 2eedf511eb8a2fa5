// Stands in for the CUDA kernels where the library is built without them.
#include "core/status.h"
#include "dsp.h"

namespace {

dsp_status absent() {
  return dsp::guard([] {
    throw dsp::Error(DSP_NO_DEVICE,
                     "no CUDA kernels: the library was built without nvcc, or with DSP_CUDA=OFF");
  });
}

}  // namespace

extern "C" {

dsp_status dsp_cuda_device_count(int32_t* count) {
  if (count != nullptr) *count = 0;
  return absent();
}

dsp_status dsp_cuda_conv2d_prepare(const dsp_cuda_call*, const void*, int64_t, void*, int64_t) {
  return absent();
}

dsp_status dsp_cuda_conv2d_run(const dsp_cuda_call*, const void*, int64_t, const void*, int64_t, const void*,
                               int64_t, const void*, int64_t, void*, int64_t, float*, int64_t, int32_t) {
  return absent();
}

dsp_status dsp_cuda_conv2d_grad_weight(const dsp_cuda_call*, const void*, int64_t, const void*, int64_t,
                                       void*, int64_t, float*, int64_t) {
  return absent();
}

dsp_status dsp_cuda_lasso_run(int32_t, const dsp_cuda_lasso_call*) { return absent(); }

dsp_status dsp_cuda_sample_groups(const dsp_cuda_samples*) { return absent(); }

dsp_status dsp_cuda_sample_groups_backward(const dsp_cuda_samples*) { return absent(); }
}
