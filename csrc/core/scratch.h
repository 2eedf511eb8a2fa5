// Reusable, 64-byte aligned memory of one thread: it grows when it must and is kept for the next call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsp {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  // At least `bytes` bytes of undefined content; what an earlier reserve() returned is no longer valid.
  char* reserve(size_t bytes);

 private:
  char* base_ = nullptr;
  size_t capacity_ = 0;
};

// For what one call shares between its tasks; belongs to the calling thread.
Scratch& call_scratch();
// For the work of one task; belongs to the thread that runs it.
Scratch& task_scratch();

// Hands out consecutive aligned pieces; with a null base it only adds up the sizes.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <typename T>
  T* take(size_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace dsp
