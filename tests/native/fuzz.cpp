// Random convolutions and programs against plain loops in double, and descriptions that must be refused.
// Built with AddressSanitizer and UBSan; every buffer has exactly the size that the interface asks for.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "conv/lanes/lane_conv.h"
#include "dsp.h"

namespace {

std::mt19937_64 engine;
uint64_t current_seed = 0;

void say_seed() {
  std::fprintf(stderr, "fuzz: failed in the round of --seed %llu\n",
               static_cast<unsigned long long>(current_seed));
}

int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(engine);
}
bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }
float normal() { return std::normal_distribution<float>(0, 1)(engine); }

std::vector<float> random_floats(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal();
  return values;
}

// Exactly as large as asked for, so that the sanitizer sees the first float beyond it.
struct Exact {
  explicit Exact(const std::vector<float>& values) : size(static_cast<int64_t>(values.size())) {
    data = static_cast<float*>(std::malloc(std::max<size_t>(1, values.size() * sizeof(float))));
    std::copy(values.begin(), values.end(), data);
  }
  Exact(int64_t count, float value) : Exact(std::vector<float>(static_cast<size_t>(count), value)) {}
  Exact(const Exact&) = delete;
  Exact(Exact&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(data); }
  float* data;
  int64_t size;
};

struct Layout {
  int64_t in, out;
  std::vector<std::vector<int32_t>> channels, filters;
  int64_t pairs() const {
    int64_t sum = 0;
    for (size_t g = 0; g < channels.size(); ++g)
      sum += static_cast<int64_t>(channels[g].size() * filters[g].size());
    return sum;
  }
  std::vector<int32_t> plan() const {
    const size_t groups = channels.size();
    std::vector<int32_t> words(DSP_PLAN_HEADER + groups * DSP_PLAN_GROUP);
    size_t live = 0;
    int32_t weights = 0;
    for (size_t g = 0; g < groups; ++g) {
      int32_t* entry = words.data() + DSP_PLAN_HEADER + g * DSP_PLAN_GROUP;
      entry[0] = static_cast<int32_t>(channels[g].size());
      entry[1] = static_cast<int32_t>(filters[g].size());
      entry[4] = weights;
      weights += entry[0] * entry[1];
      live += filters[g].size();
    }
    for (int which = 0; which < 2; ++which) {
      for (size_t g = 0; g < groups; ++g) {
        const std::vector<int32_t>& list = which == 0 ? channels[g] : filters[g];
        words[DSP_PLAN_HEADER + g * DSP_PLAN_GROUP + 2 + static_cast<size_t>(which)] =
            static_cast<int32_t>(words.size());
        words.insert(words.end(), list.begin(), list.end());
      }
    }
    const int32_t header[DSP_PLAN_HEADER] = {DSP_PLAN_MAGIC,
                                             static_cast<int32_t>(in),
                                             static_cast<int32_t>(out),
                                             static_cast<int32_t>(groups),
                                             weights,
                                             static_cast<int32_t>(words.size()),
                                             static_cast<int32_t>(live),
                                             0};
    std::copy(header, header + DSP_PLAN_HEADER, words.begin());
    return words;
  }
};

Layout random_layout(int64_t in, int64_t out) {
  Layout layout{in, out, {}, {}};
  std::vector<int32_t> order(static_cast<size_t>(out));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  std::shuffle(order.begin(), order.end(), engine);
  size_t live = chance(0.3) ? static_cast<size_t>(between(0, out)) : order.size();
  const int64_t groups = between(1, 5);
  for (int64_t g = 0; g < groups; ++g) {
    const size_t take = g == groups - 1 ? live : static_cast<size_t>(between(0, static_cast<int64_t>(live)));
    layout.filters.emplace_back(order.begin(), order.begin() + static_cast<int64_t>(take));
    order.erase(order.begin(), order.begin() + static_cast<int64_t>(take));
    live -= take;
    std::vector<int32_t> channels(static_cast<size_t>(in));
    for (size_t i = 0; i < channels.size(); ++i) channels[i] = static_cast<int32_t>(i);
    std::shuffle(channels.begin(), channels.end(), engine);
    channels.resize(static_cast<size_t>(between(1, in)));
    layout.channels.push_back(channels);
  }
  return layout;
}

int64_t out_size(int64_t in, int64_t k, int64_t s, int64_t p, int64_t d) {
  const int64_t room = in + 2 * p - d * (k - 1) - 1;
  return room < 0 ? 0 : room / s + 1;
}

int64_t random_size() {
  constexpr int64_t kSizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 14, 15, 16, 17, 24, 28, 31, 32, 33, 40, 56};
  return chance(0.1) ? between(1, 70) : kSizes[between(0, 19)];
}

dsp_conv2d_shape random_shape() {
  for (;;) {
    dsp_conv2d_shape s{};
    s.batch = chance(0.05) ? 0 : between(1, 3);
    s.height = random_size();
    s.width = random_size();
    const bool usual = chance(0.4);
    constexpr int64_t kKernels[] = {1, 1, 2, 3, 3, 4, 5, 7};
    s.kernel_h = usual ? 3 : kKernels[between(0, 7)];
    s.kernel_w = usual ? 3 : kKernels[between(0, 7)];
    s.stride_h = chance(0.5) ? 1 : between(1, 4);
    s.stride_w = chance(0.5) ? 1 : between(1, 4);
    s.padding_h = usual ? 1 : between(0, 4);
    s.padding_w = usual ? 1 : between(0, 4);
    s.dilation_h = chance(0.7) ? 1 : between(1, chance(0.05) ? 60 : 3);
    s.dilation_w = chance(0.7) ? 1 : between(1, chance(0.05) ? 60 : 3);
    if (chance(0.02)) s.padding_h = 70;
    if (chance(0.02)) s.padding_w = 70;
    if (chance(0.2)) {
      s.kernel_h = s.kernel_w = 1;
      s.padding_h = s.padding_w = 0;
      s.stride_h = s.stride_w = 1;
    }
    const int64_t h = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
    const int64_t w = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
    if (h > 0 && w > 0 && h * w <= 8000) return s;
  }
}

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "fuzz: %s (last error: %s)\n", what, dsp_last_error());
  say_seed();
  std::abort();
}

void check(bool good, const char* what) {
  if (!good) die(what);
}

