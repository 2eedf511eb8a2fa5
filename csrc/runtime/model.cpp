#include "runtime/model.h"

#include <algorithm>
#include <string>

#include "core/status.h"
#include "core/thread_pool.h"
#include "program/read.h"

namespace dsp {
namespace {

constexpr size_t kMostPlans = 8;  // of sizes other than the file's

std::string shape_text(const int64_t* shape, int32_t rank) {
  std::string text = "(";
  for (int32_t i = 0; i < rank; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

std::string name_of(const char* kind, size_t index, const TensorInfo& info) {
  return std::string(kind) + " " + std::to_string(index) + " (" + info.name + ")";
}

// The shape that a batch of it has.
void set_shape(const TensorInfo& info, const Shape& image, int64_t batch, int64_t* shape) {
  const int64_t sizes[DSP_MAX_RANK] = {batch, image.channels, image.height, image.width};
  for (int i = 0; i < DSP_MAX_RANK; ++i) shape[i] = i < info.rank ? sizes[i] : 0;
}

Shape image_of(const int64_t* shape, int32_t rank) {
  return rank == 2 ? Shape{shape[1], 1, 1} : Shape{shape[1], shape[2], shape[3]};
}

void check_dtype(const dsp_tensor& tensor, const std::string& name) {
  if (tensor.dtype != DSP_FLOAT32)
    fail(name + " has the dtype " + std::to_string(tensor.dtype) + ", expected float32 (0)");
}

struct Range {
  const char* begin;
  const char* end;
};

Range range_of(const dsp_tensor& tensor, const std::string& name) {
  int64_t numel = 1;
  for (int32_t i = 0; i < tensor.rank; ++i) numel = checked_mul(numel, tensor.shape[i], name.c_str());
  numel = checked_mul(numel, sizeof(float), name.c_str());
  const auto address = reinterpret_cast<uintptr_t>(tensor.data);
  if (numel > 0 && (tensor.data == nullptr || address % alignof(float) != 0))
    fail(name + " is null or not aligned to 4 bytes");
  if (static_cast<uint64_t>(numel) > UINTPTR_MAX - address) fail(name + " reaches beyond all addresses");
  const auto* begin = static_cast<const char*>(tensor.data);
  return {begin, numel == 0 ? begin : begin + numel};
}

void check_count(int32_t given, size_t expected, const char* what) {
  if (given < 0 || static_cast<size_t>(given) != expected)
    fail(std::string(what) + ": " + std::to_string(given) + " were given, the model has " +
         std::to_string(expected));
}

}  // namespace

Model::Model(std::unique_ptr<FileSource> source) : source_(std::move(source)) {
  const FileSource::Bytes bytes = source_->read();
  Contents contents = read_contents(bytes.data, bytes.numel);
  checksum_ = contents.checksum;
  inputs_ = std::move(contents.inputs);
  outputs_ = std::move(contents.outputs);
  for (const TensorInfo& info : inputs_) own_.push_back(image_of(info.shape, info.rank));
  const std::vector<Shape> stated = description_inputs(contents.words, contents.words_numel);
  require(stated == own_, "program file: its steps are for other inputs than it lists");
  first_ = std::make_shared<Program>(contents.words, contents.words_numel,
                                     Floats(contents.floats, contents.floats_numel));
  require(static_cast<int64_t>(outputs_.size()) == first_->outputs(),
          "program file: its steps have another number of outputs than it lists");
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const TensorInfo& info = outputs_[i];
    const Value& made = first_->output(static_cast<int64_t>(i));
    int64_t shape[DSP_MAX_RANK];
    set_shape(info, made, 1, shape);
    if (!std::equal(shape, shape + DSP_MAX_RANK, info.shape) || (info.rank == 2 && !made.flat()))
      fail("program file: " + info.name + " has another shape than it states");
  }
  if (std::all_of(inputs_.begin(), inputs_.end(), [](const TensorInfo& info) { return info.fixed(); }))
    source_.reset();
}

Model::Sizes Model::sizes_of(const dsp_tensor* inputs, int32_t n_inputs) const {
  require(inputs != nullptr, "inputs is null");
  check_count(n_inputs, inputs_.size(), "inputs");
  Sizes sizes;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const TensorInfo& info = inputs_[i];
    const dsp_tensor& x = inputs[i];
    const std::string name = name_of("input", i, info);
    check_dtype(x, name);
    if (x.rank != info.rank)
      fail(name + " has " + std::to_string(x.rank) + " dimensions, expected " + std::to_string(info.rank));
    for (int32_t d = 0; d < info.rank; ++d) {
      const int64_t most = d == 0 ? INT64_MAX : info.most[d];
      if (x.shape[d] >= (d == 0 ? 0 : info.least[d]) && x.shape[d] <= most) continue;
      std::string expected = std::to_string(info.least[d]);
      if (info.least[d] != info.most[d]) {
        expected += info.most[d] < kMostSize ? " to " + std::to_string(info.most[d]) : " or more";
      }
      fail(name + " has the shape " + shape_text(x.shape, x.rank) + ", expected size " + std::to_string(d) +
           " to be " + (d == 0 ? "0 or more" : expected));
    }
    if (x.shape[0] != inputs[0].shape[0]) fail(name + " has another batch than input 0");
    sizes.push_back(image_of(x.shape, x.rank));
  }
  return sizes;
}

Model::Planned Model::kept(const Sizes& sizes) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found =
      std::find_if(others_.begin(), others_.end(), [&](const auto& other) { return other.first == sizes; });
  if (found == others_.end()) return nullptr;
  others_.splice(others_.begin(), others_, found);
  return found->second;
}

