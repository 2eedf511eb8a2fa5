#include "emulation.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// This file itself is built without instrumentation, for speed: DSP_ASAN says that the program is under it.
#if defined(DSP_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kWarp = 32;
constexpr uint16_t kSome = 0x8000;
constexpr uint16_t kMany = 0xffff;

// ---- fibers: a stack and where it was left ----------------------------------------------------------------

#if defined(__x86_64__)
// ucontext saves the signal mask with two system calls a switch; a matrix product takes 32 switches.
extern "C" void dsp_emulation_switch(void** from, void* to);
asm(R"(
.text
.globl dsp_emulation_switch
.type dsp_emulation_switch,@function
dsp_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dsp_emulation_switch,.-dsp_emulation_switch
)");
struct Context {
  void* stack_pointer = nullptr;
};
void switch_context(Context& from, Context& to) {
  dsp_emulation_switch(&from.stack_pointer, to.stack_pointer);
}
void make_context(Context& context, char* stack, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + kStack) & ~uintptr_t{15};
  void** slots = reinterpret_cast<void**>(top);
  // As at a call: the return address stands 8 bytes above a multiple of 16.
  *--slots = nullptr;
  *--slots = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--slots = nullptr;
  context.stack_pointer = slots;
}
#else
struct Context {
  ucontext_t context;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStack;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

enum State { kReady, kAtBarrier, kInWarp, kDone };
enum Operation { kNothing, kLoadMatrix, kMultiply, kShuffle, kSync };
const char* const kOperations[] = {"nothing", "load_matrix", "multiply", "shuffle", "sync_warp"};

struct Copy {
  uint32_t to;
  const void* from;
  size_t bytes, valid;
  char early[16];  // what the source held when the copy was issued
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  State state = kDone;
  Operation operation = kNothing;
  // What it has done since its warp was last together: lanes that differ in it have gone apart.
  uint64_t path = 0;
  // The arguments of the warp instruction that it waits in.
  int number = 0;
  bool transposed = false;
  uint32_t offset = 0;
  uint32_t* out = nullptr;
  float* sum = nullptr;
  const uint32_t* a = nullptr;
  const uint32_t* b = nullptr;
  std::vector<Copy> open;                  // issued, not committed
  std::vector<std::vector<Copy>> pending;  // committed groups under way
};

// One byte of shared memory. Moments are counted in barriers, and turns of a warp in its sync_warps, over all
// blocks, so that nothing is reset.
struct Byte {
  int64_t written = -1;  // when, or -1
  int64_t read = -1;
  int64_t written_turn = 0;  // of the writer's warp
  int64_t read_turn = 0;
  uint16_t writer = 0;
  uint16_t reader = 0;     // a thread, or kSome and a warp, or kMany
  bool under_way = false;  // an asynchronous copy has not landed
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Context home;
  void* home_fake_stack = nullptr;
  const void* home_stack = nullptr;
  size_t home_size = 0;
  const std::function<void()>* body = nullptr;
  std::unique_ptr<char[]> shared;
  std::vector<Byte> bytes;
  int threads = 0, current = 0, at_barrier = 0, done = 0;
  int64_t x = 0, y = 0, size_x = 0, size_y = 0;
  int64_t moment = 0, start = 0, launch = 0;  // launch: the moment at which its first block began
  int64_t turns[32] = {};                     // of each warp
};
Block block;
Counts total{};
bool early_copies = false;

[[noreturn]] __attribute__((format(printf, 1, 2))) void found(const char* format, ...) {
  std::fprintf(stderr, "emulation: block (%lld, %lld), thread %d: ", static_cast<long long>(block.x),
               static_cast<long long>(block.y), block.current);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::fflush(stderr);
  std::_Exit(3);
}

Fiber& self() { return *block.fibers[static_cast<size_t>(block.current)]; }

// To fiber `next`, or home where it is negative.
void switch_to(int next) {
  Fiber* from = block.current >= 0 ? &self() : nullptr;
  Fiber* to = next >= 0 ? block.fibers[static_cast<size_t>(next)].get() : nullptr;
  block.current = next;
#if defined(DSP_ASAN)
  __sanitizer_start_switch_fiber(from != nullptr ? &from->fake_stack : &block.home_fake_stack,
                                 to != nullptr ? to->stack.get() : block.home_stack,
                                 to != nullptr ? kStack : block.home_size);
#endif
  switch_context(from != nullptr ? from->context : block.home, to != nullptr ? to->context : block.home);
#if defined(DSP_ASAN)
  __sanitizer_finish_switch_fiber(from != nullptr ? from->fake_stack : block.home_fake_stack, nullptr,
                                  nullptr);
#endif
}

[[noreturn]] void stuck() {
  int barrier = 0, warp = 0;
  for (int i = 0; i < block.threads; ++i) {
    const State state = block.fibers[static_cast<size_t>(i)]->state;
    barrier += state == kAtBarrier;
    warp += state == kInWarp;
  }
  found("divergence: %d threads wait at a barrier, %d in a warp instruction, %d have ended", barrier, warp,
        block.done);
}

// Gives the processor to the next thread that can go on; returns when this one can.
void pause() {
  int next = block.current;
  for (int i = 0; i < block.threads; ++i) {
    next = next + 1 == block.threads ? 0 : next + 1;
    if (block.fibers[static_cast<size_t>(next)]->state == kReady) {
      if (next != block.current) switch_to(next);
      return;
    }
  }
  stuck();
}

void fiber_main() {
#if defined(DSP_ASAN)
  if (block.home_stack == nullptr)
    __sanitizer_finish_switch_fiber(nullptr, &block.home_stack, &block.home_size);
  else
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  for (;;) {
    (*block.body)();
    Fiber& me = self();
    if (!me.open.empty() || !me.pending.empty()) found("ends with asynchronous copies under way");
    me.state = kDone;
    if (++block.done == block.threads) {
      switch_to(-1);
    } else {
      bool ready = false;
      for (int i = 1; i < block.threads && !ready; ++i) {
        const int next = (block.current + i) % block.threads;
        if (block.fibers[static_cast<size_t>(next)]->state != kReady) continue;
        ready = true;
        switch_to(next);
      }
      if (!ready) stuck();
    }
  }
}

// ---- shared memory ----------------------------------------------------------------------------------------

void check_place(uint32_t offset, size_t bytes, const char* what) {
  if (offset % bytes != 0) found("%s of %zu bytes at shared offset %u is not aligned", what, bytes, offset);
  if (offset + bytes > block.bytes.size())
    found("%s of %zu bytes at shared offset %u is out of bounds: there are %zu", what, bytes, offset,
          block.bytes.size());
}

int warp_of(uint16_t who) { return who == kMany ? -1 : (who & ~kSome) / (who >= kSome ? 1 : kWarp); }

// Whether what `who` did in a turn of its warp is over for a thread: it was the thread itself, or another of
// its warp before they last came together.
bool ordered(uint16_t who, int64_t turn, uint16_t thread) {
  const int warp = thread / kWarp;
  return who == thread || (warp_of(who) == warp && turn < block.turns[warp]);
}

// `who` together with an earlier reader of the same moment.
uint16_t together(uint16_t before, uint16_t who) {
  if (before == who) return who;
  const int warp = warp_of(who);
  return warp >= 0 && warp_of(before) == warp ? static_cast<uint16_t>(kSome | warp) : kMany;
}

void note_read(uint32_t offset, size_t bytes, uint16_t reader) {
  check_place(offset, bytes, "a read");
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = block.bytes[i];
    if (byte.under_way) found("reads shared byte %zu whose asynchronous copy has not landed", i);
    if (byte.written < block.start) found("reads shared byte %zu that nothing has written", i);
    if (byte.written == block.moment && !ordered(byte.writer, byte.written_turn, reader))
      found("race: reads shared byte %zu, written by thread %u since the last barrier", i, byte.writer);
    byte.reader = byte.read == block.moment ? together(byte.reader, reader) : reader;
    byte.read = block.moment;
    byte.read_turn = block.turns[reader / kWarp];
  }
}

