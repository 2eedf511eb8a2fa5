// One call of the group penalty: checks the table of layers, cuts it into blocks, runs the three phases.
#include <vector>

#include "assignment/kernel.h"
#include "core/isa.h"
#include "core/scratch.h"
#include "core/status.h"
#include "core/thread_pool.h"
#include "dsp.h"

namespace dsp {
namespace {

constexpr int64_t kMaxGroups = 4096;
constexpr int64_t kCacheBytes = int64_t{16} << 20;

const LassoKernels* kernels_for(int element) {
  static const LassoTable table = DSP_FOR_ISA(lasso);
  return table(element);
}

template <typename T>
T* pointer(int64_t word) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(word));
}

LassoLayer decode(const int64_t* w, const double* numbers, int groups, dsp_lasso_op operation) {
  LassoLayer l{};
  l.weight = pointer<const void>(w[0]);
  l.direction = pointer<const void>(w[1]);
  l.weight_out = pointer<void>(w[2]);
  l.keep = pointer<void>(w[3]);
  const int64_t numel = w[4];
  l.filters = w[5];
  l.channels = w[6];
  l.taps = w[7];
  l.tap_major = w[8] != 0;
  l.logs = pointer<const void>(w[9]);
  l.log_stride = w[10];
  l.log_direction = pointer<const void>(w[11]);
  l.log_direction_stride = w[12];
  l.log_out = pointer<void>(w[13]);
  l.log_out_stride = w[14];
  l.scale = numbers[0];
  l.amount = numbers[1];
  l.groups = groups;
  require(l.filters > 0 && l.channels > 0 && l.taps > 0, "lasso: a layer has no filters, channels or taps");
  require(checked_mul(checked_mul(l.filters, l.channels, "lasso"), l.taps, "lasso") == numel,
          "lasso: a weight's size is not filters x channels x taps");
  require(l.weight != nullptr && l.logs != nullptr, "lasso: a layer lacks its weight or log-probabilities");
  require(l.log_stride >= l.filters, "lasso: the rows of the log-probabilities overlap");
  require(l.log_direction == nullptr || l.log_direction_stride >= l.filters,
          "lasso: the rows of the logs' direction overlap");
  require(l.log_out == nullptr || l.log_out_stride >= l.filters, "lasso: the rows of the output overlap");
  const bool shrinks = operation == DSP_LASSO_SHRINK || operation == DSP_LASSO_PROXIMAL;
  require(!shrinks || l.weight_out != nullptr, "lasso: the penalty step needs an output for the weights");
  require(shrinks || l.keep == nullptr, "lasso: only a penalty step keeps the weights");
  require(operation != DSP_LASSO_HESSIAN || (l.direction != nullptr && l.log_direction != nullptr),
          "lasso: the Hessian product needs both directions");
  require(operation == DSP_LASSO_HESSIAN || l.log_direction == nullptr,
          "lasso: only the Hessian product takes a direction of the logs");
  require(operation != DSP_LASSO_STEP_GRADIENT || l.log_out != nullptr,
          "lasso: the gradient of a step needs an output");
  return l;
}

void run(dsp_lasso_op operation, int element, const int64_t* words, int64_t words_numel,
         const double* numbers, int64_t numbers_numel, int64_t groups, double* penalties, int threads) {
  require(operation >= DSP_LASSO_PENALTY && operation <= DSP_LASSO_STEP_GRADIENT, "lasso: unknown operation");
  require(element == 0 || element == 1, "lasso: unknown element type");
  require(groups > 0 && groups <= kMaxGroups, "lasso: the number of groups is out of range");
  require(threads >= 1, "lasso: threads must be at least 1");
  require(words != nullptr && numbers != nullptr, "lasso: the table of layers is missing");
  require(words_numel > 0 && words_numel % DSP_LASSO_WORDS == 0, "lasso: the table has a wrong length");
  const int64_t count = words_numel / DSP_LASSO_WORDS;
  require(numbers_numel == count * 2, "lasso: the numbers have a wrong length");
  const LassoKernels& kernels = *kernels_for(element);
  const size_t bytes = element == 0 ? sizeof(float) : sizeof(double);

  std::vector<LassoLayer> layers;
  layers.reserve(static_cast<size_t>(count));
  std::vector<int64_t> starts(1, 0);
  for (int64_t i = 0; i < count; ++i) {
    LassoLayer l = decode(words + i * DSP_LASSO_WORDS, numbers + i * 2, static_cast<int>(groups), operation);
    l.block = kernels.block_width(l.filters, l.channels, l.taps, operation);
    l.blocks = (l.channels + l.block - 1) / l.block;
    l.penalty = penalties == nullptr ? nullptr : penalties + i;
    layers.push_back(l);
    starts.push_back(starts.back() + l.blocks);
  }

  int64_t written = 0;
  for (const LassoLayer& l : layers)
    if (l.weight_out != nullptr && l.weight_out != l.weight) written += l.filters * l.channels * l.taps;
  const bool past_caches = written * static_cast<int64_t>(bytes) > kCacheBytes;
  for (LassoLayer& l : layers) l.past_caches = past_caches && l.weight_out != l.weight;

  const auto carve = [&](char* base) {
    Carver carver(base);
    for (LassoLayer& l : layers) {
      const size_t cells = static_cast<size_t>(l.filters * groups);
      const size_t values = static_cast<size_t>(groups);
      const size_t blocks = static_cast<size_t>(l.blocks);
      l.squares = carver.take<char>(cells * bytes);
      l.roots = carver.take<char>(cells * bytes);
      const bool second = l.log_direction != nullptr;
      l.halves = second ? carver.take<char>(cells * bytes) : nullptr;
      l.doubled = second ? carver.take<char>(cells * bytes) : nullptr;
      l.root_sum = carver.take<double>(values);
      l.size = carver.take<double>(values);
      l.root_change = carver.take<double>(values);
      l.size_change = carver.take<double>(values);
      l.sums = carver.take<double>(2 * values * blocks);
      l.parts = l.log_out == nullptr ? nullptr : carver.take<char>(cells * blocks * bytes);
    }
    return carver.used();
  };
  carve(call_scratch().reserve(carve(nullptr)));

  auto prepare = [&](int64_t i) { kernels.prepare(layers[static_cast<size_t>(i)], operation); };
  parallel_for(threads, count, prepare);
  auto block = [&](int64_t task) {
    size_t i = 0;
    size_t end = static_cast<size_t>(count);
    while (end - i > 1) {
      const size_t middle = (i + end) / 2;
      (starts[middle] <= task ? i : end) = middle;
    }
    const LassoLayer& l = layers[i];
    char* scratch = task_scratch().reserve(static_cast<size_t>(kernels.scratch_bytes(l, operation)));
    kernels.block(l, operation, task - starts[i], scratch);
  };
  parallel_for(threads, starts.back(), block);
  auto finish = [&](int64_t i) { kernels.finish(layers[static_cast<size_t>(i)], operation); };
  parallel_for(threads, count, finish);
}

}  // namespace
}  // namespace dsp

extern "C" dsp_status dsp_lasso(int32_t operation, int32_t element, const int64_t* words, int64_t words_numel,
                                const double* numbers, int64_t numbers_numel, int64_t groups,
                                double* penalties, int32_t threads) {
  return dsp::guard([&] {
    dsp::run(static_cast<dsp_lasso_op>(operation), element, words, words_numel, numbers, numbers_numel,
             groups, penalties, threads);
  });
}
