// How the group penalty of a network is cut into blocks of threads: a table of int64 words that the host
// writes once for the layers' shapes and that kernels read in the device's memory.
//
// A tile is a chunk of one layer's filters times a block of its channels, with all their taps. A block of 128
// threads walks over it in batches of filters: a batch comes to shared memory as it lies, then each thread
// has one channel of every `teams`-th filter, a *pair*. Sums over filters and over channels that cross tiles
// are left as partial sums and added up in order by the next kernel.
#pragma once

#include <cstdint>

#include "dsp.h"

namespace dsp {
namespace cuda {
namespace lasso {

constexpr int64_t kMagic = 0x44535041;
constexpr int kThreads = 128;
constexpr int kPairs = 4;      // of a thread in a batch, at most
constexpr int kRows = 32;      // filters of a batch, at most
constexpr int kGroups = 8;     // whose sums are made at a time
constexpr int kStage = 16384;  // bytes of the batches under way, at most
constexpr int kSlots = 4;      // batches under way, at most
constexpr int64_t kMostGroups = 4096;

enum Element : int64_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBfloat16 = 3 };

inline int64_t element_bytes(int64_t element) {
  return element == kFloat64 ? 8 : element == kFloat32 ? 4 : 2;
}
inline int64_t sum_bytes(int64_t element) { return element == kFloat64 ? 8 : 4; }

// Sizes are in elements of the sums' type; positions in words from the start of the table.
struct Header {
  int64_t magic, words, element, groups;
  int64_t layers, layers_at, tiles, tiles_at, row_tiles, row_tiles_at;
  int64_t filters, pitch;          // of all layers: filters, channels
  int64_t columns, rows, squares;  // partial sums for each channel, for each filter; S of all layers
  int64_t stage;                   // bytes of the batches that are in shared memory at a time, at most
};

struct Layer {
  int64_t filters, channels, taps, tap_major;
  int64_t width;                  // channels of a tile, a power of two
  int64_t batch, stored_batch;    // filters of a batch of weights, of sums over taps
  int64_t slots, slot;            // batches that are under way at a time, 1, 2 or 4; bytes of one
  int64_t chunk, chunks, blocks;  // filters of a tile; tiles along the filters, along the channels
  int64_t vectors;                // 1: 16 bytes can be moved at a time where addresses allow it
  int64_t filter_at, channel_at;  // where it begins among all filters and channels
  int64_t columns_at, rows_at, squares_at;
};

struct Tile {
  int64_t layer, row, channel, chunk, block;
};

// 128 filters of a layer.
struct RowTile {
  int64_t layer, filter;
};

// The table's header after checking its mark, its length and where its parts begin; the rest is taken as
// dsp_cuda_lasso_table wrote it. Throws Error.
const Header& read_table(const int64_t* words, int64_t numel);

// Where an operation's partial results lie in the work space, in elements of the sums' type; -1: nowhere.
struct Workspace {
  int64_t columns, rows, ratios, moved, inverses, changes, scalars, penalties, squares, products, size;
};
Workspace workspace_of(const Header& header, int32_t operation, bool directed);

}  // namespace lasso
}  // namespace cuda
}  // namespace dsp
