// How a convolution is cut into blocks of threads: a table of int32 words that the host writes once for a
// layout, a shape and a precision, and that kernels read in the device's memory.
//
// The work is an implicit GEMM: pixels x filters x (channels and taps). A block of 128 threads makes 128
// output pixels (a box of images, rows and columns) of up to 64 filters of one group. The sum runs over
// phases: a chunk of 64 bytes of channels, with all taps or with one. In each phase the input pixels that the
// box needs (its halo) are brought to shared memory once, one row of 64 bytes a pixel, and serve all taps.
#pragma once

#include <cstdint>
#include <vector>

#include "conv/plan.h"

namespace dsp {
namespace cuda {

constexpr int32_t kTableMagic = 0x44535443;
constexpr int32_t kThreads = 128;
constexpr int32_t kTilePixels = 128;
constexpr int32_t kRowBytes = 64;
constexpr int32_t kMaxColumns = kRowBytes / 2;  // channels of a chunk in 16 bits; half as many in 32
constexpr int32_t kUnits = kRowBytes / 16;      // asynchronous copies a row
constexpr int32_t kMaxOctets = 8;               // filters of a block, in eights
constexpr int32_t kStages = 3;
constexpr int32_t kWeightStages = 2;  // of the kernel for the gradient of the weight
constexpr int32_t kMaxTaps = 12;      // of a block of that kernel: three a warp
constexpr int32_t kSharedBytes = 48 * 1024;
constexpr int32_t kStaged = 32;  // filters whose sums are in shared memory at a time, before they are stored
constexpr int32_t kStagedBytes = kTilePixels * kStaged * 4;
constexpr int64_t kMostPixels = int64_t{1} << 29;  // a side, with padding: coordinates then fit 32 bits
constexpr int64_t kMostRows = 1023;                // of a halo: see the magic numbers in TableClass
constexpr int64_t kMostSplits = 16;
constexpr int64_t kMostSlices = 65535;  // of the gradient of the weight: what a grid may have

enum Operation : int32_t { kForward = 0, kGradInput = 1, kGradWeight = 2 };
enum Precision : int32_t { kF16 = 0, kBf16 = 1, kTf32 = 2, kF32 = 3 };
enum Fill : int32_t { kAuto = 0, kRuns = 1, kGather = 2 };

inline int32_t element_bytes(int32_t precision) { return precision <= kBf16 ? 2 : 4; }

// All positions are in words from the start of the table.
struct TableHeader {
  int32_t magic, words, operation, precision;
  int32_t in_channels, out_channels;  // of the tensors read and written: exchanged for the input's gradient
  int32_t n_classes, classes_at, n_items, items_at;
  int32_t blocks, splits;
  int32_t octets;               // most in an item
  int32_t halo_rows;            // most in a class
  int32_t shared_bytes, clear;  // clear: set the output to zero first
  int32_t taps, kernel_w;
  int32_t prepared_rows[2];  // rows of 64 bytes of laid out weights: low and high word
  int32_t workspace[2];      // floats
  int32_t read_numel[2], written_numel[2];
  int32_t weight_numel[2];
  int32_t multiply_adds[2];
  int32_t vectors;   // 1: some item reads 16 bytes at a time, so x must be aligned
  int32_t partials;  // of one slice of the weight's gradient: how many warps share its pixels
};

// Output pixels of one phase of the stride, with the taps that reach them: output (y, x) is at grid (gy, gx)
// * out_step + out_offset and reads the input at grid * in_step + in_offset + tap * tap_step.
struct TableClass {
  int32_t first_block, n_items, items_at, pixel_tiles;
  int32_t tile_n, tile_h, tile_w, tiles_n, tiles_h, tiles_w;
  int32_t batch, grid_h, grid_w;
  int32_t in_h, in_w, out_h, out_w;
  int32_t in_step_h, in_step_w, in_offset_h, in_offset_w;
  int32_t out_step_h, out_step_w, out_offset_h, out_offset_w;
  int32_t taps_h, taps_w, tap_step_h, tap_step_w;
  int32_t phase_h, phase_w;          // taps that share a halo
  int32_t halo_h, halo_w;            // rows and columns for one image
  int32_t halo_step_h, halo_step_w;  // input pixels between them
  int32_t row_step_h, row_step_w;    // halo rows between output pixels
  int32_t row_tap_h, row_tap_w;      // and between taps
  // quotient = value * magic >> 22, exact for values and divisors below 1024
  int32_t halo_w_magic, halo_h_magic, tile_w_magic, tile_h_magic;
  // tap (i, j) of the class is tap first + i * next of the kernel
  int32_t tap_first_h, tap_next_h, tap_first_w, tap_next_w;
};

struct TableItem {
  int32_t filters_at;  // output channels, octets * 8 of them, or -1
  int32_t octets;
  int32_t chunks_at, n_chunks;
  int32_t pairs_at;      // n_chunks x (octets * 8) x columns: which weight, in (filter, channel) pairs, or -1
  int32_t weights[2];    // first row of the laid out weights
  int32_t tap_h, tap_w;  // the gradient of the weight: first tap of the block
  int32_t taps_h, taps_w;
  int32_t grad_chunk_at;  // and the chunk of output channels
  int32_t units_at;       // of each 16 bytes of filters: the first channel where they are whole, or -1
};

struct TableChunk {
  int32_t steps;                 // of 32 bytes that hold channels: 1 or 2
  int32_t gather;                // 1: channels one by one; 0: units of 16 bytes
  int32_t unit[kUnits];          // first channel of each unit, or -1
  int32_t used;                  // one bit a column: the group reads it
  int32_t full;                  // 1: all columns of the steps are read, or hold nothing but zeros
  int32_t channel[kMaxColumns];  // of each column, or -1
};

inline int64_t wide(const int32_t (&words)[2]) {
  return static_cast<int64_t>(words[1]) * (int64_t{1} << 32) + static_cast<uint32_t>(words[0]);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int32_t magic_of(int64_t divisor) { return static_cast<int32_t>((int64_t{1} << 22) / divisor + 1); }

// Bytes of shared memory of a block whose halo has so many rows, which serve so many taps.
inline int64_t shared_of(int32_t operation, int64_t rows, int64_t taps, int64_t octets) {
  if (operation == kGradWeight) return kWeightStages * (rows + 1 + kTilePixels) * kRowBytes + kTilePixels * 4;
  const int64_t copies = (taps == 1 ? kStages : 2) * rows * kRowBytes + kStages * octets * 8 * kRowBytes;
  return copies > kStagedBytes ? copies : kStagedBytes;
}

// The first channel of a unit of 16 bytes of an item's filters where it is whole, aligned and can be stored
// so, or -1.
int32_t whole_unit(const TableHeader& header, const int32_t* filters);

// Throws Error where the shape is too large for the kernels, or not a shape at all. `blocks_wanted`: how many
// blocks of threads keep the device busy; below it the sum is split. `fill` forces how channels are read.
std::vector<int32_t> make_table(Operation operation, Precision precision, const dsp_conv2d_shape* shape,
                                const Plan& plan, Fill fill, int32_t blocks_wanted);

// The table's header. Throws Error unless it is one that make_table writes. What each call reads.
const TableHeader& read_table(const int32_t* words, int64_t numel);

// Throws Error, saying where, unless all of the words are a table that keeps the kernels inside of buffers of
// the sizes in its header, and writes each element once. As long as the table: for once, not for each call.
void check_table(const int32_t* words, int64_t numel);

}  // namespace cuda
}  // namespace dsp