// Of those activations that have some.
dsp_activation with_parameters(int32_t activation) {
  if (activation == DSP_ACT_CLAMP) return {activation, {-0.5f, 1.25f}};
  if (activation == DSP_ACT_ELU) return {activation, {1.25f, 1.0625f}};
  return {activation, {activation == DSP_ACT_LEAKY_RELU ? 0.125f : 0.0f, 0.0f}};
}

double act(double value, int32_t activation) {
  if (std::isnan(value)) return value;
  switch (activation) {
    case DSP_ACT_NONE:
      return value;
    case DSP_ACT_RELU:
      return std::max(value, 0.0);
    case DSP_ACT_RELU6:
      return std::min(std::max(value, 0.0), 6.0);
    case DSP_ACT_CLAMP:
      return std::min(std::max(value, -0.5), 1.25);
    case DSP_ACT_LEAKY_RELU:
      return value > 0 ? value : value * 0.125;
    case DSP_ACT_HARDSIGMOID:
      return std::min(std::max(value + 3, 0.0), 6.0) / 6;
    case DSP_ACT_HARDSWISH:
      return value * std::min(std::max(value + 3, 0.0), 6.0) / 6;
    case DSP_ACT_SIGMOID:
      return 1 / (1 + std::exp(-value));
    case DSP_ACT_SILU:
      return value / (1 + std::exp(-value));
    case DSP_ACT_TANH:
      return std::tanh(value);
    case DSP_ACT_GELU:
      return value * std::erfc(-value * std::sqrt(0.5)) / 2;
    case DSP_ACT_GELU_TANH:
      return value /
             (1 + std::exp(-2 * std::sqrt(2 / std::acos(-1.0)) * (value + 0.044715 * value * value * value)));
    case DSP_ACT_ELU:
      return value > 0 ? value * 1.0625 : std::expm1(value) * 1.25;
    case DSP_ACT_MISH:
      return value * std::tanh(std::log1p(std::exp(value)));
    default:
      die("this activation has no definition here");
  }
}

// visit(n, f, output pixel, channel, input pixel, weight) for every product of the convolution
template <typename Visit>
void each_product(const dsp_conv2d_shape& s, const Layout& layout, Visit&& visit) {
  const int64_t oh = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t ow = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  const int64_t taps = s.kernel_h * s.kernel_w;
  int64_t weight = 0;
  for (size_t g = 0; g < layout.channels.size(); ++g) {
    for (const int32_t f : layout.filters[g]) {
      for (const int32_t c : layout.channels[g]) {
        for (int64_t tap = 0; tap < taps; ++tap, ++weight) {
          const int64_t ky = tap / s.kernel_w * s.dilation_h - s.padding_h;
          const int64_t kx = tap % s.kernel_w * s.dilation_w - s.padding_w;
          for (int64_t n = 0; n < s.batch; ++n) {
            for (int64_t y = 0; y < oh; ++y) {
              const int64_t iy = y * s.stride_h + ky;
              if (iy < 0 || iy >= s.height) continue;
              for (int64_t x = 0; x < ow; ++x) {
                const int64_t ix = x * s.stride_w + kx;
                if (ix < 0 || ix >= s.width) continue;
                visit(((n * layout.out + f) * oh + y) * ow + x,
                      ((n * layout.in + c) * s.height + iy) * s.width + ix, weight);
              }
            }
          }
        }
      }
    }
  }
}

void compare(const Exact& actual, const std::vector<double>& expected, const std::vector<double>& magnitude,
             const char* what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(static_cast<double>(actual.data[i]) - expected[i]);
    if (!(error <= 2e-6 * (magnitude[i] + 1e-3))) {
      std::fprintf(stderr, "%s[%zu]: %g, expected %g\n", what, i, static_cast<double>(actual.data[i]),
                   expected[i]);
      die(what);
    }
  }
}

bool same_bits(const Exact& a, const Exact& b) {
  return a.size == b.size && std::memcmp(a.data, b.data, static_cast<size_t>(a.size) * sizeof(float)) == 0;
}

void fuzz_conv() {
  const dsp_conv2d_shape s = random_shape();
  const Layout layout = random_layout(between(1, 20), between(1, 24));
  const std::vector<int32_t> plan = layout.plan();
  const int64_t plan_size = static_cast<int64_t>(plan.size());
  const int64_t oh = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t ow = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  const int64_t taps = s.kernel_h * s.kernel_w;
  const Exact x(random_floats(s.batch * layout.in * s.height * s.width));
  const Exact w(random_floats(layout.pairs() * taps));
  const int64_t out_numel = s.batch * layout.out * oh * ow;
  const Exact bias(random_floats(layout.out));
  const Exact residual(random_floats(out_numel));
  const bool with_bias = chance(0.5);
  const bool with_residual = chance(0.5);
  const int32_t activation = static_cast<int32_t>(between(0, dsp_activation_count() - 1));
  const dsp_activation given = with_parameters(activation);
  const float poison = std::numeric_limits<float>::quiet_NaN();

  std::vector<double> expected(static_cast<size_t>(out_numel)), size(expected.size(), 0.0);
  each_product(s, layout, [&](int64_t o, int64_t i, int64_t k) {
    const double product = static_cast<double>(x.data[i]) * static_cast<double>(w.data[k]);
    expected[static_cast<size_t>(o)] += product;
    size[static_cast<size_t>(o)] += std::fabs(product);
  });
  for (size_t i = 0; i < expected.size(); ++i) {
    const int64_t f = oh * ow == 0 ? 0 : static_cast<int64_t>(i) / (oh * ow) % layout.out;
    if (with_bias) expected[i] += static_cast<double>(bias.data[f]);
    if (with_residual) expected[i] += static_cast<double>(residual.data[i]);
    size[i] += 5;
    expected[i] = act(expected[i], activation);
  }
  Exact out(out_numel, poison);
  Exact again(out_numel, poison);
  const auto run = [&](const Exact& weights, int32_t prepared, Exact* to, int32_t threads,
                       const float* added) {
    return dsp_conv2d_forward(&s, x.data, x.size, weights.data, weights.size, plan.data(), plan_size,
                              with_bias ? bias.data : nullptr, added, to->data, to->size, &given, prepared,
                              threads);
  };
  const float* added = with_residual ? residual.data : nullptr;
  check(run(w, 0, &out, 1, added) == DSP_OK, "forward refused");
  compare(out, expected, size, "forward");
  Exact prepared(w.size, poison);
  check(dsp_conv2d_prepare(s.kernel_h, s.kernel_w, w.data, w.size, plan.data(), plan_size, prepared.data,
                           prepared.size) == DSP_OK,
        "prepare refused");
  if (with_residual && chance(0.3)) {
    // The residual may be the output.
    std::copy(residual.data, residual.data + residual.size, again.data);
    added = again.data;
  }
  check(run(prepared, 1, &again, static_cast<int32_t>(between(1, 5)), added) == DSP_OK,
        "prepared forward refused");
  check(same_bits(out, again), "forward depends on threads or on prepared weights");

  const Exact grad(random_floats(out_numel));
  std::vector<double> grad_x(static_cast<size_t>(x.size), 0.0), size_x(grad_x);
  std::vector<double> grad_w(static_cast<size_t>(w.size), 0.0), size_w(grad_w);
  each_product(s, layout, [&](int64_t o, int64_t i, int64_t k) {
    const double g = static_cast<double>(grad.data[o]);
    const double from_w = g * static_cast<double>(w.data[k]);
    const double from_x = g * static_cast<double>(x.data[i]);
    grad_x[static_cast<size_t>(i)] += from_w;
    size_x[static_cast<size_t>(i)] += std::fabs(from_w);
    grad_w[static_cast<size_t>(k)] += from_x;
    size_w[static_cast<size_t>(k)] += std::fabs(from_x);
  });
  Exact gx[2] = {{x.size, poison}, {x.size, poison}};
  Exact gw[2] = {{w.size, poison}, {w.size, poison}};
  for (int i = 0; i < 2; ++i) {
    const int32_t threads = i == 0 ? 1 : static_cast<int32_t>(between(1, 5));
    check(dsp_conv2d_grad_input(&s, grad.data, grad.size, w.data, w.size, plan.data(), plan_size, gx[i].data,
                                gx[i].size, threads) == DSP_OK,
          "grad_input refused");
    check(dsp_conv2d_grad_weight(&s, grad.data, grad.size, x.data, x.size, plan.data(), plan_size, gw[i].data,
                                 gw[i].size, threads) == DSP_OK,
          "grad_weight refused");
  }
  compare(gx[0], grad_x, size_x, "grad_input");
  compare(gw[0], grad_w, size_w, "grad_weight");
  check(same_bits(gx[0], gx[1]), "grad_input depends on threads");
  check(same_bits(gw[0], gw[1]), "grad_weight depends on threads");
}

