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
  // A gathered byte costs about kGatherCost times a copied one, shared by the taps.
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

constexpr int64_t kSetUp = 32;      // of a phase, in copies of a row
constexpr int64_t kGatherCost = 8;  // a row that is copied channel by channel costs so many copied whole

// Into how many shares a sum of so many chunks can go: at least four taps of a chunk for each.
int64_t most_splits(const TableClass& c, int64_t chunks) {
  const int64_t taps = int64_t{c.taps_h} * c.taps_w;
  return std::min(chunks * (taps / (int64_t{c.phase_h} * c.phase_w)), chunks * taps / 4);
}

int32_t word(int64_t value) {
  if (value > std::numeric_limits<int32_t>::max() || value < std::numeric_limits<int32_t>::min())
    fail("the convolution is too large for the CUDA kernels: a table entry would be " +
         std::to_string(value));
  return static_cast<int32_t>(value);
}

// A box of pixels and the taps that share its halo.
struct BoxOf {
  int64_t images, height, width;
  Side y, x;
};

// The one with the least work: a product of all its pixels with each tap, and a copy of each row of the halo.
BoxOf choose_box(Operation operation, const Axis& h, const Axis& w, int64_t batch, int64_t octets) {
  BoxOf best{};
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
          const double work = tiles * rounds * static_cast<double>(taps * kTilePixels + rows + kSetUp);
          if (work >= least) continue;
          least = work;
          best = {tn, th, tw, y, x};
        }
      }
    }
  }
  return best;
}

// A class of output pixels with the box that it is cut into.
TableClass shape_class(const BoxOf& box, const Axis& h, const Axis& w, int64_t batch) {
  TableClass c{};
  c.tile_n = word(box.images);
  c.tile_h = word(box.height);
  c.tile_w = word(box.width);
  c.tiles_n = word(divide_up(batch, box.images));
  c.tiles_h = word(divide_up(h.grid, box.height));
  c.tiles_w = word(divide_up(w.grid, box.width));
  c.phase_h = word(box.y.phase);
  c.phase_w = word(box.x.phase);
  c.halo_h = word(box.y.halo);
  c.halo_w = word(box.x.halo);
  c.halo_step_h = word(box.y.halo_step);
  c.halo_step_w = word(box.x.halo_step);
  c.row_step_h = word(box.y.row_step);
  c.row_step_w = word(box.x.row_step);
  c.row_tap_h = word(box.y.row_tap);
  c.row_tap_w = word(box.x.row_tap);
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
  int32_t filters_at, octets, chunks_at, n_chunks, pairs_at, grad_chunk_at, units_at;
};

// The order in which a block has its rows, which are output channels: ascending, and where it adds little in
// whole units of 16 bytes, so that they are stored so; -1 is nobody's place. A multiple of eight.
std::vector<int32_t> arrange(const std::vector<int32_t>& rows, int32_t channels, int32_t unit) {
  std::vector<int32_t> order(rows.size());
  std::iota(order.begin(), order.end(), 0);
  const auto channel = [&](int32_t i) { return rows[static_cast<size_t>(i)]; };
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return channel(a) < channel(b); });
  std::vector<int32_t> by_unit;
  for (const int32_t i : order) {
    const auto place = static_cast<size_t>(channel(i) % unit);
    const size_t last = by_unit.size();
    const bool same = last > 0 && [&] {
      for (size_t k = last - static_cast<size_t>(unit); k < last; ++k)
        if (by_unit[k] >= 0) return channel(by_unit[k]) / unit == channel(i) / unit;
      return false;
    }();
    if (!same) by_unit.resize(last + static_cast<size_t>(unit), -1);
    by_unit[by_unit.size() - static_cast<size_t>(unit) + place] = i;
  }
  const auto octets = [](const std::vector<int32_t>& list) {
    return divide_up(static_cast<int64_t>(list.size()), 8);
  };
  std::vector<int32_t>& chosen =
      channels % unit == 0 && octets(by_unit) * 8 <= octets(order) * 9 ? by_unit : order;
  chosen.resize(static_cast<size_t>(octets(chosen) * 8), -1);
  return chosen;
}

