// Batch normalisation in training, with the residual and the activation inside: a channel at a time, so that
// what the first pass over it has read is still in the second-level cache for the second.
#include <cmath>

#include "core/isa.h"
#include "core/status.h"
#include "core/thread_pool.h"
#include "dsp.h"
#include "norm/kernel.h"

namespace dsp {
namespace {

const NormKernels& kernels() {
  static const NormKernels* table = DSP_FOR_ISA(norm)();
  return *table;
}

struct Scale {
  float scale, shift;
};

// The same in both directions, so that the backward finds the very sign that the forward had.
Scale scale_of(float mean, double variance, double eps, const float* weight, const float* bias, int64_t c) {
  const double w = weight == nullptr ? 1.0 : static_cast<double>(weight[c]);
  const double b = bias == nullptr ? 0.0 : static_cast<double>(bias[c]);
  const double scale = w / std::sqrt(variance + eps);
  return {static_cast<float>(scale), static_cast<float>(b - static_cast<double>(mean) * scale)};
}

int64_t plane_of(const dsp_norm_shape* shape, int64_t numel) {
  require(shape != nullptr && shape->batch >= 1 && shape->channels >= 1 && shape->pixels >= 1,
          "batch_norm: batch, channels and pixels must be at least 1");
  require(checked_mul(checked_mul(shape->batch, shape->channels, "batch_norm"), shape->pixels,
                      "batch_norm") == numel,
          "batch_norm: a tensor's size is not batch x channels x pixels");
  return shape->pixels;
}

void forward(const dsp_norm_shape* shape, const float* x, int64_t numel, const float* weight,
             const float* bias, const float* residual, const uint8_t* blank, double eps, int32_t activation,
             float* mean, float* variance, float* out, int threads) {
  const int64_t pixels = plane_of(shape, numel);
  require(x != nullptr && mean != nullptr && variance != nullptr && out != nullptr,
          "batch_norm: a tensor is missing");
  require(activation == DSP_ACT_NONE || activation == DSP_ACT_RELU, "batch_norm: unknown activation");
  require(threads >= 1, "batch_norm: threads must be at least 1");
  const NormKernels& k = kernels();
  const Activation act = make_activation(activation, nullptr);
  const int64_t step = shape->channels * pixels;
  auto channel = [&](int64_t c) {
    const bool empty = blank != nullptr && blank[c] != 0;
    const float* from = x + c * pixels;
    const double count = static_cast<double>(shape->batch) * static_cast<double>(pixels);
    // Around a value of the channel: the squares of what is left are small, whatever its mean.
    const float around = !empty && std::isfinite(from[0]) ? from[0] : 0.0f;
    double sums[2] = {0.0, 0.0};
    for (int64_t n = 0; n < shape->batch && !empty; ++n) k.moments(from + n * step, pixels, around, sums);
    const double off = sums[0] / count;
    double spread = sums[1] / count - off * off;
    if (spread < 0.0) spread = 0.0;
    mean[c] = static_cast<float>(static_cast<double>(around) + off);
    variance[c] = static_cast<float>(spread);
    const Scale s = scale_of(mean[c], static_cast<double>(variance[c]), eps, weight, bias, c);
    for (int64_t n = 0; n < shape->batch; ++n) {
      const int64_t at = n * step + c * pixels;
      k.apply(out + at, empty ? nullptr : x + at, residual == nullptr ? nullptr : residual + at, s.scale,
              s.shift, pixels, act);
    }
  };
  parallel_for(threads, shape->channels, channel);
}

void backward(const dsp_norm_shape* shape, const float* grad, const float* x, const float* y, int64_t numel,
              const float* weight, const float* bias, const float* mean, const float* variance,
              const uint8_t* blank, double eps, int32_t activation, float* grad_x, float* grad_residual,
              float* grad_weight, float* grad_bias, int threads) {
  const int64_t pixels = plane_of(shape, numel);
  require(grad != nullptr && x != nullptr && mean != nullptr && variance != nullptr,
          "batch_norm: a tensor is missing");
  require(activation == DSP_ACT_NONE || activation == DSP_ACT_RELU, "batch_norm: unknown activation");
  require(threads >= 1, "batch_norm: threads must be at least 1");
  const NormKernels& k = kernels();
  const int64_t step = shape->channels * pixels;
  auto channel = [&](int64_t c) {
    const bool empty = blank != nullptr && blank[c] != 0;
    const double eps_variance = static_cast<double>(variance[c]);
    const Scale s = scale_of(mean[c], eps_variance, eps, weight, bias, c);
    const double inverse = 1.0 / std::sqrt(eps_variance + eps);
    const double count = static_cast<double>(shape->batch) * static_cast<double>(pixels);
    NormGrad a{nullptr, nullptr, nullptr, false, s.scale, s.shift, mean[c]};
    auto place = [&](int64_t n) {
      const int64_t at = n * step + c * pixels;
      a.grad = grad + at;
      a.x = empty ? nullptr : x + at;
      a.y = activation == DSP_ACT_RELU && y != nullptr ? y + at : nullptr;
      a.relu = activation == DSP_ACT_RELU && y == nullptr;
      return at;
    };
    double sums[2] = {0.0, 0.0};
    for (int64_t n = 0; n < shape->batch; ++n) {
      place(n);
      k.grad_sums(a, pixels, sums);
    }
    if (grad_weight != nullptr) grad_weight[c] = static_cast<float>(sums[1] * inverse);
    if (grad_bias != nullptr) grad_bias[c] = static_cast<float>(sums[0]);
    float* const of_input = empty ? nullptr : grad_x;
    if (of_input == nullptr && grad_residual == nullptr) return;
    const double scale = (weight == nullptr ? 1.0 : static_cast<double>(weight[c])) * inverse;
    const float of_x = static_cast<float>(-scale * inverse * inverse * sums[1] / count);
    const float rest = static_cast<float>(-scale * sums[0] / count);
    for (int64_t n = 0; n < shape->batch; ++n) {
      const int64_t at = place(n);
      k.grad(a, of_input == nullptr ? nullptr : of_input + at,
             grad_residual == nullptr ? nullptr : grad_residual + at, static_cast<float>(scale), of_x, rest,
             pixels);
    }
  };
  parallel_for(threads, shape->channels, channel);
}

}  // namespace
}  // namespace dsp

extern "C" {

dsp_status dsp_batch_norm_forward(const dsp_norm_shape* shape, const float* x, int64_t numel,
                                  const float* weight, const float* bias, const float* residual,
                                  const uint8_t* blank, double eps, int32_t activation, float* mean,
                                  float* variance, float* out, int32_t threads) {
  return dsp::guard([&] {
    dsp::forward(shape, x, numel, weight, bias, residual, blank, eps, activation, mean, variance, out,
                 threads);
  });
}

dsp_status dsp_batch_norm_backward(const dsp_norm_shape* shape, const float* grad, const float* x,
                                   const float* y, int64_t numel, const float* weight, const float* bias,
                                   const float* mean, const float* variance, const uint8_t* blank, double eps,
                                   int32_t activation, float* grad_x, float* grad_residual,
                                   float* grad_weight, float* grad_bias, int32_t threads) {
  return dsp::guard([&] {
    dsp::backward(shape, grad, x, y, numel, weight, bias, mean, variance, blank, eps, activation, grad_x,
                  grad_residual, grad_weight, grad_bias, threads);
  });
}
}
