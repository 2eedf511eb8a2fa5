// Group assignment's CUDA kernels on the host, over random networks, against plain loops in double. Built
// with AddressSanitizer and UBSan; every buffer has exactly the size that the interface asks for and starts
// as NaN.
//
//   dsp_emulate_lasso [--seconds N] [--rounds N] [--seed N]
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

#include "assignment/cuda_cut.h"
#include "dsp.h"
#include "emulation.h"

namespace {

enum Element : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBfloat16 = 3 };

std::mt19937_64 engine;
uint64_t current_seed = 0;

int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(engine);
}
bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }
double normal() { return std::normal_distribution<double>(0, 1)(engine); }
size_t index(int64_t i) { return static_cast<size_t>(i); }

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr,
               "emulate_lasso: %s (last error: %s)\nemulate_lasso: failed in the round of --seed %llu\n",
               what.c_str(), dsp_last_error(), static_cast<unsigned long long>(current_seed));
  std::_Exit(4);
}

void check(bool good, const char* what) {
  if (!good) die(what);
}

// "Device" memory: exactly as large as asked for, so that the sanitizer sees the first byte beyond. `offset`
// elements lie before it, so that it need not begin at 16 bytes.
struct Tensor {
  Tensor(int64_t count, int32_t kind, int64_t offset = 0) : numel(count), element(kind) {
    const size_t each = kind == kFloat64 ? 8 : kind == kFloat32 ? 4 : 2;
    bytes = each * index(count);
    memory.reset(static_cast<char*>(std::malloc(std::max<size_t>(bytes + each * index(offset), 1))));
    data = memory.get() + each * index(offset);
    std::memset(data, 0xff, bytes);
    emulation::add_memory(data, bytes);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&&) = default;
  ~Tensor() {
    if (memory != nullptr) emulation::remove_memory(data);
  }
  void set(int64_t i, double value) {
    const auto single = static_cast<float>(value);
    if (element == kFloat64) {
      std::memcpy(data + i * 8, &value, 8);
    } else if (element == kFloat32) {
      std::memcpy(data + i * 4, &single, 4);
    } else {
      const uint16_t bits = element == kFloat16 ? emulation::to_f16(single) : emulation::to_bf16(single);
      std::memcpy(data + i * 2, &bits, 2);
    }
  }
  double get(int64_t i) const {
    double wide = 0;
    float value = 0;
    uint16_t bits = 0;
    if (element == kFloat64) {
      std::memcpy(&wide, data + i * 8, 8);
      return wide;
    }
    if (element == kFloat32) {
      std::memcpy(&value, data + i * 4, 4);
      return static_cast<double>(value);
    }
    std::memcpy(&bits, data + i * 2, 2);
    if (element == kFloat16) return static_cast<double>(emulation::from_f16(bits));
    const uint32_t all = static_cast<uint32_t>(bits) << 16;
    std::memcpy(&value, &all, 4);
    return static_cast<double>(value);
  }
  void randomise() {
    for (int64_t i = 0; i < numel; ++i) set(i, normal());
  }
  int64_t address() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); }

  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t numel;
  int32_t element;
  size_t bytes = 0;
  std::unique_ptr<char, Free> memory;
  char* data = nullptr;
};

bool same_bits(const Tensor& a, const Tensor& b) { return std::memcmp(a.data, b.data, a.bytes) == 0; }

// A value in double and the sum of the sizes of its terms.
struct Value {
  double value = 0, size = 0;
  void add(double term) { add({term, std::fabs(term)}); }
  void add(const Value& term) {
    value += term.value;
    size += term.size;
  }
  Value times(double factor) const { return {value * factor, size * std::fabs(factor)}; }
};

struct Layer {
  int64_t filters, channels, taps;
  bool tap_major;
  int64_t filter_at;
  Tensor weight, direction;
  int64_t at(int64_t o, int64_t c, int64_t k) const {
    return tap_major ? (o * taps + k) * channels + c : (o * channels + c) * taps + k;
  }
};