void note_write(uint32_t offset, size_t bytes) {
  const auto writer = static_cast<uint16_t>(block.current);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = block.bytes[i];
    if (byte.under_way) found("writes shared byte %zu while an asynchronous copy to it is under way", i);
    if (byte.read == block.moment && !ordered(byte.reader, byte.read_turn, writer))
      found("race: writes shared byte %zu, read by another thread since the last barrier", i);
    if (byte.written == block.moment && !ordered(byte.writer, byte.written_turn, writer))
      found("race: writes shared byte %zu, written by thread %u since the last barrier", i, byte.writer);
    byte.written = block.moment;
    byte.writer = writer;
    byte.written_turn = block.turns[writer / kWarp];
  }
}

// What a thread does goes into its path: kinds of operations, in their order.
void step(int kind) {
  Fiber& me = self();
  me.path = (me.path ^ static_cast<uint64_t>(kind + 1)) * 0x100000001b3u;
}
enum { kLoadShared, kStoreShared, kReadGlobal, kWriteGlobal, kCopyAsync };

// ---- global memory ----------------------------------------------------------------------------------------

constexpr size_t kGrain = 2;  // bytes: the smallest element

struct Cell {
  int64_t written, read, read_elsewhere;  // the last moments; read_elsewhere: by a block before the last one
  uint16_t writer, reader;
};

