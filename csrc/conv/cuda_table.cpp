#include "conv/cuda_table.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <string>

namespace dsp {
namespace cuda {
namespace {

// Filters (or channels, for the input's gradient) that read the same columns.
struct Set {
  std::vector<int32_t> columns, rows;
  std::vector<int32_t> pairs;  // rows x columns
};

std::vector<Set> forward_sets(const Plan& plan) {
  std::vector<Set> sets;
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    Set set;
    set.columns.assign(group.channels, group.channels + group.n_channels);
    set.rows.assign(group.filters, group.filters + group.n_filters);
    set.pairs.resize(set.columns.size() * set.rows.size());
    std::iota(set.pairs.begin(), set.pairs.end(), static_cast<int32_t>(group.weight_pairs));
    sets.push_back(std::move(set));
  }
  return sets;
}

// Channels read by the same groups are an atom; its columns are all filters of these groups.
std::vector<Set> atom_sets(const Plan& plan) {
  struct Place {
    std::vector<int32_t> groups, positions;
  };
  std::vector<Place> places(static_cast<size_t>(plan.in_channels()));
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    for (int32_t i = 0; i < group.n_channels; ++i) {
      Place& place = places[static_cast<size_t>(group.channels[i])];
      place.groups.push_back(g);
      place.positions.push_back(i);
    }
  }
  std::map<std::vector<int32_t>, size_t> atom_of;
  std::vector<std::vector<int32_t>> members;
  for (int32_t c = 0; c < plan.in_channels(); ++c) {
    const Place& place = places[static_cast<size_t>(c)];
    if (place.groups.empty()) continue;
    const auto [found, added] = atom_of.emplace(place.groups, members.size());
    if (added) members.emplace_back();
    members[found->second].push_back(c);
  }
  std::vector<Set> sets(members.size());
  for (const auto& [groups, index] : atom_of) {
    Set& set = sets[index];
    set.rows = members[index];
    for (const int32_t g : groups) {
      const Group group = plan.group(g);
      set.columns.insert(set.columns.end(), group.filters, group.filters + group.n_filters);
    }
    for (const int32_t c : set.rows) {
      const Place& place = places[static_cast<size_t>(c)];
      for (size_t i = 0; i < groups.size(); ++i) {
        const Group group = plan.group(groups[i]);
        for (int32_t f = 0; f < group.n_filters; ++f)
          set.pairs.push_back(
              static_cast<int32_t>(group.weight_pairs + int64_t{f} * group.n_channels + place.positions[i]));
      }
    }
  }
  return sets;
}

struct Chunk {
  TableChunk words;
  int32_t position[kMaxColumns];  // in the list that was cut, or -1
};

// Cuts a list of channels into chunks: aligned units of 16 bytes where that adds little, else one by one.
std::vector<Chunk> cut(const std::vector<int32_t>& list, int32_t all, int32_t element, int64_t taps,
                       Fill fill) {
  const int32_t columns = kRowBytes / element;
  const int32_t unit = 16 / element;
  std::map<int32_t, std::vector<int32_t>> units;  // first channel -> positions in the list, by channel
  for (size_t i = 0; i < list.size(); ++i) {
    std::vector<int32_t>& members = units[list[i] / unit * unit];
    members.resize(static_cast<size_t>(unit), -1);
    members[static_cast<size_t>(list[i] % unit)] = static_cast<int32_t>(i);
  }
  const int64_t by_unit = (static_cast<int64_t>(units.size()) + 1) / 2;
  const int64_t one_by_one = (static_cast<int64_t>(list.size()) + columns / 2 - 1) / (columns / 2);
  bool gather = all % unit != 0;
  if (fill == kGather) gather = true;
  // A gathered byte costs about eight times a copied one, shared by the taps.
  if (fill == kAuto && !gather) gather = taps > 1 ? 2 * by_unit > 3 * one_by_one : by_unit > 3 * one_by_one;

  std::vector<Chunk> chunks;
  const auto fresh = [&]() -> Chunk& {
    Chunk chunk{};
    std::fill_n(chunk.words.unit, kUnits, -1);
    std::fill_n(chunk.words.channel, kMaxColumns, -1);
    std::fill_n(chunk.position, kMaxColumns, -1);
    chunk.words.gather = gather ? 1 : 0;
    chunk.words.full = 1;
    chunks.push_back(chunk);
    return chunks.back();
  };
  if (gather) {
    for (size_t i = 0; i < list.size(); ++i) {
      const int32_t column = static_cast<int32_t>(i) % columns;
      Chunk& chunk = column == 0 ? fresh() : chunks.back();
      chunk.words.channel[column] = list[i];
      chunk.position[column] = static_cast<int32_t>(i);
      chunk.words.used = static_cast<int32_t>(static_cast<uint32_t>(chunk.words.used) | 1u << column);
      chunk.words.steps = column / (columns / 2) + 1;
    }
    return chunks;
  }
  int32_t at = 0;
  for (const auto& [first, members] : units) {
    const int32_t place = at++ % kUnits;
    Chunk& chunk = place == 0 ? fresh() : chunks.back();
    chunk.words.unit[place] = first;
    chunk.words.steps = place / 2 + 1;
    for (int32_t i = 0; i < unit; ++i) {
      if (members[static_cast<size_t>(i)] < 0) {
        chunk.words.full = 0;
        continue;
      }
      const int32_t column = place * unit + i;
      chunk.words.channel[column] = first + i;
      chunk.position[column] = members[static_cast<size_t>(i)];
      chunk.words.used = static_cast<int32_t>(static_cast<uint32_t>(chunk.words.used) | 1u << column);
    }
  }
  return chunks;
}

// One direction of a class of output pixels.
struct Axis {
  int64_t grid, in, out, in_step, in_offset, out_step, out_offset;
  int64_t taps, tap_step, tap_first, tap_next;
};

Axis plain_axis(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  // A step that is never taken must not overflow.
  return {out, in, out, out == 1 ? 1 : stride, -padding, 1, 0, taps, taps == 1 ? 1 : dilation, 0, 1};
}

// The classes of the input's gradient: rows that differ by the stride meet the same taps. With grad row
// (r + p - k d) / s + j for row s j + r and tap k, taps come in steps of s / gcd(s, d).
std::vector<Axis> phases(int64_t in, int64_t out, int64_t taps, int64_t stride, int64_t padding,
                         int64_t dilation, bool& some_without_taps) {
  const int64_t common = std::gcd(stride, dilation);
  const int64_t next = stride / common;
  std::map<int64_t, int64_t> last;  // residue -> its last tap
  for (int64_t k = 0; k < taps; ++k) {
    const int64_t residue = ((k * dilation - padding) % stride + stride) % stride;
    if (residue < in) last[residue] = k;
  }
  some_without_taps = some_without_taps || static_cast<int64_t>(last.size()) < std::min(stride, in);
  std::vector<Axis> axes;
  for (const auto& [r, k] : last) {
    const int64_t count = k / next + 1;
    axes.push_back({(in - r + stride - 1) / stride, out, in, 1, (r + padding - k * dilation) / stride, stride,
                    r, count, dilation / common, k, -next});
  }
  return axes;
}

// A side of the box, and what it takes of the input.
struct Side {
  int64_t phase, halo, halo_step, row_step, row_tap;
};

Side side_of(const Axis& axis, int64_t tile, int64_t phase) {
  if (phase == 1) return {1, tile, axis.in_step, 1, 0};
  const int64_t step = std::gcd(axis.in_step, axis.tap_step);
  const int64_t row_step = axis.in_step / step;
  const int64_t row_tap = axis.tap_step / step;
  return {phase, (tile - 1) * row_step + (phase - 1) * row_tap + 1, step, row_step, row_tap};
}

int32_t word(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max() || value < std::numeric_limits<int32_t>::min())
    fail("the convolution is too large for the CUDA kernels: a table entry would be " +
         std::to_string(value));
  return static_cast<int32_t>(value);
}