struct Network {
  int32_t element;
  int64_t groups, filters = 0, stride = 0;
  std::vector<Layer> layers;
  std::unique_ptr<Tensor> logs, rates, scales;
  bool hard = false;
  int64_t tile = 0;      // elements of a tile, 0: as the interface cuts
  bool shifted = false;  // outputs do not begin at 16 bytes
  int32_t sums() const { return element == kFloat64 ? kFloat64 : kFloat32; }
  double p(const Layer& l, int64_t g, int64_t o) const {
    return std::exp(logs->get(g * stride + l.filter_at + o));
  }
};

struct Shape {
  int64_t filters, channels, taps;
  bool tap_major;
};

Network make_network(int32_t element, int64_t groups, const std::vector<Shape>& shapes, bool hard) {
  Network n{};
  n.element = element;
  n.groups = groups;
  n.hard = hard;
  for (const Shape& s : shapes) {
    const int64_t count = s.filters * s.channels * s.taps;
    const int64_t offset = chance(0.2) ? 1 : 0;
    n.layers.push_back({s.filters, s.channels, s.taps, s.tap_major, n.filters, Tensor(count, element, offset),
                        Tensor(count, element)});
    n.filters += s.filters;
    Layer& l = n.layers.back();
    l.weight.randomise();
    l.direction.randomise();
    if (chance(0.3)) {  // a channel without weights
      const int64_t dead = between(0, s.channels - 1);
      for (int64_t o = 0; o < s.filters; ++o)
        for (int64_t k = 0; k < s.taps; ++k) l.weight.set(l.at(o, dead, k), 0);
    }
    if (chance(0.05))  // or none at all
      for (int64_t i = 0; i < count; ++i) l.weight.set(i, 0);
  }
  n.stride = n.filters + (chance(0.3) ? between(1, 5) : 0);
  n.logs = std::make_unique<Tensor>((groups - 1) * n.stride + n.filters, n.sums());
  for (int64_t o = 0; o < n.filters; ++o) {
    const int64_t pick = between(0, groups - 1);
    std::vector<double> score(index(groups));
    double sum = 0;
    for (double& value : score) sum += std::exp(value = 2 * normal());
    for (int64_t g = 0; g < groups; ++g) {
      double value = score[index(g)] - std::log(sum);
      if (hard) value = g == pick ? 0 : -std::numeric_limits<double>::infinity();
      n.logs->set(g * n.stride + o, value);
    }
  }
  const auto count = static_cast<int64_t>(n.layers.size());
  n.rates = std::make_unique<Tensor>(count, n.sums());
  n.scales = std::make_unique<Tensor>(count, n.sums());
  for (int64_t i = 0; i < count; ++i) {
    n.rates->set(i, 0.02 * std::fabs(normal()));
    n.scales->set(i, 0.2 + std::fabs(normal()));
  }
  return n;
}

// L (G, C) and 1/L from S, q (G), by plain loops.
struct Terms {
  Terms(const Network& n, const Layer& l, const std::vector<Value>& s)
      : norm(index(n.groups * l.channels)), inverse(norm.size()), q(index(n.groups)), norms(index(n.groups)) {
    const double floor = n.element == kFloat64 ? 1e-200 : 1e-30;
    for (int64_t g = 0; g < n.groups; ++g) {
      for (int64_t o = 0; o < l.filters; ++o) q[index(g)] += std::sqrt(n.p(l, g, o));
      for (int64_t c = 0; c < l.channels; ++c) {
        double sum = 0;
        for (int64_t o = 0; o < l.filters; ++o)
          sum += n.p(l, g, o) * n.p(l, g, o) * s[index(o * l.channels + c)].value;
        const size_t at = index(g * l.channels + c);
        norm[at] = sum <= floor ? 0 : std::sqrt(sum);
        inverse[at] = sum <= floor ? 0 : 1 / norm[at];
        norms[index(g)] += norm[at];
      }
    }
  }
  double ratio(int64_t g, size_t at) const { return q[index(g)] * q[index(g)] * inverse[at]; }
  std::vector<double> norm, inverse, q, norms;
};