// Makes a table, part by part, in the order of its words.
class Writer {
 public:
  Writer(Operation operation, Precision precision, const ConvShape& s, const Plan& plan, Fill fill)
      : operation_(operation),
        element_(element_bytes(precision)),
        columns_(kRowBytes / element_),
        s_(s),
        plan_(plan),
        fill_(fill),
        words_(sizeof(TableHeader) / sizeof(int32_t)) {
    put_header(precision);
  }

  std::vector<int32_t> write(int32_t blocks_wanted) {
    put_axes();
    const std::vector<Set> sets = backward() ? atom_sets(plan_) : forward_sets(plan_);
    for (const Set& set : sets) {
      if (operation_ == kGradWeight) {
        put_weight_pieces(set);
      } else {
        put_pieces(set);
      }
    }
    if (operation_ != kGradWeight && header_.clear == 0) put_dead(sets);
    for (const auto& [h, w] : axes_) put_class(h, w);
    word(checked_mul(most_phases_, s_.taps(), "the sum"));
    header_.blocks = word(blocks_);
    split_wide(rows_, header_.prepared_rows);
    split_wide(multiply_adds_, header_.multiply_adds);
    if (blocks_ > 0) split_sums(blocks_wanted);
    return close();
  }

 private:
  bool backward() const { return operation_ == kGradInput; }
  int32_t here() const { return word(static_cast<int64_t>(words_.size())); }

  void put_header(Precision precision) {
    header_.magic = kTableMagic;
    header_.operation = operation_;
    header_.precision = precision;
    header_.in_channels = backward() ? plan_.out_channels() : plan_.in_channels();
    header_.out_channels = backward() ? plan_.in_channels() : plan_.out_channels();
    header_.taps = word(s_.taps());
    header_.kernel_w = word(s_.kw);
    split_wide(backward() ? s_.out_numel() : s_.in_numel(), header_.read_numel);
    split_wide(backward() ? s_.in_numel() : s_.out_numel(), header_.written_numel);
    split_wide(int64_t{plan_.pairs()} * s_.taps(), header_.weight_numel);
    header_.splits = 1;
    header_.partials = 1;
  }

  // The classes of output pixels.
  void put_axes() {
    batch_ = s_.batch;
    bool holes = false;
    if (s_.batch > 0) {
      if (backward()) {
        const auto rows = phases(s_.height, s_.out_h, s_.kh, s_.sh, s_.ph, s_.dh, holes);
        const auto cols = phases(s_.width, s_.out_w, s_.kw, s_.sw, s_.pw, s_.dw, holes);
        for (const Axis& h : rows)
          for (const Axis& w : cols) axes_.emplace_back(h, w);
      } else {
        axes_.emplace_back(plain_axis(s_.height, s_.out_h, s_.kh, s_.sh, s_.ph, s_.dh),
                           plain_axis(s_.width, s_.out_w, s_.kw, s_.sw, s_.pw, s_.dw));
      }
      // A pointwise convolution sees one long row of pixels.
      const int64_t pixels = s_.batch * s_.in_plane();
      if (s_.taps() == 1 && s_.sh == 1 && s_.sw == 1 && s_.ph == 0 && s_.pw == 0 && pixels <= kMostPixels) {
        axes_.assign(1, {plain_axis(1, 1, 1, 1, 0, 1), plain_axis(pixels, pixels, 1, 1, 0, 1)});
        batch_ = 1;
      }
    }
    header_.clear = holes || (operation_ == kGradWeight && s_.batch == 0) ? 1 : 0;
  }

  int32_t put_chunks(const std::vector<Chunk>& chunks, size_t from, size_t to) {
    const int32_t at = here();
    for (size_t i = from; i < to; ++i) {
      put(words_, chunks[i].words);
      if (chunks[i].words.gather == 0) header_.vectors = 1;
    }
    return at;
  }

