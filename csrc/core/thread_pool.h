// Parallel loops, on threads of the core's own or on a team of the caller's OpenMP runtime. Callers on any
// number of threads may run loops at the same time.
#pragma once

#include <cstdint>

namespace dsp {

// Runs body(task) for every task in [0, tasks) on at most `threads` threads, the caller among them, and
// returns when all are done. The caller alone finishes the loop when no worker is free, so nesting cannot
// deadlock. An exception in a task is kept and thrown again here.
void parallel_for_raw(int threads, int64_t tasks, void (*body)(void* context, int64_t task), void* context);

// GOMP_parallel of an OpenMP runtime: runs body(context) on `threads` threads, the caller among them.
using TeamRunner = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);

// Loops run on this runtime's teams from now on; null: on the core's own threads. Threads of an OpenMP
// runtime go on spinning for milliseconds after a loop; a caller whose own loops run there leaves no core to
// others.
void use_team(TeamRunner runner);

// Runs body(context) on the caller. Where loops run on teams, one team stays for all the loops in it, so that
// a loop waits for no thread that is not there yet: on a busy machine each such wait can take milliseconds. A
// loop outside has a team of its own. A team helps nobody but its caller.
void with_team_raw(int threads, void (*body)(void* context), void* context);

template <typename F>
void with_team(int threads, const F& body) {
  with_team_raw(threads, [](void* context) { (*static_cast<const F*>(context))(); }, const_cast<F*>(&body));
}

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
