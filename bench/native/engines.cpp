// The convolution's engines, layer by layer: the share of the core's measured peak that each one reaches on
// one thread. Layers of ResNet-18 and ResNet-50 at 224 x 224, random groups of random channels.
//   cmake -S . -B build/bench -DDSP_BENCH=ON -DDSP_PYTHON=OFF -DDSP_CUDA=OFF && cmake --build build/bench
//   build/bench/dsp_bench_engines [--keep 0.5] [--groups 2] [--sorted] [--rounds 15] [--only "1x1 64 256"]
// Times are of the thread's clock; of the rounds, in each of which every engine and the peak is measured
// once, the best counts. --sorted: a group's filters are neighbours.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "conv/lanes/lane_conv.h"
#include "conv/plan.h"
#include "conv/planar/layout.h"
#include "dsp.h"

namespace {

using namespace dsp;

std::mt19937 engine(7);

double now() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::vector<int32_t> shuffled(int32_t count) {
  std::vector<int32_t> list(static_cast<size_t>(count));
  std::iota(list.begin(), list.end(), 0);
  std::shuffle(list.begin(), list.end(), engine);
  return list;
}

std::vector<int32_t> make_plan(int32_t in, int32_t out, int32_t groups, double keep, bool sorted) {
  std::vector<int32_t> words(static_cast<size_t>(DSP_PLAN_HEADER + groups * DSP_PLAN_GROUP));
  const int32_t channels = std::max(1, static_cast<int32_t>(in * keep + 0.5));
  std::vector<int32_t> filters = shuffled(out);
  int32_t pairs = 0;
  std::vector<int32_t> lists;
  for (int32_t g = 0; g < groups; ++g) {
    std::vector<int32_t> chosen = shuffled(in);
    chosen.resize(static_cast<size_t>(channels));
    std::sort(chosen.begin(), chosen.end());
    int32_t* entry = words.data() + DSP_PLAN_HEADER + g * DSP_PLAN_GROUP;
    entry[0] = channels;
    entry[1] = (g + 1) * out / groups - g * out / groups;
    entry[2] = static_cast<int32_t>(words.size() + lists.size());
    entry[4] = pairs;
    pairs += entry[0] * entry[1];
    lists.insert(lists.end(), chosen.begin(), chosen.end());
  }
  words.insert(words.end(), lists.begin(), lists.end());
  if (sorted) std::sort(filters.begin(), filters.end());
  for (int32_t g = 0; g < groups; ++g) {
    words[static_cast<size_t>(DSP_PLAN_HEADER + g * DSP_PLAN_GROUP + 3)] = static_cast<int32_t>(words.size());
    std::sort(filters.begin() + g * out / groups, filters.begin() + (g + 1) * out / groups);
    words.insert(words.end(), filters.begin() + g * out / groups, filters.begin() + (g + 1) * out / groups);
  }
  const int32_t header[DSP_PLAN_HEADER] = {
      DSP_PLAN_MAGIC, in, out, groups, pairs, static_cast<int32_t>(words.size()), out, 0};
  std::copy(header, header + DSP_PLAN_HEADER, words.begin());
  return words;
}

std::vector<float> randoms(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  std::uniform_real_distribution<float> some(-1, 1);
  for (float& value : values) value = some(engine);
  return values;
}

struct Layer {
  const char* name;
  int32_t in, out;
  int64_t size, kernel, stride;
};

// What a program does with a convolution between others.
const Activation relu = make_activation(DSP_ACT_RELU, nullptr);

struct Planar {
  Planar(const Plan& plan, const ConvShape& s, const std::vector<float>& packed) : weights(packed.size()) {
    prepare_weights(plan, s.kh, s.kw, packed.data(), weights.data());
    layout.set_blocks(plan, s);
    layout.set_bias(nullptr);
    const bool one = s.kh == 1 && s.sh == 1;
    if (!one && s.sh == 1 && rows_fit(s.width)) {
      in.pitch = s.width + s.pw;
      in.origin = s.ph * in.pitch + s.pw;
      in.plane = (((s.height + 2 * s.ph) * in.pitch + s.pw + 15) / 16 | 1) * 16;
      layout.set_direct_rows(s, plan, in);
    } else {
      in = {0, s.width, ((s.in_plane() + 15) / 16 | 1) * 16, 0};
      if (one) {
        layout.set_direct_flat(s, plan, in, false);
      } else {
        layout.set_gathered(s, plan, 1, false);
      }
    }
    out = {0, s.out_w, ((s.out_plane() + 15) / 16 | 1) * 16, 0};
    const int64_t last = (layout.strips() - 1) * layout.strip_pixels;
    layout.build_tiles(std::min(layout.strip_pixels, s.out_plane()), out, 0, 24 * 1024, sets[0]);
    layout.build_tiles(s.out_plane() - last, out, 0, 24 * 1024, sets[1]);
    x = randoms(s.in_channels * in.plane + 64);
    y.resize(static_cast<size_t>(s.out_channels * out.plane + 64));
    scratch.resize(static_cast<size_t>(layout.gathered() ? layout.scratch_floats() : 1));
    plane = s.out_plane();
  }
  void run() {
    for (int64_t strip = 0; strip < layout.strips(); ++strip) {
      const int64_t first = strip * layout.strip_pixels;
      const float* from = x.data();
      if (layout.gathered()) {
        layout.gather(x.data(), in, first, std::min(layout.strip_pixels, plane - first), 0,
                      static_cast<int64_t>(layout.used_channels.size()), scratch.data());
        from = scratch.data();
      }
      const TileSet* tiles = sets[strip == layout.strips() - 1 ? 1 : 0];
      layout.run(tiles, 0, layout.chunks(tiles), 0, static_cast<int64_t>(layout.blocks.size()), from,
                 weights.data(), layout.bias.data(), y.data() + first, out, nullptr, {}, relu);
    }
  }
  ConvLayout layout;
  Planes in, out;
  TileSet sets[2][kMaxRowsLog + 1];
  std::vector<float> weights, x, y, scratch;
  int64_t plane = 0;
};

struct Lanes {
  Lanes(const Plan& plan, const ConvShape& s, const std::vector<float>& packed) {
    conv.set_blocks(plan, s, nullptr, nullptr);
    const int64_t pitch = ((s.in_channels + 15) / 16 | 1) * 16;
    const int64_t out_pitch = ((s.out_channels + 15) / 16 | 1) * 16;
    conv.set_bias(nullptr);
    conv.set_views(plan, channels_last(s.width, s.ph, s.pw, pitch), channels_last(s.out_w, 1, 1, out_pitch),
                   {});
    weights.resize(static_cast<size_t>(conv.weight_floats()));
    conv.prepare(plan, packed.data(), weights.data());
    x = randoms(channels_last_floats(s.height, s.width, s.ph, s.pw, pitch));
    y.resize(static_cast<size_t>(channels_last_floats(s.out_h, s.out_w, 1, 1, out_pitch)));
  }
  void run() { conv.run(x.data(), weights.data(), nullptr, y.data(), relu, false, 1); }
  LaneConv conv;
  std::vector<float> weights, x, y;
};

}  // namespace

