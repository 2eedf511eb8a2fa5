// How one convolution is run: where the kernels read, in which blocks of filters, over which tiles of pixels.
#pragma once

#include <cstdint>
#include <vector>

#include "conv/plan.h"
#include "conv/planar/kernel.h"

namespace dsp {

// A buffer of planes: pixel (y, x) of channel c is at origin + c * plane + y * pitch + x. Where `odd` is not
// 0, a row's even columns lie next to each other, at x / 2, and its odd ones `odd` behind them: each a row to
// a convolution of stride 2.
struct Planes {
  int64_t origin = 0;
  int64_t pitch = 0;
  int64_t plane = 0;
  int64_t odd = 0;
};

// Which columns of a row tap `kx` of a convolution of stride 2 reads: those that are odd or those that are
// even, from number `first` on.
struct ColumnsApart {
  bool odd;
  int64_t first;
};
ColumnsApart columns_apart(const ConvShape& s, int64_t kx);

enum class InputMode {
  kGatherRows,  // rows are copied with their padding, phases of the stride apart: tiles are rows below each
                // other
  kGatherFlat,  // one copy per column of taps, as wide as the output: tiles are neighbours in the flat output
  kDirectRows,  // the input already has its padding around it
  kDirectFlat,  // 1x1: the input's planes are read as they are
};

struct FilterBlock {
  int32_t filters;
  int64_t offset_begin, steps;
  int64_t weight_begin, filter_begin;
  int64_t cost;
};

struct TileChunk {
  int64_t run_begin, run_end;
};

struct TileSet {
  std::vector<Tile> tiles;
  std::vector<TileRun> runs;
  std::vector<TileChunk> chunks;
  void clear();
};

// Reused from call to call by the operators (its vectors keep their memory), built once by programs.
class ConvLayout {
 public:
  // Which filters are computed together; independent of sizes. `weights_done` says that the weights come
  // prepared.
  void set_blocks(const Plan& plan, const ConvShape& s);
  // Chooses how the input is read and lays out the offsets. `strip_pixels` is chosen for `threads`.
  void set_gathered(const ConvShape& s, const Plan& plan, int threads, bool allow_direct);
  // The input lies in `in`, with room for the padding around every plane; stride 1, or 2 where columns lie
  // apart.
  void set_direct_rows(const ConvShape& s, const Plan& plan, const Planes& in);
  // 1x1, stride 1, no padding. `exact`: nothing may be read beyond the planes.
  void set_direct_flat(const ConvShape& s, const Plan& plan, const Planes& in, bool exact);
  // Tiles for the first `pixels` output pixels after the start of a strip. With `pairs` a vector is a row of
  // one image and the same row of a second one.
  void build_tiles(int64_t pixels, const Planes& out, int64_t residual_pitch, int64_t chunk_bytes,
                   TileSet sets[], int only_log = -1, bool pairs = false);

  // Copies what output pixels [first, first + pixels) need of one image into scratch. The same part of the
  // image that lies `ahead` floats further is fetched into the cache; 0: none.
  void gather(const float* image, const Planes& in, int64_t first_pixel, int64_t pixels, int64_t slot_begin,
              int64_t slot_end, float* scratch, int64_t ahead = 0) const;

  // Where each (channel, ky, kx) of a group reads, from a tile's place.
  void tap_offsets(const Group& group, std::vector<int64_t>* offsets) const;

  // Runs blocks [block_begin, block_end) over chunks [chunk_begin, chunk_end). Where the tiles are of pairs,
  // all that belongs to the second image lies `second` floats behind the first's.
  void run(const TileSet sets[], int64_t chunk_begin, int64_t chunk_end, int64_t block_begin,
           int64_t block_end, const float* in, const float* weights, const float* bias, float* out,
           const Planes& out_planes, const float* residual, const Planes& residual_planes,
           const Activation& activation, int64_t second = 0) const;

  // Whether rows are so short that two images' rows share a vector, and gain by it.
  bool pairs_fit() const;
  int64_t strips() const { return (s_.out_plane() + strip_pixels - 1) / strip_pixels; }
  int64_t scratch_floats() const;
  int64_t table_bytes() const;
  int64_t chunks(const TileSet sets[]) const;
  bool flat() const { return mode == InputMode::kGatherFlat || mode == InputMode::kDirectFlat; }
  // A step of the kernels is a column of three taps.
  bool reuse_rows() const { return reuse_rows_; }
  bool gathered() const { return mode == InputMode::kGatherRows || mode == InputMode::kGatherFlat; }
  // The block after which `part` of `parts` equal shares of the work end.
  int64_t block_share(int64_t part, int64_t parts) const;

  InputMode mode = InputMode::kGatherRows;
  int64_t strip_pixels = 0;
  int64_t in_pitch = 0;
  int64_t in_plane = 0;
  std::vector<FilterBlock> blocks;
  std::vector<int32_t> filters;        // by block
  std::vector<int32_t> dead;           // filters in no group
  std::vector<int32_t> used_channels;  // ascending; the place here is the slot in scratch
  std::vector<float> bias;             // by block, filled by set_bias
  void set_bias(const float* values);

 private:
  void set_offsets(const Plan& plan, bool by_slot);
  void set_geometry(const ConvShape& s, int64_t strip_rows);

  ConvShape s_{};
  bool reuse_rows_ = false;
  bool exact_ = false;
  int64_t rows_ = 0;  // rows of each phase in scratch
  std::vector<int64_t> y_variants_, x_variants_;
  std::vector<int64_t> tap_offset_;  // (kx, ky)
  std::vector<int64_t> offsets_;
  std::vector<int32_t> slot_;
  std::vector<char> mark_;
};

// Packed weights (filters, channels, kh, kw) to the kernels' order: by block, (channel, kx, ky, filter). The
// number of values is the same.
void prepare_weights(const Plan& plan, int64_t kh, int64_t kw, const float* packed, float* prepared);

// The taps of a row lie so far apart that what is read is most of it air.
bool wide_taps(const ConvShape& s);

// Rows of this width fill whole vectors well enough; the width of every output that is written row by row.
bool rows_fit(int64_t width);

// The sizes of a group's blocks: as even as they can be.
int32_t block_count(int32_t filters);
int32_t block_size(int32_t filters, int32_t index);

}  // namespace dsp