// The box of pixels, and the taps that share its halo, with the least work: a product of all its pixels with
// each tap, and a copy of each row of the halo.
TableClass shape_class(Operation operation, const Axis& h, const Axis& w, int64_t batch, int64_t octets) {
  TableClass best{};
  double least = std::numeric_limits<double>::infinity();
  const int64_t options[3][2] = {{h.taps, w.taps}, {1, w.taps}, {1, 1}};
  for (const auto& phase : options) {
    const int64_t taps = phase[0] * phase[1];
    if (operation == kGradWeight && taps > kMaxTaps) continue;
    for (int64_t tw = 1; tw <= std::min<int64_t>(w.grid, kTilePixels); ++tw) {
      for (int64_t th = 1; th <= std::min(h.grid, kTilePixels / tw); ++th) {
        for (const int64_t tn : {int64_t{1}, std::min(batch, kTilePixels / (tw * th))}) {
          const Side y = side_of(h, th, phase[0]);
          const Side x = side_of(w, tw, phase[1]);
          // Each factor is checked first, so that the product stays small.
          if (y.halo > kMostRows || x.halo > kMostRows) continue;
          const int64_t rows = tn * y.halo * x.halo;
          if (rows > kMostRows || shared_of(operation, rows, taps, octets) > kSharedBytes) continue;
          const double tiles = static_cast<double>(divide_up(batch, tn)) *
                               static_cast<double>(divide_up(h.grid, th)) *
                               static_cast<double>(divide_up(w.grid, tw));
          const double rounds = static_cast<double>(h.taps * w.taps / taps);
          const double work = tiles * rounds * static_cast<double>(taps * kTilePixels + rows + 32);
          if (work >= least) continue;
          least = work;
          TableClass& c = best;
          c.tile_n = word(tn);
          c.tile_h = word(th);
          c.tile_w = word(tw);
          c.tiles_n = word(divide_up(batch, tn));
          c.tiles_h = word(divide_up(h.grid, th));
          c.tiles_w = word(divide_up(w.grid, tw));
          c.phase_h = word(phase[0]);
          c.phase_w = word(phase[1]);
          c.halo_h = word(y.halo);
          c.halo_w = word(x.halo);
          c.halo_step_h = word(y.halo_step);
          c.halo_step_w = word(x.halo_step);
          c.row_step_h = word(y.row_step);
          c.row_step_w = word(x.row_step);
          c.row_tap_h = word(y.row_tap);
          c.row_tap_w = word(x.row_tap);
        }
      }
    }
  }
  TableClass& c = best;
  c.pixel_tiles = word(checked_mul(checked_mul(c.tiles_n, c.tiles_h, "blocks"), c.tiles_w, "blocks"));
  c.batch = word(batch);
  c.grid_h = word(h.grid);
  c.grid_w = word(w.grid);
  c.in_h = word(h.in);
  c.in_w = word(w.in);
  c.out_h = word(h.out);
  c.out_w = word(w.out);
  c.in_step_h = word(h.in_step);
  c.in_step_w = word(w.in_step);
  c.in_offset_h = word(h.in_offset);
  c.in_offset_w = word(w.in_offset);
  c.out_step_h = word(h.out_step);
  c.out_step_w = word(w.out_step);
  c.out_offset_h = word(h.out_offset);
  c.out_offset_w = word(w.out_offset);
  c.taps_h = word(h.taps);
  c.taps_w = word(w.taps);
  c.tap_step_h = word(h.tap_step);
  c.tap_step_w = word(w.tap_step);
  c.halo_w_magic = magic_of(c.halo_w);
  c.halo_h_magic = magic_of(c.halo_h);
  c.tile_w_magic = magic_of(c.tile_w);
  c.tile_h_magic = magic_of(c.tile_h);
  c.tap_first_h = word(h.tap_first);
  c.tap_next_h = word(h.tap_next);
  c.tap_first_w = word(w.tap_first);
  c.tap_next_w = word(w.tap_next);
  return c;
}