  void put_weight_pieces(const Set& set) {
    const std::vector<Chunk> chunks = cut(set.columns, header_.in_channels, element_, s_.taps(), fill_);
    const std::vector<Chunk> rows = cut(set.rows, header_.out_channels, element_, s_.taps(), fill_);
    const auto wide_row = static_cast<int64_t>(set.columns.size());
    for (size_t r = 0; r < rows.size(); ++r) {
      for (size_t c = 0; c < chunks.size(); ++c) {
        Piece piece{};
        piece.chunks_at = put_chunks(chunks, c, c + 1);
        piece.n_chunks = 1;
        piece.grad_chunk_at = put_chunks(rows, r, r + 1);
        piece.pairs_at = here();
        for (int32_t f = 0; f < columns_; ++f) {
          for (int32_t i = 0; i < columns_; ++i) {
            const int64_t row = rows[r].position[f];
            const int64_t column = chunks[c].position[i];
            words_.push_back(row < 0 || column < 0 ? -1
                                                   : set.pairs[static_cast<size_t>(row * wide_row + column)]);
          }
        }
        pieces_.push_back(piece);
      }
    }
  }

  // Output channels of a piece, -1 where there is none, and the first of each unit that is whole.
  void put_filters(Piece& piece, const std::vector<int32_t>& filters) {
    piece.octets = word(static_cast<int64_t>(filters.size()) / 8);
    piece.filters_at = here();
    words_.insert(words_.end(), filters.begin(), filters.end());
    piece.units_at = here();
    const auto unit = static_cast<size_t>(16 / element_);
    for (size_t i = 0; i < filters.size(); i += unit) words_.push_back(whole_unit(header_, &filters[i]));
    header_.octets = std::max(header_.octets, piece.octets);
  }

