#include <algorithm>
#include <array>
#include <string>
#include <vector>

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

// What a call needs besides its arguments; kept per thread so that a call in a loop allocates nothing.
struct Workspace {
  ConvLayout layout;
  TileSet whole[kMaxRowsLog + 1];
  TileSet last[kMaxRowsLog + 1];
  std::vector<int32_t> transposed;
  std::vector<int32_t> atom_of, fresh, position;
  std::vector<int64_t> cursor, offsets, group_offsets;
  std::vector<float> partial;
  std::array<std::vector<float>, 2> phase;
};

Workspace& workspace() {
  thread_local Workspace space;
  return space;
}

// `weight` is prepared. Where up_h or up_w is above 1, x has that many minus 1 zeros between its rows or
// columns.
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

void forward(const ConvShape& s, const Plan& plan, const float* x, const float* weight, bool prepared,
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

// Who is written by whom: atoms (channels that are read by the same groups) in the place of groups, the
// groups' filters in the place of channels. The weights come flipped.
void transpose(Workspace& space, const Plan& plan, const ConvShape& s, const float* weight,
               float* transposed) {
  const size_t channels = static_cast<size_t>(plan.in_channels());
  std::vector<int32_t>& atom_of = space.atom_of;
  std::vector<int32_t>& fresh = space.fresh;
  atom_of.assign(channels, 0);
  // Refine: within each group, channels that were together stay together, apart from those outside.
  int32_t atoms = 1;
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    const int32_t before = atoms;
    fresh.assign(static_cast<size_t>(before), 0);
    for (int32_t i = 0; i < group.n_channels; ++i) {
      int32_t& atom = atom_of[static_cast<size_t>(group.channels[i])];
      int32_t& next = fresh[static_cast<size_t>(atom)];
      if (next == 0) next = atoms++;
      atom = next;
    }
  }
  // Number the atoms that are left by their first channel; atom 0 is what nobody reads.
  fresh.assign(static_cast<size_t>(atoms), -1);
  int32_t n_atoms = 0;
  for (size_t c = 0; c < channels; ++c) {
    if (atom_of[c] == 0) {
      atom_of[c] = -1;
      continue;
    }
    int32_t& number = fresh[static_cast<size_t>(atom_of[c])];
    if (number < 0) number = n_atoms++;
    atom_of[c] = number;
  }
  std::vector<int32_t>& words = space.transposed;
  words.assign(static_cast<size_t>(DSP_PLAN_HEADER + n_atoms * DSP_PLAN_GROUP), 0);
  const auto entry = [&](int32_t atom) { return words.data() + DSP_PLAN_HEADER + atom * DSP_PLAN_GROUP; };
  for (size_t c = 0; c < channels; ++c) {
    if (atom_of[c] >= 0) entry(atom_of[c])[1]++;
  }
  std::vector<int64_t>& cursor = space.cursor;
  std::vector<int32_t>& position = space.position;
  // Which atoms a group reads: those of its channels, each once.
  const auto each_atom = [&](const Group& group, auto&& visit) {
    fresh.assign(static_cast<size_t>(n_atoms), 0);
    for (int32_t i = 0; i < group.n_channels; ++i) {
      const int32_t atom = atom_of[static_cast<size_t>(group.channels[i])];
      if (fresh[static_cast<size_t>(atom)]++ == 0) visit(atom);
    }
  };
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    each_atom(group, [&](int32_t atom) { entry(atom)[0] += group.n_filters; });
  }
  int32_t at = static_cast<int32_t>(words.size());
  int32_t pairs = 0;
  int32_t live = 0;
  for (int32_t a = 0; a < n_atoms; ++a) {
    entry(a)[2] = at;
    entry(a)[4] = pairs;
    at += entry(a)[0];
    pairs += entry(a)[0] * entry(a)[1];
  }
  for (int32_t a = 0; a < n_atoms; ++a) {
    entry(a)[3] = at;
    at += entry(a)[1];
    live += entry(a)[1];
  }
  words.resize(static_cast<size_t>(at));
  const int32_t header[DSP_PLAN_HEADER] = {
      DSP_PLAN_MAGIC, plan.out_channels(), plan.in_channels(), n_atoms, pairs, at, live, 0};
  std::copy(header, header + DSP_PLAN_HEADER, words.begin());
  // Lists: filters in the order of the groups; the channels of an atom ascending.
  cursor.assign(static_cast<size_t>(n_atoms), 0);
  position.assign(channels, 0);
  for (size_t c = 0; c < channels; ++c) {
    if (atom_of[c] < 0) continue;
    int64_t& used = cursor[static_cast<size_t>(atom_of[c])];
    position[c] = static_cast<int32_t>(used);
    words[static_cast<size_t>(entry(atom_of[c])[3] + used++)] = static_cast<int32_t>(c);
  }
  cursor.assign(static_cast<size_t>(n_atoms), 0);
  const int64_t taps = s.taps();
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    const float* from = weight + group.weight_pairs * taps;
    for (int32_t i = 0; i < group.n_channels; ++i) {
      const size_t c = static_cast<size_t>(group.channels[i]);
      const int32_t* to = entry(atom_of[c]);
      for (int32_t f = 0; f < group.n_filters; ++f) {
        const float* w = from + (int64_t{f} * group.n_channels + i) * taps;
        const int64_t column = cursor[static_cast<size_t>(atom_of[c])] + f;
        float* out = transposed + (to[4] + int64_t{position[c]} * to[0] + column) * taps;
        for (int64_t t = 0; t < taps; ++t) out[t] = w[taps - 1 - t];
      }
    }
    each_atom(group, [&](int32_t atom) {
      int64_t& used = cursor[static_cast<size_t>(atom)];
      for (int32_t f = 0; f < group.n_filters; ++f)
        words[static_cast<size_t>(entry(atom)[2] + used++)] = group.filters[f];
    });
  }
}

