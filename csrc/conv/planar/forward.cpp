#include <algorithm>

#include "conv/planar/conv2d.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace dsp {

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

void convolve(Workspace& space, const ConvShape& s, const Plan& plan, const float* x, const float* weight,
              const float* bias, const float* residual, float* out, const Activation& activation,
              int threads) {
  const KernelTable& k = kernels();
  ConvLayout& layout = space.layout;
  layout.set_blocks(plan, s);
  layout.set_bias(bias);
  const int64_t in_image = s.in_channels * s.in_plane();
  const int64_t out_image = s.out_channels * s.out_plane();
  if (layout.blocks.empty()) {
    auto body = [&](int64_t n) {
      for (int64_t f = 0; f < s.out_channels; ++f) {
        const int64_t at = n * out_image + f * s.out_plane();
        k.fill(out + at, 0, 0, residual == nullptr ? nullptr : residual + at, 0,
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
  const Planes in_planes{0, s.width, s.in_plane()};
  const Planes out_planes{0, s.out_w, plane};
  layout.build_tiles(whole_pixels, out_planes, s.out_w, kChunkBytes, space.whole);
  layout.build_tiles(plane - last_first, out_planes, s.out_w, kChunkBytes, space.last);

  const int64_t pieces = s.batch * strips;
  int64_t parts = 1;
  if (threads > 1 && pieces < threads) {
    parts = std::min<int64_t>(static_cast<int64_t>(layout.blocks.size()),
                              (2 * threads + pieces - 1) / std::max<int64_t>(pieces, 1));
  }
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
      // Threads take images in turn: this one's next is about so far away.
      const int64_t ahead = n + threads < s.batch ? threads * in_image : 0;
      layout.gather(image, in_planes, first, pixels, 0, static_cast<int64_t>(layout.used_channels.size()),
                    scratch, ahead);
      in = scratch;
    }
    layout.run(sets, 0, layout.chunks(sets), b0, b1, in, weight, layout.bias.data(), to, out_planes, from,
               out_planes, activation);
    if (part != 0) return;
    for (const int32_t f : layout.dead) {
      k.fill(to + f * plane, 0, 0, from == nullptr ? nullptr : from + f * plane, 0,
             bias == nullptr ? 0.0f : bias[f], 1, pixels, activation);
    }
  };
  parallel_for(threads, pieces * parts, body);
}

void conv_forward(const ConvShape& s, const Plan& plan, const float* x, const float* weight, bool prepared,
                  const float* bias, const float* residual, float* out, const Activation& activation,
                  int threads) {
  const float* laid_out = weight;
  if (!prepared && plan.pairs() > 0) {
    float* buffer = reinterpret_cast<float*>(
        call_scratch().reserve(static_cast<size_t>(plan.pairs() * s.taps()) * sizeof(float)));
    prepare_weights(plan, s.kh, s.kw, weight, buffer);
    laid_out = buffer;
  }
  convolve(workspace(), s, plan, x, laid_out, bias, residual, out, activation, threads);
}

}  // namespace dsp
