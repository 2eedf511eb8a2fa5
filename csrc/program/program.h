// A network as a list of steps over one preallocated memory; the format of its description is in dsp.h.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "dsp.h"
#include "program/chains.h"
#include "program/step.h"

namespace dsp {

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

class Program {
 public:
  Program(const int64_t* words, int64_t words_numel, const Floats& floats);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void run(const float* const* in, float* const* out, int64_t batch, int threads);
  // Every step in the order in which they run, with the time that one image takes in it on this thread.
  std::vector<dsp_program_step> profile();
  int64_t inputs() const { return inputs_; }
  int64_t outputs() const { return static_cast<int64_t>(outputs_.size()); }
  const Value& input(int64_t i) const { return values_[static_cast<size_t>(i)]; }
  const Value& output(int64_t i) const {
    return values_[static_cast<size_t>(outputs_[static_cast<size_t>(i)])];
  }
  dsp_program_memory memory() const;
  int64_t step_count() const { return static_cast<int64_t>(steps_.size()); }

 private:
  void place_weights();
  void assign_memory();
  void run_chains(const Place& at, size_t end, int threads, double* seconds) const;
  float* take_arena();
  void give_arena(float* arena);
  struct Lease {
    explicit Lease(Program* owner) : program(owner), floats(owner->take_arena()) {}
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() { program->give_arena(floats); }
    Program* program;
    float* floats;
  };
  void give(const Place& at, int64_t id, float* out) const;
  void run_images(const float* const* in, float* const* out, int64_t first, int64_t images, float* arena,
                  int threads, double* seconds = nullptr) const;

  std::vector<Value> values_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<Chain> chains_;
  std::unique_ptr<float, Free> weights_;  // of all steps, in the order in which they run
  int64_t inputs_ = 0;
  std::vector<int64_t> outputs_;
  size_t first_pair_ = 0;  // the first step for which images wait for one another
  int64_t second_ = 0;     // from a value of the first image to that of the second
  int64_t arena_floats_ = 0;
  int64_t scratch_floats_ = 0;
  mutable std::mutex mutex_;
  std::vector<float*> free_arenas_;
  int64_t arenas_ = 0;
};

}  // namespace dsp
