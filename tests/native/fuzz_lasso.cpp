// The group penalty on random tables of layers, against plain loops in double. Built with AddressSanitizer
// and UBSan; every buffer has exactly the size that the interface asks for.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "dsp.h"

namespace {

std::mt19937_64 engine;
uint64_t current_seed = 0;

int64_t between(int64_t least, int64_t most) {
  return std::uniform_int_distribution<int64_t>(least, most)(engine);
}
bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }
double normal() { return std::normal_distribution<double>(0, 1)(engine); }

[[noreturn]] void die(const char* what, double got, double want) {
  std::fprintf(stderr, "fuzz_lasso: %s: got %.9g, want %.9g; the round of --seed %llu; %s\n", what, got, want,
               static_cast<unsigned long long>(current_seed), dsp_last_error());
  std::exit(1);
}

template <typename T>
struct Exact {
  explicit Exact(int64_t count) : size(count), data(static_cast<T*>(std::malloc(bytes()))) {}
  Exact(Exact&& other) noexcept : size(other.size), data(other.data) { other.data = nullptr; }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  ~Exact() { std::free(data); }
  size_t bytes() const { return static_cast<size_t>(size) * sizeof(T); }
  void fill(double value) { std::fill(data, data + size, static_cast<T>(value)); }
  int64_t at() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)); }
  int64_t size;
  T* data;
};

template <typename T>
struct Layer {
  Layer(int64_t o, int64_t c, int64_t k, int64_t g)
      : filters(o),
        channels(c),
        taps(k),
        groups(g),
        stride(o + (g > 1 ? between(0, 3) : 0)),
        tap_major(chance(0.3)),
        scale(0.25 + std::abs(normal())),
        amount(0.1 * std::abs(normal())),
        weight(o * c * k),
        direction(o * c * k),
        logs((g - 1) * stride + o),
        towards((g - 1) * stride + o) {}

  int64_t index(int64_t o, int64_t c, int64_t k) const {
    return tap_major ? (o * taps + k) * channels + c : (o * channels + c) * taps + k;
  }
  double p(int64_t g, int64_t o) const { return std::exp(static_cast<double>(logs.data[g * stride + o])); }

  int64_t filters, channels, taps, groups, stride;
  bool tap_major;
  double scale, amount;
  Exact<T> weight, direction, logs, towards;
};

// L (G, C), s (G) and q (G), by plain loops.
template <typename T>
struct Terms {
  explicit Terms(const Layer<T>& l) {
    const double floor = std::is_same<T, float>::value ? 1e-15 : 1e-100;
    for (int64_t g = 0; g < l.groups; ++g) {
      double sum = 0;
      for (int64_t o = 0; o < l.filters; ++o) sum += std::sqrt(l.p(g, o));
      q.push_back(sum);
      for (int64_t c = 0; c < l.channels; ++c) {
        double squares = 0;
        for (int64_t o = 0; o < l.filters; ++o)
          for (int64_t k = 0; k < l.taps; ++k) {
            const double w = static_cast<double>(l.weight.data[l.index(o, c, k)]);
            squares += l.p(g, o) * l.p(g, o) * w * w;
          }
        norm.push_back(squares <= floor * floor ? 0 : std::sqrt(squares));
      }
    }
  }
  std::vector<double> q, norm;
};

void near(const char* what, double got, double want, double size, double tolerance) {
  if (!(std::abs(got - want) <= tolerance * (std::abs(want) + size))) die(what, got, want);
}