std::vector<Value> multipliers(const Network& n, const Layer& l, const Terms& t) {
  std::vector<Value> out(index(l.filters * l.channels));
  for (int64_t o = 0; o < l.filters; ++o)
    for (int64_t c = 0; c < l.channels; ++c)
      for (int64_t g = 0; g < n.groups; ++g)
        out[index(o * l.channels + c)].add(n.p(l, g, o) * n.p(l, g, o) *
                                           t.ratio(g, index(g * l.channels + c)));
  return out;
}

double tolerance(const Network& n) { return n.element == kFloat64 ? 1e-13 : 2e-5; }

void compare(const Network& n, const Tensor& got, int64_t at, const Value& want, const char* what) {
  double bound = tolerance(n) * want.size;
  if (got.element == kFloat16) bound += std::ldexp(std::fabs(want.value) + bound, -11) + std::ldexp(1, -24);
  if (got.element == kBfloat16) bound += std::ldexp(std::fabs(want.value) + bound, -8);
  if (std::fabs(got.get(at) - want.value) <= bound + 1e-37) return;
  char text[200];
  std::snprintf(text, sizeof(text), "wrong value: %s[%lld] is %.9g, expected %.9g", what,
                static_cast<long long>(at), got.get(at), want.value);
  die(text);
}

struct Call {
  Call(const Network& n, int32_t operation, bool directed, bool out, bool keep, bool log_out,
       bool penalties) {
    std::vector<int64_t> shapes;
    for (const Layer& l : n.layers)
      for (const int64_t word : {l.filters, l.channels, l.taps, int64_t{l.tap_major}}) shapes.push_back(word);
    const auto numel = static_cast<int64_t>(shapes.size());
    int64_t needed = 0;
    if (n.tile > 0) {
      table = dsp::cuda::lasso::make_table(n.element, n.groups, shapes.data(), numel, n.tile);
      needed = static_cast<int64_t>(table.size());
    } else {
      check(dsp_cuda_lasso_table(n.element, n.groups, shapes.data(), numel, nullptr, 0, &needed) == DSP_OK,
            "table refused");
      table.resize(index(needed));
      check(dsp_cuda_lasso_table(n.element, n.groups, shapes.data(), numel, table.data(), needed, nullptr) ==
                DSP_OK,
            "table refused");
    }
    dsp_cuda_lasso_layout layout{};
    check(dsp_cuda_lasso_sizes(table.data(), needed, operation, directed, &layout) == DSP_OK,
          "sizes refused");
    check(layout.filters == n.filters && layout.tiles > 0, "wrong sizes");
    for (const Layer& l : n.layers) {
      weights.emplace_back(l.weight.numel, n.element, n.shifted || chance(0.1) ? 1 : 0);
      kept.emplace_back(l.weight.numel, n.element);
      addresses.push_back(l.weight.address());
      addresses.push_back(directed ? l.direction.address() : 0);
      addresses.push_back(out ? weights.back().address() : 0);
      addresses.push_back(keep ? kept.back().address() : 0);
    }
    // In the "device's" memory.
    device_table = std::make_unique<Tensor>(needed, kFloat64);
    std::memcpy(device_table->data, table.data(), device_table->bytes);
    device_addresses = std::make_unique<Tensor>(static_cast<int64_t>(addresses.size()), kFloat64);
    std::memcpy(device_addresses->data, addresses.data(), device_addresses->bytes);
    stride = n.filters + (chance(0.3) ? between(1, 5) : 0);
    logs = std::make_unique<Tensor>((n.groups - 1) * stride + n.filters, n.sums());
    sums = std::make_unique<Tensor>(static_cast<int64_t>(n.layers.size()), n.sums());
    workspace = std::make_unique<Tensor>(layout.workspace, n.sums());
    call = {0,
            nullptr,
            table.data(),
            needed,
            reinterpret_cast<const int64_t*>(device_table->data),
            addresses.data(),
            static_cast<int64_t>(addresses.size()),
            reinterpret_cast<const int64_t*>(device_addresses->data),
            n.logs->data,
            n.stride,
            n.logs->numel,
            operation == DSP_LASSO_PENALTY ? nullptr : n.rates->data,
            n.scales->data,
            n.rates->numel,
            log_out ? logs->data : nullptr,
            stride,
            logs->numel,
            penalties ? sums->data : nullptr,
            workspace->data,
            workspace->numel};
  }
  std::vector<int64_t> table, addresses;
  std::unique_ptr<Tensor> device_table, device_addresses, logs, sums, workspace;
  std::vector<Tensor> weights, kept;
  int64_t stride = 0;
  dsp_cuda_lasso_call call{};
};