Model::Planned Model::made(const Sizes& sizes) {
  const FileSource::Bytes bytes = source_->read();
  const Contents contents = read_contents(bytes.data, bytes.numel);
  if (contents.checksum != checksum_)
    throw Error(DSP_IO_ERROR, "program file: it has changed since it was loaded");
  const std::vector<int64_t> words = description_for(contents.words, contents.words_numel, sizes);
  return std::make_shared<Program>(words.data(), static_cast<int64_t>(words.size()),
                                   Floats(contents.floats, contents.floats_numel));
}

Model::Planned Model::find(const Sizes& sizes) {
  if (sizes == own_) return first_;
  Planned planned = kept(sizes);
  if (planned != nullptr) return planned;
  std::lock_guard<std::mutex> planning(planning_);
  planned = kept(sizes);
  if (planned != nullptr) return planned;
  planned = made(sizes);
  std::lock_guard<std::mutex> lock(mutex_);
  others_.emplace_front(sizes, planned);
  if (others_.size() > kMostPlans) others_.pop_back();
  return planned;
}

void Model::plan(const dsp_tensor* inputs, int32_t n_inputs, dsp_tensor* outputs, int32_t n_outputs) {
  const Sizes sizes = sizes_of(inputs, n_inputs);
  require(outputs != nullptr, "outputs is null");
  check_count(n_outputs, outputs_.size(), "outputs");
  const Planned program = find(sizes);
  for (size_t i = 0; i < outputs_.size(); ++i) {
    outputs[i].dtype = outputs_[i].dtype;
    outputs[i].rank = outputs_[i].rank;
    set_shape(outputs_[i], program->output(static_cast<int64_t>(i)), inputs[0].shape[0], outputs[i].shape);
  }
}

void Model::run(const dsp_tensor* inputs, int32_t n_inputs, const dsp_tensor* outputs, int32_t n_outputs,
                int32_t threads) {
  const Sizes sizes = sizes_of(inputs, n_inputs);
  require(outputs != nullptr, "outputs is null");
  check_count(n_outputs, outputs_.size(), "outputs");
  if (threads < 1) fail("threads is " + std::to_string(threads) + ", expected 1 or more");
  const int64_t batch = inputs[0].shape[0];
  const Planned program = find(sizes);
  std::vector<Range> ranges;
  for (size_t i = 0; i < inputs_.size(); ++i)
    ranges.push_back(range_of(inputs[i], name_of("input", i, inputs_[i])));
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const std::string name = name_of("output", i, outputs_[i]);
    const dsp_tensor& y = outputs[i];
    check_dtype(y, name);
    int64_t shape[DSP_MAX_RANK];
    set_shape(outputs_[i], program->output(static_cast<int64_t>(i)), batch, shape);
    const int32_t rank = outputs_[i].rank;
    if (y.rank != rank || !std::equal(shape, shape + rank, y.shape)) {
      const int32_t shown = std::max(0, std::min(y.rank, DSP_MAX_RANK));
      fail(name + " has the shape " + shape_text(y.shape, shown) + ", expected " + shape_text(shape, rank));
    }
    const Range mine = range_of(y, name);
    for (const Range& other : ranges) {
      if (mine.begin < other.end && other.begin < mine.end) fail(name + " overlaps an input or an output");
    }
    ranges.push_back(mine);
  }
  if (batch == 0) return;
  std::vector<const float*> in;
  for (size_t i = 0; i < inputs_.size(); ++i) in.push_back(static_cast<const float*>(inputs[i].data));
  std::vector<float*> out;
  for (size_t i = 0; i < outputs_.size(); ++i) out.push_back(static_cast<float*>(outputs[i].data));
  const auto body = [&] { program->run(in.data(), out.data(), batch, static_cast<int>(threads)); };
  with_team(threads, body);
}

}  // namespace dsp

