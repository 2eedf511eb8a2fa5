#include "core/scratch.h"

#include <cstdlib>
#include <new>

namespace dsp {

Scratch::~Scratch() { std::free(base_); }

char* Scratch::reserve(size_t bytes) {
  if (bytes > capacity_) {
    const size_t rounded = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    if (rounded < bytes) throw std::bad_alloc();
    std::free(base_);
    base_ = nullptr;
    capacity_ = 0;
    base_ = static_cast<char*>(std::aligned_alloc(4096, rounded));
    if (base_ == nullptr) throw std::bad_alloc();
    capacity_ = rounded;
  }
  return base_;
}

Scratch& call_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Scratch& task_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

}  // namespace dsp
