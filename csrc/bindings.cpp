// The Python face of dsp.h: addresses and sizes as integers in, a status out; the GIL is released meanwhile.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dsp.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

int conv2d_forward(Address x, int64_t x_numel, Address weight, int64_t weight_numel, Address plan,
                   int64_t plan_numel, Address bias, Address residual, Address out, int64_t out_numel,
                   int64_t batch, int64_t height, int64_t width, int64_t kh, int64_t kw, int64_t sh,
                   int64_t sw, int64_t ph, int64_t pw, int64_t dh, int64_t dw, int32_t activation,
                   float first, float second, int32_t threads, int32_t prepared) {
  const dsp_conv2d_shape shape{batch, height, width, kh, kw, sh, sw, ph, pw, dh, dw};
  const dsp_activation act{activation, {first, second}};
  return dsp_conv2d_forward(&shape, at<const float>(x), x_numel, at<const float>(weight), weight_numel,
                            at<const int32_t>(plan), plan_numel, at<const float>(bias),
                            at<const float>(residual), at<float>(out), out_numel, &act, prepared, threads);
}

int conv2d_prepare(int64_t kh, int64_t kw, Address weight, int64_t weight_numel, Address plan,
                   int64_t plan_numel, Address prepared, int64_t prepared_numel) {
  return dsp_conv2d_prepare(kh, kw, at<const float>(weight), weight_numel, at<const int32_t>(plan),
                            plan_numel, at<float>(prepared), prepared_numel);
}

int conv2d_grad_input(Address grad, int64_t grad_numel, Address weight, int64_t weight_numel, Address plan,
                      int64_t plan_numel, Address grad_x, int64_t grad_x_numel, int64_t batch, int64_t height,
                      int64_t width, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph, int64_t pw,
                      int64_t dh, int64_t dw, int32_t threads) {
  const dsp_conv2d_shape shape{batch, height, width, kh, kw, sh, sw, ph, pw, dh, dw};
  return dsp_conv2d_grad_input(&shape, at<const float>(grad), grad_numel, at<const float>(weight),
                               weight_numel, at<const int32_t>(plan), plan_numel, at<float>(grad_x),
                               grad_x_numel, threads);
}

int conv2d_grad_weight(Address grad, int64_t grad_numel, Address x, int64_t x_numel, Address plan,
                       int64_t plan_numel, Address grad_w, int64_t weight_numel, int64_t batch,
                       int64_t height, int64_t width, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                       int64_t ph, int64_t pw, int64_t dh, int64_t dw, int32_t threads) {
  const dsp_conv2d_shape shape{batch, height, width, kh, kw, sh, sw, ph, pw, dh, dw};
  return dsp_conv2d_grad_weight(&shape, at<const float>(grad), grad_numel, at<const float>(x), x_numel,
                                at<const int32_t>(plan), plan_numel, at<float>(grad_w), weight_numel,
                                threads);
}

int batch_norm_forward(Address x, int64_t numel, int64_t batch, int64_t channels, int64_t pixels,
                       Address weight, Address bias, Address residual, Address blank, double eps,
                       int32_t activation, Address mean, Address variance, Address out, int32_t threads) {
  const dsp_norm_shape shape{batch, channels, pixels};
  return dsp_batch_norm_forward(&shape, at<const float>(x), numel, at<const float>(weight),
                                at<const float>(bias), at<const float>(residual), at<const uint8_t>(blank),
                                eps, activation, at<float>(mean), at<float>(variance), at<float>(out),
                                threads);
}

int batch_norm_backward(Address grad, Address x, Address y, int64_t numel, int64_t batch, int64_t channels,
                        int64_t pixels, Address weight, Address bias, Address mean, Address variance,
                        Address blank, double eps, int32_t activation, Address grad_x, Address grad_residual,
                        Address grad_weight, Address grad_bias, int32_t threads) {
  const dsp_norm_shape shape{batch, channels, pixels};
  return dsp_batch_norm_backward(&shape, at<const float>(grad), at<const float>(x), at<const float>(y), numel,
                                 at<const float>(weight), at<const float>(bias), at<const float>(mean),
                                 at<const float>(variance), at<const uint8_t>(blank), eps, activation,
                                 at<float>(grad_x), at<float>(grad_residual), at<float>(grad_weight),
                                 at<float>(grad_bias), threads);
}

