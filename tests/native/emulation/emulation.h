// A thread block on the host: threads are fibers, warp instructions wait for all lanes, and memory remembers
// who wrote it, when, and who has read it. See docs/cuda.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulation {

// Whether asynchronous copies bring what their source holds when they are issued, or when they are waited
// for: on a device it may be either. Where they may be read is the same.
void land_at_issue(bool early);

// Memory that kernels are given. Once there is some, reads and writes of kernels must be in it; what two of a
// launch's blocks write, or one reads and another writes, is a race, and so between threads of a block since
// its last barrier.
void add_memory(const void* from, size_t bytes);
void remove_memory(const void* from);

int thread();
int64_t block_x();
int block_y();
int64_t blocks_x();
int blocks_y();

void barrier();
void sync_warp();
void read_global(const void* from, size_t bytes);
void write_global(const void* to, size_t bytes);
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
  int64_t wide_stores, narrow_stores;  // to global memory: of 16 bytes, and of fewer
  int64_t matrices, conflicts;         // read by ldmatrix, and how often banks of shared memory made one wait
};
const Counts& counts();

// What a launch gets without opting in to more.
constexpr size_t kMostShared = 48 * 1024;

// Runs `body` once for every thread of every block, one block after the other.
void run_grid(int64_t blocks_x, int blocks_y, int threads, size_t shared_bytes,
              const std::function<void()>& body);

}  // namespace emulation