void test_operation(const Network& n, int32_t operation) {
  const bool step = operation == DSP_LASSO_STEP_GRADIENT;
  const bool backward = operation == DSP_LASSO_BACKWARD;
  const bool proximal = operation == DSP_LASSO_PROXIMAL;
  const bool shrinks = operation == DSP_LASSO_SHRINK || proximal;
  const bool directed = step && chance(0.6);
  const bool keep = shrinks && chance(0.5);
  const bool penalties = operation == DSP_LASSO_PENALTY || (backward && chance(0.5));
  const auto make = [&] {
    return std::make_unique<Call>(n, operation, directed, backward || shrinks, keep, backward || step,
                                  penalties);
  };
  const auto t = make();
  check(dsp_cuda_lasso_run(operation, &t->call) == DSP_OK, "run refused");
  if (chance(0.1)) {
    const auto again = make();
    check(dsp_cuda_lasso_run(operation, &again->call) == DSP_OK, "run refused");
    for (size_t i = 0; i < n.layers.size(); ++i)
      check(same_bits(t->weights[i], again->weights[i]), "weights differ from run to run");
    for (int64_t g = 0; g < n.groups && (backward || step); ++g)
      for (int64_t o = 0; o < n.filters; ++o)
        check(t->logs->get(g * t->stride + o) == again->logs->get(g * again->stride + o),
              "logs differ from run to run");
  }
  for (size_t i = 0; i < n.layers.size(); ++i) {
    const Layer& l = n.layers[i];
    const double scale = n.scales->get(static_cast<int64_t>(i));
    const double amount = n.rates->get(static_cast<int64_t>(i)) * scale;
    std::vector<Value> s(index(l.filters * l.channels)), d(s.size());
    for (int64_t o = 0; o < l.filters; ++o) {
      for (int64_t c = 0; c < l.channels; ++c) {
        for (int64_t k = 0; k < l.taps; ++k) {
          const double w = l.weight.get(l.at(o, c, k));
          s[index(o * l.channels + c)].add(w * w);
          d[index(o * l.channels + c)].add(w * l.direction.get(l.at(o, c, k)));
        }
      }
    }
    const Terms terms(n, l, s);
    const std::vector<Value> m = multipliers(n, l, terms);
    if (penalties) {
      Value penalty;
      for (int64_t g = 0; g < n.groups; ++g)
        penalty.add(scale * terms.q[index(g)] * terms.q[index(g)] * terms.norms[index(g)]);
      compare(n, *t->sums, static_cast<int64_t>(i), penalty, "penalty");
    }
    for (int64_t o = 0; o < l.filters && (backward || shrinks); ++o) {
      for (int64_t c = 0; c < l.channels; ++c) {
        Value factor = m[index(o * l.channels + c)].times(backward ? amount : -amount);
        if (shrinks) factor.add(1);
        if (proximal) {
          factor = {};
          for (int64_t g = 0; g < n.groups; ++g) {
            const size_t at = index(g * l.channels + c);
            if (terms.norm[at] == 0) continue;
            const double left = 1 - amount * terms.ratio(g, at);
            factor.add(
                {n.p(l, g, o) * std::max(left, 0.0), n.p(l, g, o) * (1 + amount * terms.ratio(g, at))});
          }
        }
        for (int64_t k = 0; k < l.taps; ++k) {
          const int64_t at = l.at(o, c, k);
          compare(n, t->weights[i], at, factor.times(l.weight.get(at)), "weight");
          if (keep) check(t->kept[i].get(at) == l.weight.get(at), "the weights kept are others");
        }
      }
    }
    if (!backward && !step) continue;
    // Where the penalty step moves to, and the mixed product's T.
    std::vector<Value> moved(s.size()), turned(s.size());
    for (size_t at = 0; at < s.size(); ++at) {
      const double f = 1 - amount * m[at].value;
      moved[at] = s[at].times(f * f);
      moved[at].size += 4 * s[at].size * amount * m[at].size;
    }
    const Terms then(n, l, step ? moved : s);
    const std::vector<Value> m2 = multipliers(n, l, then);
    for (size_t at = 0; at < s.size(); ++at) {
      turned[at] = d[at];
      turned[at].add(s[at].times(-amount * (1 - amount * m[at].value) * m2[at].value));
      turned[at].size += s[at].size * amount * amount * m[at].size * m2[at].size;
    }
    for (int64_t g = 0; g < n.groups; ++g) {
      std::vector<Value> change(index(l.channels));
      Value changes;
      for (int64_t c = 0; c < l.channels && directed; ++c) {
        for (int64_t o = 0; o < l.filters; ++o)
          change[index(c)].add(turned[index(o * l.channels + c)].times(
              n.p(l, g, o) * n.p(l, g, o) * terms.inverse[index(g * l.channels + c)]));
        changes.add(change[index(c)]);
      }
      const double q = terms.q[index(g)];
      for (int64_t o = 0; o < l.filters; ++o) {
        const double p = n.p(l, g, o);
        Value sum;
        for (int64_t c = 0; c < l.channels; ++c) {
          const size_t at = index(g * l.channels + c);
          const size_t pair = index(o * l.channels + c);
          sum.add((step ? moved : s)[pair].times(then.ratio(g, at)));
          if (!directed) continue;
          sum.add(change[index(c)].times(-s[pair].value * terms.ratio(g, at) * terms.inverse[at]));
          sum.add(turned[pair].times(2 * terms.ratio(g, at)));
        }
        Value want = sum.times(p * p);
        want.add(then.norms[index(g)] * q * std::sqrt(p));
        if (directed) want.add(changes.times(q * std::sqrt(p)));
        compare(n, *t->logs, g * t->stride + l.filter_at + o, want.times(step ? scale : amount),
                step ? "gradient of a step" : "gradient for the logs");
      }
    }
  }
}