template <typename T>
void put(std::vector<int32_t>& words, const T& value) {
  static_assert(sizeof(T) % sizeof(int32_t) == 0, "words");
  const size_t at = words.size();
  words.resize(at + sizeof(T) / sizeof(int32_t));
  std::memcpy(words.data() + at, &value, sizeof(T));
}

void split_wide(int64_t value, int32_t (&words)[2]) {
  const uint32_t low = static_cast<uint32_t>(value & 0xffffffff);
  std::memcpy(&words[0], &low, 4);
  words[1] = static_cast<int32_t>(value >> 32);
}

// Multiply-adds of the matrix instructions for a class, padding included.
int64_t work_of(Operation operation, const std::vector<int32_t>& words, const std::vector<TableItem>& items,
                int64_t first_item, const TableClass& c, int64_t columns) {
  const auto steps = [&](int32_t at, int32_t index) {
    TableChunk chunk;
    std::memcpy(&chunk, words.data() + at + static_cast<size_t>(index) * (sizeof(chunk) / sizeof(int32_t)),
                sizeof(chunk));
    return chunk.steps * columns / 2;
  };
  int64_t sum = 0;
  for (size_t i = static_cast<size_t>(first_item); i < items.size(); ++i) {
    const TableItem& item = items[i];
    if (operation == kGradWeight) {
      const int64_t rows = columns == 32 ? steps(item.chunks_at, 0) : 16;
      sum += rows * steps(item.grad_chunk_at, 0) * item.taps_h * item.taps_w;
      continue;
    }
    int64_t depth = 0;
    for (int32_t chunk = 0; chunk < item.n_chunks; ++chunk) depth += steps(item.chunks_at, chunk);
    sum += depth * item.octets * 8 * c.taps_h * c.taps_w;
  }
  return checked_mul(checked_mul(sum, c.pixel_tiles, "the work"), kTilePixels, "the work");
}

