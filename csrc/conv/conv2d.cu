// The C interface of the convolution's CUDA kernels: checks, then launches on the caller's stream.
#include <algorithm>
#include <string>

#include "conv/conv2d.cuh"
#include "conv/cuda_table.h"
#include "core/status.h"
#include "cuda/runtime.h"
#include "dsp.h"

namespace dsp {
namespace cuda {
namespace {

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// 16 bytes are read and written at a time.
void check_buffer(const void* pointer, int64_t numel, int64_t expected, const char* name, bool of_16 = true) {
  check_tensor(pointer, numel, expected, name);
  if (of_16 && !aligned(pointer)) fail(std::string(name) + " does not start at a multiple of 16 bytes");
}

// What may be left out: null, without elements.
void check_optional(const void* pointer, int64_t numel, int64_t expected, const char* name) {
  check_tensor(pointer, numel, pointer == nullptr ? 0 : expected, name);
}

const TableHeader& check_call(const dsp_cuda_call* call, bool grad_weight) {
  require(call != nullptr, "call is null");
  const TableHeader& header = read_table(call->table, call->table_numel);
  require(call->device_table != nullptr, "device_table is null");
  require(reinterpret_cast<uintptr_t>(call->device_table) % 4 == 0, "device_table is not aligned");
  if ((header.operation == kGradWeight) != grad_weight) fail("table is for another operation");
  return header;
}

// Calls `run` with the element type of the table.
template <typename F>
void with_precision(int32_t precision, F&& run) {
  if (precision == kF16) {
    run(F16{});
  } else if (precision == kBf16) {
    run(Bf16{});
  } else if (precision == kTf32) {
    run(Tf32{});
  } else {
    run(F32{});
  }
}

int64_t prepared_bytes(const TableHeader& header) { return wide(header.prepared_rows) * kRowBytes; }

}  // namespace
}  // namespace cuda
}  // namespace dsp

extern "C" {

dsp_status dsp_cuda_device_count(int32_t* count) {
  return dsp::guard([&] {
    dsp::require(count != nullptr, "count is null");
    *count = 0;
    *count = dsp::cuda::count_devices();
  });
}

dsp_status dsp_cuda_conv2d_prepare(const dsp_cuda_call* call, const void* weight, int64_t weight_numel,
                                   void* prepared, int64_t prepared_numel) {
  using namespace dsp::cuda;
  return dsp::guard([&] {
    const TableHeader& header = check_call(call, false);
    check_buffer(weight, weight_numel, wide(header.weight_numel), "weight", false);
    check_buffer(prepared, prepared_numel, prepared_bytes(header), "prepared");
    if (prepared_numel == 0) return;
    const DeviceScope scope(call->device);
    ConvArguments a{};
    a.table = call->device_table;
    a.weight = weight;
    a.out = prepared;
    // Rows of the largest item, 32 to a block.
    const int64_t share = wide(header.prepared_rows) / std::max(header.n_items, 1) / 32;
    const auto kernel = element_bytes(header.precision) == 2 ? conv2d_prepare_kernel<uint16_t>
                                                             : conv2d_prepare_kernel<uint32_t>;
    launch(kernel, header.n_items, std::min<int64_t>(share + 1, 1024), kThreads, 0, call->stream, a);
  });
}

dsp_status dsp_cuda_conv2d_run(const dsp_cuda_call* call, const void* x, int64_t x_numel,
                               const void* prepared, int64_t prepared_numel, const void* bias,
                               int64_t bias_numel, const void* residual, int64_t residual_numel, void* out,
                               int64_t out_numel, float* workspace, int64_t workspace_numel,
                               int32_t activation) {
  using namespace dsp::cuda;
  return dsp::guard([&] {
    const TableHeader& header = check_call(call, false);
    check_buffer(x, x_numel, wide(header.read_numel), "x", header.vectors != 0);
    check_buffer(prepared, prepared_numel, prepared_bytes(header), "prepared");
    check_optional(bias, bias_numel, header.out_channels, "bias");
    check_optional(residual, residual_numel, wide(header.written_numel), "residual");
    check_buffer(out, out_numel, wide(header.written_numel), "out", false);
    check_buffer(workspace, workspace_numel, wide(header.workspace), "workspace", false);
    if (activation < DSP_ACT_NONE || activation > DSP_ACT_RELU6)
      dsp::fail("activation is " + std::to_string(activation) + ", expected 0, 1 or 2");
    if (header.operation == kGradInput && (bias != nullptr || residual != nullptr))
      dsp::fail("a gradient takes neither bias nor residual");
    if (out_numel == 0) return;
    const DeviceScope scope(call->device);
    if (header.clear != 0) set_zero(out, out_numel * element_bytes(header.precision), call->stream);
    if (header.blocks == 0) return;
    ConvArguments a{};
    a.table = call->device_table;
    a.x = x;
    a.weight = prepared;
    a.bias = bias;
    a.residual = residual;
    a.out = out;
    a.workspace = workspace;
    a.activation = activation;
    a.wide = aligned(out) && aligned(residual) ? 1 : 0;
    with_precision(header.precision, [&](auto element) {
      using E = decltype(element);
      launch(conv2d_kernel<E>, header.blocks, header.splits, kThreads, header.shared_bytes, call->stream, a);
      if (header.splits > 1)
        launch(conv2d_finish_kernel<typename E::Stored>, header.blocks, 1, kThreads, kStagedBytes,
               call->stream, a);
    });
  });
}

dsp_status dsp_cuda_conv2d_grad_weight(const dsp_cuda_call* call, const void* grad, int64_t grad_numel,
                                       const void* x, int64_t x_numel, void* grad_weight,
                                       int64_t weight_numel, float* workspace, int64_t workspace_numel) {
  using namespace dsp::cuda;
  return dsp::guard([&] {
    const TableHeader& header = check_call(call, true);
    check_buffer(grad, grad_numel, wide(header.written_numel), "grad", header.vectors != 0);
    check_buffer(x, x_numel, wide(header.read_numel), "x", header.vectors != 0);
    check_buffer(grad_weight, weight_numel, wide(header.weight_numel), "grad_weight", false);
    check_buffer(workspace, workspace_numel, wide(header.workspace), "workspace", false);
    if (weight_numel == 0) return;
    const DeviceScope scope(call->device);
    if (header.clear != 0)
      set_zero(grad_weight, weight_numel * element_bytes(header.precision), call->stream);
    if (header.blocks == 0) return;
    ConvArguments a{};
    a.table = call->device_table;
    a.x = x;
    a.grad = grad;
    a.out = grad_weight;
    a.workspace = workspace;
    with_precision(header.precision, [&](auto element) {
      using E = decltype(element);
      launch(conv2d_grad_weight_kernel<E>, header.blocks, header.splits, kThreads, header.shared_bytes,
             call->stream, a);
      launch(conv2d_add_weight_kernel<typename E::Stored>, header.blocks, 8, kThreads, 0, call->stream, a);
    });
  });
}
}
