// Reads a table of the CUDA convolution to its last word: whatever passes keeps the kernels inside of the
// buffers whose sizes the table tells.
#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "conv/cuda_table.h"

namespace dsp {
namespace cuda {
namespace {

constexpr int64_t kHeaderWords = sizeof(TableHeader) / sizeof(int32_t);
constexpr int64_t kMostCoordinate = int64_t{1} << 31;

// What of a table is looked at, for the error's text.
struct Place {
  const char* kind;
  int64_t index;
};

[[noreturn]] void bad(const Place& place, const char* what, int64_t value) {
  std::string where = place.kind;
  if (place.index >= 0) where += " " + std::to_string(place.index);
  fail("table: " + where + ": " + what + " is " + std::to_string(value) + ", which cannot be");
}

void need(bool good, const Place& place, const char* what, int64_t value) {
  if (!good) bad(place, what, value);
}

// One direction of a class, with the kernel's taps in it.
struct Side {
  int64_t tile, tiles, grid, in, out, in_step, in_offset, out_step, out_offset, taps, tap_step, phase, halo,
      halo_step, row_step, row_tap, tap_first, tap_next, kernel;
};

void check_side(const Side& s, const Place& place) {
  need(s.tile >= 1 && s.tile <= kTilePixels, place, "a side of the box", s.tile);
  need(s.grid >= 1 && s.grid <= kMostPixels, place, "a side of the grid", s.grid);
  need(s.tiles == divide_up(s.grid, s.tile), place, "the number of boxes", s.tiles);
  need(s.in >= 1 && s.in <= kMostPixels, place, "a side of the input", s.in);
  need(s.out >= 1 && s.out <= kMostPixels, place, "a side of the output", s.out);
  need(s.out_step >= 1, place, "an output's step", s.out_step);
  need(s.out_offset >= 0 && s.out_offset < std::min(s.out_step, s.out), place, "an output's offset",
       s.out_offset);
  need(s.grid == divide_up(s.out - s.out_offset, s.out_step), place, "a side of the grid", s.grid);
  need(s.taps >= 1 && s.taps <= s.kernel, place, "a number of taps", s.taps);
  const int64_t last = s.tap_first + (s.taps - 1) * s.tap_next;
  need(s.tap_first >= 0 && s.tap_first < s.kernel, place, "the first tap", s.tap_first);
  need(last >= 0 && last < s.kernel, place, "the last tap", last);
  need(s.phase == 1 || s.phase == s.taps, place, "a number of taps that share a halo", s.phase);
  need(s.in_step >= 1, place, "an input's step", s.in_step);
  need(s.tap_step >= 1, place, "a tap's step", s.tap_step);
  need(s.halo_step >= 1, place, "a halo's step", s.halo_step);
  need(s.row_step >= 1 && s.row_step <= kMostRows, place, "a step in the halo", s.row_step);
  need(s.row_tap >= 0 && s.row_tap <= kMostRows, place, "a tap's step in the halo", s.row_tap);
  if (s.phase == 1) {
    need(s.halo_step == s.in_step, place, "a halo's step", s.halo_step);
    need(s.row_step == 1, place, "a step in the halo", s.row_step);
    need(s.row_tap == 0, place, "a tap's step in the halo", s.row_tap);
  } else {
    need(s.halo_step * s.row_step == s.in_step, place, "a step in the halo", s.row_step);
    need(s.halo_step * s.row_tap == s.tap_step, place, "a tap's step in the halo", s.row_tap);
  }
  need(s.halo == (s.tile - 1) * s.row_step + (s.phase - 1) * s.row_tap + 1 && s.halo <= kMostRows, place,
       "a side of the halo", s.halo);
  // Factors that could overflow the sum are bounded by themselves.
  need(s.in_step <= kMostCoordinate / s.grid, place, "an input's step", s.in_step);
  need(s.tap_step <= kMostCoordinate / s.taps, place, "a tap's step", s.tap_step);
  const int64_t furthest = (s.tiles - 1) * s.tile * s.in_step + s.in_offset +
                           (s.taps - s.phase) * s.tap_step + (s.halo - 1) * s.halo_step;
  need(furthest < kMostCoordinate, place, "the furthest pixel", furthest);
}

class Reader {
 public:
  Reader(const int32_t* words, int64_t numel)
      : words_(words), numel_(numel), header_(read_table(words, numel)) {}

