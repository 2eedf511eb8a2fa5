// Program files that are cut, flipped, spliced and given other sizes, with their checksum set right again for
// most, so that what lies behind it is reached. Built with AddressSanitizer and UBSan; a file is either
// refused with a text, or loads and runs.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/crc32.h"
#include "dsp.h"

namespace {

std::mt19937_64 engine;
uint64_t current_seed = 0;

size_t below(size_t count) { return std::uniform_int_distribution<size_t>(0, count - 1)(engine); }
bool chance(double p) { return std::uniform_real_distribution<double>(0, 1)(engine) < p; }

void check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz_file: %s (%s), in the round of --seed %llu\n", what, dsp_last_error(),
               static_cast<unsigned long long>(current_seed));
  std::abort();
}

using Bytes = std::vector<uint8_t>;

// A network with every kind of field: a convolution in two groups, another with a residual, a pooling, a
// concatenation, an activation, a linear layer. Of random sizes.
struct Net {
  std::vector<int64_t> words;
  std::vector<float> floats;
  std::vector<dsp_tensor_info> tensors;

  int64_t add_floats(int64_t count) {
    const int64_t at = static_cast<int64_t>(floats.size());
    for (int64_t i = 0; i < count; ++i) floats.push_back(std::normal_distribution<float>(0, 1)(engine));
    return at;
  }
  void add_step(int64_t code, const std::vector<int64_t>& fields) {
    words.push_back(code);
    words.push_back(static_cast<int64_t>(fields.size()) + 2);
    words.insert(words.end(), fields.begin(), fields.end());
    words[3] += 1;
  }
  // All filters read all channels, in one group or in two.
  static std::vector<int64_t> plan(int64_t in, int64_t out, int64_t groups) {
    std::vector<int64_t> plan = {DSP_PLAN_MAGIC, in, out, groups, in * out, 0, out, 0};
    const int64_t header = DSP_PLAN_HEADER + groups * DSP_PLAN_GROUP;
    for (int64_t g = 0, filter = 0; g < groups; ++g) {
      const int64_t filters = (out - filter) / (groups - g);
      for (const int64_t word : {in, filters, header + g * in, header + groups * in + filter, in * filter})
        plan.push_back(word);
      filter += filters;
    }
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < in; ++c) plan.push_back(c);
    for (int64_t f = 0; f < out; ++f) plan.push_back(f);
    plan[5] = static_cast<int64_t>(plan.size());
    return plan;
  }
  void add_conv(int64_t x, int64_t residual, int64_t in, int64_t out, int64_t kernel, int64_t groups) {
    const int64_t pad = kernel / 2;
    std::vector<int64_t> fields = {x, residual, 1, kernel, kernel, 1, 1, pad, pad, 1, 1};
    fields.push_back(add_floats(in * out * kernel * kernel));
    fields.push_back(chance(0.5) ? add_floats(out) : -1);
    const std::vector<int64_t> words_of_plan = plan(in, out, groups);
    fields.push_back(static_cast<int64_t>(words_of_plan.size()));
    fields.insert(fields.end(), words_of_plan.begin(), words_of_plan.end());
    add_step(DSP_OP_CONV, fields);
  }

  explicit Net(bool one_output = false) {
    const int64_t in = 1 + static_cast<int64_t>(below(4)), mid = 2 + static_cast<int64_t>(below(20));
    const int64_t size = 4 + static_cast<int64_t>(below(14)), features = 1 + static_cast<int64_t>(below(7));
    words = {DSP_PROGRAM_MAGIC, DSP_PROGRAM_VERSION, 1, 0, 2, 0, in, size, size, 7, 3};
    add_conv(0, -1, in, mid, 3, 2);                                       // 1
    add_conv(1, 1, mid, mid, 1 + 2 * static_cast<int64_t>(below(2)), 1);  // 2
    add_step(DSP_OP_MAX_POOL, {2, 2, 2, 2, 2, 0, 0, 1, 1, 0});            // 3, an output
    add_step(DSP_OP_CONCAT, {2, 2, 1});                                   // 4
    add_step(DSP_OP_ADAPTIVE_AVG_POOL, {4, 1, 1});                        // 5
    add_step(DSP_OP_FLATTEN, {5});                                        // 6
    const int64_t weight = add_floats(2 * mid * features);
    add_step(DSP_OP_LINEAR, {6, 1, features, weight, add_floats(features)});  // 7, an output
    if (one_output) {
      words.erase(words.begin() + DSP_PROGRAM_HEADER + 4);
      words[4] = 1;
    }
    words[5] = static_cast<int64_t>(words.size());
    const int64_t open = int64_t{1} << 31, half = (size - 2) / 2 + 1;
    tensors = {{"x", DSP_FLOAT32, 4, {1, in, size, size}, {0, in, 2, 2}, {open, in, open, open}},
               {"features", DSP_FLOAT32, 2, {1, features}, {1, features}, {1, features}},
               {"map", DSP_FLOAT32, 4, {1, mid, half, half}, {1, mid, half, half}, {1, mid, half, half}}};
    if (one_output) tensors.pop_back();
    if (chance(0.5)) {
      std::copy(tensors[0].shape + 2, tensors[0].shape + 4, tensors[0].least + 2);
      std::copy(tensors[0].shape + 2, tensors[0].shape + 4, tensors[0].most + 2);
    }
  }
  Bytes file() const {
    int64_t needed = 0;
    const auto write = [&](uint8_t* to, int64_t bytes) {
      return dsp_program_file(words.data(), static_cast<int64_t>(words.size()), floats.data(),
                              static_cast<int64_t>(floats.size()), tensors.data(), 1,
                              static_cast<int32_t>(tensors.size()) - 1, to, bytes, &needed);
    };
    check(write(nullptr, 0) == DSP_OK, "a file has no size");
    Bytes bytes(static_cast<size_t>(needed));
    check(write(bytes.data(), needed) == DSP_OK, "a file is not written");
    return bytes;
  }
};

