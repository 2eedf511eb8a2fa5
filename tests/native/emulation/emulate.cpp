// The CUDA kernels on the host, over random layouts, against plain loops in double. Built with
// AddressSanitizer and UBSan; every buffer has exactly the size that the interface asks for and starts as
// NaN.
//
//   dsp_emulate [--seconds N] [--rounds N] [--seed N]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dsp.h"
#include "emulation.h"

namespace {

enum Precision { kF16, kBf16, kTf32, kF32 };
enum Fill { kAuto, kRuns, kGather };

std::mt19937_64 engine;
uint64_t current_seed = 0;

int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(engine);
}
bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "emulate: %s (last error: %s)\nemulate: failed in the round of --seed %llu\n",
               what.c_str(), dsp_last_error(), static_cast<unsigned long long>(current_seed));
  std::_Exit(4);
}

void check(bool good, const char* what) {
  if (!good) die(what);
}

// A tensor in "device" memory: exactly as large as asked for, so that the sanitizer sees the first byte
// beyond.
struct Buffer {
  Buffer(int64_t count, int64_t each) : numel(count), bytes(static_cast<size_t>(count * each)) {
    data = static_cast<char*>(std::malloc(std::max<size_t>(bytes, 1)));
    std::memset(data, 0xff, bytes);  // NaN in every precision
    emulation::add_memory(data, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    emulation::remove_memory(data);
    std::free(data);
  }
  int64_t numel;
  size_t bytes;
  char* data;
};

struct Tensor : Buffer {
  Tensor(int64_t count, Precision p) : Buffer(count, p <= kBf16 ? 2 : 4), precision(p) {}
  void set(int64_t i, float value) {
    if (precision <= kBf16) {
      const uint16_t bits = precision == kF16 ? emulation::to_f16(value) : emulation::to_bf16(value);
      std::memcpy(data + i * 2, &bits, 2);
    } else {
      std::memcpy(data + i * 4, &value, 4);
    }
  }
  double get(int64_t i) const {
    if (precision > kBf16) {
      float value;
      std::memcpy(&value, data + i * 4, 4);
      return static_cast<double>(value);
    }
    uint16_t bits;
    std::memcpy(&bits, data + i * 2, 2);
    if (precision == kF16) return static_cast<double>(emulation::from_f16(bits));
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return static_cast<double>(value);
  }
  void randomise() {
    std::normal_distribution<float> normal(0, 1);
    for (int64_t i = 0; i < numel; ++i) set(i, normal(engine));
  }
  Precision precision;
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
    int32_t live = 0, pair = 0;
    const auto entry = [&](size_t g) { return words.data() + DSP_PLAN_HEADER + g * DSP_PLAN_GROUP; };
    for (size_t g = 0; g < groups; ++g) {
      entry(g)[0] = static_cast<int32_t>(channels[g].size());
      entry(g)[1] = static_cast<int32_t>(filters[g].size());
      entry(g)[4] = pair;
      pair += entry(g)[0] * entry(g)[1];
      live += entry(g)[1];
    }
    for (const int which : {2, 3}) {
      for (size_t g = 0; g < groups; ++g) {
        const auto& list = which == 2 ? channels[g] : filters[g];
        entry(g)[which] = static_cast<int32_t>(words.size());
        words.insert(words.end(), list.begin(), list.end());
      }
    }
    const int32_t header[] = {DSP_PLAN_MAGIC,
                              static_cast<int32_t>(in),
                              static_cast<int32_t>(out),
                              static_cast<int32_t>(groups),
                              pair,
                              static_cast<int32_t>(words.size()),
                              live,
                              0};
    std::copy(std::begin(header), std::end(header), words.begin());
    return words;
  }
};