// floats: (address, numel) of each piece
py::tuple program_create(Address words, int64_t words_numel, const py::sequence& floats) {
  std::vector<const float*> pieces;
  std::vector<int64_t> numel;
  for (const py::handle item : floats) {
    const auto piece = item.cast<std::pair<Address, int64_t>>();
    pieces.push_back(at<const float>(piece.first));
    numel.push_back(piece.second);
  }
  dsp_program* program = nullptr;
  int status = 0;
  {
    py::gil_scoped_release release;
    status = dsp_program_create_from(at<const int64_t>(words), words_numel, pieces.data(), numel.data(),
                                     static_cast<int64_t>(pieces.size()), &program);
  }
  return py::make_tuple(status, reinterpret_cast<Address>(program));
}

// The inputs, then the outputs.
int program_run(Address program, const std::vector<Address>& tensors, const std::vector<int64_t>& numel,
                int64_t batch, int32_t threads) {
  const int64_t inputs = dsp_program_inputs(at<const dsp_program>(program));
  const int64_t outputs = dsp_program_outputs(at<const dsp_program>(program));
  if (static_cast<int64_t>(tensors.size()) != inputs + outputs || tensors.size() != numel.size())
    throw std::invalid_argument("program_run: the program has another number of inputs and outputs");
  static_assert(sizeof(Address) == sizeof(float*));
  const auto* in = reinterpret_cast<const float* const*>(tensors.data());
  auto* out = reinterpret_cast<float* const*>(tensors.data() + inputs);
  return dsp_program_run(at<dsp_program>(program), in, numel.data(), out, numel.data() + inputs, batch,
                         threads);
}

void program_destroy(Address program) { dsp_program_destroy(at<dsp_program>(program)); }

py::list program_outputs(Address program) {
  py::list shapes;
  for (int64_t i = 0; i < dsp_program_outputs(at<const dsp_program>(program)); ++i) {
    int64_t shape[3] = {0, 0, 0};
    dsp_program_output(at<const dsp_program>(program), i, shape);
    shapes.append(py::make_tuple(shape[0], shape[1], shape[2]));
  }
  return shapes;
}

// (name, dtype, shape, least, most) of an input or output; sizes as many as it has dimensions.
dsp_tensor_info tensor_info(const py::tuple& given, std::string* name) {
  *name = given[0].cast<std::string>();
  const py::sequence shape = given[2];
  dsp_tensor_info info{
      name->c_str(), given[1].cast<int32_t>(), static_cast<int32_t>(shape.size()), {}, {}, {}};
  int64_t* const sizes[] = {info.shape, info.least, info.most};
  for (size_t row = 0; row < 3; ++row) {
    const py::sequence from = given[2 + row];
    if (from.size() != shape.size() || from.size() > DSP_MAX_RANK)
      throw py::value_error("a tensor's sizes are not 1 to 4, or not as many as its bounds");
    for (size_t i = 0; i < from.size(); ++i) sizes[row][i] = from[i].cast<int64_t>();
  }
  return info;
}

py::tuple tensor_info(const dsp_tensor_info& info) {
  const auto sizes = [&](const int64_t* from) {
    py::tuple result(info.rank);
    for (int32_t i = 0; i < info.rank; ++i) result[static_cast<size_t>(i)] = from[i];
    return result;
  };
  return py::make_tuple(info.name, info.dtype, sizes(info.shape), sizes(info.least), sizes(info.most));
}