struct Memory {
  size_t bytes = 0;
  std::unique_ptr<Cell[], decltype(&std::free)> cells{nullptr, &std::free};
};
std::map<uintptr_t, Memory> memories;

// The memory that holds [from, from + bytes), and the first cell; null where none was named.
Cell* cells_of(const void* from, size_t bytes, const char* what) {
  const auto at = reinterpret_cast<uintptr_t>(from);
  if (at % bytes != 0) found("%s a global address that is not aligned to its %zu bytes", what, bytes);
  if (memories.empty()) return nullptr;
  auto next = memories.upper_bound(at);
  if (next == memories.begin()) found("%s global memory out of bounds: %zu bytes", what, bytes);
  --next;
  Memory& memory = next->second;
  if (at + bytes > next->first + memory.bytes)
    found("%s global memory out of bounds: %zu bytes at %zu of %zu", what, bytes,
          static_cast<size_t>(at - next->first), memory.bytes);
  // Zeros: moments begin at one.
  if (memory.cells == nullptr)
    memory.cells.reset(static_cast<Cell*>(std::calloc(memory.bytes / kGrain + 1, sizeof(Cell))));
  return memory.cells.get() + (at - next->first) / kGrain;
}

void note_global_read(const void* from, size_t bytes) {
  Cell* cell = cells_of(from, bytes, "reads");
  if (cell == nullptr) return;
  const auto reader = static_cast<uint16_t>(block.current);
  for (size_t i = 0; i < (bytes + kGrain - 1) / kGrain; ++i, ++cell) {
    if (cell->written >= block.launch && cell->written < block.start)
      found("race: reads global memory that another block has written");
    if (cell->written == block.moment && cell->writer != reader)
      found("race: reads global memory, written by thread %u since the last barrier", cell->writer);
    if (cell->read < block.start) cell->read_elsewhere = cell->read;
    cell->reader = cell->read == block.moment && cell->reader != reader ? kMany : reader;
    cell->read = block.moment;
  }
}

void note_global_write(const void* to, size_t bytes) {
  Cell* cell = cells_of(to, bytes, "writes");
  if (cell == nullptr) return;
  const auto writer = static_cast<uint16_t>(block.current);
  for (size_t i = 0; i < (bytes + kGrain - 1) / kGrain; ++i, ++cell) {
    if (cell->written >= block.launch && cell->written < block.start)
      found("race: writes global memory that another block has written");
    if (cell->written == block.moment && cell->writer != writer)
      found("race: writes global memory, written by thread %u since the last barrier", cell->writer);
    const int64_t elsewhere = cell->read < block.start ? cell->read : cell->read_elsewhere;
    if (elsewhere >= block.launch) found("race: writes global memory that another block has read");
    if (cell->read == block.moment && cell->reader != writer)
      found("race: writes global memory, read by another thread since the last barrier");
    cell->written = block.moment;
    cell->writer = writer;
  }
}

// ---- asynchronous copies ----------------------------------------------------------------------------------

void land(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    for (size_t i = copy.to; i < copy.to + copy.bytes; ++i) block.bytes[i].under_way = false;
    note_write(copy.to, copy.bytes);
    std::memset(block.shared.get() + copy.to, 0, copy.bytes);
    if (copy.valid == 0) continue;
    if (!early_copies) note_global_read(copy.from, copy.valid);
    std::memcpy(block.shared.get() + copy.to, early_copies ? copy.early : copy.from, copy.valid);
  }
}

