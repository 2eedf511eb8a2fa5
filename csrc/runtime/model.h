// A program file in use: its plans by image size, and what a caller may ask of it.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "program/program.h"
#include "runtime/file.h"

namespace dsp {

// Where the bytes of a file come from, now and whenever other sizes are planned.
class FileSource {
 public:
  FileSource() = default;
  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;
  virtual ~FileSource() = default;
  struct Bytes {
    const uint8_t* data;
    int64_t numel;
    std::unique_ptr<uint8_t, void (*)(uint8_t*)> owner;
  };
  // Aligned as read_contents wants them. Throws Error where they cannot be read.
  virtual Bytes read() = 0;
};

std::unique_ptr<FileSource> file_source(const char* path);
std::unique_ptr<FileSource> memory_source(const void* data, int64_t numel);

class Model {
 public:
  explicit Model(std::unique_ptr<FileSource> source);  // throws Error

  const std::vector<TensorInfo>& inputs() const { return inputs_; }
  const std::vector<TensorInfo>& outputs() const { return outputs_; }
  dsp_program_memory memory() const { return first_->memory(); }
  void plan(const dsp_tensor* inputs, int32_t n_inputs, dsp_tensor* outputs, int32_t n_outputs);
  void run(const dsp_tensor* inputs, int32_t n_inputs, const dsp_tensor* outputs, int32_t n_outputs,
           int32_t threads);

 private:
  using Sizes = std::vector<Shape>;  // of one image of each input
  using Planned = std::shared_ptr<Program>;
  // Checks the inputs' dtypes and shapes against the file.
  Sizes sizes_of(const dsp_tensor* inputs, int32_t n_inputs) const;
  Planned find(const Sizes& sizes);
  Planned made(const Sizes& sizes);
  Planned kept(const Sizes& sizes);

  std::unique_ptr<FileSource> source_;  // null where no other size can be asked for
  uint32_t checksum_ = 0;
  std::vector<TensorInfo> inputs_, outputs_;
  Sizes own_;
  Planned first_;                                // for the sizes of the file
  std::mutex planning_;                          // one plan at a time is made
  std::mutex mutex_;                             // of the list
  std::list<std::pair<Sizes, Planned>> others_;  // the last used in front
};

}  // namespace dsp