// (status, the bytes of a program file)
py::tuple program_file(Address words, int64_t words_numel, Address floats, int64_t floats_numel,
                       const py::sequence& inputs, const py::sequence& outputs) {
  std::vector<dsp_tensor_info> tensors;
  std::vector<std::string> names(inputs.size() + outputs.size());
  for (const py::sequence& list : {inputs, outputs}) {
    for (const py::handle given : list)
      tensors.push_back(tensor_info(given.cast<py::tuple>(), &names[tensors.size()]));
  }
  const auto write = [&](uint8_t* file, int64_t bytes, int64_t* needed) {
    return dsp_program_file(at<const int64_t>(words), words_numel, at<const float>(floats), floats_numel,
                            tensors.data(), static_cast<int32_t>(inputs.size()),
                            static_cast<int32_t>(outputs.size()), file, bytes, needed);
  };
  int64_t needed = 0;
  int status = write(nullptr, 0, &needed);
  if (status != DSP_OK) return py::make_tuple(status, py::bytes());
  py::bytes file(nullptr, static_cast<size_t>(needed));
  status = write(reinterpret_cast<uint8_t*>(PyBytes_AS_STRING(file.ptr())), needed, &needed);
  return py::make_tuple(status, file);
}

py::tuple model_load(const std::string& path) {
  dsp_model* model = nullptr;
  int status = 0;
  {
    py::gil_scoped_release release;
    status = dsp_model_load(path.c_str(), &model);
  }
  return py::make_tuple(status, reinterpret_cast<Address>(model));
}

py::tuple model_load_memory(Address data, int64_t bytes) {
  dsp_model* model = nullptr;
  int status = 0;
  {
    py::gil_scoped_release release;
    status = dsp_model_load_memory(at<const void>(data), bytes, &model);
  }
  return py::make_tuple(status, reinterpret_cast<Address>(model));
}

void model_destroy(Address model) { dsp_model_destroy(at<dsp_model>(model)); }

// The inputs, then the outputs: (name, dtype, shape, least, most) of each.
py::tuple model_tensors(Address model) {
  const auto* asked = at<const dsp_model>(model);
  py::list lists[2];
  dsp_tensor_info info{};
  for (int32_t i = 0; i < dsp_model_inputs(asked); ++i) {
    dsp_model_input(asked, i, &info);
    lists[0].append(tensor_info(info));
  }
  for (int32_t i = 0; i < dsp_model_outputs(asked); ++i) {
    dsp_model_output(asked, i, &info);
    lists[1].append(tensor_info(info));
  }
  return py::make_tuple(lists[0], lists[1]);
}

// float32 arrays: (address, shape) of each.
std::vector<dsp_tensor> tensors_at(const py::sequence& given) {
  std::vector<dsp_tensor> tensors;
  for (const py::handle item : given) {
    const py::tuple pair = item.cast<py::tuple>();
    const py::sequence shape = pair[1];
    if (shape.size() > DSP_MAX_RANK) throw py::value_error("a tensor has more than 4 dimensions");
    dsp_tensor tensor{at<void>(pair[0].cast<Address>()), DSP_FLOAT32, static_cast<int32_t>(shape.size()), {}};
    for (size_t i = 0; i < shape.size(); ++i) tensor.shape[i] = shape[i].cast<int64_t>();
    tensors.push_back(tensor);
  }
  return tensors;
}

// (status, the outputs' shapes) for inputs of these shapes.
py::tuple model_plan(Address model, const py::sequence& inputs) {
  const std::vector<dsp_tensor> given = tensors_at(inputs);
  std::vector<dsp_tensor> made(static_cast<size_t>(dsp_model_outputs(at<const dsp_model>(model))));
  int status = 0;
  {
    py::gil_scoped_release release;
    status = dsp_model_plan(at<dsp_model>(model), given.data(), static_cast<int32_t>(given.size()),
                            made.data(), static_cast<int32_t>(made.size()));
  }
  py::list shapes;
  for (const dsp_tensor& tensor : made) {
    py::tuple shape(tensor.rank);
    for (int32_t i = 0; i < tensor.rank; ++i) shape[static_cast<size_t>(i)] = tensor.shape[i];
    shapes.append(shape);
  }
  return py::make_tuple(status, shapes);
}