void test_samples() {
  const int32_t element = chance(0.5) ? kFloat32 : kFloat64;
  const int64_t groups = between(1, 9), count = between(1, 300);
  const int64_t stride = count + between(0, 2), other_stride = count + between(0, 2);
  Tensor first((groups - 1) * stride + count, element), second((groups - 1) * other_stride + count, element);
  Tensor out(groups * count, element), gradient(groups * count, element);
  first.randomise();
  second.randomise();
  const bool divide = chance(0.5);
  const double temperature = 0.3;
  dsp_cuda_samples call{0,           nullptr,    element, divide,      groups,       count,
                        temperature, first.data, stride,  second.data, other_stride, out.data};
  check(dsp_cuda_sample_groups(&call) == DSP_OK, "samples refused");
  Tensor cotangent(groups * count, element);
  cotangent.randomise();
  call.first = cotangent.data;
  call.second = out.data;
  call.first_stride = call.second_stride = count;
  call.out = gradient.data;
  check(dsp_cuda_sample_groups_backward(&call) == DSP_OK, "samples refused");
  const double tol = element == kFloat64 ? 1e-13 : 1e-5;
  for (int64_t i = 0; i < count; ++i) {
    const auto score = [&](int64_t g) {
      const double x = first.get(g * stride + i), noise = second.get(g * other_stride + i);
      return divide ? (x + noise) / temperature : x / temperature + noise;
    };
    double largest = score(0), sum = 0, total = 0;
    for (int64_t g = 0; g < groups; ++g) largest = std::max(largest, score(g));
    for (int64_t g = 0; g < groups; ++g) sum += std::exp(score(g) - largest);
    for (int64_t g = 0; g < groups; ++g) total += cotangent.get(g * count + i);
    for (int64_t g = 0; g < groups; ++g) {
      const double want = score(g) - largest - std::log(sum);
      check(std::fabs(out.get(g * count + i) - want) <= tol * (1 + std::fabs(score(g)) + std::fabs(largest)),
            "wrong value: sample");
      const double slope =
          (cotangent.get(g * count + i) - std::exp(out.get(g * count + i)) * total) / temperature;
      check(std::fabs(gradient.get(g * count + i) - slope) <= tol * (10 + 10 * std::fabs(total)),
            "wrong value: gradient of a sample");
    }
  }
}