// The engine with filters in lanes: values in any layout, channels stored in any order; the bits of the
// planar engine, for any number of threads.
void fuzz_lanes() {
  dsp_conv2d_shape shape = random_shape();
  shape.batch = 1;
  const bool large = chance(0.2);
  if (large && shape.height * shape.width > 300) shape.height = shape.width = 12;
  const Layout layout =
      large ? random_layout(between(1, 90), between(1, 150)) : random_layout(between(1, 20), between(1, 40));
  if (out_size(shape.height, shape.kernel_h, shape.stride_h, shape.padding_h, shape.dilation_h) < 1 ||
      out_size(shape.width, shape.kernel_w, shape.stride_w, shape.padding_w, shape.dilation_w) < 1)
    return;
  const std::vector<int32_t> words = layout.plan();
  const dsp::Plan plan(words.data(), static_cast<int64_t>(words.size()));
  const dsp::ConvShape s = dsp::check_shape(&shape, plan);
  const Exact x(random_floats(s.in_numel()));
  const Exact w(random_floats(layout.pairs() * s.taps()));
  const Exact bias(random_floats(layout.out));
  const bool with_bias = chance(0.5);
  const bool with_residual = chance(0.5);
  const int32_t activation = static_cast<int32_t>(between(0, dsp_activation_count() - 1));
  const dsp_activation given = with_parameters(activation);
  const Exact residual(random_floats(s.out_numel()));
  const float poison = std::numeric_limits<float>::quiet_NaN();
  Exact planar(s.out_numel(), poison);
  check(dsp_conv2d_forward(&shape, x.data, x.size, w.data, w.size, words.data(),
                           static_cast<int64_t>(words.size()), with_bias ? bias.data : nullptr,
                           with_residual ? residual.data : nullptr, planar.data, planar.size, &given, 0,
                           1) == DSP_OK,
        "forward refused");

  // Where channels are stored: anywhere in `room` places.
  const auto places = [&](int64_t channels, int64_t room) {
    std::vector<int32_t> place(static_cast<size_t>(room));
    for (size_t i = 0; i < place.size(); ++i) place[i] = static_cast<int32_t>(i);
    if (chance(0.5)) std::shuffle(place.begin(), place.end(), engine);
    place.resize(static_cast<size_t>(channels));
    return place;
  };
  const int64_t in_room = layout.in + (chance(0.3) ? between(0, 9) : 0);
  const int64_t out_room = layout.out + (chance(0.3) ? between(0, 9) : 0);
  const std::vector<int32_t> in_place = places(layout.in, in_room);
  const std::vector<int32_t> out_place = places(layout.out, out_room);
  // The input with its padding, channels last or in planes.
  const bool last = chance(0.7);
  const int64_t width = s.width + s.pw, rows = s.height + 2 * s.ph;
  dsp::View in{};
  int64_t in_floats = 0;
  if (last) {
    in = dsp::channels_last(s.width, s.ph, s.pw, in_room);
    in_floats = dsp::channels_last_floats(s.height, s.width, s.ph, s.pw, in_room);
  } else {
    in = {s.ph * width + s.pw, width, 1, rows * width + s.pw};
    in_floats = in_room * in.channel;
  }
  Exact padded(in_floats, 0.0f);
  for (int64_t c = 0; c < s.in_channels; ++c) {
    for (int64_t y = 0; y < s.height; ++y) {
      for (int64_t i = 0; i < s.width; ++i)
        padded.data[in.origin + y * in.row + i * in.pixel + in_place[static_cast<size_t>(c)] * in.channel] =
            x.data[(c * s.height + y) * s.width + i];
    }
  }
  const dsp::View out = dsp::channels_last(s.out_w, 0, 0, out_room);
  const auto each_out = [&](auto&& visit) {
    for (int64_t f = 0; f < s.out_channels; ++f) {
      for (int64_t p = 0; p < s.out_plane(); ++p)
        visit(f * s.out_plane() + p, p * out_room + out_place[static_cast<size_t>(f)]);
    }
  };
  dsp::LaneConv conv;
  conv.set_blocks(plan, s, in_place.data(), out_place.data());
  conv.set_bias(with_bias ? bias.data : nullptr);
  check(conv.set_views(plan, in, out, out), "lanes: places do not fit");
  Exact prepared(conv.weight_floats(), poison);
  conv.prepare(plan, w.data, prepared.data);
  for (const int threads : {1, static_cast<int>(between(2, 5))}) {
    Exact actual(s.out_plane() * out_room, poison);
    const bool in_its_place = chance(0.5);
    Exact added(actual.size, poison);
    each_out([&](int64_t at, int64_t to) { (in_its_place ? actual : added).data[to] = residual.data[at]; });
    conv.run(padded.data, prepared.data, with_residual ? (in_its_place ? actual.data : added.data) : nullptr,
             actual.data, dsp::make_activation(&given),
             with_residual && in_its_place && activation == DSP_ACT_NONE && chance(0.5), threads);
    each_out([&](int64_t at, int64_t to) {
      if (actual.data[to] != planar.data[at]) die("lanes: other values than the planar engine");
    });
    const int64_t untouched =
        std::count_if(actual.data, actual.data + actual.size, [](float value) { return std::isnan(value); });
    check(untouched == s.out_plane() * (out_room - layout.out),
          "lanes: a place beside the channels is written");
  }
}