int model_run(Address model, const py::sequence& inputs, const py::sequence& outputs, int32_t threads) {
  const std::vector<dsp_tensor> given = tensors_at(inputs);
  const std::vector<dsp_tensor> made = tensors_at(outputs);
  py::gil_scoped_release release;
  return dsp_model_run(at<dsp_model>(model), given.data(), static_cast<int32_t>(given.size()), made.data(),
                       static_cast<int32_t>(made.size()), threads);
}

py::dict memory_of(const dsp_program_memory& memory) {
  py::dict result;
  result["weight_bytes"] = memory.weight_bytes;
  result["arena_bytes"] = memory.arena_bytes;
  result["scratch_bytes"] = memory.scratch_bytes;
  result["arenas"] = memory.arenas;
  return result;
}

py::dict program_memory(Address program) {
  dsp_program_memory memory{};
  dsp_program_memory_use(at<const dsp_program>(program), &memory);
  return memory_of(memory);
}

py::dict model_memory(Address model) {
  dsp_program_memory memory{};
  dsp_model_memory_use(at<const dsp_model>(model), &memory);
  return memory_of(memory);
}

// (operation, channels last, shape, multiply-adds, seconds) of each step; with the status.
py::tuple program_profile(Address program) {
  int64_t count = 0;
  int status = dsp_program_profile(at<dsp_program>(program), nullptr, 0, &count);
  std::vector<dsp_program_step> steps(static_cast<size_t>(count));
  if (status == DSP_OK) {
    py::gil_scoped_release release;
    status = dsp_program_profile(at<dsp_program>(program), steps.data(), count, &count);
  }
  py::list rows;
  for (const dsp_program_step& step : steps)
    rows.append(py::make_tuple(step.operation, step.channels_last != 0,
                               py::make_tuple(step.shape[0], step.shape[1], step.shape[2]), step.macs,
                               step.seconds));
  return py::make_tuple(status, rows);
}

int lasso(int32_t operation, int32_t element, Address words, int64_t words_numel, Address numbers,
          int64_t numbers_numel, int64_t groups, Address penalties, int32_t threads) {
  return dsp_lasso(operation, element, at<const int64_t>(words), words_numel, at<const double>(numbers),
                   numbers_numel, groups, at<double>(penalties), threads);
}

py::tuple cuda_device_count() {
  int32_t count = 0;
  const int status = dsp_cuda_device_count(&count);
  return py::make_tuple(status, count);
}

// (status, number of words); writes them where `words` is not 0.
py::tuple cuda_conv2d_table(int32_t operation, int32_t precision, int64_t batch, int64_t height,
                            int64_t width, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t ph,
                            int64_t pw, int64_t dh, int64_t dw, Address plan, int64_t plan_numel,
                            int32_t fill, int32_t blocks_wanted, Address words, int64_t words_numel) {
  const dsp_conv2d_shape shape{batch, height, width, kh, kw, sh, sw, ph, pw, dh, dw};
  int64_t needed = 0;
  int status = 0;
  {
    py::gil_scoped_release release;
    status = dsp_cuda_conv2d_table(operation, precision, &shape, at<const int32_t>(plan), plan_numel, fill,
                                   blocks_wanted, at<int32_t>(words), words_numel, &needed);
  }
  return py::make_tuple(status, needed);
}

// (status, prepared bytes, workspace floats, blocks, splits, shared bytes, multiply-adds)
py::tuple cuda_conv2d_sizes(Address table, int64_t table_numel) {
  dsp_cuda_sizes sizes{};
  const int status = dsp_cuda_conv2d_sizes(at<const int32_t>(table), table_numel, &sizes);
  return py::make_tuple(status, sizes.prepared_bytes, sizes.workspace_floats, sizes.blocks, sizes.splits,
                        sizes.shared_bytes, sizes.multiply_adds);
}

// (status, what dsp_cuda_work holds, in its order)
py::tuple cuda_conv2d_work(Address table, int64_t table_numel) {
  dsp_cuda_work work{};
  const int status = dsp_cuda_conv2d_work(at<const int32_t>(table), table_numel, &work);
  return py::make_tuple(status, work.multiply_adds, work.effort, work.weights, work.blocks, work.most_splits,
                        work.gathered, work.groups, work.halo_rows, work.phase_taps);
}