// Channel sets of runs, as learned and ordered layouts have them, or of single channels.
Layout random_layout(int64_t in, int64_t out) {
  Layout layout{in, out, {}, {}};
  std::vector<int32_t> order(static_cast<size_t>(out));
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
  if (chance(0.7)) std::shuffle(order.begin(), order.end(), engine);
  int64_t live = chance(0.3) ? between(0, out) : out;
  const int64_t groups = between(1, 4);
  int64_t used = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t take = g == groups - 1 ? live - used : between(0, live - used);
    layout.filters.emplace_back(order.begin() + used, order.begin() + used + take);
    used += take;
    std::vector<int32_t> all(static_cast<size_t>(in));
    for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int32_t>(i);
    std::vector<int32_t> channels;
    if (chance(0.5)) {
      const int64_t runs = between(1, 3);
      std::vector<bool> member(static_cast<size_t>(in), false);
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t first = between(0, in - 1);
        const int64_t last = std::min(in, first + between(1, std::max<int64_t>(1, in / 2)));
        for (int64_t c = first; c < last; ++c) member[static_cast<size_t>(c)] = true;
      }
      for (int64_t c = 0; c < in; ++c)
        if (member[static_cast<size_t>(c)]) channels.push_back(static_cast<int32_t>(c));
    } else {
      std::shuffle(all.begin(), all.end(), engine);
      channels.assign(all.begin(), all.begin() + between(1, in));
    }
    layout.channels.push_back(channels);
  }
  return layout;
}

int64_t out_size(int64_t in, int64_t k, int64_t s, int64_t p, int64_t d) {
  const int64_t room = in + 2 * p - d * (k - 1) - 1;
  return room < 0 ? 0 : room / s + 1;
}

dsp_conv2d_shape random_shape() {
  for (;;) {
    dsp_conv2d_shape s{};
    constexpr int64_t kSizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 12, 14, 16, 17};
    constexpr int64_t kKernels[] = {1, 2, 3, 3, 4, 5, 7};
    s.batch = between(1, 4);
    s.height = kSizes[between(0, 11)];
    s.width = kSizes[between(0, 11)];
    const int kind = static_cast<int>(between(0, 3));
    s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    if (kind == 0) {
      s.kernel_h = s.kernel_w = 1;
      if (chance(0.4)) s.stride_h = s.stride_w = between(1, 3);
    } else if (kind == 1) {
      s.kernel_h = s.kernel_w = 3;
      s.padding_h = s.padding_w = 1;
      if (chance(0.3)) s.stride_h = s.stride_w = 2;
    } else {
      s.kernel_h = kKernels[between(0, 6)];
      s.kernel_w = kKernels[between(0, 6)];
      s.stride_h = between(1, 3);
      s.stride_w = between(1, 3);
      s.padding_h = between(0, 4);
      s.padding_w = between(0, 4);
      s.dilation_h = chance(0.7) ? 1 : between(1, chance(0.1) ? 40 : 4);
      s.dilation_w = chance(0.7) ? 1 : between(1, chance(0.1) ? 40 : 4);
      if (chance(0.1)) s.padding_h = 30;
    }
    const int64_t h = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
    const int64_t w = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
    if (h > 0 && w > 0 && s.batch * h * w <= 1200 && s.batch * h * w * s.kernel_h * s.kernel_w <= 12000)
      return s;
  }
}

// visit(output element, input element, weight) for every product; tensors are channels last.
template <typename Visit>
void each_product(const dsp_conv2d_shape& s, const Layout& layout, Visit&& visit) {
  const int64_t oh = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t ow = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  int64_t weight = 0;
  for (size_t g = 0; g < layout.channels.size(); ++g) {
    for (const int32_t f : layout.filters[g]) {
      for (const int32_t c : layout.channels[g]) {
        for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
          for (int64_t kx = 0; kx < s.kernel_w; ++kx, ++weight) {
            for (int64_t n = 0; n < s.batch; ++n) {
              for (int64_t y = 0; y < oh; ++y) {
                const int64_t iy = y * s.stride_h + ky * s.dilation_h - s.padding_h;
                if (iy < 0 || iy >= s.height) continue;
                for (int64_t x = 0; x < ow; ++x) {
                  const int64_t ix = x * s.stride_w + kx * s.dilation_w - s.padding_w;
                  if (ix < 0 || ix >= s.width) continue;
                  visit(((n * oh + y) * ow + x) * layout.out + f,
                        ((n * s.height + iy) * s.width + ix) * layout.in + c, weight);
                }
              }
            }
          }
        }
      }
    }
  }
}