// ---- warp instructions ------------------------------------------------------------------------------------

float element(Kind kind, const uint32_t* registers, int index) {
  if (kind == kTf32) {
    uint32_t bits = registers[index] & ~uint32_t{0x1fff};
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const auto bits = static_cast<uint16_t>(registers[index / 2] >> (index % 2 * 16));
  if (kind == kF16) return from_f16(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and "... m16n8k8", .tf32.
void multiply_warp(Fiber* const* lanes) {
  const auto kind = static_cast<Kind>(lanes[0]->number);
  const int depth = kind == kTf32 ? 8 : 16;
  float a[16][16], b[16][8];
  for (int l = 0; l < kWarp; ++l) {
    const int row = l / 4;
    const int quad = l % 4;
    if (kind == kTf32) {
      for (int i = 0; i < 4; ++i) a[row + i % 2 * 8][quad + i / 2 * 4] = element(kind, lanes[l]->a, i);
      for (int i = 0; i < 2; ++i) b[quad + i * 4][row] = element(kind, lanes[l]->b, i);
    } else {
      for (int i = 0; i < 8; ++i)
        a[row + i / 2 % 2 * 8][quad * 2 + i % 2 + i / 4 * 8] = element(kind, lanes[l]->a, i);
      for (int i = 0; i < 4; ++i) b[quad * 2 + i % 2 + i / 2 * 8][row] = element(kind, lanes[l]->b, i);
    }
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < 4; ++i) {
      const int row = l / 4 + i / 2 * 8;
      const int column = l % 4 * 2 + i % 2;
      float sum = lanes[l]->sum[i];
      for (int k = 0; k < depth; ++k) sum += a[row][k] * b[k][column];
      lanes[l]->sum[i] = sum;
    }
  }
}

// How often a matrix's rows of 16 bytes have to wait for one another: 32 banks of 4 bytes give eight rows at
// once where no two different ones lie in the same four banks.
int conflicts_of(Fiber* const* rows) {
  int most = 1;
  for (int i = 0; i < 8; ++i) {
    int same = 1;
    for (int k = 0; k < i; ++k) {
      bool counted = rows[k]->offset == rows[i]->offset;
      for (int j = 0; j < k && !counted; ++j) counted = rows[j]->offset == rows[k]->offset;
      if (rows[k]->offset == rows[i]->offset) {
        same = 0;  // the same row: one read for both
        break;
      }
      if (!counted && rows[k]->offset / 16 % 8 == rows[i]->offset / 16 % 8) ++same;
    }
    most = std::max(most, same);
  }
  return most - 1;
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix".
void load_matrix_warp(Fiber* const* lanes) {
  const int count = lanes[0]->number;
  for (int m = 0; m < count; ++m) {
    uint8_t rows[8][16];
    const int first = block.current / kWarp * kWarp;
    for (int r = 0; r < 8; ++r) {
      const uint32_t offset = lanes[m * 8 + r]->offset;
      note_read(offset, 16, static_cast<uint16_t>(first + m * 8 + r));
      std::memcpy(rows[r], block.shared.get() + offset, 16);
    }
    ++total.matrices;
    total.conflicts += conflicts_of(lanes + m * 8);
    for (int l = 0; l < kWarp; ++l) {
      uint32_t bits;
      if (lanes[0]->transposed) {
        uint16_t low, high;
        std::memcpy(&low, rows[l % 4 * 2] + l / 4 * 2, 2);
        std::memcpy(&high, rows[l % 4 * 2 + 1] + l / 4 * 2, 2);
        bits = low | static_cast<uint32_t>(high) << 16;
      } else {
        std::memcpy(&bits, rows[l / 4] + l % 4 * 4, 4);
      }
      lanes[l]->out[m] = bits;
    }
  }
}

void shuffle_warp(Fiber* const* lanes) {
  for (int l = 0; l < kWarp; ++l) *lanes[l]->out = lanes[l ^ lanes[l]->number]->offset;
}

// Waits until all lanes of the warp are in the same instruction; the last one carries it out for all.
void in_warp(Operation operation) {
  Fiber& me = self();
  me.operation = operation;
  me.state = kInWarp;
  const int first = block.current / kWarp * kWarp;
  Fiber* lanes[kWarp];
  bool all = true;
  for (int l = 0; l < kWarp; ++l) {
    lanes[l] = block.fibers[static_cast<size_t>(first + l)].get();
    if (lanes[l]->state != kInWarp) {
      all = false;
      continue;
    }
    if (lanes[l]->operation != operation || (operation != kShuffle && lanes[l]->number != me.number) ||
        lanes[l]->transposed != me.transposed)
      found("divergence: this lane is in %s, lane %d in another %s", kOperations[operation], l,
            kOperations[lanes[l]->operation]);
    if (operation != kSync && lanes[l]->path != me.path)
      found("divergence: before %s, lane %d has gone another way than this one since their warp was together",
            kOperations[operation], l);
  }
  if (!all) {
    pause();
    return;
  }
  if (operation == kLoadMatrix) load_matrix_warp(lanes);
  if (operation == kMultiply) multiply_warp(lanes);
  if (operation == kShuffle) shuffle_warp(lanes);
  if (operation == kSync) ++block.turns[block.current / kWarp];
  for (Fiber* lane : lanes) {
    lane->state = kReady;
    lane->path = 0;
  }
}

}  // namespace

void land_at_issue(bool early) { early_copies = early; }
void add_memory(const void* from, size_t bytes) { memories[reinterpret_cast<uintptr_t>(from)].bytes = bytes; }
void remove_memory(const void* from) { memories.erase(reinterpret_cast<uintptr_t>(from)); }
const Counts& counts() { return total; }

int thread() { return block.current; }
int64_t block_x() { return block.x; }
int block_y() { return static_cast<int>(block.y); }
int64_t blocks_x() { return block.size_x; }
int blocks_y() { return static_cast<int>(block.size_y); }

void barrier() {
  self().state = kAtBarrier;
  if (++block.at_barrier < block.threads) {
    pause();
    return;
  }
  block.at_barrier = 0;
  ++block.moment;
  ++total.barriers;
  for (auto& fiber : block.fibers) {
    if (fiber->state != kAtBarrier) stuck();
    fiber->state = kReady;
    fiber->path = 0;
  }
}

void sync_warp() {
  Fiber& me = self();
  me.number = 0;
  me.transposed = false;
  in_warp(kSync);
}

void read_global(const void* from, size_t bytes) {
  step(kReadGlobal);
  note_global_read(from, bytes);
}

void write_global(const void* to, size_t bytes) {
  step(kWriteGlobal);
  ++(bytes < 16 ? total.narrow_stores : total.wide_stores);
  note_global_write(to, bytes);
}

void load_shared(void* to, uint32_t offset, size_t bytes) {
  step(kLoadShared);
  note_read(offset, bytes, static_cast<uint16_t>(block.current));
  std::memcpy(to, block.shared.get() + offset, bytes);
}

void store_shared(uint32_t offset, const void* from, size_t bytes) {
  step(kStoreShared);
  check_place(offset, bytes, "a write");
  note_write(offset, bytes);
  std::memcpy(block.shared.get() + offset, from, bytes);
}

void load_matrix(uint32_t* to, int count, bool transposed, uint32_t offset) {
  Fiber& me = self();
  if (block.current % kWarp == 0) ++total.matrix_loads;
  me.number = count;
  me.transposed = transposed;
  me.offset = offset;
  me.out = to;
  in_warp(kLoadMatrix);
}

void multiply(Kind kind, float* sum, const uint32_t* a, const uint32_t* b) {
  Fiber& me = self();
  if (block.current % kWarp == 0) ++total.multiplies;
  me.number = kind;
  me.transposed = false;
  me.sum = sum;
  me.a = a;
  me.b = b;
  in_warp(kMultiply);
}

uint32_t shuffle_xor(uint32_t value, int lanes) {
  Fiber& me = self();
  uint32_t result = 0;
  me.number = lanes;
  me.transposed = false;
  me.offset = value;
  me.out = &result;
  in_warp(kShuffle);
  return result;
}

void copy_async(uint32_t offset, const void* from, size_t bytes, size_t valid) {
  step(kCopyAsync);
  check_place(offset, bytes, "an asynchronous copy");
  if (valid > 0 && reinterpret_cast<uintptr_t>(from) % bytes != 0)
    found("an asynchronous copy of %zu bytes reads a global address that is not aligned", bytes);
#if defined(DSP_ASAN)
  if (valid > 0 && __asan_region_is_poisoned(const_cast<void*>(from), valid) != nullptr)
    found("an asynchronous copy of %zu bytes reads global memory out of bounds", valid);
#endif
  const auto writer = static_cast<uint16_t>(block.current);
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = block.bytes[i];
    if (byte.under_way) found("two asynchronous copies to shared byte %zu are under way", i);
    if (byte.read == block.moment && !ordered(byte.reader, byte.read_turn, writer))
      found("race: an asynchronous copy to shared byte %zu, read by another thread since the last barrier",
            i);
    if (byte.written == block.moment && !ordered(byte.writer, byte.written_turn, writer))
      found("race: an asynchronous copy to shared byte %zu, written by thread %u since the last barrier", i,
            byte.writer);
    byte.under_way = true;
  }
  ++total.async_copies;
  Copy copy{offset, from, bytes, valid, {}};
  if (early_copies && valid > 0) {
    note_global_read(from, valid);
    std::memcpy(copy.early, from, valid);
  }
  self().open.push_back(copy);
}

void commit_copies() {
  Fiber& me = self();
  me.pending.push_back(std::move(me.open));
  me.open.clear();
}

void wait_copies(int pending) {
  Fiber& me = self();
  const size_t keep = static_cast<size_t>(pending);
  if (me.pending.size() <= keep) return;
  const size_t landed = me.pending.size() - keep;
  for (size_t i = 0; i < landed; ++i) land(me.pending[i]);
  me.pending.erase(me.pending.begin(), me.pending.begin() + static_cast<std::ptrdiff_t>(landed));
}

float from_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const int exponent = bits >> 10 & 31;
  const uint32_t fraction = bits & 0x3ff;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 0x7f800000u : static_cast<uint32_t>(exponent + 112) << 23;
  const uint32_t all = sign | wide | fraction << 13;
  std::memcpy(&value, &all, 4);
  return value;
}

