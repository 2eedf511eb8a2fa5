#include "core/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#include "dsp.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace dsp {
namespace {

constexpr int kSlots = 16;
constexpr int kMaxWorkers = 255;
constexpr int kSpins = 4000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline void wait_a_little(int spin) {
  if (spin < kSpins) {
    relax();
  } else {
    std::this_thread::yield();
  }
}

// Where others find a caller's loop. The next loop begins only after all have left the one before.
class alignas(128) Slot {
 public:
  std::atomic<bool> taken{false};

  void open(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    tasks_ = tasks;
    body_ = body;
    context_ = context;
    failed_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    next_.store(0, std::memory_order_relaxed);
    places_.store(threads - 1, std::memory_order_relaxed);
    open_.store(true, std::memory_order_seq_cst);
  }

  // The caller's share, and the wait for the others'.
  std::exception_ptr finish() {
    work();
    open_.store(false, std::memory_order_seq_cst);
    for (int spin = 0; inside_.load(std::memory_order_seq_cst) != 0; spin += spin < kSpins)
      wait_a_little(spin);
    std::exception_ptr error = error_;
    error_ = nullptr;
    return error;
  }

  void help() {
    if (!open_.load(std::memory_order_acquire)) return;
    inside_.fetch_add(1, std::memory_order_seq_cst);
    // Checked again now that the caller waits for us: the loop may have ended in between.
    if (open_.load(std::memory_order_seq_cst) && places_.fetch_sub(1, std::memory_order_relaxed) > 0) work();
    inside_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  void work() {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks_) return;
      try {
        body_(context_, task);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
  }

  std::atomic<bool> open_{false};
  std::atomic<int> inside_{0};
  std::atomic<int> places_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) int64_t tasks_ = 0;
  void (*body_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// A team of the caller's OpenMP runtime, for all loops that the caller runs while it lasts.
class Team {
 public:
  // False within a task of the caller's own.
  bool run(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    if (running_) return false;
    running_ = true;
    slot_.open(threads, tasks, body, context);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    std::exception_ptr error = slot_.finish();
    running_ = false;
    if (error) std::rethrow_exception(error);
    return true;
  }

  void attend() {
    uint64_t seen = 0;
    for (int spin = 0; !over_.load(std::memory_order_acquire);) {
      const uint64_t now = generation_.load(std::memory_order_seq_cst);
      if (now != seen) {
        seen = now;
        slot_.help();
        spin = 0;
      } else {
        wait_a_little(spin);
        spin += spin < kSpins;
      }
    }
  }

  void dismiss() { over_.store(true, std::memory_order_release); }

 private:
  Slot slot_;
  bool running_ = false;
  std::atomic<uint64_t> generation_{0};
  std::atomic<bool> over_{false};
};

// Threads of the core's own.
class Pool {
 public:
  bool run(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
    Slot* slot = claim();
    if (slot == nullptr) return false;
    grow(threads - 1);
    slot->open(threads, tasks, body, context);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    std::exception_ptr error = slot->finish();
    slot->taken.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

 private:
  Slot* claim() {
    for (Slot& slot : slots_) {
      bool expected = false;
      if (slot.taken.compare_exchange_strong(expected, true, std::memory_order_acquire)) return &slot;
    }
    return nullptr;
  }

  void grow(int wanted) {
    if (wanted > kMaxWorkers) wanted = kMaxWorkers;
    if (workers_.load(std::memory_order_acquire) >= wanted) return;
    std::lock_guard<std::mutex> lock(mutex_);
    while (workers_.load(std::memory_order_relaxed) < wanted) {
      try {
        std::thread([this] { loop(); }).detach();
      } catch (const std::system_error&) {
        return;  // fewer threads than wished for: the caller does the rest
      }
      workers_.fetch_add(1, std::memory_order_release);
    }
  }

  void loop() {
    uint64_t seen = ~uint64_t{0};
    for (;;) {
      uint64_t now = generation_.load(std::memory_order_seq_cst);
      for (int spin = 0; now == seen && spin < kSpins; ++spin) {
        relax();
        now = generation_.load(std::memory_order_seq_cst);
      }
      if (now == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        continue;
      }
      seen = now;
      for (Slot& slot : slots_) slot.help();
    }
  }

  Slot slots_[kSlots];
  std::atomic<int> workers_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<uint64_t> generation_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

std::atomic<Pool*> current{nullptr};
std::atomic<TeamRunner> team_runner{nullptr};
std::mutex creation;
thread_local Team* team = nullptr;  // the caller's, in with_team

// A forked child has none of the parent's threads: it starts with a pool of its own (the old one is
// abandoned), and an OpenMP runtime would wait for its own for ever.
void forget_after_fork() {
  team_runner.store(nullptr);
  current.store(nullptr);
  new (&creation) std::mutex;
}

void mind_forks() {
  static const bool registered = pthread_atfork(nullptr, nullptr, forget_after_fork) == 0;
  static_cast<void>(registered);
}

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found != nullptr) return *found;
  std::lock_guard<std::mutex> lock(creation);
  found = current.load(std::memory_order_acquire);
  if (found == nullptr) {
    mind_forks();
    found = new Pool;  // never freed: workers may still wait in it while the process ends
    current.store(found, std::memory_order_release);
  }
  return *found;
}

}  // namespace

void use_team(TeamRunner runner) {
  mind_forks();
  team_runner.store(runner);
}

void parallel_for_raw(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  const auto loop = [&] {
    const int used = threads > tasks ? static_cast<int>(tasks) : threads;
    if (used > 1 &&
        (team != nullptr ? team->run(used, tasks, body, context) : pool().run(used, tasks, body, context)))
      return;
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
  };
  // The whole team whatever the number of tasks: a runtime lets threads go that a smaller one does not need.
  with_team(threads, loop);
}

void with_team_raw(int threads, void (*body)(void*), void* context) {
  threads = std::min(threads, kMaxWorkers + 1);  // a runtime that cannot make a thread ends the process
  const TeamRunner runner =
      threads > 1 && team == nullptr ? team_runner.load(std::memory_order_acquire) : nullptr;
  if (runner == nullptr) {
    body(context);
    return;
  }
  struct Session {
    void (*body)(void*);
    void* context;
    std::thread::id caller;
    std::exception_ptr error;
    Team team;
  } session = {body, context, std::this_thread::get_id(), nullptr, {}};
  const auto part = [](void* self) {
    Session& s = *static_cast<Session*>(self);
    if (std::this_thread::get_id() != s.caller) {
      s.team.attend();
      return;
    }
    team = &s.team;
    try {
      s.body(s.context);
    } catch (...) {
      s.error = std::current_exception();
    }
    team = nullptr;
    s.team.dismiss();
  };
  runner(part, &session, static_cast<unsigned>(threads), 0);
  if (session.error) std::rethrow_exception(session.error);
}

}  // namespace dsp

extern "C" void dsp_use_team(dsp_team_runner runner) { dsp::use_team(runner); }