struct Expected {
  explicit Expected(int64_t count)
      : value(static_cast<size_t>(count)), size(value.size()), terms(value.size()) {}
  void add(int64_t at, double product) {
    const auto i = static_cast<size_t>(at);
    value[i] += product;
    size[i] += std::fabs(product);
    terms[i] += 1;
  }
  std::vector<double> value, size, terms;
};

// |error| <= 4 sqrt(K) u size + one rounding of the output (docs/errors-and-bounds.md). TF32 operands lose
// their low bits: up to 2^-10 each.
void compare(const Tensor& actual, const Expected& expected, const char* what) {
  const double u = actual.precision == kTf32 ? std::ldexp(1, -10) : std::ldexp(1, -24);
  const double out = std::ldexp(1, actual.precision == kF16 ? -11 : actual.precision == kBf16 ? -8 : -24);
  const double least = actual.precision == kF16 ? std::ldexp(1, -24) : 1e-38;
  for (size_t i = 0; i < expected.value.size(); ++i) {
    const double bound = 4 * std::sqrt(std::max(expected.terms[i], 1.0)) * u * expected.size[i];
    const double error = std::fabs(actual.get(static_cast<int64_t>(i)) - expected.value[i]);
    if (!(error <= bound + out * (std::fabs(expected.value[i]) + bound) + least)) {
      char text[200];
      std::snprintf(text, sizeof(text), "wrong value: %s[%zu] is %g, expected %g", what, i,
                    actual.get(static_cast<int64_t>(i)), expected.value[i]);
      die(text);
    }
  }
}

bool same_bits(const Buffer& a, const Buffer& b) { return std::memcmp(a.data, b.data, a.bytes) == 0; }

// A table, on the "host" and on the "device".
struct Table {
  Table(int32_t operation, Precision precision, const dsp_conv2d_shape& s, const std::vector<int32_t>& plan,
        Fill fill, int32_t blocks) {
    int64_t needed = 0;
    const int64_t plan_size = static_cast<int64_t>(plan.size());
    check(dsp_cuda_conv2d_table(operation, precision, &s, plan.data(), plan_size, fill, blocks, nullptr, 0,
                                &needed) == DSP_OK,
          "table refused");
    host.resize(static_cast<size_t>(needed));
    check(dsp_cuda_conv2d_table(operation, precision, &s, plan.data(), plan_size, fill, blocks, host.data(),
                                needed, nullptr) == DSP_OK,
          "table refused");
    device = std::make_unique<Buffer>(needed, 4);
    std::memcpy(device->data, host.data(), device->bytes);
    check(dsp_cuda_conv2d_sizes(host.data(), needed, &sizes) == DSP_OK, "sizes refused");
    call = {0, nullptr, host.data(), needed, reinterpret_cast<const int32_t*>(device->data)};
  }
  std::vector<int32_t> host;
  std::unique_ptr<Buffer> device;
  dsp_cuda_sizes sizes{};
  dsp_cuda_call call{};
};

double activate(double value, int32_t activation) {
  if (activation != DSP_ACT_NONE) value = std::max(value, 0.0);
  return activation == DSP_ACT_RELU6 ? std::min(value, 6.0) : value;
}

struct Case {
  dsp_conv2d_shape shape;
  Layout layout;
  Precision precision;
  Fill fill;
  int32_t blocks;
};

