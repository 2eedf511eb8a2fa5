// A thread block on the host: threads are fibers, warp instructions wait for all lanes, and shared memory
// remembers of each byte who wrote it, when, and who has read it. See docs/cuda.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

// Which deliberate fault is switched on; 0 is none.
int fault();
void set_fault(int number);

int thread();
int64_t block_x();
int block_y();
int64_t blocks_x();
int blocks_y();

void barrier();
void load_shared(void* to, uint32_t offset, size_t bytes);
void store_shared(uint32_t offset, const void* from, size_t bytes);
void load_matrix(uint32_t* to, int count, bool transposed, uint32_t offset);
enum Kind { kF16, kBf16, kTf32 };
void multiply(Kind kind, float* sum, const uint32_t* a, const uint32_t* b);
uint32_t shuffle_xor(uint32_t value, int lanes);
void copy_async(uint32_t offset, const void* from, size_t bytes, size_t valid);
void commit_copies();
void wait_copies(int pending);

float from_f16(uint16_t bits);
uint16_t to_f16(float value);
uint16_t to_bf16(float value);

// What the emulation has run, so that a test can tell that it ran at all.
struct Counts {
  int64_t blocks, barriers, multiplies, matrix_loads, async_copies, launches;
};
const Counts& counts();

// Runs `body` once for every thread of every block, one block after the other.
void run_grid(int64_t blocks_x, int blocks_y, int threads, size_t shared_bytes,
              const std::function<void()>& body);

}  // namespace emulation
