#include <algorithm>
#include <cstring>

#include "conv/plan.h"
#include "core/scratch.h"
#include "core/status.h"
#include "core/thread_pool.h"
#include "dsp.h"

namespace dsp {
namespace {

int check_threads(int32_t threads) {
  if (threads < 1) fail("threads is " + std::to_string(threads) + ", expected at least 1");
  return threads;
}

float activate(float value, int32_t activation) {
  if (activation == DSP_ACT_NONE) return value;
  if (value < 0) return 0;  // written so that NaN stays NaN
  if (activation == DSP_ACT_RELU6 && value > 6) return 6;
  return value;
}

// The output columns (or rows) for which tap k reads inside the input.
void valid_range(int64_t k, int64_t dilation, int64_t padding, int64_t stride, int64_t size, int64_t out,
                 int64_t* first, int64_t* last) {
  const int64_t shift = k * dilation - padding;
  *first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
  *last = size - 1 - shift < 0 ? 0 : std::min(out, (size - 1 - shift) / stride + 1);
  if (*last < *first) *last = *first;
}

void forward_image(const ConvShape& s, const Plan& plan, const float* x, const float* weight, const float* bias,
                   const float* residual, float* out, int32_t activation) {
  const int64_t plane = s.out_plane();
  if (residual != out) {
    std::memset(out, 0, static_cast<size_t>(s.out_channels * plane) * sizeof(float));
  }
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    for (int32_t f = 0; f < group.n_filters; ++f) {
      float* to = out + group.filters[f] * plane;
      const float* w = weight + (group.weight_pairs + int64_t{f} * group.n_channels) * s.taps();
      for (int32_t c = 0; c < group.n_channels; ++c) {
        const float* from = x + group.channels[c] * s.in_plane();
        for (int64_t ky = 0; ky < s.kh; ++ky) {
          int64_t y0, y1;
          valid_range(ky, s.dh, s.ph, s.sh, s.height, s.out_h, &y0, &y1);
          for (int64_t kx = 0; kx < s.kw; ++kx) {
            int64_t x0, x1;
            valid_range(kx, s.dw, s.pw, s.sw, s.width, s.out_w, &x0, &x1);
            const float value = w[(c * s.kh + ky) * s.kw + kx];
            for (int64_t y = y0; y < y1; ++y) {
              const float* row = from + (y * s.sh + ky * s.dh - s.ph) * s.width;
              for (int64_t xo = x0; xo < x1; ++xo)
                to[y * s.out_w + xo] += value * row[xo * s.sw + kx * s.dw - s.pw];
            }
          }
        }
      }
    }
  }
  for (int64_t f = 0; f < s.out_channels; ++f) {
    for (int64_t i = 0; i < plane; ++i) {
      float value = out[f * plane + i];
      if (bias != nullptr) value += bias[f];
      if (residual != nullptr && residual != out) value += residual[f * plane + i];
      out[f * plane + i] = activate(value, activation);
    }
  }
}

}  // namespace
}  // namespace dsp