void test_network(const Network& n) {
  for (const int32_t operation : {DSP_LASSO_PENALTY, DSP_LASSO_BACKWARD, DSP_LASSO_SHRINK, DSP_LASSO_PROXIMAL,
                                  DSP_LASSO_STEP_GRADIENT}) {
    if (operation == DSP_LASSO_PROXIMAL && !n.hard) continue;
    test_operation(n, operation);
  }
}

void random_round() {
  const auto element = static_cast<int32_t>(between(0, 3));
  const int64_t groups = chance(0.8) ? between(1, 4) : between(5, 11);
  std::vector<Shape> shapes;
  const int64_t count = between(1, 6);
  for (int64_t i = 0; i < count; ++i) {
    constexpr int64_t kTaps[] = {1, 1, 2, 4, 9, 9, 25};
    constexpr int64_t kChannels[] = {1, 3, 4, 8, 16, 17, 31, 32, 64, 130};
    Shape s{between(1, 40), chance(0.7) ? kChannels[between(0, 9)] : between(1, 70), kTaps[between(0, 6)],
            chance(0.4)};
    if (chance(0.05)) s = {between(1, 5), between(1, 9), between(200, 1500), chance(0.5)};
    while (s.filters * s.channels * s.taps > 6000 && s.filters > 1) s.filters = (s.filters + 1) / 2;
    shapes.push_back(s);
  }
  Network n = make_network(element, groups, shapes, chance(0.4));
  if (chance(0.5)) n.tile = int64_t{1} << between(6, 14);
  test_network(n);
  test_samples();
}

// Several tiles and batches each way, in every element type and both memory orders.
void fixed_rounds() {
  for (const int32_t element : {kFloat32, kFloat64, kFloat16, kBfloat16})
    test_network(make_network(element, 3,
                              {{37, 136, 1, false}, {21, 24, 9, false}, {19, 16, 9, true}, {70, 3, 4, false}},
                              element == kFloat64));
  test_network(make_network(kFloat32, 9, {{9, 5, 4, true}, {40, 8, 1, false}}, false));
  // Tiles of more batches than are under way at a time, as large networks have them.
  for (const int32_t element : {kFloat32, kBfloat16}) {
    Network n = make_network(element, 2, {{61, 130, 1, false}, {25, 20, 9, true}, {40, 16, 9, false}}, false);
    n.tile = 16384;
    n.shifted = element == kFloat32;
    test_network(n);
  }
}

void refused(dsp_status status, const char* text) {
  if (status != DSP_INVALID_ARGUMENT || std::strstr(dsp_last_error(), text) == nullptr)
    die(std::string("not refused: ") + text);
}

