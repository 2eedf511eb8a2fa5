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

// One running loop. A slot is reused only after all have left.
struct alignas(128) Slot {
  std::atomic<bool> taken{false};
  std::atomic<bool> open{false};
  std::atomic<int> inside{0};
  std::atomic<int> places{0};
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) int64_t tasks = 0;
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
  std::atomic<bool> failed{false};
  std::exception_ptr error;
};

class Pool {
 public:
  // attended: others are in attend() for the caller's loops.
  bool run(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context, bool attended) {
    Slot* slot = claim();
    if (slot == nullptr) return false;
    if (!attended) grow(threads - 1);
    slot->tasks = tasks;
    slot->body = body;
    slot->context = context;
    slot->failed.store(false, std::memory_order_relaxed);
    slot->error = nullptr;
    slot->next.store(0, std::memory_order_relaxed);
    slot->places.store(threads - 1, std::memory_order_relaxed);
    slot->open.store(true, std::memory_order_seq_cst);
    generation_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
      }
      wake_.notify_all();
    }
    work(*slot);
    slot->open.store(false, std::memory_order_seq_cst);
    for (int spin = 0; slot->inside.load(std::memory_order_seq_cst) != 0; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
      }
    }
    std::exception_ptr error = slot->error;
    slot->error = nullptr;
    slot->taken.store(false, std::memory_order_release);
    if (error) std::rethrow_exception(error);
    return true;
  }

  // Helps with loops until it is over.
  void attend(const std::atomic<bool>& over) {
    uint64_t seen = ~uint64_t{0};
    for (int spin = 0; !over.load(std::memory_order_acquire); ++spin) {
      const uint64_t now = generation_.load(std::memory_order_seq_cst);
      if (now != seen) {
        seen = now;
        help();
        spin = 0;
      } else if (spin < kSpins) {
        relax();
      } else {
        std::this_thread::yield();
        spin = kSpins;
      }
    }
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

  static void work(Slot& slot) {
    for (;;) {
      const int64_t task = slot.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= slot.tasks) return;
      try {
        slot.body(slot.context, task);
      } catch (...) {
        if (!slot.failed.exchange(true)) slot.error = std::current_exception();
      }
    }
  }

  bool help() {
    bool helped = false;
    for (Slot& slot : slots_) {
      if (!slot.open.load(std::memory_order_acquire)) continue;
      slot.inside.fetch_add(1, std::memory_order_seq_cst);
      // Checked again now that the caller waits for us: the loop may have ended in between.
      if (slot.open.load(std::memory_order_seq_cst) &&
          slot.places.fetch_sub(1, std::memory_order_relaxed) > 0) {
        helped = true;
        work(slot);
      }
      slot.inside.fetch_sub(1, std::memory_order_seq_cst);
    }
    return helped;
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
      help();
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
std::atomic<TeamRunner> team{nullptr};
std::mutex creation;
// On the caller of with_team, while a team attends to its loops.
thread_local bool attended = false;

// A forked child has none of the parent's threads: it starts with a pool of its own (the old one is
// abandoned), and an OpenMP runtime would wait for its own for ever.
void forget_after_fork() {
  team.store(nullptr);
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
  team.store(runner);
}

void parallel_for_raw(int threads, int64_t tasks, void (*body)(void*, int64_t), void* context) {
  const auto loop = [&] {
    const int used = threads > tasks ? static_cast<int>(tasks) : threads;
    if (used > 1 && pool().run(used, tasks, body, context, attended)) return;
    for (int64_t task = 0; task < tasks; ++task) body(context, task);
  };
  // The whole team whatever the number of tasks: a runtime lets threads go that a smaller one does not need.
  with_team(threads, loop);
}

void with_team_raw(int threads, void (*body)(void*), void* context) {
  threads = std::min(threads, kMaxWorkers + 1);  // a runtime that cannot make a thread ends the process
  const TeamRunner runner = threads > 1 && !attended ? team.load(std::memory_order_acquire) : nullptr;
  if (runner == nullptr) {
    body(context);
    return;
  }
  struct Session {
    void (*body)(void*);
    void* context;
    Pool& loops;
    std::thread::id caller;
    std::exception_ptr error;
    std::atomic<bool> over{false};
  } session = {body, context, pool(), std::this_thread::get_id(), nullptr};
  const auto part = [](void* self) {
    Session& s = *static_cast<Session*>(self);
    if (std::this_thread::get_id() != s.caller) {
      s.loops.attend(s.over);
      return;
    }
    attended = true;
    try {
      s.body(s.context);
    } catch (...) {
      s.error = std::current_exception();
    }
    attended = false;
    s.over.store(true, std::memory_order_release);
  };
  runner(part, &session, static_cast<unsigned>(threads), 0);
  if (session.error) std::rethrow_exception(session.error);
}

}  // namespace dsp

extern "C" void dsp_use_team(dsp_team_runner runner) { dsp::use_team(runner); }