void run_table(const Table& table, const Tensor& x, const Tensor& weight, const Tensor* bias,
               const void* residual, Tensor& out, int32_t activation) {
  Buffer prepared(table.sizes.prepared_bytes, 1);
  Buffer workspace(table.sizes.workspace_floats, 4);
  check(dsp_cuda_conv2d_prepare(&table.call, weight.data, weight.numel, prepared.data, prepared.numel) ==
            DSP_OK,
        "prepare refused");
  check(dsp_cuda_conv2d_run(&table.call, x.data, x.numel, prepared.data, prepared.numel,
                            bias == nullptr ? nullptr : bias->data, bias == nullptr ? 0 : bias->numel,
                            residual, residual == nullptr ? 0 : out.numel, out.data, out.numel,
                            reinterpret_cast<float*>(workspace.data), workspace.numel, activation) == DSP_OK,
        "run refused");
}

bool refused_for(dsp_status status, const char* text) {
  return status == DSP_INVALID_ARGUMENT && std::strstr(dsp_last_error(), text) != nullptr;
}

// Lengths and pointers that do not fit the table are named, and nothing is written.
void test_refusals() {
  const Layout layout{8, 8, {{0, 1, 5}}, {{0, 1, 2, 4}}};
  const std::vector<int32_t> plan = layout.plan();
  const dsp_conv2d_shape s{1, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1};
  const Table forward(0, kF32, s, plan, kAuto, 1), to_x(1, kF32, s, plan, kAuto, 1);
  Tensor x(128, kF32), bias(8, kF32), residual(128, kF32), out(128, kF32), before(128, kF32);
  const auto run = [&](const Table& table, int64_t x_numel, const void* added, int64_t added_numel,
                       const void* rest, int64_t rest_numel, int64_t out_numel, int64_t less) {
    Buffer prepared(table.sizes.prepared_bytes, 1);
    Buffer workspace(table.sizes.workspace_floats, 4);
    return dsp_cuda_conv2d_run(&table.call, x.data, x_numel, prepared.data, prepared.numel - less, added,
                               added_numel, rest, rest_numel, out.data, out_numel,
                               reinterpret_cast<float*>(workspace.data), workspace.numel, DSP_ACT_NONE);
  };
  const void* b = bias.data;
  const void* r = residual.data;
  check(refused_for(run(forward, 127, b, 8, r, 128, 128, 0), "x has 127 values, expected 128"), "x");
  check(refused_for(run(forward, 128, b, 7, r, 128, 128, 0), "bias has 7 values, expected 8"), "bias");
  check(refused_for(run(forward, 128, nullptr, 8, r, 128, 128, 0), "bias has 8 values, expected 0"),
        "no bias");
  check(refused_for(run(forward, 128, b, 8, r, 120, 128, 0), "residual has 120 values, expected 128"),
        "residual");
  check(refused_for(run(forward, 128, b, 8, nullptr, 128, 128, 0), "residual has 128 values, expected 0"),
        "no residual");
  check(refused_for(run(forward, 128, b, 8, r, 128, 129, 0), "out has 129 values, expected 128"), "out");
  check(refused_for(run(forward, 128, b, 8, r, 128, 128, 1), "prepared has "), "prepared");
  check(refused_for(run(to_x, 128, b, 8, nullptr, 0, 128, 0), "neither bias nor residual"), "gradient");
  check(refused_for(run(to_x, 128, nullptr, 0, r, 128, 128, 0), "neither bias nor residual"), "gradient");
  check(same_bits(out, before), "a call that was refused has written");
}