void set_checksum(Bytes* bytes) {
  if (bytes->size() < 32) return;
  uint64_t size = bytes->size();
  if (chance(0.9)) std::memcpy(bytes->data() + 16, &size, sizeof(size));
  const uint32_t sum = dsp::crc32(bytes->data() + 16, bytes->size() - 16);
  std::memcpy(bytes->data() + 12, &sum, sizeof(sum));
}

// Numbers that sizes and offsets should not be, and some that they may.
int64_t odd_number() {
  const int64_t numbers[] = {-1,
                             0,
                             1,
                             2,
                             3,
                             7,
                             8,
                             16,
                             63,
                             255,
                             4096,
                             65536,
                             int64_t{1} << 31,
                             INT32_MAX,
                             int64_t{1} << 33,
                             int64_t{1} << 61,
                             INT64_MAX,
                             INT64_MIN};
  const uint64_t shift = chance(0.2) ? below(5) : 2;
  return static_cast<int64_t>(static_cast<uint64_t>(numbers[below(std::size(numbers))]) + shift - 2);
}

void change(Bytes* bytes, const Bytes& other) {
  if (bytes->empty()) return;
  switch (below(7)) {
    case 0:
      bytes->resize(below(bytes->size()));
      break;
    case 1:
      (*bytes)[below(bytes->size())] ^= static_cast<uint8_t>(1u << below(8));
      break;
    case 2:
      (*bytes)[below(bytes->size())] = static_cast<uint8_t>(below(256));
      break;
    case 3:    // a word of eight bytes, most often where the head, names and steps are
    case 4: {  // or of four
      const size_t width = chance(0.7) ? 8 : 4;
      const size_t end = chance(0.8) ? std::min<size_t>(bytes->size(), 2048) : bytes->size();
      if (end < width) break;
      const int64_t number = odd_number();
      std::memcpy(bytes->data() + below(end / width) * width, &number, width);
      break;
    }
    case 5: {  // a piece of another file
      const size_t at = below(bytes->size()), from = below(other.size());
      const size_t count = std::min({bytes->size() - at, other.size() - from, 1 + below(200)});
      std::memcpy(bytes->data() + at, other.data() + from, count);
      break;
    }
    default: {  // a piece less, or zeros more
      const auto at = bytes->begin() + static_cast<std::ptrdiff_t>(below(bytes->size()));
      if (chance(0.5)) {
        bytes->erase(at, at + static_cast<std::ptrdiff_t>(
                                  std::min<size_t>(static_cast<size_t>(bytes->end() - at), 1 + below(64))));
      } else {
        bytes->insert(at, 1 + below(64), 0);
      }
    }
  }
}

constexpr int64_t kMostElements = 1 << 20;  // of what is run