struct dsp_model {
  dsp::Model model;
};

namespace {

dsp_status create(std::unique_ptr<dsp::FileSource> (*open)(const void*, int64_t), const void* from,
                  int64_t numel, dsp_model** model) {
  return dsp::guard([&] {
    dsp::require(model != nullptr, "model is null");
    *model = nullptr;
    *model = new dsp_model{dsp::Model(open(from, numel))};
  });
}

dsp_status info_of(const dsp_model* model, bool input, int32_t index, dsp_tensor_info* info) {
  return dsp::guard([&] {
    dsp::require(model != nullptr && info != nullptr, "model or info is null");
    const std::vector<dsp::TensorInfo>& infos = input ? model->model.inputs() : model->model.outputs();
    if (index < 0 || static_cast<size_t>(index) >= infos.size())
      dsp::fail("index is " + std::to_string(index) + ", expected 0 to " + std::to_string(infos.size() - 1));
    const dsp::TensorInfo& from = infos[static_cast<size_t>(index)];
    *info = {from.name.c_str(), from.dtype, from.rank, {}, {}, {}};
    std::copy(from.shape, from.shape + DSP_MAX_RANK, info->shape);
    std::copy(from.least, from.least + DSP_MAX_RANK, info->least);
    std::copy(from.most, from.most + DSP_MAX_RANK, info->most);
  });
}

}  // namespace

extern "C" {

int32_t dsp_runtime_version(void) { return DSP_RUNTIME_VERSION; }

dsp_status dsp_model_load(const char* path, dsp_model** model) {
  const auto open = [](const void* name, int64_t) {
    dsp::require(name != nullptr, "path is null");
    return dsp::file_source(static_cast<const char*>(name));
  };
  return create(open, path, 0, model);
}

dsp_status dsp_model_load_memory(const void* data, int64_t bytes, dsp_model** model) {
  const auto open = [](const void* from, int64_t numel) {
    dsp::require(from != nullptr && numel >= 0, "data is null or bytes is negative");
    return dsp::memory_source(from, numel);
  };
  return create(open, data, bytes, model);
}

void dsp_model_destroy(dsp_model* model) { delete model; }

int32_t dsp_model_inputs(const dsp_model* model) {
  return model == nullptr ? 0 : static_cast<int32_t>(model->model.inputs().size());
}

int32_t dsp_model_outputs(const dsp_model* model) {
  return model == nullptr ? 0 : static_cast<int32_t>(model->model.outputs().size());
}

dsp_status dsp_model_input(const dsp_model* model, int32_t index, dsp_tensor_info* info) {
  return info_of(model, true, index, info);
}

dsp_status dsp_model_output(const dsp_model* model, int32_t index, dsp_tensor_info* info) {
  return info_of(model, false, index, info);
}

dsp_status dsp_model_plan(dsp_model* model, const dsp_tensor* inputs, int32_t n_inputs, dsp_tensor* outputs,
                          int32_t n_outputs) {
  return dsp::guard([&] {
    dsp::require(model != nullptr, "model is null");
    model->model.plan(inputs, n_inputs, outputs, n_outputs);
  });
}

dsp_status dsp_model_run(dsp_model* model, const dsp_tensor* inputs, int32_t n_inputs,
                         const dsp_tensor* outputs, int32_t n_outputs, int32_t threads) {
  return dsp::guard([&] {
    dsp::require(model != nullptr, "model is null");
    model->model.run(inputs, n_inputs, outputs, n_outputs, threads);
  });
}

dsp_status dsp_model_memory_use(const dsp_model* model, dsp_program_memory* memory) {
  return dsp::guard([&] {
    dsp::require(model != nullptr && memory != nullptr, "model or memory is null");
    *memory = model->model.memory();
  });
}

}  // extern "C"