int cuda_conv2d_prepare(int32_t device, Address stream, Address table, int64_t table_numel,
                        Address device_table, Address weight, int64_t weight_numel, Address prepared,
                        int64_t prepared_bytes) {
  const dsp_cuda_call call{device, at<void>(stream), at<const int32_t>(table), table_numel,
                           at<const int32_t>(device_table)};
  return dsp_cuda_conv2d_prepare(&call, at<const void>(weight), weight_numel, at<void>(prepared),
                                 prepared_bytes);
}

int cuda_conv2d_run(int32_t device, Address stream, Address table, int64_t table_numel, Address device_table,
                    Address x, int64_t x_numel, Address prepared, int64_t prepared_bytes, Address bias,
                    int64_t bias_numel, Address residual, int64_t residual_numel, Address out,
                    int64_t out_numel, Address workspace, int64_t workspace_numel, int32_t activation) {
  const dsp_cuda_call call{device, at<void>(stream), at<const int32_t>(table), table_numel,
                           at<const int32_t>(device_table)};
  return dsp_cuda_conv2d_run(&call, at<const void>(x), x_numel, at<const void>(prepared), prepared_bytes,
                             at<const void>(bias), bias_numel, at<const void>(residual), residual_numel,
                             at<void>(out), out_numel, at<float>(workspace), workspace_numel, activation);
}

int cuda_conv2d_grad_weight(int32_t device, Address stream, Address table, int64_t table_numel,
                            Address device_table, Address grad, int64_t grad_numel, Address x,
                            int64_t x_numel, Address grad_weight, int64_t weight_numel, Address workspace,
                            int64_t workspace_numel) {
  const dsp_cuda_call call{device, at<void>(stream), at<const int32_t>(table), table_numel,
                           at<const int32_t>(device_table)};
  return dsp_cuda_conv2d_grad_weight(&call, at<const void>(grad), grad_numel, at<const void>(x), x_numel,
                                     at<void>(grad_weight), weight_numel, at<float>(workspace),
                                     workspace_numel);
}

// (status, number of words); writes them where `words` is not 0.
py::tuple cuda_lasso_table(int32_t element, int64_t groups, Address shapes, int64_t shapes_numel,
                           Address words, int64_t words_numel) {
  int64_t needed = 0;
  const int status = dsp_cuda_lasso_table(element, groups, at<const int64_t>(shapes), shapes_numel,
                                          at<int64_t>(words), words_numel, &needed);
  return py::make_tuple(status, needed);
}

// (status, filters, elements of the work space, tiles, bytes of weights in a block's shared memory)
py::tuple cuda_lasso_sizes(Address table, int64_t table_numel, int32_t operation, int32_t directed) {
  dsp_cuda_lasso_layout sizes{};
  const int status = dsp_cuda_lasso_sizes(at<const int64_t>(table), table_numel, operation, directed, &sizes);
  return py::make_tuple(status, sizes.filters, sizes.workspace, sizes.tiles, sizes.stage_bytes);
}

int cuda_lasso_run(int32_t operation, int32_t device, Address stream, Address table, int64_t table_numel,
                   Address device_table, Address addresses, int64_t addresses_numel, Address device_addresses,
                   Address logs, int64_t log_stride, int64_t logs_numel, Address rates, Address scales,
                   int64_t numbers_numel, Address log_out, int64_t log_out_stride, int64_t log_out_numel,
                   Address penalties, Address workspace, int64_t workspace_numel) {
  const dsp_cuda_lasso_call call{device,
                                 at<void>(stream),
                                 at<const int64_t>(table),
                                 table_numel,
                                 at<const int64_t>(device_table),
                                 at<const int64_t>(addresses),
                                 addresses_numel,
                                 at<const int64_t>(device_addresses),
                                 at<const void>(logs),
                                 log_stride,
                                 logs_numel,
                                 at<const void>(rates),
                                 at<const void>(scales),
                                 numbers_numel,
                                 at<void>(log_out),
                                 log_out_stride,
                                 log_out_numel,
                                 at<void>(penalties),
                                 at<void>(workspace),
                                 workspace_numel};
  return dsp_cuda_lasso_run(operation, &call);
}