// Words of a table changed at random, one at a time: it is refused with a text, or the kernels stay inside of
// their buffers all the same, which the emulation and the sanitizer watch. Returns how many were refused.
int64_t test_spoilt_tables(const Case& t, int64_t changes) {
  const dsp_conv2d_shape& s = t.shape;
  const std::vector<int32_t> plan = t.layout.plan();
  const int64_t oh = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t ow = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  Tensor x(s.batch * s.height * s.width * t.layout.in, t.precision);
  Tensor weight(t.layout.pairs() * s.kernel_h * s.kernel_w, t.precision);
  Tensor out(s.batch * oh * ow * t.layout.out, t.precision);
  x.randomise();
  weight.randomise();
  out.randomise();
  int64_t refused = 0;
  for (const int32_t operation : {0, 1, 2}) {
    const Table good(operation, t.precision, s, plan, t.fill, t.blocks);
    const auto words = static_cast<int64_t>(good.host.size());
    const auto random_word = [&] { return static_cast<size_t>(between(0, words - 1)); };
    for (int64_t i = 0; i < changes; ++i) {
      std::vector<int32_t> host = good.host;
      // Classes and items are at the end; between them and the header, long lists of weights.
      const int64_t region = between(0, 3);
      const size_t at = region == 0 ? random_word()
                        : region == 1
                            ? static_cast<size_t>(between(0, std::min<int64_t>(words, 40) - 1))
                            : static_cast<size_t>(between(std::max<int64_t>(0, words - 160), words - 1));
      const int32_t values[] = {host[at] + (host[at] < (1 << 30) ? 1 : 0),
                                host[at] - (host[at] > -(1 << 30) ? 1 : 0), host[random_word()],
                                static_cast<int32_t>(between(-(int64_t{1} << 31), (int64_t{1} << 31) - 1)),
                                static_cast<int32_t>(between(-2, 70))};
      host[at] = values[between(0, 4)];
      dsp_cuda_sizes sizes{};
      if (dsp_cuda_conv2d_sizes(host.data(), words, &sizes) != DSP_OK) {
        check(std::strlen(dsp_last_error()) > 0, "a table was refused without a text");
        ++refused;
        continue;
      }
      Buffer device(words, 4);
      std::memcpy(device.data, host.data(), device.bytes);
      const dsp_cuda_call call{0, nullptr, host.data(), words, reinterpret_cast<const int32_t*>(device.data)};
      // What is left, a weight in the place of another, is as large as before, or the call refuses its
      // length.
      if (sizes.workspace_floats > 1 << 22 || sizes.prepared_bytes > 1 << 24) continue;
      Buffer prepared(sizes.prepared_bytes, 1);
      Buffer workspace(sizes.workspace_floats, 4);
      auto* parts = reinterpret_cast<float*>(workspace.data);
      if (operation == 2) {
        Tensor to(weight.numel, t.precision);
        dsp_cuda_conv2d_grad_weight(&call, out.data, out.numel, x.data, x.numel, to.data, to.numel, parts,
                                    workspace.numel);
      } else if (dsp_cuda_conv2d_prepare(&call, weight.data, weight.numel, prepared.data, prepared.numel) ==
                 DSP_OK) {
        const Tensor& from = operation == 0 ? x : out;
        Tensor to(operation == 0 ? out.numel : x.numel, t.precision);
        dsp_cuda_conv2d_run(&call, from.data, from.numel, prepared.data, prepared.numel, nullptr, 0, nullptr,
                            0, to.data, to.numel, parts, workspace.numel, DSP_ACT_NONE);
      }
    }
  }
  return refused;
}

