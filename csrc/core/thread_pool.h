// Persistent worker threads. Callers on any number of threads may run loops at the same time.
#pragma once

#include <cstdint>

namespace dsp {

// Runs body(task) for every task in [0, tasks) on at most `threads` threads, the caller among them, and
// returns when all are done. The caller alone finishes the loop when no worker is free, so nesting cannot
// deadlock. An exception in a task is kept and thrown again here.
void parallel_for_raw(int threads, int64_t tasks, void (*body)(void* context, int64_t task), void* context);

template <typename F>
void parallel_for(int threads, int64_t tasks, F& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  parallel_for_raw(
      threads, tasks, [](void* context, int64_t task) { (*static_cast<F*>(context))(task); }, &body);
}

}  // namespace dsp