// One word or one argument changed: either it is refused, or it was a change that keeps the plan valid; never
// may memory outside the buffers be touched.
void fuzz_bad_conv() {
  dsp_conv2d_shape s = random_shape();
  const Layout layout = random_layout(between(1, 8), between(1, 8));
  std::vector<int32_t> plan = layout.plan();
  const int64_t oh = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t ow = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  const Exact x(random_floats(s.batch * layout.in * s.height * s.width));
  const Exact w(random_floats(layout.pairs() * s.kernel_h * s.kernel_w));
  Exact out(s.batch * layout.out * oh * ow, 0.0f);
  Exact gx(x.size, 0.0f);
  Exact gw(w.size, 0.0f);
  constexpr int32_t kOdd[] = {-1,
                              0,
                              1,
                              2,
                              7,
                              8,
                              1000,
                              1 << 20,
                              1 << 30,
                              std::numeric_limits<int32_t>::max(),
                              std::numeric_limits<int32_t>::min()};
  int64_t plan_size = static_cast<int64_t>(plan.size());
  int64_t x_size = x.size;
  int32_t threads = 2;
  const int64_t kind = between(0, 3);
  if (kind == 0) {
    for (int64_t i = between(1, 3); i > 0; --i)
      plan[static_cast<size_t>(between(0, plan_size - 1))] =
          chance(0.5) ? kOdd[between(0, 10)] : static_cast<int32_t>(between(-2, 40));
  } else if (kind == 1) {
    int64_t* const fields[] = {&s.batch,     &s.height,     &s.width,     &s.kernel_h,
                               &s.kernel_w,  &s.stride_h,   &s.stride_w,  &s.padding_h,
                               &s.padding_w, &s.dilation_h, &s.dilation_w};
    constexpr int64_t kWide[] = {-1,
                                 0,
                                 3,
                                 int64_t{1} << 30,
                                 (int64_t{1} << 31) - 1,
                                 int64_t{1} << 31,
                                 std::numeric_limits<int64_t>::max(),
                                 std::numeric_limits<int64_t>::min()};
    for (int64_t i = between(1, 3); i > 0; --i) *fields[between(0, 10)] = kWide[between(0, 7)];
  } else if (kind == 2) {
    plan_size = between(0, plan_size);
  } else {
    if (chance(0.5)) x_size += chance(0.5) ? 1 : -1;
    threads = static_cast<int32_t>(between(-1, 1));
  }
  const std::vector<int32_t> exact(plan.begin(), plan.begin() + plan_size);
  dsp_conv2d_forward(&s, x.data, x_size, w.data, w.size, exact.data(), plan_size, nullptr, nullptr, out.data,
                     out.size, nullptr, 0, threads);
  dsp_conv2d_grad_input(&s, out.data, out.size, w.data, w.size, exact.data(), plan_size, gx.data, x_size,
                        threads);
  dsp_conv2d_grad_weight(&s, out.data, out.size, x.data, x_size, exact.data(), plan_size, gw.data, gw.size,
                         threads);
  Exact prepared(w.size, 0.0f);
  dsp_conv2d_prepare(s.kernel_h, s.kernel_w, w.data, w.size, exact.data(), plan_size, prepared.data,
                     prepared.size);
}

// ---- programs ----

struct Tensor {
  int64_t channels, height, width;
  std::vector<double> data;
};

double at(const Tensor& t, int64_t c, int64_t y, int64_t x) {
  return t.data[static_cast<size_t>((c * t.height + y) * t.width + x)];
}

struct Network {
  std::vector<int64_t> words;
  std::vector<float> floats;
  std::vector<int64_t> begins;  // where each field's floats begin
  std::vector<Tensor> values;
  size_t inputs = 0;
  std::vector<int64_t> outputs;
};

int64_t store(Network* net, const std::vector<float>& values) {
  const int64_t place = static_cast<int64_t>(net->floats.size());
  net->floats.insert(net->floats.end(), values.begin(), values.end());
  net->begins.push_back(place);
  return place;
}

void add_step(Network* net, int64_t op, const std::vector<int64_t>& arguments) {
  net->words.push_back(op);
  net->words.push_back(static_cast<int64_t>(arguments.size()) + 2);
  net->words.insert(net->words.end(), arguments.begin(), arguments.end());
}

// The same with an activation: its code is arguments[place], where its parameters are comes behind it.
void add_step(Network* net, int64_t op, std::vector<int64_t> arguments, size_t place) {
  const int32_t kind = static_cast<int32_t>(arguments[place]);
  const int32_t count = dsp_activation_at(kind)->parameters;
  if (count > 0) {
    const dsp_activation known = with_parameters(kind);
    const int64_t at = store(net, std::vector<float>(known.parameters, known.parameters + count));
    arguments.insert(arguments.begin() + static_cast<int64_t>(place) + 1, at);
  }
  add_step(net, op, arguments);
}

// A value with the given shape, or -1.
int64_t find_value(const Network& net, int64_t channels, int64_t height, int64_t width) {
  for (size_t i = net.values.size(); i-- > 0;) {
    const Tensor& t = net.values[i];
    if (t.channels == channels && t.height == height && t.width == width) return static_cast<int64_t>(i);
  }
  return -1;
}