template <dsp_status (*kCall)(const dsp_cuda_samples*)>
int cuda_samples(int32_t device, Address stream, int32_t element, int32_t divide, int64_t groups,
                 int64_t count, double temperature, Address first, int64_t first_stride, Address second,
                 int64_t second_stride, Address out) {
  const dsp_cuda_samples samples{device,        at<void>(stream),
                                 element,       divide,
                                 groups,        count,
                                 temperature,   at<const void>(first),
                                 first_stride,  at<const void>(second),
                                 second_stride, at<void>(out)};
  return kCall(&samples);
}

// (name, code, number of parameters) of each.
py::list activations() {
  py::list rows;
  for (int32_t i = 0; i < dsp_activation_count(); ++i) {
    const dsp_activation_info* row = dsp_activation_at(i);
    rows.append(py::make_tuple(row->name, row->code, row->parameters));
  }
  return rows;
}

// How a program's description is written.
py::dict program_format() {
  static const char* const kinds[] = {"int",        "value",  "maybe_value",  "values",
                                      "activation", "floats", "maybe_floats", "plan"};
  py::dict steps;
  for (int32_t i = 0; i < dsp_step_count(); ++i) {
    const dsp_step_info* step = dsp_step_at(i);
    py::list fields;
    for (int32_t j = 0; j < step->fields_numel; ++j) {
      const dsp_step_field& field = step->fields[j];
      fields.append(py::make_tuple(field.name, kinds[field.kind], field.least, field.most));
    }
    steps[step->name] = py::make_tuple(step->code, fields);
  }
  py::dict format;
  format["magic"] = DSP_PROGRAM_MAGIC;
  format["version"] = DSP_PROGRAM_VERSION;
  format["header"] = DSP_PROGRAM_HEADER;
  format["steps"] = steps;
  return format;
}