void test_case(const Case& t, bool forward, bool backward) {
  static bool early = false;
  emulation::land_at_issue(early = !early);
  const dsp_conv2d_shape& s = t.shape;
  const std::vector<int32_t> plan = t.layout.plan();
  const int64_t oh = out_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const int64_t ow = out_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  const int64_t out_numel = s.batch * oh * ow * t.layout.out;
  Tensor x(s.batch * s.height * s.width * t.layout.in, t.precision);
  Tensor weight(t.layout.pairs() * s.kernel_h * s.kernel_w, t.precision);
  x.randomise();
  weight.randomise();

  if (forward) {
    Tensor bias(t.layout.out, t.precision);
    Tensor residual(out_numel, t.precision);
    bias.randomise();
    residual.randomise();
    const bool with_bias = chance(0.5);
    const bool with_residual = chance(0.5);
    const auto activation = static_cast<int32_t>(between(0, 2));
    Expected expected(out_numel);
    each_product(s, t.layout,
                 [&](int64_t o, int64_t i, int64_t k) { expected.add(o, x.get(i) * weight.get(k)); });
    for (int64_t i = 0; i < out_numel; ++i) {
      if (with_bias) expected.add(i, bias.get(i % t.layout.out));
      if (with_residual) expected.add(i, residual.get(i));
      expected.value[static_cast<size_t>(i)] = activate(expected.value[static_cast<size_t>(i)], activation);
    }
    // A channel that no group of a filter reads must not reach it.
    std::vector<bool> read(static_cast<size_t>(t.layout.in), false);
    for (size_t g = 0; g < t.layout.channels.size(); ++g)
      for (const int32_t c : t.layout.channels[g])
        if (!t.layout.filters[g].empty()) read[static_cast<size_t>(c)] = true;
    for (int64_t i = 0; i < x.numel; ++i)
      if (!read[static_cast<size_t>(i % t.layout.in)]) x.set(i, std::numeric_limits<float>::infinity());
    const Table table(0, t.precision, s, plan, t.fill, t.blocks);
    const int64_t conflicts = emulation::counts().conflicts;
    Tensor out(out_numel, t.precision);
    if (with_residual && chance(0.5)) {
      std::memcpy(out.data, residual.data, out.bytes);
      run_table(table, x, weight, with_bias ? &bias : nullptr, out.data, out, activation);
    } else {
      run_table(table, x, weight, with_bias ? &bias : nullptr, with_residual ? residual.data : nullptr, out,
                activation);
    }
    compare(out, expected, "forward");
    // A pointwise convolution reads rows that follow one another: every bank once.
    const bool pointwise =
        s.kernel_h * s.kernel_w * s.stride_h * s.stride_w == 1 && s.padding_h + s.padding_w == 0;
    check(!pointwise || s.batch * s.height * s.width < 8 || emulation::counts().conflicts == conflicts,
          "bank conflicts in a pointwise convolution");
  }
  if (!backward) return;

  x.randomise();
  Tensor grad(out_numel, t.precision);
  grad.randomise();
  Expected of_x(x.numel);
  Expected of_weight(weight.numel);
  each_product(s, t.layout, [&](int64_t o, int64_t i, int64_t k) {
    of_x.add(i, grad.get(o) * weight.get(k));
    of_weight.add(k, grad.get(o) * x.get(i));
  });
  const Table to_x(1, t.precision, s, plan, t.fill, t.blocks);
  Tensor grad_x(x.numel, t.precision);
  run_table(to_x, grad, weight, nullptr, nullptr, grad_x, DSP_ACT_NONE);
  compare(grad_x, of_x, "gradient of the input");

  const Table to_weight(2, t.precision, s, plan, t.fill, t.blocks);
  Tensor grad_weight(weight.numel, t.precision);
  Tensor again(weight.numel, t.precision);
  for (Tensor* to : {&grad_weight, &again}) {
    if (to == &again && !chance(0.1)) continue;
    Buffer workspace(to_weight.sizes.workspace_floats, 4);
    check(dsp_cuda_conv2d_grad_weight(&to_weight.call, grad.data, grad.numel, x.data, x.numel, to->data,
                                      to->numel, reinterpret_cast<float*>(workspace.data),
                                      workspace.numel) == DSP_OK,
          "grad_weight refused");
    if (to == &again) check(same_bits(grad_weight, again), "grad_weight differs from run to run");
  }
  compare(grad_weight, of_weight, "gradient of the weight");
}

Case random_case() {
  Case t{};
  t.shape = random_shape();
  t.precision = static_cast<Precision>(between(0, 3));
  constexpr int64_t kChannels[] = {1, 3, 4, 8, 16, 20, 24, 32, 40, 72};
  constexpr int64_t kFilters[] = {1, 5, 8, 13, 16, 20, 24, 32, 48, 70};
  t.layout = random_layout(kChannels[between(0, 9)], kFilters[between(0, 9)]);
  t.fill = static_cast<Fill>(between(0, 2));
  t.blocks = chance(0.5) ? 1 : static_cast<int32_t>(between(2, 200));
  return t;
}