  void put_pieces(const Set& set) {
    const std::vector<Chunk> chunks = cut(set.columns, header_.in_channels, element_, s_.taps(), fill_);
    const auto wide_row = static_cast<int64_t>(set.columns.size());
    const int32_t chunks_at = put_chunks(chunks, 0, chunks.size());
    const std::vector<int32_t> order = arrange(set.rows, header_.out_channels, 16 / element_);
    const int64_t octets = static_cast<int64_t>(order.size()) / 8;
    const int64_t tiles = divide_up(octets, kMaxOctets);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const std::vector<int32_t> rows(order.begin() + octets * tile / tiles * 8,
                                      order.begin() + octets * (tile + 1) / tiles * 8);
      Piece piece{};
      piece.chunks_at = chunks_at;
      piece.n_chunks = word(static_cast<int64_t>(chunks.size()));
      std::vector<int32_t> filters;
      for (const int32_t row : rows) filters.push_back(row < 0 ? -1 : set.rows[static_cast<size_t>(row)]);
      put_filters(piece, filters);
      piece.pairs_at = here();
      for (const Chunk& chunk : chunks) {
        for (const int64_t row : rows) {
          for (int32_t i = 0; i < columns_; ++i) {
            const int64_t column = chunk.position[i];
            words_.push_back(row < 0 || column < 0 ? -1
                                                   : set.pairs[static_cast<size_t>(row * wide_row + column)]);
          }
        }
      }
      pieces_.push_back(piece);
    }
  }

  // Output channels that read nothing: pieces without a sum.
  void put_dead(const std::vector<Set>& sets) {
    std::vector<bool> written(static_cast<size_t>(header_.out_channels), false);
    for (const Set& set : sets)
      for (const int32_t row : set.rows) written[static_cast<size_t>(row)] = true;
    std::vector<int32_t> dead;
    for (int32_t i = 0; i < header_.out_channels; ++i)
      if (!written[static_cast<size_t>(i)]) dead.push_back(i);
    const std::vector<int32_t> order = arrange(dead, header_.out_channels, 16 / element_);
    for (size_t first = 0; first < order.size(); first += kMaxOctets * 8) {
      const size_t last = std::min(order.size(), first + kMaxOctets * 8);
      std::vector<int32_t> filters;
      for (size_t i = first; i < last; ++i)
        filters.push_back(order[i] < 0 ? -1 : dead[static_cast<size_t>(order[i])]);
      Piece piece{};
      put_filters(piece, filters);
      pieces_.push_back(piece);
    }
  }

  // A class, and its items: what its blocks work on.
  void put_class(const Axis& h, const Axis& w) {
    const int64_t octets = std::max(header_.octets, 1);
    TableClass c = shape_class(choose_box(operation_, h, w, batch_, octets), h, w, batch_);
    const int64_t phase_taps = int64_t{c.phase_h} * c.phase_w;
    const int64_t halo = int64_t{c.tile_n} * c.halo_h * c.halo_w;
    const auto first_item = static_cast<int64_t>(items_.size());
    header_.halo_rows = std::max(header_.halo_rows, word(halo));
    header_.shared_bytes =
        std::max(header_.shared_bytes, word(shared_of(operation_, halo, phase_taps, octets)));
    for (const Piece& piece : pieces_) put_items(c, piece);
    multiply_adds_ += work_of(operation_, words_, items_, first_item, c, columns_);
    if (operation_ == kGradWeight) header_.partials = phase_taps >= 3 ? 1 : word(4 / phase_taps);
    c.first_block = word(blocks_);
    c.items_at = word(first_item);
    c.n_items = word(static_cast<int64_t>(items_.size()) - first_item);
    blocks_ +=
        operation_ == kGradWeight ? int64_t{c.n_items} : checked_mul(c.pixel_tiles, c.n_items, "blocks");
    word(blocks_);
    classes_.push_back(c);
  }

  void put_items(const TableClass& c, const Piece& piece) {
    TableItem item{};
    item.filters_at = piece.filters_at;
    item.octets = piece.octets;
    item.chunks_at = piece.chunks_at;
    item.n_chunks = piece.n_chunks;
    item.pairs_at = piece.pairs_at;
    item.grad_chunk_at = piece.grad_chunk_at;
    item.units_at = piece.units_at;
    item.taps_h = c.phase_h;
    item.taps_w = c.phase_w;
    if (operation_ == kGradWeight) {
      for (int32_t ty = 0; ty < c.taps_h; ty += c.phase_h) {
        for (int32_t tx = 0; tx < c.taps_w; tx += c.phase_w) {
          item.tap_h = ty;
          item.tap_w = tx;
          items_.push_back(item);
        }
      }
      return;
    }
    const int64_t taps = int64_t{c.taps_h} * c.taps_w;
    split_wide(rows_, item.weights);
    rows_ += checked_mul(checked_mul(piece.n_chunks, taps, "the weights"), piece.octets * 8, "the weights");
    most_phases_ = std::max(most_phases_, piece.n_chunks * (taps / (int64_t{c.phase_h} * c.phase_w)));
    most_splits_ = std::max(most_splits_, most_splits(c, piece.n_chunks));
    items_.push_back(item);
  }

  // Into how many shares the sums go, and the memory for their parts.
  void split_sums(int32_t blocks_wanted) {
    const int64_t wanted = divide_up(blocks_wanted, blocks_);
    if (operation_ == kGradWeight) {
      const int64_t tiles = classes_[0].pixel_tiles;
      // Never more than 64 boxes of pixels in one running sum.
      header_.splits = word(std::min({tiles, std::max(wanted, divide_up(tiles, 64)), kMostSlices}));
      const int64_t sums = int64_t{classes_[0].phase_h} * classes_[0].phase_w * columns_ * columns_;
      split_wide(
          checked_mul(checked_mul(int64_t{header_.splits} * header_.partials, blocks_, "the workspace"), sums,
                      "the workspace"),
          header_.workspace);
      return;
    }
    header_.splits = word(std::min({wanted, most_splits_, kMostSplits}));
    if (header_.splits > 1)
      split_wide(
          checked_mul(header_.splits * blocks_, int64_t{header_.octets} * 8 * kTilePixels, "the workspace"),
          header_.workspace);
  }

  std::vector<int32_t> close() {
    header_.n_classes = word(static_cast<int64_t>(classes_.size()));
    header_.classes_at = here();
    for (const TableClass& c : classes_) put(words_, c);
    header_.n_items = word(static_cast<int64_t>(items_.size()));
    header_.items_at = here();
    for (const TableItem& item : items_) put(words_, item);
    header_.words = here();
    std::memcpy(words_.data(), &header_, sizeof(header_));
    return std::move(words_);
  }

  const Operation operation_;
  const int32_t element_, columns_;
  const ConvShape& s_;
  const Plan& plan_;
  const Fill fill_;
  TableHeader header_{};
  std::vector<int32_t> words_;
  std::vector<std::pair<Axis, Axis>> axes_;
  int64_t batch_ = 0;
  std::vector<Piece> pieces_;
  std::vector<TableClass> classes_;
  std::vector<TableItem> items_;
  int64_t rows_ = 0, blocks_ = 0, most_phases_ = 1, most_splits_ = 1, multiply_adds_ = 0;
};