// A set's rows (or, for the gradient of the weight, pieces of both lists) with their places in the table.
struct Piece {
  int32_t filters_at, octets, chunks_at, n_chunks, pairs_at, grad_chunk_at;
};

}  // namespace

std::vector<int32_t> make_table(Operation operation, Precision precision, const dsp_conv2d_shape* shape,
                                const Plan& plan, Fill fill, int32_t blocks_wanted) {
  if (operation < kForward || operation > kGradWeight) fail("operation is not one of the three");
  if (precision < kF16 || precision > kF32) fail("precision is not one of the four");
  if (fill < kAuto || fill > kGather) fail("fill is not one of the three");
  if (blocks_wanted < 1) fail("blocks_wanted is below 1");
  const ConvShape s = check_shape(shape, plan);
  const auto small = [](int64_t value, const char* what) {
    if (value > kMostPixels) fail(std::string(what) + " is above 2^29: too large for the CUDA kernels");
  };
  small(s.height + 2 * s.ph, "the padded height");
  small(s.width + 2 * s.pw, "the padded width");
  small(s.batch, "batch");

  const int32_t element = element_bytes(precision);
  const int32_t columns = kRowBytes / element;
  const bool backward = operation == kGradInput;
  const int64_t taps = s.taps();
  small(taps, "the number of taps");

  TableHeader header{};
  header.magic = kTableMagic;
  header.operation = operation;
  header.precision = precision;
  header.in_channels = backward ? plan.out_channels() : plan.in_channels();
  header.out_channels = backward ? plan.in_channels() : plan.out_channels();
  header.taps = word(taps);
  header.kernel_w = word(s.kw);
  split_wide(backward ? s.out_numel() : s.in_numel(), header.read_numel);
  split_wide(backward ? s.in_numel() : s.out_numel(), header.written_numel);
  split_wide(int64_t{plan.pairs()} * taps, header.weight_numel);
  header.splits = 1;
  header.partials = 1;

  // The classes of output pixels.
  std::vector<std::pair<Axis, Axis>> axes;
  int64_t batch = s.batch;
  bool holes = false;
  if (s.batch > 0) {
    if (backward) {
      const auto rows = phases(s.height, s.out_h, s.kh, s.sh, s.ph, s.dh, holes);
      const auto cols = phases(s.width, s.out_w, s.kw, s.sw, s.pw, s.dw, holes);
      for (const Axis& h : rows)
        for (const Axis& w : cols) axes.emplace_back(h, w);
    } else {
      axes.emplace_back(plain_axis(s.height, s.out_h, s.kh, s.sh, s.ph, s.dh),
                        plain_axis(s.width, s.out_w, s.kw, s.sw, s.pw, s.dw));
    }
    // A pointwise convolution sees one long row of pixels.
    const int64_t pixels = s.batch * s.in_plane();
    if (taps == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0 && pixels <= kMostPixels) {
      axes.assign(1, {plain_axis(1, 1, 1, 1, 0, 1), plain_axis(pixels, pixels, 1, 1, 0, 1)});
      batch = 1;
    }
  }
  header.clear = holes || (operation == kGradWeight && s.batch == 0) ? 1 : 0;

  std::vector<int32_t> words(sizeof(TableHeader) / sizeof(int32_t));
  std::vector<TableClass> classes;
  std::vector<TableItem> items;

  // What reads what, cut into pieces that a block can hold.
  const std::vector<Set> sets = backward ? atom_sets(plan) : forward_sets(plan);
  std::vector<Piece> pieces;
  const auto put_chunks = [&](const std::vector<Chunk>& chunks, size_t from, size_t to) {
    const int32_t at = word(static_cast<int64_t>(words.size()));
    for (size_t i = from; i < to; ++i) {
      put(words, chunks[i].words);
      if (chunks[i].words.gather == 0) header.vectors = 1;
    }
    return at;
  };
  for (const Set& set : sets) {
    const std::vector<Chunk> chunks = cut(set.columns, header.in_channels, element, taps, fill);
    const int64_t wide_row = static_cast<int64_t>(set.columns.size());
    if (operation == kGradWeight) {
      const std::vector<Chunk> rows = cut(set.rows, header.out_channels, element, taps, fill);
      for (size_t r = 0; r < rows.size(); ++r) {
        for (size_t c = 0; c < chunks.size(); ++c) {
          Piece piece{};
          piece.chunks_at = put_chunks(chunks, c, c + 1);
          piece.n_chunks = 1;
          piece.grad_chunk_at = put_chunks(rows, r, r + 1);
          piece.pairs_at = word(static_cast<int64_t>(words.size()));
          for (int32_t f = 0; f < columns; ++f) {
            for (int32_t i = 0; i < columns; ++i) {
              const int64_t row = rows[r].position[f];
              const int64_t column = chunks[c].position[i];
              words.push_back(
                  row < 0 || column < 0 ? -1 : set.pairs[static_cast<size_t>(row * wide_row + column)]);
            }
          }
          pieces.push_back(piece);
        }
      }
      continue;
    }
    const int32_t chunks_at = put_chunks(chunks, 0, chunks.size());
    const int64_t octets = divide_up(static_cast<int64_t>(set.rows.size()), 8);
    const int64_t tiles = divide_up(octets, kMaxOctets);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = octets * tile / tiles * 8;
      const int64_t last = octets * (tile + 1) / tiles * 8;
      Piece piece{};
      piece.octets = word((last - first) / 8);
      piece.chunks_at = chunks_at;
      piece.n_chunks = word(static_cast<int64_t>(chunks.size()));
      piece.filters_at = word(static_cast<int64_t>(words.size()));
      const auto live = [&](int64_t row) { return row < static_cast<int64_t>(set.rows.size()); };
      for (int64_t row = first; row < last; ++row)
        words.push_back(live(row) ? set.rows[static_cast<size_t>(row)] : -1);
      piece.pairs_at = word(static_cast<int64_t>(words.size()));
      for (const Chunk& chunk : chunks) {
        for (int64_t row = first; row < last; ++row) {
          for (int32_t i = 0; i < columns; ++i) {
            const int64_t column = chunk.position[i];
            words.push_back(
                !live(row) || column < 0 ? -1 : set.pairs[static_cast<size_t>(row * wide_row + column)]);
          }
        }
      }
      pieces.push_back(piece);
      header.octets = std::max(header.octets, piece.octets);
    }
  }
  // Output channels that read nothing: items without a sum.
  if (operation != kGradWeight && header.clear == 0) {
    std::vector<bool> written(static_cast<size_t>(header.out_channels), false);
    for (const Set& set : sets)
      for (const int32_t row : set.rows) written[static_cast<size_t>(row)] = true;
    std::vector<int32_t> dead;
    for (int32_t i = 0; i < header.out_channels; ++i)
      if (!written[static_cast<size_t>(i)]) dead.push_back(i);
    for (size_t first = 0; first < dead.size(); first += kMaxOctets * 8) {
      const size_t last = std::min(dead.size(), first + kMaxOctets * 8);
      Piece piece{};
      piece.octets = word(divide_up(static_cast<int64_t>(last - first), 8));
      piece.filters_at = word(static_cast<int64_t>(words.size()));
      words.insert(words.end(), dead.begin() + static_cast<std::ptrdiff_t>(first),
                   dead.begin() + static_cast<std::ptrdiff_t>(last));
      words.resize(static_cast<size_t>(piece.filters_at + piece.octets * 8), -1);
      pieces.push_back(piece);
      header.octets = std::max(header.octets, piece.octets);
    }
  }

  int64_t rows = 0;
  int64_t blocks = 0;
  int64_t most_phases = 1;
  int64_t most_splits = 1;
  int64_t multiply_adds = 0;
  for (const auto& [h, w] : axes) {
    TableClass c = shape_class(operation, h, w, batch, std::max(header.octets, 1));
    const int64_t class_taps = int64_t{c.taps_h} * c.taps_w;
    const int64_t phase_taps = int64_t{c.phase_h} * c.phase_w;
    const int64_t halo = int64_t{c.tile_n} * c.halo_h * c.halo_w;
    const int64_t first_item = static_cast<int64_t>(items.size());
    header.halo_rows = std::max(header.halo_rows, word(halo));
    header.shared_bytes = std::max(header.shared_bytes,
                                   word(shared_of(operation, halo, phase_taps, std::max(header.octets, 1))));
    for (const Piece& piece : pieces) {
      TableItem item{};
      item.filters_at = piece.filters_at;
      item.octets = piece.octets;
      item.chunks_at = piece.chunks_at;
      item.n_chunks = piece.n_chunks;
      item.pairs_at = piece.pairs_at;
      item.grad_chunk_at = piece.grad_chunk_at;
      item.taps_h = c.phase_h;
      item.taps_w = c.phase_w;
      if (operation == kGradWeight) {
        for (int32_t ty = 0; ty < c.taps_h; ty += c.phase_h) {
          for (int32_t tx = 0; tx < c.taps_w; tx += c.phase_w) {
            item.tap_h = ty;
            item.tap_w = tx;
            items.push_back(item);
          }
        }
        continue;
      }
      split_wide(rows, item.weights);
      rows += checked_mul(checked_mul(piece.n_chunks, class_taps, "the weights"), piece.octets * 8,
                          "the weights");
      most_phases = std::max(most_phases, piece.n_chunks * (class_taps / phase_taps));
      // Of one split: at least four taps of a chunk.
      most_splits = std::max(
          most_splits, std::min(piece.n_chunks * (class_taps / phase_taps), piece.n_chunks * class_taps / 4));
      items.push_back(item);
    }
    multiply_adds += work_of(operation, words, items, first_item, c, columns);
    if (operation == kGradWeight) header.partials = phase_taps >= 3 ? 1 : word(4 / phase_taps);
    c.first_block = word(blocks);
    c.items_at = word(first_item);
    c.n_items = word(static_cast<int64_t>(items.size()) - first_item);
    blocks += operation == kGradWeight ? int64_t{c.n_items} : checked_mul(c.pixel_tiles, c.n_items, "blocks");
    word(blocks);
    classes.push_back(c);
  }
  word(checked_mul(most_phases, taps, "the sum"));
  header.blocks = word(blocks);
  split_wide(rows, header.prepared_rows);
  split_wide(multiply_adds, header.multiply_adds);
  if (blocks > 0) {
    const int64_t wanted = divide_up(blocks_wanted, blocks);
    if (operation == kGradWeight) {
      const int64_t tiles = classes[0].pixel_tiles;
      // Never more than 64 boxes of pixels in one running sum.
      header.splits = word(std::min({tiles, std::max(wanted, divide_up(tiles, 64)), kMostSlices}));
      const int64_t sums = int64_t{classes[0].phase_h} * classes[0].phase_w * columns * columns;
      split_wide(checked_mul(checked_mul(int64_t{header.splits} * header.partials, blocks, "the workspace"),
                             sums, "the workspace"),
                 header.workspace);
    } else {
      header.splits = word(std::min({wanted, most_splits, kMostSplits}));
      if (header.splits > 1)
        split_wide(
            checked_mul(header.splits * blocks, int64_t{header.octets} * 8 * kTilePixels, "the workspace"),
            header.workspace);
    }
  }
  header.n_classes = word(static_cast<int64_t>(classes.size()));
  header.classes_at = word(static_cast<int64_t>(words.size()));
  for (const TableClass& c : classes) put(words, c);
  header.n_items = word(static_cast<int64_t>(items.size()));
  header.items_at = word(static_cast<int64_t>(words.size()));
  for (const TableItem& item : items) put(words, item);
  header.words = word(static_cast<int64_t>(words.size()));
  std::memcpy(words.data(), &header, sizeof(header));
  return words;
}