Network random_network() {
  Network net;
  // Often as CNNs have them: maps of whole or half vectors, halved by stride 2.
  const bool usual = chance(0.4);
  constexpr int64_t kUsual[] = {4, 8, 16, 32, 48};
  const auto random_input = [&](int64_t height, int64_t width) {
    Tensor input{chance(0.9) ? between(1, 6) : between(15, 20), height, width, {}};
    for (int64_t i = 0; i < input.channels * input.height * input.width; ++i)
      input.data.push_back(static_cast<double>(normal()));
    net.values.push_back(input);
  };
  const auto random_side = [&] { return usual ? kUsual[between(0, 4)] : random_size(); };
  random_input(random_side(), random_side());
  while (chance(0.3)) {  // often of one size with the first, so that they are concatenated and added
    const Tensor first = net.values.front();
    random_input(chance(0.7) ? first.height : random_side(), chance(0.7) ? first.width : random_side());
  }
  net.inputs = net.values.size();
  const int64_t steps = between(1, 8);
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t id = chance(0.7) ? static_cast<int64_t>(net.values.size()) - 1
                                   : between(0, static_cast<int64_t>(net.values.size()) - 1);
    const Tensor x = net.values[static_cast<size_t>(id)];
    Tensor y{};
    const int32_t activation = static_cast<int32_t>(between(0, dsp_activation_count() - 1));
    const int64_t kind = usual && chance(0.7) ? 0 : between(0, 13);
    if (kind <= 4) {
      dsp_conv2d_shape s{};
      do {
        s = random_shape();
        s.batch = 1;
        s.height = x.height;
        s.width = x.width;
        if (usual && chance(0.8)) {
          constexpr int64_t kKernels[] = {3, 3, 1, 1, 5, 7};
          s.kernel_h = s.kernel_w = kKernels[between(0, 5)];
          s.padding_h = s.padding_w = chance(0.8) ? s.kernel_h / 2 : between(0, 4);
          s.stride_h = s.stride_w = chance(0.5) ? 1 : 2;
          if (chance(0.8)) s.dilation_h = s.dilation_w = 1;
        }
      } while (out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h) < 1 ||
               out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w) < 1 || s.dilation_h > 3 ||
               s.dilation_w > 3 || s.padding_h > 9 || s.padding_w > 9);
      y.height = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
      y.width = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
      y.channels = x.height * x.width <= 300 && chance(0.2) ? between(9, 90) : between(1, 8);
      const int64_t residual = chance(0.5) ? find_value(net, y.channels, y.height, y.width) : -1;
      const Layout layout = random_layout(x.channels, y.channels);
      const std::vector<int32_t> plan = layout.plan();
      std::vector<float> w = random_floats(layout.pairs() * s.kernel_h * s.kernel_w);
      for (float& value : w) value *= 0.2f;
      const std::vector<float> bias = random_floats(y.channels);
      const bool with_bias = chance(0.5);
      y.data.assign(static_cast<size_t>(y.channels * y.height * y.width), 0.0);
      each_product(s, layout, [&](int64_t o, int64_t in, int64_t k) {
        y.data[static_cast<size_t>(o)] +=
            x.data[static_cast<size_t>(in)] * static_cast<double>(w[static_cast<size_t>(k)]);
      });
      for (size_t o = 0; o < y.data.size(); ++o) {
        if (with_bias) y.data[o] += static_cast<double>(bias[o / static_cast<size_t>(y.height * y.width)]);
        if (residual >= 0) y.data[o] += net.values[static_cast<size_t>(residual)].data[o];
        y.data[o] = act(y.data[o], activation);
      }
      std::vector<int64_t> arguments = {id,
                                        residual,
                                        activation,
                                        s.kernel_h,
                                        s.kernel_w,
                                        s.stride_h,
                                        s.stride_w,
                                        s.padding_h,
                                        s.padding_w,
                                        s.dilation_h,
                                        s.dilation_w,
                                        store(&net, w),
                                        0,
                                        static_cast<int64_t>(plan.size())};
      arguments[12] = with_bias ? store(&net, bias) : -1;
      arguments.insert(arguments.end(), plan.begin(), plan.end());
      add_step(&net, DSP_OP_CONV, arguments, 2);
    } else if (kind == 5) {
      y = x;
      const int64_t other = find_value(net, x.channels, x.height, x.width);
      for (size_t o = 0; o < y.data.size(); ++o)
        y.data[o] = act(y.data[o] + net.values[static_cast<size_t>(other)].data[o], activation);
      add_step(&net, DSP_OP_ADD, {id, other, activation}, 2);
    } else if (kind == 6 && x.height >= 2 && x.width >= 2) {
      const int64_t k = between(2, std::min<int64_t>(3, std::min(x.height, x.width)));
      const int64_t stride = between(1, 3);
      const int64_t pad = between(0, k / 2);
      y = {x.channels, out_size(x.height, k, stride, pad, 1), out_size(x.width, k, stride, pad, 1), {}};
      for (int64_t c = 0; c < y.channels; ++c) {
        for (int64_t oy = 0; oy < y.height; ++oy) {
          for (int64_t ox = 0; ox < y.width; ++ox) {
            double best = -std::numeric_limits<double>::infinity();
            for (int64_t ky = 0; ky < k; ++ky) {
              for (int64_t kx = 0; kx < k; ++kx) {
                const int64_t iy = oy * stride - pad + ky;
                const int64_t ix = ox * stride - pad + kx;
                if (iy >= 0 && iy < x.height && ix >= 0 && ix < x.width)
                  best = std::max(best, at(x, c, iy, ix));
              }
            }
            y.data.push_back(best);
          }
        }
      }
      add_step(&net, DSP_OP_MAX_POOL, {id, k, k, stride, stride, pad, pad, 1, 1, 0});
    } else if (kind == 7) {
      y = {x.channels, between(1, 4), between(1, 4), {}};
      for (int64_t c = 0; c < y.channels; ++c) {
        for (int64_t oy = 0; oy < y.height; ++oy) {
          for (int64_t ox = 0; ox < y.width; ++ox) {
            const int64_t y0 = oy * x.height / y.height, y1 = ((oy + 1) * x.height + y.height - 1) / y.height;
            const int64_t x0 = ox * x.width / y.width, x1 = ((ox + 1) * x.width + y.width - 1) / y.width;
            double sum = 0;
            for (int64_t iy = y0; iy < y1; ++iy) {
              for (int64_t ix = x0; ix < x1; ++ix) sum += at(x, c, iy, ix);
            }
            y.data.push_back(sum / static_cast<double>((y1 - y0) * (x1 - x0)));
          }
        }
      }
      add_step(&net, DSP_OP_ADAPTIVE_AVG_POOL, {id, y.height, y.width});
    } else if (kind == 10) {
      y = {between(1, x.channels + 2), between(1, x.height + 2), between(1, x.width + 2), {}};
      std::vector<int64_t> numbers[3];
      const int64_t sizes[3] = {x.channels, x.height, x.width}, counts[3] = {y.channels, y.height, y.width};
      for (int d = 0; d < 3; ++d) {
        for (int64_t n = 1; n <= counts[d]; ++n)
          numbers[d].push_back(chance(0.7) ? std::min(n, sizes[d]) : between(0, sizes[d]));
      }
      for (const int64_t c : numbers[0]) {
        for (const int64_t row : numbers[1]) {
          for (const int64_t column : numbers[2])
            y.data.push_back(c && row && column ? at(x, c - 1, row - 1, column - 1) : -0.75);
        }
      }
      std::vector<int64_t> arguments = {id, store(&net, {-0.75f})};
      for (const auto& list : numbers) {
        arguments.push_back(static_cast<int64_t>(list.size()));
        arguments.insert(arguments.end(), list.begin(), list.end());
      }
      add_step(&net, DSP_OP_GATHER, arguments);
    } else if (kind == 11) {
      y = {between(1, 6), between(1, 9), between(1, 9), {}};
      std::vector<int64_t> arguments = {id, y.channels, y.height, y.width, y.channels * y.height * y.width};
      const int64_t numel = static_cast<int64_t>(x.data.size());
      for (int64_t n = 0; n < y.channels * y.height * y.width; ++n) {
        arguments.push_back(chance(0.5) ? n % numel : between(0, numel - 1));
        y.data.push_back(x.data[static_cast<size_t>(arguments.back())]);
      }
      add_step(&net, DSP_OP_REORDER, arguments);
    } else if (kind == 12) {
      // Of a value and a constant, which broadcast.
      Tensor more{chance(0.5) ? 1 : x.channels, chance(0.5) ? 1 : x.height, chance(0.5) ? 1 : x.width, {}};
      const std::vector<float> content = random_floats(more.channels * more.height * more.width);
      for (const float value : content) more.data.push_back(static_cast<double>(value));
      add_step(&net, DSP_OP_CONSTANT, {more.channels, more.height, more.width, store(&net, content)});
      net.values.push_back(more);
      const bool swapped = chance(0.5);
      const int64_t op = between(0, 6) == 3 ? 2 : between(0, 2);  // no division: it has no bound
      y = {x.channels, x.height, x.width, {}};
      for (int64_t c = 0; c < y.channels; ++c) {
        for (int64_t row = 0; row < y.height; ++row) {
          for (int64_t column = 0; column < y.width; ++column) {
            double a = at(x, c, row, column);
            double b = at(more, std::min(c, more.channels - 1), std::min(row, more.height - 1),
                          std::min(column, more.width - 1));
            if (swapped) std::swap(a, b);
            y.data.push_back(act(op == 0 ? a + b : (op == 1 ? a - b : a * b), activation));
          }
        }
      }
      const int64_t constant = static_cast<int64_t>(net.values.size()) - 1;
      add_step(&net, DSP_OP_ELEMENTWISE, {swapped ? constant : id, swapped ? id : constant, op, activation},
               3);
    } else if (kind == 8) {
      y = x;
      const int64_t other = find_value(net, x.channels, x.height, x.width);
      const Tensor& more = net.values[static_cast<size_t>(other)];
      y.channels += more.channels;
      y.data.insert(y.data.end(), more.data.begin(), more.data.end());
      add_step(&net, DSP_OP_CONCAT, {2, id, other});
    } else {
      // flatten, and a linear layer over it where it is small
      y = {x.channels * x.height * x.width, 1, 1, x.data};
      add_step(&net, DSP_OP_FLATTEN, {id});
      if (y.channels < 600) {
        net.values.push_back(y);
        Tensor z{between(1, 9), 1, 1, {}};
        const std::vector<float> w = random_floats(z.channels * y.channels);
        for (int64_t o = 0; o < z.channels; ++o) {
          double sum = 0;
          for (int64_t k = 0; k < y.channels; ++k)
            sum += y.data[static_cast<size_t>(k)] *
                   static_cast<double>(w[static_cast<size_t>(o * y.channels + k)]);
          z.data.push_back(act(sum, activation));
        }
        add_step(&net, DSP_OP_LINEAR,
                 {static_cast<int64_t>(net.values.size()) - 1, activation, z.channels, store(&net, w), -1},
                 1);
        y = z;
      }
    }
    net.values.push_back(y);
  }
  const int64_t inputs = static_cast<int64_t>(net.inputs);
  const int64_t last = static_cast<int64_t>(net.values.size()) - 1;
  net.outputs = {chance(0.8) ? last : between(inputs, last)};
  while (chance(0.4) && static_cast<int64_t>(net.outputs.size()) <= last - inputs)
    net.outputs.push_back(between(inputs, last));
  std::vector<int64_t> head = {DSP_PROGRAM_MAGIC,
                               DSP_PROGRAM_VERSION,
                               inputs,
                               last + 1 - inputs,
                               static_cast<int64_t>(net.outputs.size()),
                               0};
  for (size_t i = 0; i < net.inputs; ++i)
    head.insert(head.end(), {net.values[i].channels, net.values[i].height, net.values[i].width});
  head.insert(head.end(), net.outputs.begin(), net.outputs.end());
  head[5] = static_cast<int64_t>(head.size() + net.words.size());
  net.words.insert(net.words.begin(), head.begin(), head.end());
  return net;
}