  void check() {
    check_header();
    check_classes();
    check_items();
    check_sums();
  }

 private:
  template <typename T>
  const T& entry(int64_t at, int64_t index) const {
    return *reinterpret_cast<const T*>(words_ + at + index * static_cast<int64_t>(sizeof(T) / 4));
  }
  void room(int64_t at, int64_t count, const Place& place, const char* what) const {
    need(at >= kHeaderWords && count >= 0 && count <= numel_ && at <= numel_ - count, place, what, at);
  }
  bool of_weight() const { return header_.operation == kGradWeight; }
  int64_t columns() const { return kRowBytes / element_bytes(header_.precision); }
  const TableClass& class_at(int64_t index) const { return entry<TableClass>(header_.classes_at, index); }

  void check_header() {
    const Place place{"header", -1};
    const TableHeader& h = header_;
    need(h.in_channels >= 0, place, "in_channels", h.in_channels);
    need(h.out_channels >= 0, place, "out_channels", h.out_channels);
    need(h.taps >= 1, place, "taps", h.taps);
    need(h.kernel_w >= 1 && h.taps % h.kernel_w == 0, place, "kernel_w", h.kernel_w);
    need(h.clear == 0 || h.clear == 1, place, "clear", h.clear);
    need(h.vectors == 0 || h.vectors == 1, place, "vectors", h.vectors);
    need(wide(h.read_numel) >= 0, place, "read_numel", wide(h.read_numel));
    need(wide(h.written_numel) >= 0, place, "written_numel", wide(h.written_numel));
    need(wide(h.multiply_adds) >= 0, place, "multiply_adds", wide(h.multiply_adds));
    const int64_t weights = wide(h.weight_numel);
    need(weights >= 0 && weights % h.taps == 0 && weights / h.taps < kMostCoordinate, place, "weight_numel",
         weights);
    pairs_ = weights / h.taps;
    room(h.classes_at, int64_t{h.n_classes} * static_cast<int64_t>(sizeof(TableClass) / 4), place,
         "classes_at");
    room(h.items_at, int64_t{h.n_items} * static_cast<int64_t>(sizeof(TableItem) / 4), place, "items_at");
    need(!of_weight() || h.n_classes <= 1, place, "n_classes", h.n_classes);
    need(h.n_classes > 0 || h.clear == 1 || wide(h.written_numel) == 0, place, "n_classes", h.n_classes);
  }

