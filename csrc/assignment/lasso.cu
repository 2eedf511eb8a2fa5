// The C interface of group assignment's CUDA kernels: checks, then launches on the caller's stream.
#include <string>

#include "assignment/cuda_table.h"
#include "assignment/lasso.cuh"
#include "core/status.h"
#include "cuda/runtime.h"
#include "dsp.h"

namespace dsp {
namespace cuda {
namespace lasso {
namespace {

template <typename F>
void with_element(int64_t element, F&& run) {
  if (element == kFloat32) {
    run(Single{});
  } else if (element == kFloat64) {
    run(Double{});
  } else if (element == kFloat16) {
    run(Half{});
  } else {
    run(Brain{});
  }
}

template <typename F>
void with_sum(int64_t element, F&& run) {
  if (element == kFloat64) {
    run(double{});
  } else {
    run(float{});
  }
}

// Whether the layers' tensors of one kind are there: all of them, or none.
bool has(const dsp_cuda_lasso_call& call, const Header& h, int which, const char* name) {
  int64_t found = 0;
  for (int64_t i = 0; i < h.layers; ++i) {
    const int64_t address = call.addresses[i * kAddresses + which];
    if (address % element_bytes(h.element) != 0)
      fail(std::string(name) + " of layer " + std::to_string(i) + " is not aligned to its elements");
    found += address != 0 ? 1 : 0;
  }
  if (found != 0 && found != h.layers) fail(std::string(name) + " is given for some of the layers only");
  return found != 0;
}

void check_rows(const void* pointer, int64_t stride, int64_t numel, const Header& h, const char* name) {
  require(pointer != nullptr, (std::string(name) + " is null").c_str());
  if (h.groups > 1 && stride < h.filters)
    fail(std::string(name) + ": rows of " + std::to_string(h.filters) + " elements overlap at a stride of " +
         std::to_string(stride));
  const int64_t expected = checked_add(checked_mul(h.groups - 1, stride, name), h.filters, name);
  if (numel != expected)
    fail(std::string(name) + " has " + std::to_string(numel) + " values, expected " +
         std::to_string(expected));
}

void run_operation(int32_t operation, const dsp_cuda_lasso_call& call) {
  const bool penalty = operation == DSP_LASSO_PENALTY;
  const bool backward = operation == DSP_LASSO_BACKWARD;
  const bool proximal = operation == DSP_LASSO_PROXIMAL;
  const bool shrinks = operation == DSP_LASSO_SHRINK || proximal;
  const bool step = operation == DSP_LASSO_STEP_GRADIENT;
  if (!penalty && !backward && !shrinks && !step)
    fail("operation is " + std::to_string(operation) + ", which the CUDA kernels do not have");
  const Header& h = read_table(call.table, call.table_numel);
  require(call.device_table != nullptr && call.device_addresses != nullptr,
          "device_table or device_addresses is null");
  if (call.addresses == nullptr || call.addresses_numel != h.layers * kAddresses)
    fail("addresses has " + std::to_string(call.addresses_numel) + " values, expected " +
         std::to_string(h.layers * kAddresses));
  require(has(call, h, kWeight, "weight"), "weight is null");
  const bool directed = has(call, h, kDirection, "direction");
  const bool out = has(call, h, kOut, "output");
  const bool keep = has(call, h, kKeep, "keep");
  require(out == (backward || shrinks), out ? "this operation writes no weights" : "output is null");
  require(!directed || step, "only the gradient of a step takes a direction");
  require(!keep || shrinks, "only a penalty step keeps the weights");
  check_rows(call.logs, call.log_stride, call.logs_numel, h, "logs");
  if (backward || step) check_rows(call.log_out, call.log_out_stride, call.log_out_numel, h, "log_out");
  require(call.scales != nullptr, "scales is null");
  require(penalty || call.rates != nullptr, "rates is null");
  if (call.numbers_numel != h.layers)
    fail("rates and scales have " + std::to_string(call.numbers_numel) + " values, expected " +
         std::to_string(h.layers));
  require(!penalty || call.penalties != nullptr, "penalties is null");
  require(call.penalties == nullptr || penalty || backward, "this operation makes no penalties");
  const Workspace w = workspace_of(h, operation, directed);
  if (call.workspace == nullptr || call.workspace_numel != w.size)
    fail("workspace has " + std::to_string(call.workspace_numel) + " values, expected " +
         std::to_string(w.size));

  const DeviceScope scope(call.device);
  const auto place = [&](int64_t at) -> void* {
    return at < 0 ? nullptr : static_cast<char*>(call.workspace) + at * sum_bytes(h.element);
  };
  Arguments a{};
  a.table = call.device_table;
  a.addresses = call.device_addresses;
  a.logs = call.logs;
  a.log_stride = call.log_stride;
  a.rates = call.rates;
  a.scales = call.scales;
  a.columns = place(w.columns);
  a.rows = place(w.rows);
  a.ratios = place(w.ratios);
  a.moved = place(w.moved);
  a.inverses = place(w.inverses);
  a.changes = place(w.changes);
  a.scalars = place(w.scalars);
  a.group_penalties = place(w.penalties);
  a.penalties = call.penalties;
  a.squares = place(w.squares);
  a.products = place(w.products);
  a.log_out = call.log_out;
  a.log_out_stride = call.log_out_stride;
  a.keep = keep;

  const auto columns = [&](Mode mode, bool both) {
    a.mode = mode;
    a.directed = both;
    with_element(h.element, [&](auto element) {
      launch(lasso_columns_kernel<decltype(element)>, h.tiles, 1, kThreads, shared_bytes(h, both, 0),
             call.stream, a);
    });
  };
  const auto norms = [&](Mode mode) {
    a.mode = mode;
    with_sum(h.element, [&](auto sum) {
      launch(lasso_norms_kernel<decltype(sum)>, h.layers, h.groups, kThreads, kThreads * sum_bytes(h.element),
             call.stream, a);
    });
  };
  const auto rows = [&](Mode mode) {
    a.mode = mode;
    with_sum(h.element, [&](auto sum) {
      launch(lasso_rows_kernel<decltype(sum)>, h.row_tiles, h.groups, kThreads, 0, call.stream, a);
    });
  };

  if (step) {
    a.store = true;
    columns(kStep, directed);
    a.store = false;
    a.stored = true;
    a.directed = directed;
    norms(kStep);
    columns(kMoved, false);
    norms(kMoved);
    if (directed) {
      columns(kMixed, true);
      norms(kMixed);
    }
    with_element(h.element, [&](auto element) {
      launch(lasso_turn_kernel<decltype(element)>, h.tiles, 1, kThreads, shared_bytes(h, directed, 3),
             call.stream, a);
    });
    rows(kMoved);
    return;
  }
  columns(kNorm, false);
  norms(proximal ? kProximal : kNorm);
  if (call.penalties != nullptr) {
    with_sum(h.element, [&](auto sum) {
      launch(lasso_total_kernel<decltype(sum)>, (h.layers + kThreads - 1) / kThreads, 1, kThreads, 0,
             call.stream, a);
    });
  }
  if (penalty) return;
  a.mode = backward ? kBackward : proximal ? kProximal : kShrink;
  with_element(h.element, [&](auto element) {
    launch(lasso_apply_kernel<decltype(element)>, h.tiles, 1, kThreads, shared_bytes(h, false, 2),
           call.stream, a);
  });
  if (backward) rows(kBackward);
}

void run_samples(const dsp_cuda_samples& s, bool backward) {
  if (s.element != kFloat32 && s.element != kFloat64)
    fail("element is " + std::to_string(s.element) + ", expected 0 or 1");
  if (s.groups < 1 || s.count < 1)
    fail("groups and count must be at least 1, got " + std::to_string(s.groups) + " and " +
         std::to_string(s.count));
  require(s.first != nullptr && s.second != nullptr && s.out != nullptr, "a matrix is null");
  require(s.groups == 1 || (s.first_stride >= s.count && s.second_stride >= s.count),
          "the rows of a matrix overlap");
  const int64_t blocks = (s.count + kThreads - 1) / kThreads;
  if (s.temperature <= 0 || blocks > INT32_MAX) fail("the temperature or the count is out of range");
  const DeviceScope scope(s.device);
  const SampleArguments a{s.first,        s.second,        s.out,         s.groups,     s.count,
                          s.first_stride, s.second_stride, s.temperature, s.divide != 0};
  with_sum(s.element, [&](auto sum) {
    using A = decltype(sum);
    launch(backward ? sample_backward_kernel<A> : sample_forward_kernel<A>, blocks, 1, kThreads, 0, s.stream,
           a);
  });
}

}  // namespace
}  // namespace lasso
}  // namespace cuda
}  // namespace dsp

extern "C" {

dsp_status dsp_cuda_lasso_run(int32_t operation, const dsp_cuda_lasso_call* call) {
  return dsp::guard([&] {
    dsp::require(call != nullptr, "call is null");
    dsp::cuda::lasso::run_operation(operation, *call);
  });
}

dsp_status dsp_cuda_sample_groups(const dsp_cuda_samples* samples) {
  return dsp::guard([&] {
    dsp::require(samples != nullptr, "samples is null");
    dsp::cuda::lasso::run_samples(*samples, false);
  });
}

dsp_status dsp_cuda_sample_groups_backward(const dsp_cuda_samples* samples) {
  return dsp::guard([&] {
    dsp::require(samples != nullptr, "samples is null");
    dsp::cuda::lasso::run_samples(*samples, true);
  });
}
}