// Runs what was loaded: some images, now and then of another size.
void run(dsp_model* model) {
  std::vector<dsp_tensor> in, out(static_cast<size_t>(dsp_model_outputs(model)));
  const int64_t batch = static_cast<int64_t>(below(4));
  const bool other = chance(0.3);
  for (int32_t i = 0; i < dsp_model_inputs(model); ++i) {
    dsp_tensor_info info;
    check(dsp_model_input(model, i, &info) == DSP_OK, "an input says nothing");
    check(std::strlen(info.name) > 0, "an input has no name");
    dsp_tensor x{nullptr, info.dtype, info.rank, {}};
    for (int d = 0; d < info.rank; ++d) x.shape[d] = info.shape[d];
    x.shape[0] = batch;
    for (int d = 2; other && d < info.rank; ++d)
      x.shape[d] = std::min(info.most[d], info.least[d] + static_cast<int64_t>(below(20)));
    in.push_back(x);
  }
  const auto numel = [](const dsp_tensor& t) {
    int64_t count = 1;
    for (int d = 0; d < t.rank; ++d) count = count > kMostElements ? count : count * t.shape[d];
    return count;
  };
  for (const dsp_tensor& x : in)
    if (numel(x) > kMostElements) return;
  dsp_program_memory memory;
  check(dsp_model_memory_use(model, &memory) == DSP_OK, "no memory is known");
  if (memory.arena_bytes > 64 * kMostElements) return;
  const dsp_status planned = dsp_model_plan(model, in.data(), static_cast<int32_t>(in.size()), out.data(),
                                            static_cast<int32_t>(out.size()));
  check(planned == DSP_OK || other, "a file's own size is not planned");
  if (planned != DSP_OK) return;
  std::vector<std::vector<float>> memories;
  for (auto* list : {&in, &out}) {
    for (dsp_tensor& tensor : *list) {
      if (numel(tensor) > kMostElements) return;
      memories.emplace_back(static_cast<size_t>(numel(tensor)), 0.5f);
      tensor.data = memories.back().data();
    }
  }
  check(dsp_model_run(model, in.data(), static_cast<int32_t>(in.size()), out.data(),
                      static_cast<int32_t>(out.size()), 1 + static_cast<int32_t>(below(2))) == DSP_OK,
        "what was loaded does not run");
}

void try_file(const Bytes& bytes, bool whole) {
  // Exactly as large as it is, so that the sanitizer sees the first byte beyond it; aligned or not.
  const size_t shift = chance(0.2) ? 1 : 0;
  auto* copy = static_cast<uint8_t*>(std::malloc(std::max<size_t>(1, bytes.size() + shift)));
  uint8_t* at = copy + shift;
  if (!bytes.empty()) std::memcpy(at, bytes.data(), bytes.size());
  dsp_model* model = nullptr;
  const dsp_status status = dsp_model_load_memory(at, static_cast<int64_t>(bytes.size()), &model);
  check((status == DSP_OK) == (model != nullptr), "a model without a status, or a status without one");
  check(status == DSP_OK || std::strlen(dsp_last_error()) > 0, "no reason");
  check(status == DSP_OK || status == DSP_INVALID_ARGUMENT || status == DSP_OUT_OF_MEMORY, "another status");
  check(!whole || status == DSP_OK, "a whole file is refused");
  if (model != nullptr) run(model);
  dsp_model_destroy(model);
  std::free(copy);
}

// A file for the examples, and three images for it.
int write_example(const char* path, const char* images) {
  engine.seed(1);
  const Net net(true);
  const Bytes bytes = net.file();
  const int64_t* shape = net.tensors[0].shape;
  std::vector<float> values(static_cast<size_t>(3 * shape[1] * shape[2] * shape[3]));
  for (float& value : values) value = std::normal_distribution<float>(0, 1)(engine);
  bool good = true;
  const auto write = [&](const char* name, const void* from, size_t count) {
    std::FILE* file = std::fopen(name, "wb");
    good = file != nullptr && std::fwrite(from, 1, count, file) == count && std::fclose(file) == 0 && good;
  };
  write(path, bytes.data(), bytes.size());
  write(images, values.data(), values.size() * sizeof(float));
  return good ? 0 : 1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 4 && std::string(arguments[1]) == "--write") return write_example(arguments[2], arguments[3]);
  double seconds = 5;
  uint64_t seed = 1;
  for (int i = 1; i + 1 < count; i += 2) {
    if (std::string(arguments[i]) == "--seconds") seconds = std::atof(arguments[i + 1]);
    if (std::string(arguments[i]) == "--seed") seed = std::strtoull(arguments[i + 1], nullptr, 10);
  }
  const auto begin = std::chrono::steady_clock::now();
  int64_t files = 0, loaded = 0;
  for (current_seed = seed;; ++current_seed) {
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    if (taken.count() > seconds) break;
    engine.seed(current_seed);
    const Bytes file = Net().file(), other = Net().file();
    try_file(file, true);
    for (int i = 0; i < 50; ++i, ++files) {
      Bytes changed = file;
      const size_t changes = 1 + below(3);
      for (size_t j = 0; j < changes; ++j) change(&changed, other);
      const bool summed = chance(0.85);
      if (summed) set_checksum(&changed);
      dsp_model* model = nullptr;
      if (dsp_model_load_memory(changed.data(), static_cast<int64_t>(changed.size()), &model) == DSP_OK) {
        ++loaded;
        check(summed || changed == file, "a damaged file is not seen");
      }
      dsp_model_destroy(model);
      try_file(changed, false);
    }
  }
  std::printf("fuzz_file: %lld files, %lld of them still loaded\n", static_cast<long long>(files),
              static_cast<long long>(loaded));
  return 0;
}
