// The convolution's part of the interface: checks, then the engine.
#include "conv/planar/conv2d.h"

#include <algorithm>
#include <string>

#include "conv/plan.h"
#include "core/status.h"
#include "dsp.h"

namespace dsp {
namespace {

int check_threads(int32_t threads) {
  if (threads < 1) fail("threads is " + std::to_string(threads) + ", expected at least 1");
  return threads;
}

}  // namespace
}  // namespace dsp

extern "C" {

dsp_status dsp_conv2d_forward(const dsp_conv2d_shape* shape, const float* x, int64_t x_numel,
                              const float* weight, int64_t weight_numel, const int32_t* plan_words,
                              int64_t plan_numel, const float* bias, const float* residual, float* out,
                              int64_t out_numel, const dsp_activation* activation, int32_t prepared,
                              int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    const Plan plan(plan_words, plan_numel);
    const ConvShape s = check_shape(shape, plan);
    check_tensor(x, x_numel, s.in_numel(), "x");
    check_tensor(weight, weight_numel, plan.pairs() * s.taps(), "weight");
    check_tensor(out, out_numel, s.out_numel(), "out");
    const Activation act = make_activation(activation);
    const int most = check_threads(threads);
    if (s.batch == 0) return;  // and sizes that no memory stands behind are not laid out
    conv_forward(s, plan, x, weight, prepared != 0, bias, residual, out, act, most);
  });
}

dsp_status dsp_conv2d_prepare(int64_t kernel_h, int64_t kernel_w, const float* weight, int64_t weight_numel,
                              const int32_t* plan_words, int64_t plan_numel, float* prepared,
                              int64_t prepared_numel) {
  return dsp::guard([&] {
    using namespace dsp;
    const Plan plan(plan_words, plan_numel);
    require(kernel_h >= 1 && kernel_w >= 1, "the kernel has a size below 1");
    const int64_t numel =
        checked_mul(plan.pairs(), checked_mul(kernel_h, kernel_w, "the kernel"), "the size of weight");
    check_tensor(weight, weight_numel, numel, "weight");
    check_tensor(prepared, prepared_numel, numel, "prepared");
    require(numel == 0 || weight != prepared, "prepared is weight itself");
    prepare_weights(plan, kernel_h, kernel_w, weight, prepared);
  });
}

dsp_status dsp_conv2d_grad_input(const dsp_conv2d_shape* shape, const float* grad, int64_t grad_numel,
                                 const float* weight, int64_t weight_numel, const int32_t* plan_words,
                                 int64_t plan_numel, float* grad_x, int64_t grad_x_numel, int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    const Plan plan(plan_words, plan_numel);
    const ConvShape s = check_shape(shape, plan);
    check_tensor(grad, grad_numel, s.out_numel(), "grad");
    check_tensor(weight, weight_numel, plan.pairs() * s.taps(), "weight");
    check_tensor(grad_x, grad_x_numel, s.in_numel(), "grad_x");
    const int most = check_threads(threads);
    if (s.batch == 0) return;
    conv_grad_input(s, plan, grad, weight, grad_x, most);
  });
}

dsp_status dsp_conv2d_grad_weight(const dsp_conv2d_shape* shape, const float* grad, int64_t grad_numel,
                                  const float* x, int64_t x_numel, const int32_t* plan_words,
                                  int64_t plan_numel, float* grad_w, int64_t weight_numel, int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    const Plan plan(plan_words, plan_numel);
    const ConvShape s = check_shape(shape, plan);
    check_tensor(grad, grad_numel, s.out_numel(), "grad");
    check_tensor(x, x_numel, s.in_numel(), "x");
    check_tensor(grad_w, weight_numel, plan.pairs() * s.taps(), "grad_w");
    const int most = check_threads(threads);
    if (s.batch == 0) {
      std::fill_n(grad_w, weight_numel, 0.0f);
      return;
    }
    conv_grad_weight(s, plan, grad, x, grad_w, most);
  });
}

}  // extern "C"