// The rows (columns) of x that are `phase` modulo the stride get their gradients from some of the taps only,
// and for these it is a convolution with stride 1: tap i of `count`, which is tap first - i * every of the
// kernel, reads row r + start + i * step of the output's gradient for row r of the phase.
struct PhaseTaps {
  int64_t count = 0, first = 0, every = 1, start = 0, step = 1;
};

PhaseTaps phase_taps(int64_t phase, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  PhaseTaps taps;
  int64_t last = -1;
  for (int64_t k = kernel - 1; k >= 0; --k) {
    if ((phase + padding - k * dilation) % stride != 0) continue;
    if (taps.count == 0) {
      taps.first = k;
      taps.start = (phase + padding - k * dilation) / stride;
    } else if (taps.count == 1) {
      taps.every = last - k;
      taps.step = taps.every * dilation / stride;
    }
    last = k;
    ++taps.count;
  }
  return taps;
}

void grad_input(const ConvShape& s, const Plan& plan, const float* grad, const float* weight, float* grad_x,
                int threads) {
  Workspace& space = workspace();
  const size_t numel = static_cast<size_t>(plan.pairs() * s.taps());
  Carver sizes(nullptr);
  for (int i = 0; i < 3; ++i) sizes.take<float>(numel);
  Carver carve(call_scratch().reserve(sizes.used() + 64));
  float* flipped = carve.take<float>(numel);
  float* chosen = carve.take<float>(numel);
  float* prepared = carve.take<float>(numel);
  transpose(space, plan, s, weight, flipped);
  const Plan back = Plan::trusted(space.transposed.data());
  ConvShape t = s;
  t.in_channels = s.out_channels;
  t.out_channels = s.in_channels;
  t.height = s.out_h;
  t.width = s.out_w;
  t.sh = 1;
  t.sw = 1;
  if (s.sh == 1 && s.sw == 1) {
    // The gradient of a convolution is one with the padding that is left: it may be below 0.
    t.out_h = s.height;
    t.out_w = s.width;
    t.ph = s.dh * (s.kh - 1) - s.ph;
    t.pw = s.dw * (s.kw - 1) - s.pw;
    prepare_weights(back, s.kh, s.kw, flipped, prepared);
    convolve(space, t, back, grad, prepared, nullptr, nullptr, grad_x, Activation{}, threads);
    return;
  }
  const KernelTable& k = kernels();
  const int64_t planes = s.batch * s.in_channels;
  const int64_t columns = std::min(s.sw, s.width);
  // Columns of x in pairs are put together from two phases at once.
  const bool pairs = s.sw == 2 && columns == 2;
  for (int64_t py = 0; py < std::min(s.sh, s.height); ++py) {
    const PhaseTaps y = phase_taps(py, s.kh, s.sh, s.ph, s.dh);
    t.out_h = (s.height - py + s.sh - 1) / s.sh;
    std::array<const float*, 2> phases{};  // null: nothing but zeros
    std::array<int64_t, 2> pitch{};
    for (int64_t px = 0; px < columns; ++px) {
      const PhaseTaps x = phase_taps(px, s.kw, s.sw, s.pw, s.dw);
      t.out_w = (s.width - px + s.sw - 1) / s.sw;
      const size_t slot = pairs ? static_cast<size_t>(px) : 0;
      phases[slot] = nullptr;
      pitch[slot] = t.out_w;
      if (y.count > 0 && x.count > 0) {
        t.kh = y.count;
        t.kw = x.count;
        t.dh = y.step;
        t.dw = x.step;
        t.ph = -y.start;
        t.pw = -x.start;
        float* to = chosen;
        for (int64_t pair = 0; pair < plan.pairs(); ++pair) {
          for (int64_t i = 0; i < y.count; ++i) {
            // `flipped` holds the taps in reverse.
            const float* row = flipped + pair * s.taps() + (s.kh - 1 - (y.first - i * y.every)) * s.kw;
            for (int64_t j = 0; j < x.count; ++j) *to++ = row[s.kw - 1 - (x.first - j * x.every)];
          }
        }
        prepare_weights(back, t.kh, t.kw, chosen, prepared);
        std::vector<float>& phase = space.phase[slot];
        phase.resize(static_cast<size_t>(planes * t.out_plane()));
        convolve(space, t, back, grad, prepared, nullptr, nullptr, phase.data(), Activation{}, threads);
        phases[slot] = phase.data();
      }
      if (pairs) continue;
      auto scatter = [&](int64_t plane) {
        for (int64_t row = 0; row < t.out_h; ++row) {
          float* to = grad_x + plane * s.in_plane() + (row * s.sh + py) * s.width + px;
          const float* values =
              phases[0] == nullptr ? nullptr : phases[0] + (plane * t.out_h + row) * t.out_w;
          for (int64_t column = 0; column < t.out_w; ++column)
            to[column * s.sw] = values == nullptr ? 0.0f : values[column];
        }
      };
      parallel_for(threads, planes, scatter);
    }
    if (!pairs) continue;
    auto zip = [&](int64_t plane) {
      for (int64_t row = 0; row < t.out_h; ++row) {
        const int64_t at = plane * t.out_h + row;
        k.zip(grad_x + plane * s.in_plane() + (row * s.sh + py) * s.width,
              phases[0] == nullptr ? nullptr : phases[0] + at * pitch[0],
              phases[1] == nullptr ? nullptr : phases[1] + at * pitch[1], s.width);
      }
    };
    parallel_for(threads, planes, zip);
  }
}

