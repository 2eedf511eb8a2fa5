// One network, several threads of the program, in C++: threads NET.dsp [THREADS [ROUNDS]]
//
// Each thread runs images of its own through one model and holds the results against those of a single
// thread, bit by bit; then the time of a run is printed.
//
//   c++ -std=c++17 threads.cpp $(python -m dsp_kernels.config --cflags --libs) -pthread -o threads
#include <dsp_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

void check(dsp_status status) {
  if (status != DSP_OK) throw std::runtime_error(dsp_last_error());
}

class Network {
 public:
  explicit Network(const char* path) {
    dsp_model* model = nullptr;
    check(dsp_model_load(path, &model));
    model_.reset(model);
    if (dsp_model_inputs(model) != 1 || dsp_model_outputs(model) != 1)
      throw std::runtime_error("the network has several inputs or outputs");
    check(dsp_model_input(model, 0, &in_));
    check(dsp_model_output(model, 0, &out_));
  }
  size_t image() const { return size(in_); }

  // Any number of threads may call this at the same time.
  std::vector<float> operator()(std::vector<float>& images, int32_t threads) const {
    const size_t batch = images.size() / image();
    std::vector<float> results(batch * size(out_));
    const dsp_tensor x = tensor(in_, images.data(), batch);
    const dsp_tensor y = tensor(out_, results.data(), batch);
    check(dsp_model_run(model_.get(), &x, 1, &y, 1, threads));
    return results;
  }

 private:
  struct Destroy {
    void operator()(dsp_model* model) const { dsp_model_destroy(model); }
  };
  static size_t size(const dsp_tensor_info& info) {
    size_t numel = 1;
    for (int i = 1; i < info.rank; ++i) numel *= static_cast<size_t>(info.shape[i]);
    return numel;
  }
  static dsp_tensor tensor(const dsp_tensor_info& info, float* data, size_t batch) {
    dsp_tensor tensor{data, info.dtype, info.rank, {}};
    for (int i = 0; i < info.rank; ++i) tensor.shape[i] = info.shape[i];
    tensor.shape[0] = static_cast<int64_t>(batch);
    return tensor;
  }

  std::unique_ptr<dsp_model, Destroy> model_;
  dsp_tensor_info in_{}, out_{};
};

std::vector<float> random_images(size_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) {
    seed = seed * 1664525 + 1013904223;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1 << 23) - 1;
  }
  return values;
}

int run(const Network& network, int threads, int rounds) {
  std::vector<int> wrong(static_cast<size_t>(threads), 0);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      std::vector<float> images = random_images(network.image() * static_cast<size_t>(1 + t % 3), 7u + t);
      const std::vector<float> alone = network(images, 1);
      for (int round = 0; round < rounds; ++round) {
        const std::vector<float> again = network(images, 1 + round % 2);
        wrong[static_cast<size_t>(t)] |=
            std::memcmp(again.data(), alone.data(), alone.size() * sizeof(float));
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
  for (const int other : wrong)
    if (other != 0) throw std::runtime_error("a thread's results differ");
  std::vector<float> image = random_images(network.image(), 1);
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < rounds; ++round) network(image, 1);
  const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - begin;
  std::printf("%d threads agree; %.3f ms an image on %s\n", threads, taken.count() / rounds, dsp_cpu_isa());
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: threads NET.dsp [THREADS [ROUNDS]]\n");
    return 1;
  }
  try {
    return run(Network(arguments[1]), count > 2 ? std::atoi(arguments[2]) : 4,
               count > 3 ? std::atoi(arguments[3]) : 50);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "threads: %s\n", error.what());
    return 1;
  }
}