py::dict build_info() {
  py::dict info;
  info["abi_version"] = dsp_abi_version();
  info["cpu_isa"] = dsp_cpu_isa();
#if defined(DSP_CUDA_ARCHITECTURES)
  info["cuda_architectures"] = DSP_CUDA_ARCHITECTURES;
#else
  info["cuda_architectures"] = py::none();
#endif
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

const auto nogil = py::call_guard<py::gil_scoped_release>();

void define_core(py::module_& m) {
  m.def("abi_version", &dsp_abi_version);
  m.def("cpu_isa", &dsp_cpu_isa);
  m.def("fma_rounds", &dsp_fma_rounds, py::call_guard<py::gil_scoped_release>(), py::arg("rounds"));
  m.def("last_error", &dsp_last_error);
  m.def(
      "use_team", [](Address runner) { dsp_use_team(reinterpret_cast<dsp_team_runner>(runner)); },
      py::arg("runner"));
  m.def("build_info", &build_info);
  m.def("activations", &activations);
}

void define_conv(py::module_& m) {
  m.def("conv2d_forward", &conv2d_forward, nogil, py::arg("x"), py::arg("x_numel"), py::arg("weight"),
        py::arg("weight_numel"), py::arg("plan"), py::arg("plan_numel"), py::arg("bias"), py::arg("residual"),
        py::arg("out"), py::arg("out_numel"), py::arg("batch"), py::arg("height"), py::arg("width"),
        py::arg("kh"), py::arg("kw"), py::arg("sh"), py::arg("sw"), py::arg("ph"), py::arg("pw"),
        py::arg("dh"), py::arg("dw"), py::arg("activation"), py::arg("first"), py::arg("second"),
        py::arg("threads"), py::arg("prepared") = 0);
  m.def("conv2d_prepare", &conv2d_prepare, nogil, py::arg("kh"), py::arg("kw"), py::arg("weight"),
        py::arg("weight_numel"), py::arg("plan"), py::arg("plan_numel"), py::arg("prepared"),
        py::arg("prepared_numel"));
  m.def("conv2d_grad_input", &conv2d_grad_input, nogil, py::arg("grad"), py::arg("grad_numel"),
        py::arg("weight"), py::arg("weight_numel"), py::arg("plan"), py::arg("plan_numel"), py::arg("grad_x"),
        py::arg("grad_x_numel"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("kh"),
        py::arg("kw"), py::arg("sh"), py::arg("sw"), py::arg("ph"), py::arg("pw"), py::arg("dh"),
        py::arg("dw"), py::arg("threads"));
  m.def("conv2d_grad_weight", &conv2d_grad_weight, nogil, py::arg("grad"), py::arg("grad_numel"),
        py::arg("x"), py::arg("x_numel"), py::arg("plan"), py::arg("plan_numel"), py::arg("grad_w"),
        py::arg("weight_numel"), py::arg("batch"), py::arg("height"), py::arg("width"), py::arg("kh"),
        py::arg("kw"), py::arg("sh"), py::arg("sw"), py::arg("ph"), py::arg("pw"), py::arg("dh"),
        py::arg("dw"), py::arg("threads"));
}

void define_program(py::module_& m) {
  m.def("program_format", &program_format);
  m.def("program_create", &program_create, py::arg("words"), py::arg("words_numel"), py::arg("floats"));
  m.def("program_run", &program_run, nogil, py::arg("program"), py::arg("tensors"), py::arg("numel"),
        py::arg("batch"), py::arg("threads"));
  m.def("program_destroy", &program_destroy, nogil, py::arg("program"));
  m.def("program_outputs", &program_outputs, py::arg("program"));
  m.def("program_memory", &program_memory, py::arg("program"));
  m.def("program_profile", &program_profile, py::arg("program"));
}

void define_runtime(py::module_& m) {
  m.def("program_file", &program_file, py::arg("words"), py::arg("words_numel"), py::arg("floats"),
        py::arg("floats_numel"), py::arg("inputs"), py::arg("outputs"));
  m.def("model_load", &model_load, py::arg("path"));
  m.def("model_load_memory", &model_load_memory, py::arg("data"), py::arg("bytes"));
  m.def("model_destroy", &model_destroy, nogil, py::arg("model"));
  m.def("model_tensors", &model_tensors, py::arg("model"));
  m.def("model_plan", &model_plan, py::arg("model"), py::arg("inputs"));
  m.def("model_run", &model_run, py::arg("model"), py::arg("inputs"), py::arg("outputs"), py::arg("threads"));
  m.def("model_memory", &model_memory, py::arg("model"));
}

void define_norm(py::module_& m) {
  m.def("batch_norm_forward", &batch_norm_forward, nogil, py::arg("x"), py::arg("numel"), py::arg("batch"),
        py::arg("channels"), py::arg("pixels"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("blank"), py::arg("eps"), py::arg("activation"), py::arg("mean"), py::arg("variance"),
        py::arg("out"), py::arg("threads"));
  m.def("batch_norm_backward", &batch_norm_backward, nogil, py::arg("grad"), py::arg("x"), py::arg("y"),
        py::arg("numel"), py::arg("batch"), py::arg("channels"), py::arg("pixels"), py::arg("weight"),
        py::arg("bias"), py::arg("mean"), py::arg("variance"), py::arg("blank"), py::arg("eps"),
        py::arg("activation"), py::arg("grad_x"), py::arg("grad_residual"), py::arg("grad_weight"),
        py::arg("grad_bias"), py::arg("threads"));
}

void define_assignment(py::module_& m) {
  m.def("lasso", &lasso, nogil, py::arg("operation"), py::arg("element"), py::arg("words"),
        py::arg("words_numel"), py::arg("numbers"), py::arg("numbers_numel"), py::arg("groups"),
        py::arg("penalties"), py::arg("threads"));
}

void define_cuda(py::module_& m) {
  m.def("cuda_device_count", &cuda_device_count);
  m.def("cuda_conv2d_table", &cuda_conv2d_table, py::arg("operation"), py::arg("precision"), py::arg("batch"),
        py::arg("height"), py::arg("width"), py::arg("kh"), py::arg("kw"), py::arg("sh"), py::arg("sw"),
        py::arg("ph"), py::arg("pw"), py::arg("dh"), py::arg("dw"), py::arg("plan"), py::arg("plan_numel"),
        py::arg("fill"), py::arg("blocks_wanted"), py::arg("words"), py::arg("words_numel"));
  m.def("cuda_conv2d_sizes", &cuda_conv2d_sizes, py::arg("table"), py::arg("table_numel"));
  m.def("cuda_conv2d_work", &cuda_conv2d_work, py::arg("table"), py::arg("table_numel"));
  m.def("cuda_conv2d_prepare", &cuda_conv2d_prepare, nogil, py::arg("device"), py::arg("stream"),
        py::arg("table"), py::arg("table_numel"), py::arg("device_table"), py::arg("weight"),
        py::arg("weight_numel"), py::arg("prepared"), py::arg("prepared_bytes"));
  m.def("cuda_conv2d_run", &cuda_conv2d_run, nogil, py::arg("device"), py::arg("stream"), py::arg("table"),
        py::arg("table_numel"), py::arg("device_table"), py::arg("x"), py::arg("x_numel"),
        py::arg("prepared"), py::arg("prepared_bytes"), py::arg("bias"), py::arg("bias_numel"),
        py::arg("residual"), py::arg("residual_numel"), py::arg("out"), py::arg("out_numel"),
        py::arg("workspace"), py::arg("workspace_numel"), py::arg("activation"));
  m.def("cuda_conv2d_grad_weight", &cuda_conv2d_grad_weight, nogil, py::arg("device"), py::arg("stream"),
        py::arg("table"), py::arg("table_numel"), py::arg("device_table"), py::arg("grad"),
        py::arg("grad_numel"), py::arg("x"), py::arg("x_numel"), py::arg("grad_weight"),
        py::arg("weight_numel"), py::arg("workspace"), py::arg("workspace_numel"));
  m.def("cuda_lasso_table", &cuda_lasso_table, py::arg("element"), py::arg("groups"), py::arg("shapes"),
        py::arg("shapes_numel"), py::arg("words"), py::arg("words_numel"));
  m.def("cuda_lasso_sizes", &cuda_lasso_sizes, py::arg("table"), py::arg("table_numel"), py::arg("operation"),
        py::arg("directed"));
  m.def("cuda_lasso_run", &cuda_lasso_run, nogil, py::arg("operation"), py::arg("device"), py::arg("stream"),
        py::arg("table"), py::arg("table_numel"), py::arg("device_table"), py::arg("addresses"),
        py::arg("addresses_numel"), py::arg("device_addresses"), py::arg("logs"), py::arg("log_stride"),
        py::arg("logs_numel"), py::arg("rates"), py::arg("scales"), py::arg("numbers_numel"),
        py::arg("log_out"), py::arg("log_out_stride"), py::arg("log_out_numel"), py::arg("penalties"),
        py::arg("workspace"), py::arg("workspace_numel"));
  m.def("cuda_sample_groups", &cuda_samples<dsp_cuda_sample_groups>, nogil, py::arg("device"),
        py::arg("stream"), py::arg("element"), py::arg("divide"), py::arg("groups"), py::arg("count"),
        py::arg("temperature"), py::arg("first"), py::arg("first_stride"), py::arg("second"),
        py::arg("second_stride"), py::arg("out"));
  m.def("cuda_sample_groups_backward", &cuda_samples<dsp_cuda_sample_groups_backward>, nogil,
        py::arg("device"), py::arg("stream"), py::arg("element"), py::arg("divide"), py::arg("groups"),
        py::arg("count"), py::arg("temperature"), py::arg("first"), py::arg("first_stride"),
        py::arg("second"), py::arg("second_stride"), py::arg("out"));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels: addresses and sizes in, a status out (0 is success).";
  define_core(m);
  define_conv(m);
  define_program(m);
  define_runtime(m);
  define_norm(m);
  define_assignment(m);
  define_cuda(m);
}