// What a forward convolution's table makes of the work, for a cost model.
dsp_cuda_work work_in(const int32_t* words, const TableHeader& header) {
  dsp_cuda_work work{};
  work.multiply_adds = wide(header.multiply_adds);
  work.weights = wide(header.prepared_rows) * (kRowBytes / element_bytes(header.precision));
  work.blocks = header.blocks;
  work.most_splits = 1;
  work.phase_taps = 1;
  if (header.n_classes == 0) return work;
  const auto& c = *reinterpret_cast<const TableClass*>(words + header.classes_at);
  const int64_t taps = int64_t{c.taps_h} * c.taps_w;
  work.halo_rows = int64_t{c.tile_n} * c.halo_h * c.halo_w;
  work.phase_taps = int64_t{c.phase_h} * c.phase_w;
  const auto products = static_cast<double>(work.phase_taps * kTilePixels);
  int32_t chunks_of_last = -1;
  for (int32_t i = 0; i < header.n_items; ++i) {
    const TableItem& item = reinterpret_cast<const TableItem*>(words + header.items_at)[i];
    if (item.n_chunks == 0) continue;
    const auto* chunks = reinterpret_cast<const TableChunk*>(words + item.chunks_at);
    if (item.chunks_at != chunks_of_last) {
      chunks_of_last = item.chunks_at;
      ++work.groups;
      work.gathered += chunks[0].gather;
    }
    int64_t depth = 0;
    for (int32_t k = 0; k < item.n_chunks; ++k)
      depth += chunks[k].steps * (kRowBytes / element_bytes(header.precision)) / 2;
    const auto part = static_cast<double>(depth * item.octets * 8 * taps * c.pixel_tiles * kTilePixels);
    const int64_t copies = work.halo_rows * (chunks[0].gather != 0 ? kGatherCost : 1) + kSetUp;
    work.effort += part * (1.0 + static_cast<double>(copies) / products);
    work.most_splits = std::max(work.most_splits, std::min(most_splits(c, item.n_chunks), kMostSplits));
  }
  return work;
}

}  // namespace

int32_t whole_unit(const TableHeader& header, const int32_t* filters) {
  const int32_t unit = 16 / element_bytes(header.precision);
  if (header.out_channels % unit != 0 || filters[0] < 0 || filters[0] % unit != 0) return -1;
  for (int32_t i = 1; i < unit; ++i)
    if (filters[i] != filters[0] + i) return -1;
  return filters[0];
}

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
  small(s.taps(), "the number of taps");
  return Writer(operation, precision, s, plan, fill).write(blocks_wanted);
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

dsp_status dsp_cuda_conv2d_work(const int32_t* table, int64_t table_numel, dsp_cuda_work* work) {
  using namespace dsp::cuda;
  return dsp::guard([&] {
    dsp::require(work != nullptr, "work is null");
    check_table(table, table_numel);
    const TableHeader& header = read_table(table, table_numel);
    if (header.operation != kForward) dsp::fail("table is for another operation");
    *work = work_in(table, header);
  });
}
}