template <typename T>
void fuzz() {
  const int element = std::is_same<T, float>::value ? 0 : 1;
  const double tolerance = element == 0 ? 2e-5 : 1e-12;
  const int64_t groups = chance(0.8) ? between(1, 4) : between(5, 9);
  const bool large = chance(0.1);
  std::vector<Layer<T>> layers;
  const int64_t count = between(1, 4);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t sides[] = {1, 1, 4, 9, 9, 25};
    layers.emplace_back(large ? between(200, 500) : between(1, 40), large ? between(30, 90) : between(1, 50),
                        sides[between(0, 5)], groups);
  }
  bool hard = chance(0.4);
  for (Layer<T>& l : layers) {
    for (int64_t i = 0; i < l.weight.size; ++i) {
      l.weight.data[i] = static_cast<T>(normal());
      l.direction.data[i] = static_cast<T>(normal());
    }
    if (chance(0.3)) {
      const int64_t dead = between(0, l.channels - 1);
      for (int64_t o = 0; o < l.filters; ++o)
        for (int64_t k = 0; k < l.taps; ++k) l.weight.data[l.index(o, dead, k)] = 0;
    }
    for (int64_t i = 0; i < l.logs.size; ++i) l.towards.data[i] = static_cast<T>(normal());
    l.logs.fill(0);
    for (int64_t o = 0; o < l.filters; ++o) {
      const int64_t pick = between(0, groups - 1);
      double sum = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const double score = normal() * 2;
        l.logs.data[g * l.stride + o] = static_cast<T>(score);
        sum += std::exp(score);
      }
      for (int64_t g = 0; g < groups; ++g) {
        T& value = l.logs.data[g * l.stride + o];
        value = static_cast<T>(static_cast<double>(value) - std::log(sum));
        if (hard) value = g == pick ? T(0) : -std::numeric_limits<T>::infinity();
      }
    }
  }
  for (int operation = DSP_LASSO_PENALTY; operation <= DSP_LASSO_STEP_GRADIENT; ++operation) {
    if (operation == DSP_LASSO_PROXIMAL && !hard) continue;
    const bool shrinks = operation == DSP_LASSO_SHRINK || operation == DSP_LASSO_PROXIMAL;
    const bool hessian = operation == DSP_LASSO_HESSIAN;
    const bool logs_out = operation != DSP_LASSO_PENALTY && !shrinks;
    const bool weights_out = shrinks || operation == DSP_LASSO_BACKWARD || hessian;
    const bool moves = hessian || (operation == DSP_LASSO_STEP_GRADIENT && chance(0.7));
    std::vector<std::vector<Exact<T>>> outs;
    std::vector<std::vector<double>> penalties;
    for (const int threads : {1, 3}) {
      std::vector<int64_t> words;
      std::vector<double> numbers;
      std::vector<Exact<T>> out;
      for (Layer<T>& l : layers) {
        out.emplace_back(l.weight.size);
        out.back().fill(std::nan(""));
        out.emplace_back(l.logs.size);
        out.back().fill(std::nan(""));
        out.emplace_back(l.weight.size);
        const Exact<T>& w = out[out.size() - 3];
        const int64_t row[DSP_LASSO_WORDS] = {l.weight.at(),
                                              moves ? l.direction.at() : 0,
                                              weights_out ? w.at() : 0,
                                              shrinks ? out.back().at() : 0,
                                              l.weight.size,
                                              l.filters,
                                              l.channels,
                                              l.taps,
                                              l.tap_major ? 1 : 0,
                                              l.logs.at(),
                                              l.stride,
                                              hessian ? l.towards.at() : 0,
                                              l.stride,
                                              logs_out ? out[out.size() - 2].at() : 0,
                                              l.stride};
        words.insert(words.end(), row, row + DSP_LASSO_WORDS);
        numbers.push_back(l.scale);
        numbers.push_back(l.amount);
      }
      penalties.emplace_back(layers.size(), std::nan(""));
      if (dsp_lasso(operation, element, words.data(), static_cast<int64_t>(words.size()), numbers.data(),
                    static_cast<int64_t>(numbers.size()), groups, penalties.back().data(),
                    threads) != DSP_OK) {
        die("status", 1, 0);
      }
      outs.push_back(std::move(out));
    }
    if (penalties[0] != penalties[1]) die("penalties of 1 and 3 threads", penalties[0][0], penalties[1][0]);
    for (size_t i = 0; i < layers.size(); ++i) {
      const Layer<T>& l = layers[i];
      const Exact<T>& w = outs[0][3 * i];
      const Exact<T>& e = outs[0][3 * i + 1];
      const Exact<T>& kept = outs[0][3 * i + 2];
      if (weights_out && std::memcmp(w.data, outs[1][3 * i].data, w.bytes()) != 0) die("threads", 1, 3);
      for (int64_t g = 0; g < groups && logs_out; ++g)
        for (int64_t o = 0; o < l.filters; ++o) {
          const T value = e.data[g * l.stride + o];
          if (!std::isfinite(value)) die("a gradient for the logs", static_cast<double>(value), 0);
          if (value != outs[1][3 * i + 1].data[g * l.stride + o]) die("threads, logs", 1, 3);
        }
      if (shrinks && std::memcmp(kept.data, l.weight.data, kept.bytes()) != 0) die("kept weights", 0, 0);
      const Terms<T> t(l);
      double penalty = 0;
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t c = 0; c < l.channels; ++c) {
          const size_t at = static_cast<size_t>(g);
          penalty += t.q[at] * t.q[at] * t.norm[static_cast<size_t>(g * l.channels + c)];
        }
      if (operation == DSP_LASSO_PENALTY || operation == DSP_LASSO_BACKWARD)
        near("penalty", penalties[0][i], l.scale * penalty, 1e-9, tolerance);
      for (int64_t o = 0; o < l.filters && weights_out && !hessian; ++o)
        for (int64_t c = 0; c < l.channels; ++c) {
          double multiplier = 0;
          double left = 0;
          for (int64_t g = 0; g < groups; ++g) {
            const double norm = t.norm[static_cast<size_t>(g * l.channels + c)];
            const double size = t.q[static_cast<size_t>(g)] * t.q[static_cast<size_t>(g)];
            const double p = l.p(g, o);
            if (norm > 0) {
              multiplier += p * p * size / norm;
              left += p * std::max(0.0, 1 - l.amount * size / norm);
            }
          }
          double factor = l.amount * multiplier;
          if (operation == DSP_LASSO_SHRINK) factor = 1 - factor;
          if (operation == DSP_LASSO_PROXIMAL) factor = left;
          for (int64_t k = 0; k < l.taps; ++k) {
            const double old = static_cast<double>(l.weight.data[l.index(o, c, k)]);
            const double size = std::abs(old) * (1 + l.amount * multiplier);
            near("weights", static_cast<double>(w.data[l.index(o, c, k)]), old * factor, size, tolerance);
          }
        }
      if (operation != DSP_LASSO_BACKWARD) continue;
      for (int64_t g = 0; g < groups; ++g) {
        double norms = 0;
        for (int64_t c = 0; c < l.channels; ++c) norms += t.norm[static_cast<size_t>(g * l.channels + c)];
        const double q = t.q[static_cast<size_t>(g)];
        for (int64_t o = 0; o < l.filters; ++o) {
          const double p = l.p(g, o);
          double want = norms * q * std::sqrt(p);
          for (int64_t c = 0; c < l.channels; ++c) {
            const double norm = t.norm[static_cast<size_t>(g * l.channels + c)];
            for (int64_t k = 0; k < l.taps && norm > 0; ++k) {
              const double x = static_cast<double>(l.weight.data[l.index(o, c, k)]);
              want += p * p * q * q / norm * x * x;
            }
          }
          near("logs", static_cast<double>(e.data[g * l.stride + o]), l.amount * want, 1e-9, tolerance);
        }
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 10;
  uint64_t seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--seconds") == 0) seconds = std::atof(argv[i + 1]);
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
  }
  const auto start = std::chrono::steady_clock::now();
  int64_t rounds = 0;
  do {
    current_seed = seed + static_cast<uint64_t>(rounds);
    engine.seed(current_seed);
    fuzz<float>();
    fuzz<double>();
    ++rounds;
  } while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds);
  std::printf("%lld rounds on %s\n", static_cast<long long>(rounds), dsp_cpu_isa());
  return 0;
}