  void check_classes() {
    int64_t blocks = 0, items = 0, most_rows = 0, most_shared = 0;
    std::set<std::pair<int32_t, int32_t>> offsets;
    for (int32_t i = 0; i < header_.n_classes; ++i) {
      const Place place{"class", i};
      const TableClass& c = class_at(i);
      const int64_t kernel_h = header_.taps / header_.kernel_w;
      check_side({c.tile_h, c.tiles_h, c.grid_h, c.in_h, c.out_h, c.in_step_h, c.in_offset_h, c.out_step_h,
                  c.out_offset_h, c.taps_h, c.tap_step_h, c.phase_h, c.halo_h, c.halo_step_h, c.row_step_h,
                  c.row_tap_h, c.tap_first_h, c.tap_next_h, kernel_h},
                 place);
      check_side({c.tile_w, c.tiles_w, c.grid_w, c.in_w, c.out_w, c.in_step_w, c.in_offset_w, c.out_step_w,
                  c.out_offset_w, c.taps_w, c.tap_step_w, c.phase_w, c.halo_w, c.halo_step_w, c.row_step_w,
                  c.row_tap_w, c.tap_first_w, c.tap_next_w, header_.kernel_w},
                 place);
      need(c.batch >= 1 && c.batch <= kMostPixels, place, "the batch", c.batch);
      need(c.tile_n >= 1 && int64_t{c.tile_n} * c.tile_h * c.tile_w <= kTilePixels, place,
           "the images of a box", c.tile_n);
      need(c.tiles_n == divide_up(c.batch, c.tile_n), place, "the number of boxes", c.tiles_n);
      const int64_t tiles =
          checked_mul(checked_mul(c.tiles_n, c.tiles_h, "the boxes"), c.tiles_w, "the boxes");
      need(c.pixel_tiles == tiles, place, "the number of boxes", c.pixel_tiles);
      const int64_t rows = int64_t{c.tile_n} * c.halo_h * c.halo_w;
      need(rows <= kMostRows, place, "the size of the halo", rows);
      need(c.halo_w_magic == magic_of(c.halo_w), place, "halo_w_magic", c.halo_w_magic);
      need(c.halo_h_magic == magic_of(c.halo_h), place, "halo_h_magic", c.halo_h_magic);
      need(c.tile_w_magic == magic_of(c.tile_w), place, "tile_w_magic", c.tile_w_magic);
      need(c.tile_h_magic == magic_of(c.tile_h), place, "tile_h_magic", c.tile_h_magic);
      check_tensors(c, place);
      const TableClass& first = class_at(0);
      need(c.out_step_h == first.out_step_h && c.out_step_w == first.out_step_w, place, "an output's step",
           c.out_step_h);
      // Two classes must not write the same pixel.
      need(offsets.emplace(c.out_offset_h, c.out_offset_w).second, place, "an output's offset",
           c.out_offset_h);
      const int64_t phase = int64_t{c.phase_h} * c.phase_w;
      if (of_weight()) {
        need(phase <= kMaxTaps, place, "the taps that share a halo", phase);
        need(int64_t{c.taps_h} * c.taps_w == header_.taps, place, "the number of taps",
             int64_t{c.taps_h} * c.taps_w);
        need(header_.partials == (phase >= 3 ? 1 : 4 / phase), {"header", -1}, "partials", header_.partials);
      }
      need(c.items_at == items, place, "the first item", c.items_at);
      need(c.n_items >= 0, place, "the number of items", c.n_items);
      need(c.first_block == blocks, place, "the first block", c.first_block);
      items += c.n_items;
      blocks += of_weight() ? int64_t{c.n_items} : checked_mul(tiles, c.n_items, "the blocks");
      most_rows = std::max(most_rows, rows);
      most_shared = std::max(most_shared,
                             shared_of(header_.operation, rows, phase, std::max<int64_t>(header_.octets, 1)));
    }
    const Place place{"header", -1};
    need(header_.n_items == items, place, "n_items", header_.n_items);
    need(header_.blocks == blocks, place, "blocks", header_.blocks);
    need(header_.halo_rows == most_rows, place, "halo_rows", header_.halo_rows);
    need(header_.shared_bytes == most_shared, place, "shared_bytes", header_.shared_bytes);
    if (header_.clear == 0 && header_.n_classes > 0) {
      const TableClass& c = class_at(0);
      const int64_t all = std::min<int64_t>(c.out_step_h, c.out_h) * std::min<int64_t>(c.out_step_w, c.out_w);
      need(header_.n_classes == all, place, "n_classes", header_.n_classes);
    }
  }

  // The tensors are those whose lengths each call compares with the header.
  void check_tensors(const TableClass& c, const Place& place) const {
    const auto elements = [&](int64_t height, int64_t width, int64_t channels) {
      const int64_t images = checked_mul(checked_mul(c.batch, height, "a tensor"), width, "a tensor");
      return checked_mul(images, channels, "a tensor");
    };
    const int64_t read = elements(c.in_h, c.in_w, header_.in_channels);
    const int64_t written = elements(c.out_h, c.out_w, header_.out_channels);
    need(read == wide(header_.read_numel), place, "the size of the input", read);
    need(written == wide(header_.written_numel), place, "the size of the output", written);
  }

  void check_chunk(int64_t at, int32_t channels, const Place& place) {
    const TableChunk& chunk = entry<TableChunk>(at, 0);
    const int64_t unit = 16 / element_bytes(header_.precision);
    need(chunk.gather == 0 || chunk.gather == 1, place, "gather of a chunk", chunk.gather);
    need(chunk.full == 0 || chunk.full == 1, place, "full of a chunk", chunk.full);
    if (chunk.gather == 0) {
      need(header_.vectors == 1, {"header", -1}, "vectors", header_.vectors);
      need(channels % unit == 0, place, "the number of channels", channels);
    }
    int64_t last = -1;
    uint32_t used = 0;
    for (int64_t i = 0; i < kMaxColumns; ++i) {
      const int64_t channel = chunk.channel[i];
      if (channel < 0) {
        need(channel == -1, place, "a channel of a chunk", channel);
        continue;
      }
      need(i < columns() && channel < channels, place, "a channel of a chunk", channel);
      if (chunk.gather == 0)
        need(channel == chunk.unit[i / unit] + i % unit, place, "a channel of a chunk", channel);
      used |= 1u << i;
      last = i;
    }
    need(static_cast<uint32_t>(chunk.used) == used, place, "used of a chunk", chunk.used);
    need(last >= 0 && chunk.steps == last / (columns() / 2) + 1, place, "steps of a chunk", chunk.steps);
    if (chunk.gather == 1) return;
    for (int64_t i = 0; i < kUnits; ++i) {
      const int64_t first = chunk.unit[i];
      need(first == -1 || (first >= 0 && first % unit == 0 && first + unit <= channels), place,
           "a unit of a chunk", first);
      const uint32_t members = (1u << unit) - 1;
      if (first >= 0 && chunk.full == 1)
        need((used >> (i * unit) & members) == members, place, "full of a chunk", chunk.full);
    }
  }