// A program from floats in pieces that end at `ends`, and are gone afterwards.
dsp_status create(const std::vector<int64_t>& words, const std::vector<float>& floats,
                  const std::vector<int64_t>& ends, dsp_program** program) {
  std::vector<std::unique_ptr<Exact>> pieces;
  std::vector<const float*> begins;
  std::vector<int64_t> numel;
  int64_t begin = 0;
  for (const int64_t end : ends) {
    pieces.push_back(
        std::make_unique<Exact>(std::vector<float>(floats.begin() + begin, floats.begin() + end)));
    begins.push_back(pieces.back()->data);
    numel.push_back(end - begin);
    begin = end;
  }
  const int64_t count = static_cast<int64_t>(words.size());
  if (ends.size() == 1) return dsp_program_create(words.data(), count, begins[0], numel[0], program);
  return dsp_program_create_from(words.data(), count, begins.data(), numel.data(),
                                 static_cast<int64_t>(ends.size()), program);
}

void fuzz_program() {
  const Network net = random_network();
  constexpr const char* kEngines[] = {"", "planar", "lanes"};
  setenv("DSP_CPU_ENGINE", kEngines[between(0, 2)], 1);
  setenv("DSP_CPU_CHAIN", chance(0.5) ? "1" : "0", 1);
  // What a field names lies in one piece.
  std::vector<int64_t> ends;
  for (const int64_t begin : net.begins) {
    if (chance(0.3)) ends.push_back(begin);
  }
  ends.push_back(static_cast<int64_t>(net.floats.size()));
  dsp_program* program = nullptr;
  check(create(net.words, net.floats, ends, &program) == DSP_OK, "program refused");
  // The first image is the one that the reference was computed for; each has the bits that it has alone.
  const int64_t batch = between(0, 7);
  std::vector<std::vector<float>> in;
  for (size_t i = 0; i < net.inputs; ++i) {
    const std::vector<double>& first = net.values[i].data;
    in.push_back(random_floats(batch * static_cast<int64_t>(first.size())));
    for (size_t j = 0; batch > 0 && j < first.size(); ++j) in[i][j] = static_cast<float>(first[j]);
  }
  // Images [begin, begin + count) on so many threads: of each output, what comes out.
  const auto run = [&](int64_t begin, int64_t count, int32_t threads) {
    std::vector<Exact> given, made;
    for (size_t i = 0; i < in.size(); ++i) {
      const int64_t numel = static_cast<int64_t>(net.values[i].data.size());
      given.emplace_back(
          std::vector<float>(in[i].begin() + begin * numel, in[i].begin() + (begin + count) * numel));
    }
    for (const int64_t id : net.outputs) {
      const int64_t numel = static_cast<int64_t>(net.values[static_cast<size_t>(id)].data.size());
      made.emplace_back(count * numel, std::numeric_limits<float>::quiet_NaN());
    }
    std::vector<const float*> from;
    std::vector<float*> to;
    std::vector<int64_t> from_numel, to_numel;
    for (const Exact& x : given) {
      from.push_back(x.data);
      from_numel.push_back(x.size);
    }
    for (const Exact& y : made) {
      to.push_back(y.data);
      to_numel.push_back(y.size);
    }
    check(dsp_program_run(program, from.data(), from_numel.data(), to.data(), to_numel.data(), count,
                          threads) == DSP_OK,
          "program does not run");
    std::vector<std::vector<float>> results;
    for (const Exact& y : made) results.emplace_back(y.data, y.data + y.size);
    return results;
  };
  double scale = 1;
  for (const Tensor& t : net.values) {
    for (const double value : t.data) scale = std::max(scale, std::fabs(value));
  }
  std::vector<std::vector<float>> alone(net.outputs.size());
  for (int64_t n = 0; n < batch; ++n) {
    const std::vector<std::vector<float>> image = run(n, 1, 1);
    for (size_t i = 0; i < image.size(); ++i)
      alone[i].insert(alone[i].end(), image[i].begin(), image[i].end());
  }
  for (size_t i = 0; batch > 0 && i < net.outputs.size(); ++i) {
    const std::vector<double>& y = net.values[static_cast<size_t>(net.outputs[i])].data;
    for (size_t j = 0; j < y.size(); ++j) {
      if (!(std::fabs(static_cast<double>(alone[i][j]) - y[j]) <= 1e-4 * scale)) die("program: wrong result");
    }
  }
  const auto work = [&](int32_t threads) {
    const std::vector<std::vector<float>> all = run(0, batch, threads);
    for (size_t i = 0; i < all.size(); ++i) {
      if (all[i].size() != alone[i].size() ||
          (!all[i].empty() &&
           std::memcmp(all[i].data(), alone[i].data(), all[i].size() * sizeof(float)) != 0))
        die("program: an image has other bits than alone");
    }
  };
  work(static_cast<int32_t>(between(1, 4)));
  work(1);
  if (chance(0.2)) {
    std::thread other([&] { work(2); });
    work(3);
    other.join();
  }
  dsp_program_destroy(program);
}

