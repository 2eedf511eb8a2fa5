#include <algorithm>
#include <cstring>

#include "conv/kernel.h"
#include "conv/layout.h"
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

// The output columns (or rows) for which tap k reads inside the input.
void valid_range(int64_t k, int64_t dilation, int64_t padding, int64_t stride, int64_t size, int64_t out,
                 int64_t* first, int64_t* last) {
  const int64_t shift = k * dilation - padding;
  *first = shift >= 0 ? 0 : (-shift + stride - 1) / stride;
  *last = size - 1 - shift < 0 ? 0 : std::min(out, (size - 1 - shift) / stride + 1);
  if (*last < *first) *last = *first;
}

// What a call needs besides its arguments; kept per thread so that a call in a loop allocates nothing.
struct Workspace {
  ConvLayout layout;
  TileSet whole[kMaxRowsLog + 1];
  TileSet last[kMaxRowsLog + 1];
};

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

void forward(const ConvShape& s, const Plan& plan, const float* x, const float* weight, bool prepared,
             const float* bias, const float* residual, float* out, int32_t activation, int threads) {
  const KernelTable& k = kernels();
  Workspace& space = workspace();
  ConvLayout& layout = space.layout;
  layout.set_blocks(plan, s);
  layout.set_bias(bias);
  const int64_t in_image = s.in_channels * s.in_plane();
  const int64_t out_image = s.out_channels * s.out_plane();
  if (layout.blocks.empty()) {
    auto body = [&](int64_t n) {
      for (int64_t f = 0; f < s.out_channels; ++f) {
        const int64_t at = n * out_image + f * s.out_plane();
        k.fill(out + at, 0, residual == nullptr ? nullptr : residual + at, 0,
               bias == nullptr ? 0.0f : bias[f], 1, s.out_plane(), activation);
      }
    };
    parallel_for(threads, s.batch, body);
    return;
  }
  layout.set_gathered(s, plan, threads, true);
  const int64_t plane = s.out_plane();
  const int64_t strips = layout.strips();
  const int64_t whole_pixels = std::min(layout.strip_pixels, plane);
  const int64_t last_first = (strips - 1) * layout.strip_pixels;
  // 24 KB of input per chunk leaves half of the first-level cache to weights and outputs.
  constexpr int64_t kChunkBytes = 24 * 1024;
  layout.build_tiles(whole_pixels, s.out_w, s.out_w, kChunkBytes, space.whole);
  layout.build_tiles(plane - last_first, s.out_w, s.out_w, kChunkBytes, space.last);

  const float* prepared_weights = weight;
  if (!prepared) {
    const int64_t numel = plan.pairs() * s.taps();
    float* laid_out =
        reinterpret_cast<float*>(call_scratch().reserve(static_cast<size_t>(numel) * sizeof(float)));
    prepare_weights(plan, s.kh, s.kw, weight, laid_out);
    prepared_weights = laid_out;
  }

  const int64_t pieces = s.batch * strips;
  int64_t parts = 1;
  if (threads > 1 && pieces < threads) {
    parts = std::min<int64_t>(static_cast<int64_t>(layout.blocks.size()),
                              (2 * threads + pieces - 1) / std::max<int64_t>(pieces, 1));
  }
  const Planes in_planes{0, s.width, s.in_plane()};
  const Planes out_planes{0, s.out_w, plane};
  auto body = [&](int64_t task) {
    const int64_t part = task % parts;
    const int64_t strip = task / parts % strips;
    const int64_t n = task / parts / strips;
    const int64_t first = strip * layout.strip_pixels;
    const int64_t pixels = strip == strips - 1 ? plane - first : layout.strip_pixels;
    const TileSet* sets = strip == strips - 1 ? space.last : space.whole;
    const int64_t b0 = layout.block_share(part, parts);
    const int64_t b1 = layout.block_share(part + 1, parts);
    const float* image = x + n * in_image;
    float* to = out + n * out_image + first;
    const float* from = residual == nullptr ? nullptr : residual + n * out_image + first;
    const float* in = image + first;
    if (b0 < b1 && layout.gathered()) {
      float* scratch = reinterpret_cast<float*>(
          task_scratch().reserve(static_cast<size_t>(layout.scratch_floats()) * sizeof(float)));
      layout.gather(image, in_planes, first, pixels, 0, static_cast<int64_t>(layout.used_channels.size()),
                    scratch);
      in = scratch;
    }
    layout.run(sets, 0, layout.chunks(sets), b0, b1, in, prepared_weights, layout.bias.data(), to, out_planes,
               from, out_planes, activation);
    if (part != 0) return;
    for (const int32_t f : layout.dead) {
      k.fill(to + f * plane, 0, from == nullptr ? nullptr : from + f * plane, 0,
             bias == nullptr ? 0.0f : bias[f], 1, pixels, activation);
    }
  };
  parallel_for(threads, pieces * parts, body);
}

}  // namespace
}  // namespace dsp

extern "C" {

dsp_status dsp_conv2d_forward(const dsp_conv2d_shape* shape, const float* x, int64_t x_numel,
                              const float* weight, int64_t weight_numel, const int32_t* plan_words,
                              int64_t plan_numel, const float* bias, const float* residual, float* out,
                              int64_t out_numel, int32_t activation, int32_t prepared, int32_t threads) {
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
    forward(s, plan, x, weight, prepared != 0, bias, residual, out, activation, most);
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