// A 3 x 3 convolution, the same with a stride, and a pointwise one, of every precision, in both ways of
// reading channels, with sums in one piece and split.
void fixed_cases() {
  Layout layout{48, 30, {}, {}};
  layout.channels = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 18, 19, 20, 40}, {}};
  for (int32_t c = 5; c < 45; ++c) layout.channels[1].push_back(c);
  layout.filters = {{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 29, 27, 25, 23, 21},
                    {1, 3, 5, 7}};
  for (int p = kF16; p <= kF32; ++p) {
    for (const Fill fill : {kRuns, kGather}) {
      for (const int64_t stride : {1, 2}) {
        const dsp_conv2d_shape s{2, 9, 8, 3, 3, stride, stride, 1, 1, 1, 1};
        test_case({s, layout, static_cast<Precision>(p), fill, 64}, true, true);
      }
      const dsp_conv2d_shape s{2, 9, 8, 1, 1, 1, 1, 0, 0, 1, 1};
      test_case({s, layout, static_cast<Precision>(p), fill, 1}, true, true);
    }
  }
}

// Groups whose filters are whole units of 16 bytes, in any order, store nothing narrower.
void test_wide_stores() {
  Layout layout{32, 40, {}, {}};
  layout.channels = {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, {9, 10, 11, 12, 30, 31}};
  layout.filters = {{7, 6, 5, 4, 3, 2, 1, 0, 24, 25, 26, 27, 28, 29, 30, 31},
                    {8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23}};
  for (const Precision p : {kF16, kBf16, kTf32, kF32}) {
    const emulation::Counts before = emulation::counts();
    test_case({{2, 9, 8, 3, 3, 1, 1, 1, 1, 1, 1}, layout, p, kAuto, 1}, true, false);
    const emulation::Counts& after = emulation::counts();
    check(after.wide_stores > before.wide_stores && after.narrow_stores == before.narrow_stores,
          "stores of fewer than 16 bytes");
  }
}

int64_t parse(const char* text) { return std::strtoll(text, nullptr, 10); }

}  // namespace

int main(int argc, char** argv) {
  int64_t seconds = 20, rounds = std::numeric_limits<int64_t>::max();
  uint64_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--seconds") seconds = parse(argv[i + 1]);
    if (name == "--rounds") rounds = parse(argv[i + 1]);
    if (name == "--seed") seed = static_cast<uint64_t>(parse(argv[i + 1]));
  }
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  current_seed = seed;
  engine.seed(seed);
  fixed_cases();
  // Rows of a halo that do not follow one another, or every second one, meet in their banks; weights never
  // do. Random cases have strides and dilations of any kind: there they are only counted.
  const emulation::Counts& n = emulation::counts();
  check(n.conflicts * 10 <= n.matrices, "more than a tenth of the matrices have bank conflicts");
  test_refusals();
  test_wide_stores();
  int64_t done = 0, refused = 0;
  while (done < rounds && std::chrono::steady_clock::now() < end) {
    current_seed = seed + static_cast<uint64_t>(done++);
    engine.seed(current_seed);
    const Case t = random_case();
    test_case(t, true, chance(0.5));
    if (chance(0.2)) refused += test_spoilt_tables(t, 10);
  }
  check(n.multiplies > 0 && n.matrix_loads > 0 && n.async_copies > 0, "nothing was run");
  std::printf(
      "emulate: %lld rounds, %lld spoilt tables refused, %lld blocks, %lld barriers, %lld matrix products, "
      "%lld matrix loads, %lld copies, %lld conflicts of banks in %lld matrices\n",
      static_cast<long long>(done), static_cast<long long>(refused), static_cast<long long>(n.blocks),
      static_cast<long long>(n.barriers), static_cast<long long>(n.multiplies),
      static_cast<long long>(n.matrix_loads), static_cast<long long>(n.async_copies),
      static_cast<long long>(n.conflicts), static_cast<long long>(n.matrices));
  return 0;
}
