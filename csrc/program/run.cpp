// How a program runs: images over threads, steps over one image or two.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>

#include "core/pages.h"
#include "core/thread_pool.h"
#include "program/program.h"
#include "program/steps/conv.h"

namespace dsp {
namespace {

double thread_seconds() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace

float* Program::take_arena() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_arenas_.empty()) {
      float* arena = free_arenas_.back();
      free_arenas_.pop_back();
      return arena;
    }
    free_arenas_.reserve(static_cast<size_t>(arenas_) + 1);
    ++arenas_;
  }
  const size_t bytes = static_cast<size_t>(arena_floats_) * sizeof(float) + 4096;
  float* arena = nullptr;
  try {
    arena = static_cast<float*>(take_pages(bytes));
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    --arenas_;
    throw;
  }
  std::memset(arena, 0, bytes);
  return arena;
}

void Program::give_arena(float* arena) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_arenas_.push_back(arena);  // take_arena() reserved the room
}

// One image of a value, to the caller.
void Program::give(const Place& at, int64_t id, float* out) const {
  const Value& y = at.value(id);
  if (y.layout == Layout::kLanes) {
    const PixelRows<const float> from = at.const_pixel_rows(id);
    for (int64_t row = 0; row < y.height; ++row) {
      for (int64_t x = 0; x < y.width; ++x) {
        for (int64_t c = 0; c < y.channels; ++c)
          out[(c * y.height + row) * y.width + x] = from(row)[x * from.pixel + y.place(c)];
      }
    }
    return;
  }
  const Rows<const float> from = at.const_rows(id);
  for (int64_t c = 0; c < y.channels; ++c) {
    for (int64_t row = 0; row < y.height; ++row, out += y.width)
      std::memcpy(out, from(c, row), static_cast<size_t>(y.width) * sizeof(float));
  }
}

// The steps before `end`, for one image. The time of each is added to `seconds`, unless that is null.
void Program::run_chains(const Place& at, size_t end, int threads, double* seconds) const {
  const auto timed = [seconds](size_t step, const auto& body) {
    const double start = seconds == nullptr ? 0 : thread_seconds();
    body();
    if (seconds != nullptr) seconds[step] += thread_seconds() - start;
  };
  for (const Chain& chain : chains_) {
    if (chain.begin >= end) break;
    const size_t last = std::min(chain.end, end);
    const int64_t plane = chain.pixels == 0 ? 0 : steps_[chain.begin]->conv()->geometry().out_plane();
    const int64_t turns = chain.pixels == 0 ? 0 : (plane + chain.pixels - 1) / chain.pixels;
    if (turns == 0 || (threads > 1 && turns < 3 * int64_t{threads})) {
      for (size_t i = chain.begin; i < last; ++i) timed(i, [&] { steps_[i]->run(at, threads); });
      continue;
    }
    auto body = [&](int64_t turn) {
      const int64_t first = turn * chain.pixels;
      const int64_t pixels = std::min(chain.pixels, plane - first);
      for (size_t i = chain.begin; i < last; ++i)
        timed(i, [&] { steps_[i]->conv()->run_pixels(at, first, pixels); });
    };
    parallel_for(threads, turns, body);
  }
}

// One image, or two: these go one after the other until they can share vectors.
void Program::run_images(const float* const* in, float* const* out, int64_t first, int64_t images,
                         float* arena, int threads, double* seconds) const {
  const Place at[2] = {{values_, in, first, arena, 0}, {values_, in, first + images - 1, arena, second_}};
  const size_t alone = images == 1 ? steps_.size() : first_pair_;
  for (int64_t n = 0; n < images; ++n) run_chains(at[n], alone, threads, seconds);
  for (size_t i = alone; i < steps_.size(); ++i) {
    const ConvStep* conv = steps_[i]->conv();
    if (conv != nullptr && conv->pairs()) {
      conv->run_pair(at[0], second_);
      continue;
    }
    for (const Place& place : at) steps_[i]->run(place, threads);
  }
  for (int64_t n = 0; n < images; ++n) {
    for (size_t i = 0; i < outputs_.size(); ++i)
      give(at[n], outputs_[i], out[i] + (first + n) * at[n].value(outputs_[i]).numel());
  }
}

void Program::run(const float* const* in, float* const* out, int64_t batch, int threads) {
  const auto some = [&](int64_t first, int64_t images, int inner) {
    const Lease arena(this);
    run_images(in, out, first, images, arena.floats, inner);
  };
  // Whole images side by side while every thread has one, two at a time where that helps; what is left over
  // is shared layer by layer.
  const int64_t whole = threads <= 1 ? batch : batch / threads * threads;
  const int64_t pairs = first_pair_ < steps_.size() ? whole / threads / 2 * threads : 0;
  auto body = [&](int64_t task) {
    if (task < pairs) {
      some(2 * task, 2, 1);
    } else {
      some(pairs + task, 1, 1);
    }
  };
  parallel_for(threads, whole - pairs, body);
  for (int64_t n = whole; n < batch; ++n) some(n, 1, threads);
}

}  // namespace dsp