extern "C" {

const char* dsp_cpu_isa(void) { return "generic"; }

dsp_status dsp_conv2d_forward(const dsp_conv2d_shape* shape, const float* x, int64_t x_numel, const float* weight,
                              int64_t weight_numel, const int32_t* plan_words, int64_t plan_numel,
                              const float* bias, const float* residual, float* out, int64_t out_numel,
                              int32_t activation, int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    const Plan plan(plan_words, plan_numel);
    const ConvShape s = check_shape(shape, plan);
    check_tensor(x, x_numel, s.in_numel(), "x");
    check_tensor(weight, weight_numel, plan.pairs() * s.taps(), "weight");
    check_tensor(out, out_numel, s.out_numel(), "out");
    if (activation < DSP_ACT_NONE || activation > DSP_ACT_RELU6)
      fail("activation is " + std::to_string(activation) + ", expected 0 (none), 1 (relu) or 2 (relu6)");
    const int most = check_threads(threads);
    auto body = [&](int64_t n) {
      const int64_t at = n * s.out_channels * s.out_plane();
      forward_image(s, plan, x + n * s.in_channels * s.in_plane(), weight, bias,
                    residual == nullptr ? nullptr : residual + at, out + at, activation);
    };
    parallel_for(most, s.batch, body);
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
    auto body = [&](int64_t n) {
      float* to_image = grad_x + n * s.in_channels * s.in_plane();
      std::memset(to_image, 0, static_cast<size_t>(s.in_channels * s.in_plane()) * sizeof(float));
      for (int32_t g = 0; g < plan.n_groups(); ++g) {
        const Group group = plan.group(g);
        for (int32_t f = 0; f < group.n_filters; ++f) {
          const float* from = grad + (n * s.out_channels + group.filters[f]) * s.out_plane();
          const float* w = weight + (group.weight_pairs + int64_t{f} * group.n_channels) * s.taps();
          for (int32_t c = 0; c < group.n_channels; ++c) {
            float* to = to_image + group.channels[c] * s.in_plane();
            for (int64_t ky = 0; ky < s.kh; ++ky) {
              int64_t y0, y1;
              valid_range(ky, s.dh, s.ph, s.sh, s.height, s.out_h, &y0, &y1);
              for (int64_t kx = 0; kx < s.kw; ++kx) {
                int64_t x0, x1;
                valid_range(kx, s.dw, s.pw, s.sw, s.width, s.out_w, &x0, &x1);
                const float value = w[(c * s.kh + ky) * s.kw + kx];
                for (int64_t y = y0; y < y1; ++y) {
                  float* row = to + (y * s.sh + ky * s.dh - s.ph) * s.width;
                  for (int64_t xo = x0; xo < x1; ++xo)
                    row[xo * s.sw + kx * s.dw - s.pw] += value * from[y * s.out_w + xo];
                }
              }
            }
          }
        }
      }
    };
    parallel_for(most, s.batch, body);
  });
}

dsp_status dsp_conv2d_grad_weight(const dsp_conv2d_shape* shape, const float* grad, int64_t grad_numel,
                                  const float* x, int64_t x_numel, const int32_t* plan_words, int64_t plan_numel,
                                  float* grad_w, int64_t weight_numel, int32_t threads) {
  return dsp::guard([&] {
    using namespace dsp;
    const Plan plan(plan_words, plan_numel);
    const ConvShape s = check_shape(shape, plan);
    check_tensor(grad, grad_numel, s.out_numel(), "grad");
    check_tensor(x, x_numel, s.in_numel(), "x");
    check_tensor(grad_w, weight_numel, plan.pairs() * s.taps(), "grad_w");
    const int most = check_threads(threads);
    auto body = [&](int64_t g) {
      const Group group = plan.group(static_cast<int32_t>(g));
      for (int32_t f = 0; f < group.n_filters; ++f) {
        float* w = grad_w + (group.weight_pairs + int64_t{f} * group.n_channels) * s.taps();
        for (int32_t c = 0; c < group.n_channels; ++c) {
          for (int64_t ky = 0; ky < s.kh; ++ky) {
            int64_t y0, y1;
            valid_range(ky, s.dh, s.ph, s.sh, s.height, s.out_h, &y0, &y1);
            for (int64_t kx = 0; kx < s.kw; ++kx) {
              int64_t x0, x1;
              valid_range(kx, s.dw, s.pw, s.sw, s.width, s.out_w, &x0, &x1);
              double sum = 0;
              for (int64_t n = 0; n < s.batch; ++n) {
                const float* from = grad + (n * s.out_channels + group.filters[f]) * s.out_plane();
                const float* plane = x + (n * s.in_channels + group.channels[c]) * s.in_plane();
                for (int64_t y = y0; y < y1; ++y) {
                  const float* row = plane + (y * s.sh + ky * s.dh - s.ph) * s.width;
                  float part = 0;
                  for (int64_t xo = x0; xo < x1; ++xo)
                    part += from[y * s.out_w + xo] * row[xo * s.sw + kx * s.dw - s.pw];
                  sum += static_cast<double>(part);
                }
              }
              w[(c * s.kh + ky) * s.kw + kx] = static_cast<float>(sum);
            }
          }
        }
      }
    };
    parallel_for(most, plan.n_groups(), body);
  });
}

}  // extern "C"