void test_refusals() {
  const Network n = make_network(kFloat32, 2, {{4, 3, 9, false}, {5, 4, 1, false}}, false);
  int64_t needed = 0;
  const int64_t long_kernel[] = {1, 1, 5000, 0}, order[] = {1, 1, 1, 2}, none[] = {1, 0, 1, 0};
  refused(dsp_cuda_lasso_table(0, 2, long_kernel, 4, nullptr, 0, &needed), "5000 taps are too many");
  refused(dsp_cuda_lasso_table(0, 2, order, 4, nullptr, 0, &needed), "memory order is 2");
  refused(dsp_cuda_lasso_table(0, 2, none, 4, nullptr, 0, &needed), "must lie between 1");
  refused(dsp_cuda_lasso_table(0, 2, none, 3, nullptr, 0, &needed), "wrong length");
  refused(dsp_cuda_lasso_table(4, 2, none, 4, nullptr, 0, &needed), "element is 4");
  refused(dsp_cuda_lasso_table(0, 0, none, 4, nullptr, 0, &needed), "groups is 0");
  const auto with = [&](const auto& change, const char* text, int32_t operation = DSP_LASSO_BACKWARD) {
    Call t(n, DSP_LASSO_BACKWARD, false, true, false, true, false);
    change(t.call, t.addresses);
    refused(dsp_cuda_lasso_run(operation, &t.call), text);
  };
  using C = dsp_cuda_lasso_call;
  using V = std::vector<int64_t>;
  with([](C& c, V&) { --c.table_numel; }, "table is not one of");
  with([](C& c, V&) { c.device_table = nullptr; }, "device_table");
  with([](C& c, V&) { --c.addresses_numel; }, "addresses has 7 values, expected 8");
  with([](C& c, V&) { --c.workspace_numel; }, "workspace has");
  with([](C& c, V&) { ++c.logs_numel; }, "logs has");
  with([](C& c, V&) { c.log_stride = 8; }, "overlap");
  with([](C& c, V&) { c.log_out = nullptr; }, "log_out is null");
  with([](C& c, V&) { c.rates = nullptr; }, "rates is null");
  with([](C& c, V&) { c.numbers_numel = 3; }, "expected 2");
  with([](C&, V& a) { a[0] = 0; }, "weight is given for some");
  with([](C&, V& a) { a[2] = a[6] = 0; }, "output is null");
  with([](C&, V& a) { a[1] = a[5] = a[0]; }, "takes a direction");
  with([](C&, V& a) { a[3] = a[7] = a[0]; }, "keeps the weights");
  with([](C&, V& a) { a[0] += 2; }, "not aligned");
  with([](C&, V&) {}, "operation is 2", DSP_LASSO_HESSIAN);
  with([](C&, V&) {}, "writes no weights", DSP_LASSO_STEP_GRADIENT);
  Call other(n, DSP_LASSO_BACKWARD, false, true, false, true, false);
  other.call.device = 1;
  check(dsp_cuda_lasso_run(DSP_LASSO_BACKWARD, &other.call) == DSP_NO_DEVICE, "another device was taken");
  dsp_cuda_samples samples{};
  refused(dsp_cuda_sample_groups(&samples), "groups and count");
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
  test_refusals();
  fixed_rounds();
  int64_t done = 0;
  while (done < rounds && std::chrono::steady_clock::now() < end) {
    current_seed = seed + static_cast<uint64_t>(done++);
    engine.seed(current_seed);
    emulation::land_at_issue(done % 2 == 0);
    random_round();
  }
  const emulation::Counts& n = emulation::counts();
  check(n.blocks > 0 && n.barriers > 0 && n.async_copies > 0, "nothing was run");
  std::printf("emulate_lasso: %lld rounds, %lld blocks, %lld barriers, %lld copies\n",
              static_cast<long long>(done), static_cast<long long>(n.blocks),
              static_cast<long long>(n.barriers), static_cast<long long>(n.async_copies));
  return 0;
}