  void check_items() {
    if (of_weight()) written_.assign(static_cast<size_t>(wide(header_.weight_numel)), false);
    int64_t rows = 0;
    int32_t octets = 0;
    std::set<std::array<int32_t, 5>> known;  // pieces that the classes share
    for (int32_t k = 0; k < header_.n_classes; ++k) {
      const TableClass& c = class_at(k);
      std::vector<bool> seen(static_cast<size_t>(header_.out_channels), false);
      for (int64_t i = c.items_at; i < int64_t{c.items_at} + c.n_items; ++i) {
        const Place place{"item", i};
        const TableItem& item = entry<TableItem>(header_.items_at, i);
        need(item.taps_h == c.phase_h, place, "taps_h", item.taps_h);
        need(item.taps_w == c.phase_w, place, "taps_w", item.taps_w);
        if (of_weight()) {
          check_weight_item(item, c, place);
          continue;
        }
        need(item.octets >= 1 && item.octets <= kMaxOctets, place, "octets", item.octets);
        room(item.filters_at, int64_t{item.octets} * 8, place, "filters_at");
        for (int64_t f = 0; f < int64_t{item.octets} * 8; ++f) {
          const int32_t filter = words_[item.filters_at + f];
          need(filter >= -1 && filter < header_.out_channels, place, "a filter", filter);
          if (filter < 0) continue;
          // Two blocks must not write the same element.
          need(!seen[static_cast<size_t>(filter)], place, "a filter, named twice,", filter);
          seen[static_cast<size_t>(filter)] = true;
        }
        const int64_t unit = 16 / element_bytes(header_.precision);
        room(item.units_at, int64_t{item.octets} * 8 / unit, place, "units_at");
        for (int64_t u = 0; u < int64_t{item.octets} * 8 / unit; ++u) {
          const int32_t first = words_[item.units_at + u];
          need(first == whole_unit(header_, words_ + item.filters_at + u * unit), place, "a unit of filters",
               first);
        }
        need(wide(item.weights) == rows, place, "the first row of weights", wide(item.weights));
        if (known.insert({item.filters_at, item.octets, item.chunks_at, item.n_chunks, item.pairs_at}).second)
          check_piece(item, place);
        const int64_t taps = int64_t{c.taps_h} * c.taps_w;
        rows += checked_mul(checked_mul(item.n_chunks, taps, "the weights"), int64_t{item.octets} * 8,
                            "the weights");
        octets = std::max(octets, item.octets);
      }
      if (!of_weight() && header_.clear == 0) {
        const auto missing = std::find(seen.begin(), seen.end(), false);
        need(missing == seen.end(), {"class", k}, "a channel that no item writes", missing - seen.begin());
      }
    }
    const Place place{"header", -1};
    // Without classes nothing says which pieces there would have been.
    if (header_.n_classes > 0 || of_weight()) need(header_.octets == octets, place, "octets", header_.octets);
    need(wide(header_.prepared_rows) == rows, place, "prepared_rows", wide(header_.prepared_rows));
    if (of_weight() && header_.clear == 0) {
      const auto missing = std::find(written_.begin(), written_.end(), false);
      need(missing == written_.end(), place, "a weight whose gradient no item makes",
           missing - written_.begin());
    }
  }