uint16_t to_f16(float value) {
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) return 0x7fff;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  int exponent = 0;
  std::frexp(size, &exponent);
  // Spacing of the halves around it; below the smallest normal one it stays.
  const int spacing = std::max(exponent - 11, -24);
  const float steps = std::nearbyint(std::ldexp(size, -spacing));
  const auto count = static_cast<uint32_t>(steps);
  uint32_t bits = count;
  if (count >= 1024) bits = static_cast<uint32_t>(spacing + 25) * 1024 + (count - 1024);
  return static_cast<uint16_t>(sign | bits);
}

uint16_t to_bf16(float value) {
  if (std::isnan(value)) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits += 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(bits >> 16);
}

void run_grid(int64_t blocks_x, int blocks_y, int threads, size_t shared_bytes,
              const std::function<void()>& body) {
  if (threads % kWarp != 0 || threads > 1024 || threads < kWarp) {
    std::fprintf(stderr, "emulation: %d threads in a block\n", threads);
    std::_Exit(3);
  }
  while (block.fibers.size() < static_cast<size_t>(threads)) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[kStack]);
    make_context(fiber->context, fiber->stack.get(), fiber_main);
    block.fibers.push_back(std::move(fiber));
  }
  if (block.fibers.size() > static_cast<size_t>(threads)) block.fibers.resize(static_cast<size_t>(threads));
  if (shared_bytes > kMostShared) {
    std::fprintf(stderr,
                 "emulation: a launch wants %zu bytes of shared memory: more than %zu without the opt-in\n",
                 shared_bytes, kMostShared);
    std::_Exit(3);
  }
  ++total.launches;
  block.launch = block.moment + 1;
  block.threads = threads;
  block.shared.reset(new char[shared_bytes]);
  block.bytes.assign(shared_bytes, Byte{});
  block.body = &body;
  block.size_x = blocks_x;
  block.size_y = blocks_y;
  for (block.y = 0; block.y < blocks_y; ++block.y) {
    for (block.x = 0; block.x < blocks_x; ++block.x) {
      for (auto& fiber : block.fibers) {
        fiber->state = kReady;
        fiber->path = 0;
      }
      block.done = block.at_barrier = 0;
      block.start = ++block.moment;
      ++total.blocks;
      block.current = -1;
      // Another thread goes first in each block.
      switch_to(static_cast<int>((block.x * 37 + block.y * 11) % threads));
    }
  }
  block.current = 0;
}

}  // namespace emulation