void fuzz_bad_program() {
  Network net = random_network();
  constexpr int64_t kWide[] = {-2,
                               -1,
                               0,
                               1,
                               2,
                               9,
                               1000,
                               int64_t{1} << 33,
                               std::numeric_limits<int64_t>::max(),
                               std::numeric_limits<int64_t>::min()};
  for (int64_t i = between(1, 3); i > 0; --i) {
    int64_t& word = net.words[static_cast<size_t>(between(0, static_cast<int64_t>(net.words.size()) - 1))];
    word = chance(0.5)
               ? kWide[between(0, 9)]
               : static_cast<int64_t>(static_cast<uint64_t>(word) + static_cast<uint64_t>(between(-2, 2)));
  }
  if (chance(0.2)) net.words.resize(static_cast<size_t>(between(0, static_cast<int64_t>(net.words.size()))));
  const std::vector<int64_t> words(net.words);
  std::vector<int64_t> ends(static_cast<size_t>(between(0, 2)));
  for (int64_t& end : ends) end = between(0, static_cast<int64_t>(net.floats.size()));
  std::sort(ends.begin(), ends.end());
  ends.push_back(static_cast<int64_t>(net.floats.size()));
  dsp_program* program = nullptr;
  if (create(words, net.floats, ends, &program) != DSP_OK) {
    check(std::strlen(dsp_last_error()) > 0, "no reason given");
    return;
  }
  // Still a program, if another one: it has to run within its own sizes.
  std::vector<Exact> in, out;
  std::vector<const float*> from;
  std::vector<float*> to;
  std::vector<int64_t> from_numel, to_numel;
  dsp_program_memory memory{};
  check(dsp_program_memory_use(program, &memory) == DSP_OK, "no memory use");
  bool small = memory.arena_bytes < (1 << 26) && memory.scratch_bytes < (1 << 26);
  int64_t shape[3] = {0, 0, 0};
  check(dsp_program_input(program, dsp_program_inputs(program), shape) != DSP_OK, "an input beyond the last");
  for (int64_t i = 0; small && i < dsp_program_inputs(program); ++i) {
    check(dsp_program_input(program, i, shape) == DSP_OK, "no input shape");
    from_numel.push_back(shape[0] * shape[1] * shape[2]);
    small = from_numel.back() < (1 << 20);
    if (small) in.emplace_back(from_numel.back(), 1.0f);
  }
  for (int64_t i = 0; small && i < dsp_program_outputs(program); ++i) {
    check(dsp_program_output(program, i, shape) == DSP_OK, "no output shape");
    to_numel.push_back(shape[0] * shape[1] * shape[2]);
    small = to_numel.back() < (1 << 20);
    if (small) out.emplace_back(to_numel.back(), 0.0f);
  }
  if (small) {
    for (const Exact& x : in) from.push_back(x.data);
    for (const Exact& y : out) to.push_back(y.data);
    check(
        dsp_program_run(program, from.data(), from_numel.data(), to.data(), to_numel.data(), 1, 2) == DSP_OK,
        "program does not run");
  }
  dsp_program_destroy(program);
}