void grad_weight(const ConvShape& s, const Plan& plan, const float* grad, const float* x, float* grad_w,
                 int threads) {
  const KernelTable& k = kernels();
  Workspace& space = workspace();
  ConvLayout& layout = space.layout;
  const int64_t numel = plan.pairs() * s.taps();
  if (numel == 0) return;
  layout.set_blocks(plan, s);
  // Laid out for one thread whatever the number is: what is added to what must not depend on it.
  layout.set_gathered(s, plan, 1, true);
  const int64_t plane = s.out_plane();
  const int64_t strips = layout.strips();
  const int64_t last_first = (strips - 1) * layout.strip_pixels;
  constexpr int log = 2;
  const bool by_rows = layout.reuse_rows() && s.kw == 3;
  const int most_filters = by_rows ? (k.grad_rows[1] != nullptr ? 2 : 1) : kMaxGradFilters;
  constexpr int64_t kOneChunk = int64_t{1} << 40;
  const Planes grad_planes{0, s.out_w, plane};
  layout.build_tiles(std::min(layout.strip_pixels, plane), grad_planes, 0, kOneChunk, space.whole, log);
  layout.build_tiles(plane - last_first, grad_planes, 0, kOneChunk, space.last, log);

  // Slices of the batch have sums of their own, added up in order at the end.
  constexpr int64_t kScratchBytes = 640 * 1024;
  constexpr int64_t kPartialBytes = int64_t{64} << 20;
  const int64_t image_bytes = std::max<int64_t>(1, (layout.scratch_floats() + s.out_channels * plane) * 4);
  const int64_t together = strips > 1 ? 1 : std::max<int64_t>(1, kScratchBytes / image_bytes);
  int64_t slices = std::min<int64_t>(16, (s.batch + together - 1) / together);
  slices = std::max<int64_t>(1, std::min(slices, kPartialBytes / (numel * 4)));
  const int64_t n_groups = plan.n_groups();
  const int64_t parts = slices >= threads ? 1 : std::min<int64_t>(2 * threads, n_groups);
  space.partial.resize(static_cast<size_t>(numel * slices));
  float* partial = space.partial.data();
  const int64_t in_image = s.in_channels * s.in_plane();
  const int64_t out_image = s.out_channels * plane;
  const Planes in_planes{0, s.width, s.in_plane()};
  // Offsets of all groups, one after the other: group g's start at pairs before it per filter.
  std::vector<int64_t>& offsets = space.offsets;
  std::vector<int64_t>& starts = space.cursor;
  offsets.clear();
  starts.clear();
  std::vector<int64_t>& one_group = space.group_offsets;
  for (int32_t g = 0; g < n_groups; ++g) {
    starts.push_back(static_cast<int64_t>(offsets.size()));
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    layout.tap_offsets(group, &one_group);
    offsets.insert(offsets.end(), one_group.begin(), one_group.end());
  }
  auto body = [&](int64_t task) {
    const int64_t slice = task / parts;
    const int64_t part = task % parts;
    float* sums = partial + slice * numel;
    const int32_t g0 = static_cast<int32_t>(part * n_groups / parts);
    const int32_t g1 = static_cast<int32_t>((part + 1) * n_groups / parts);
    for (int32_t g = g0; g < g1; ++g) {
      const Group group = plan.group(g);
      std::fill_n(sums + group.weight_pairs * s.taps(),
                  int64_t{group.n_channels} * group.n_filters * s.taps(), 0.0f);
    }
    const int64_t n0 = slice * s.batch / slices;
    const int64_t n1 = (slice + 1) * s.batch / slices;
    for (int64_t n = n0; n < n1; n += together) {
      const int64_t images = std::min(together, n1 - n);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t first = strip * layout.strip_pixels;
        const int64_t pixels = strip == strips - 1 ? plane - first : layout.strip_pixels;
        const TileSet& set = (strip == strips - 1 ? space.last : space.whole)[log];
        GradArgs args{};
        args.x = x + n * in_image + first;
        args.x_image = in_image;
        if (layout.gathered()) {
          const int64_t floats = layout.scratch_floats();
          float* scratch = reinterpret_cast<float*>(
              task_scratch().reserve(static_cast<size_t>(floats * images) * sizeof(float)));
          for (int64_t i = 0; i < images; ++i) {
            layout.gather(x + (n + i) * in_image, in_planes, first, pixels, 0,
                          static_cast<int64_t>(layout.used_channels.size()), scratch + i * floats,
                          n + together + i < n1 ? together * in_image : 0);
          }
          args.x = scratch;
          args.x_image = floats;
        }
        args.grad = grad + n * out_image + first;
        args.grad_image = out_image;
        args.images = images;
        args.x_step = layout.flat() ? k.lanes : layout.in_pitch;
        args.grad_step = layout.flat() ? k.lanes : s.out_w;
        args.grad_plane = plane;
        args.tiles = set.tiles.data();
        args.runs = set.runs.data();
        args.n_runs = static_cast<int64_t>(set.runs.size());
        for (int32_t g = g0; g < g1; ++g) {
          const Group group = plan.group(g);
          const int64_t columns = group.n_channels * s.taps();
          args.out_row = columns;
          const int32_t blocks = (group.n_filters + most_filters - 1) / most_filters;
          int32_t f = 0;
          for (int32_t b = 0; b < blocks; ++b) {
            const int32_t size = group.n_filters / blocks + (b < group.n_filters % blocks ? 1 : 0);
            args.filters = group.filters + f;
            float* row = sums + group.weight_pairs * s.taps() + f * columns;
            int64_t t = 0;
            while (t < columns) {
              const int kind = columns - t >= 9 && k.max_grad_taps >= 9 ? 2 : (columns - t >= 3 ? 1 : 0);
              args.offsets = offsets.data() + starts[static_cast<size_t>(g)] + t;
              args.out = row + t;
              if (by_rows) {
                k.grad_rows[size - 1](args);
                t += 9;
                continue;
              }
              k.grad[size - 1][kind](args);
              t += kind == 2 ? 9 : (kind == 1 ? 3 : 1);
            }
            f += size;
          }
        }
      }
    }
  };
  parallel_for(threads, slices * parts, body);
  for (int64_t i = 0; i < numel; ++i) {
    float sum = partial[i];
    for (int64_t slice = 1; slice < slices; ++slice) sum += partial[slice * numel + i];
    grad_w[i] = sum;
  }
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
    forward(s, plan, x, weight, prepared != 0, bias, residual, out, act, most);
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
    grad_input(s, plan, grad, weight, grad_x, most);
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
    grad_weight(s, plan, grad, x, grad_w, most);
  });
}

}  // extern "C"