  // Filters, chunks and pairs of an item.
  void check_piece(const TableItem& item, const Place& place) {
    constexpr int64_t kChunkWords = sizeof(TableChunk) / sizeof(int32_t);
    const int64_t filters = int64_t{item.octets} * 8;
    need(item.n_chunks >= 0, place, "n_chunks", item.n_chunks);
    if (item.n_chunks == 0) return;
    room(item.chunks_at, item.n_chunks * kChunkWords, place, "chunks_at");
    room(item.pairs_at, checked_mul(item.n_chunks, filters * columns(), "the pairs"), place, "pairs_at");
    const int32_t* pair = words_ + item.pairs_at;
    for (int64_t k = 0; k < item.n_chunks; ++k) {
      const int64_t at = item.chunks_at + k * kChunkWords;
      check_chunk(at, header_.in_channels, place);
      const TableChunk& chunk = entry<TableChunk>(at, 0);
      for (int64_t f = 0; f < filters; ++f) {
        const bool live = words_[item.filters_at + f] >= 0;
        for (int64_t i = 0; i < columns(); ++i) check_pair(*pair++, live && chunk.channel[i] >= 0, place);
      }
    }
  }

  void check_pair(int32_t pair, bool wanted, const Place& place) const {
    need(wanted ? pair >= 0 && pair < pairs_ : pair == -1, place, "a pair", pair);
  }

  void check_weight_item(const TableItem& item, const TableClass& c, const Place& place) {
    constexpr int64_t kChunkWords = sizeof(TableChunk) / sizeof(int32_t);
    need(item.octets == 0, place, "octets", item.octets);
    need(item.n_chunks == 1, place, "n_chunks", item.n_chunks);
    need(item.tap_h >= 0 && item.tap_h <= c.taps_h - item.taps_h, place, "tap_h", item.tap_h);
    need(item.tap_w >= 0 && item.tap_w <= c.taps_w - item.taps_w, place, "tap_w", item.tap_w);
    room(item.chunks_at, kChunkWords, place, "chunks_at");
    room(item.grad_chunk_at, kChunkWords, place, "grad_chunk_at");
    room(item.pairs_at, columns() * columns(), place, "pairs_at");
    check_chunk(item.chunks_at, header_.in_channels, place);
    check_chunk(item.grad_chunk_at, header_.out_channels, place);
    const TableChunk& chunk = entry<TableChunk>(item.chunks_at, 0);
    const TableChunk& filters = entry<TableChunk>(item.grad_chunk_at, 0);
    for (int64_t f = 0; f < columns(); ++f) {
      for (int64_t i = 0; i < columns(); ++i) {
        const int32_t pair = words_[item.pairs_at + f * columns() + i];
        check_pair(pair, filters.channel[f] >= 0 && chunk.channel[i] >= 0, place);
        if (pair < 0) continue;
        for (int32_t tap = 0; tap < item.taps_h * item.taps_w; ++tap) {
          const int64_t in_kernel =
              int64_t{item.tap_h + tap / item.taps_w} * c.taps_w + item.tap_w + tap % item.taps_w;
          const auto at = static_cast<size_t>(int64_t{pair} * header_.taps + in_kernel);
          // Two blocks must not write the same element.
          need(!written_[at], place, "a pair, named twice,", pair);
          written_[at] = true;
        }
      }
    }
  }

  // How the sums are split, and the memory for their parts.
  void check_sums() const {
    const Place place{"header", -1};
    const int64_t splits = header_.splits, blocks = header_.blocks;
    int64_t expected = 0;
    if (of_weight()) {
      need(splits <= kMostSlices, place, "splits", splits);
      if (blocks > 0) {
        const TableClass& c = class_at(0);
        const int64_t parts = checked_mul(splits * header_.partials, blocks, "the workspace");
        expected =
            checked_mul(parts, int64_t{c.phase_h} * c.phase_w * columns() * columns(), "the workspace");
      }
    } else {
      need(splits <= kMostSplits, place, "splits", splits);
      if (splits > 1)
        expected = checked_mul(splits * blocks, int64_t{header_.octets} * 8 * kTilePixels, "the workspace");
    }
    need(wide(header_.workspace) == expected, place, "workspace", wide(header_.workspace));
  }

  const int32_t* words_;
  int64_t numel_;
  const TableHeader& header_;
  int64_t pairs_ = 0;
  std::vector<bool> written_;  // of the weight's gradient
};

}  // namespace

void check_table(const int32_t* words, int64_t numel) { Reader(words, numel).check(); }

}  // namespace cuda
}  // namespace dsp