int main(int argc, char** argv) {
  double keep = 0.5;
  int groups = 2, rounds = 15;
  bool sorted = false;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const auto value = [&] { return i + 1 < argc ? argv[++i] : "0"; };
    if (std::strcmp(argv[i], "--keep") == 0) keep = std::atof(value());
    if (std::strcmp(argv[i], "--groups") == 0) groups = std::max(1, std::atoi(value()));
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::max(1, std::atoi(value()));
    if (std::strcmp(argv[i], "--sorted") == 0) sorted = true;
    if (std::strcmp(argv[i], "--only") == 0) only = value();
  }
  const Layer layers[] = {
      {"3x3", 64, 64, 56, 3, 1},     {"3x3", 128, 128, 28, 3, 1},    {"3x3", 256, 256, 14, 3, 1},
      {"3x3", 512, 512, 7, 3, 1},    {"3x3/2", 64, 128, 56, 3, 2},   {"3x3/2", 128, 256, 28, 3, 2},
      {"3x3/2", 256, 512, 14, 3, 2}, {"1x1", 256, 64, 56, 1, 1},     {"1x1", 64, 256, 56, 1, 1},
      {"1x1", 512, 128, 28, 1, 1},   {"1x1", 128, 512, 28, 1, 1},    {"1x1", 1024, 256, 14, 1, 1},
      {"1x1", 256, 1024, 14, 1, 1},  {"1x1", 2048, 512, 7, 1, 1},    {"1x1", 512, 2048, 7, 1, 1},
      {"1x1/2", 256, 512, 56, 1, 2}, {"1x1/2", 512, 1024, 28, 1, 2}, {"1x1/2", 1024, 2048, 14, 1, 2},
      {"3x3", 16, 16, 32, 3, 1},     {"3x3", 32, 32, 16, 3, 1},      {"3x3", 64, 64, 8, 3, 1},
  };
  std::printf("%s, keep %.2f, %d groups%s\n", dsp_cpu_isa(), keep, groups, sorted ? " of neighbours" : "");
  std::printf("layer                     peak GFLOP/s   lanes  planar  lanes' filters\n");
  for (const Layer& layer : layers) {
    const std::string title =
        std::string(layer.name) + " " + std::to_string(layer.in) + " " + std::to_string(layer.out);
    if (title.find(only) == std::string::npos) continue;
    const std::vector<int32_t> words = make_plan(layer.in, layer.out, groups, keep, sorted);
    const Plan plan(words.data(), static_cast<int64_t>(words.size()));
    const int64_t pad = layer.kernel / 2;
    const dsp_conv2d_shape shape{
        1, layer.size, layer.size, layer.kernel, layer.kernel, layer.stride, layer.stride, pad, pad, 1, 1};
    const ConvShape s = check_shape(&shape, plan);
    const std::vector<float> packed = randoms(plan.pairs() * s.taps());
    Planar planar(plan, s, packed);
    Lanes lanes(plan, s, packed);
    const double flops = 2.0 * static_cast<double>(plan.pairs() * s.taps() * s.out_plane());
    const int repeats = std::max(1, static_cast<int>(1e9 / flops / 10));
    double best[3] = {0, 0, 0};
    for (int round = 0; round < rounds; ++round) {
      for (int which = 0; which < 3; ++which) {
        const double start = now();
        double made = 0;
        if (which == 0) {
          made = static_cast<double>(dsp_fma_rounds(200000));
        } else {
          for (int i = 0; i < repeats; ++i, made += flops) which == 1 ? lanes.run() : planar.run();
        }
        best[which] = std::max(best[which], made / (now() - start));
      }
    }
    std::printf("%-6s %4d->%4d %3lldx%-3lld   %12.0f   %4.0f%%   %4.0f%%   %4.0f%%\n", layer.name, layer.in,
                layer.out, static_cast<long long>(layer.size), static_cast<long long>(layer.size),
                best[0] / 1e9, 100 * best[1] / best[0], 100 * best[2] / best[0],
                50.0 * flops / static_cast<double>(lanes.conv.lane_products()));
  }
  return 0;
}