// Batch normalisation over buffers of exactly the size that it asks for, against sums in double.
void fuzz_norm() {
  const dsp_norm_shape shape{between(1, 4), between(1, 5), between(1, 70)};
  const int64_t numel = shape.batch * shape.channels * shape.pixels;
  const bool affine = chance(0.7);
  const bool with_residual = chance(0.5);
  const bool relu = chance(0.5);
  const auto randoms = [](int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = static_cast<float>(between(-1000, 1000)) / 300.0f;
    return values;
  };
  std::vector<float> values = randoms(numel);
  std::vector<uint8_t> marks(static_cast<size_t>(shape.channels));
  for (uint8_t& mark : marks) mark = chance(0.3) ? 1 : 0;
  const auto each = [&](auto&& visit) {
    for (int64_t n = 0; n < shape.batch; ++n)
      for (int64_t c = 0; c < shape.channels; ++c)
        for (int64_t p = 0; p < shape.pixels; ++p) visit(c, (n * shape.channels + c) * shape.pixels + p);
  };
  each([&](int64_t c, int64_t i) {
    if (marks[static_cast<size_t>(c)] != 0) values[static_cast<size_t>(i)] = 0.0f;
  });
  const Exact x(values), weight(randoms(shape.channels)), bias(randoms(shape.channels));
  const Exact residual(randoms(numel)), grad(randoms(numel));
  const float nan = std::numeric_limits<float>::quiet_NaN();
  Exact mean(shape.channels, nan), variance(shape.channels, nan), out(numel, nan);
  Exact of_x(numel, nan), of_residual(numel, nan), of_weight(shape.channels, nan),
      of_bias(shape.channels, nan);
  const uint8_t* blank = chance(0.5) ? marks.data() : nullptr;
  const int32_t act = relu ? DSP_ACT_RELU : DSP_ACT_NONE;
  const int32_t threads = static_cast<int32_t>(between(1, 4));
  const float* w = affine ? weight.data : nullptr;
  const float* b = affine ? bias.data : nullptr;
  check(dsp_batch_norm_forward(&shape, x.data, numel, w, b, with_residual ? residual.data : nullptr, blank,
                               1e-3, act, mean.data, variance.data, out.data, threads) == DSP_OK,
        "batch norm does not run");
  check(dsp_batch_norm_backward(&shape, grad.data, x.data, with_residual && relu ? out.data : nullptr, numel,
                                w, b, mean.data, variance.data, blank, 1e-3, act, of_x.data,
                                with_residual ? of_residual.data : nullptr, of_weight.data, of_bias.data,
                                threads) == DSP_OK,
        "the gradient of batch norm does not run");
  std::vector<double> sum(marks.size()), square(marks.size()), gradient(marks.size());
  const double count = static_cast<double>(shape.batch * shape.pixels);
  each([&](int64_t c, int64_t i) { sum[static_cast<size_t>(c)] += static_cast<double>(x.data[i]) / count; });
  each([&](int64_t c, int64_t i) {
    const double off = static_cast<double>(x.data[i]) - sum[static_cast<size_t>(c)];
    square[static_cast<size_t>(c)] += off * off / count;
  });
  each([&](int64_t c, int64_t i) {
    const size_t at = static_cast<size_t>(c);
    const double scale = (affine ? static_cast<double>(weight.data[c]) : 1.0) / std::sqrt(square[at] + 1e-3);
    double right = (static_cast<double>(x.data[i]) - sum[at]) * scale;
    if (affine) right += static_cast<double>(bias.data[c]);
    if (with_residual) right += static_cast<double>(residual.data[i]);
    if (relu && right < 0) right = 0;
    if (!(std::fabs(static_cast<double>(out.data[i]) - right) <= 1e-3 * (1 + std::fabs(scale))))
      die("batch norm: wrong result");
    const double passed = relu && !(out.data[i] > 0.0f) ? 0.0 : static_cast<double>(grad.data[i]);
    gradient[at] += passed;
    if (with_residual && std::fabs(static_cast<double>(of_residual.data[i]) - passed) > 0)
      die("batch norm: wrong gradient of the residual");
    const bool unset = blank != nullptr && blank[at] != 0;
    if (unset != std::isnan(of_x.data[i]))
      die("batch norm: a gradient is not set, or set where it should not be");
  });
  for (int64_t c = 0; c < shape.channels; ++c) {
    const double right = gradient[static_cast<size_t>(c)];
    if (!(std::fabs(static_cast<double>(of_bias.data[c]) - right) <= 1e-3 * (1 + count)))
      die("batch norm: wrong gradient of the bias");
  }
  dsp_norm_shape bad = shape;
  (chance(0.5) ? bad.pixels : bad.batch) += between(1, 3);
  check(dsp_batch_norm_forward(&bad, x.data, numel, w, b, nullptr, nullptr, 1e-3, act, mean.data,
                               variance.data, out.data, 1) != DSP_OK,
        "batch norm takes sizes that do not fit");
}

}  // namespace

// Called by the sanitizer before it reports.
extern "C" void __asan_on_error() { say_seed(); }

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--seconds") == 0) seconds = std::atof(argv[i + 1]);
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
  }
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  // Each round has a seed of its own: a failing round can be run alone with --seed and --seconds 0.
  do {
    current_seed = seed + static_cast<uint64_t>(rounds);
    engine.seed(current_seed);
    fuzz_conv();
    fuzz_lanes();
    fuzz_bad_conv();
    fuzz_program();
    fuzz_bad_program();
    fuzz_norm();
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%lld rounds on %s\n", static_cast<long long>(rounds), dsp_cpu_isa());
  return 0;
}