const TableHeader& read_table(const int32_t* words, int64_t numel) {
  require(words != nullptr, "table is null");
  constexpr int64_t kHeader = sizeof(TableHeader) / sizeof(int32_t);
  if (numel < kHeader) fail("table has " + std::to_string(numel) + " words, at least its header expected");
  const auto& header = *reinterpret_cast<const TableHeader*>(words);
  if (header.magic != kTableMagic) fail("table is not one of dsp_cuda_conv2d_table");
  if (header.words != numel)
    fail("table says it has " + std::to_string(header.words) + " words, given are " + std::to_string(numel));
  if (header.operation < kForward || header.operation > kGradWeight || header.precision < kF16 ||
      header.precision > kF32 || header.blocks < 0 || header.splits < 1 || header.shared_bytes < 0 ||
      header.shared_bytes > kSharedBytes || header.n_classes < 0 || header.n_items < 0)
    fail("table has an impossible header");
  return header;
}

}  // namespace cuda
}  // namespace dsp

extern "C" {

dsp_status dsp_cuda_conv2d_table(int32_t operation, int32_t precision, const dsp_conv2d_shape* shape,
                                 const int32_t* plan, int64_t plan_numel, int32_t fill, int32_t blocks_wanted,
                                 int32_t* words, int64_t words_numel, int64_t* needed) {
  using namespace dsp::cuda;
  return dsp::guard([&] {
    const dsp::Plan checked(plan, plan_numel);
    const std::vector<int32_t> table =
        make_table(static_cast<Operation>(operation), static_cast<Precision>(precision), shape, checked,
                   static_cast<Fill>(fill), blocks_wanted);
    const int64_t size = static_cast<int64_t>(table.size());
    if (needed != nullptr) *needed = size;
    if (words == nullptr) return;
    dsp::check_tensor(words, words_numel, size, "words");
    std::copy(table.begin(), table.end(), words);
  });
}

dsp_status dsp_cuda_conv2d_sizes(const int32_t* table, int64_t table_numel, dsp_cuda_sizes* sizes) {
  using namespace dsp::cuda;
  return dsp::guard([&] {
    dsp::require(sizes != nullptr, "sizes is null");
    check_table(table, table_numel);
    const TableHeader& header = read_table(table, table_numel);
    *sizes = {wide(header.prepared_rows) * kRowBytes,
              wide(header.workspace),
              header.blocks,
              header.splits,
              header.shared_bytes,
              wide(header.multiply_adds)};
  });
}
}
