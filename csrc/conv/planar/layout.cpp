#include "conv/planar/layout.h"

#include <algorithm>

#include "core/status.h"

namespace dsp {
namespace {

constexpr int64_t kScratchBytes = 384 * 1024;  // of a strip's input: it should stay in the second-level cache
constexpr int64_t kSlack = 64;                 // floats that a full vector may read beyond the last row

// Planes an odd number of cache lines apart do not all fall into the same cache sets.
int64_t spread(int64_t floats) { return (((floats + 15) / 16) | 1) * 16; }

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// About `wanted` of `total` rows or vectors at a time, in equal pieces that are multiples of 8.
int64_t even_chunk(int64_t total, int64_t wanted) {
  const int64_t chunk = std::max<int64_t>(1, wanted / 8) * 8;
  const int64_t pieces = (total + chunk - 1) / chunk;
  return std::max<int64_t>(8, round_up((total + pieces - 1) / std::max<int64_t>(pieces, 1), 8));
}

// Vectors that rows of this width take, in lanes per pixel: 1 is perfect.
double row_waste(int64_t width, const KernelTable& k) {
  const int64_t rest = width % k.lanes;
  int64_t lanes = width - rest;
  if (rest > 0) lanes += k.has_half && rest <= k.lanes / 2 ? k.lanes / 2 : k.lanes;
  return static_cast<double>(lanes) / static_cast<double>(width);
}

}  // namespace

ColumnsApart columns_apart(const ConvShape& s, int64_t kx) {
  const int64_t column = kx * s.dw - s.pw;
  const bool odd = column % 2 != 0;
  return {odd, (column - (odd ? 1 : 0)) / 2};
}

bool wide_taps(const ConvShape& s) {
  const double span_w = static_cast<double>((s.kw - 1) * s.dw / s.sw);
  return span_w > 2.0 * static_cast<double>(s.out_w) + 64;
}

bool rows_fit(int64_t width) { return row_waste(width, kernels()) <= 1.1; }

void TileSet::clear() {
  tiles.clear();
  runs.clear();
  chunks.clear();
}

int32_t block_count(int32_t filters) {
  const int32_t most = kernels().max_filters;
  return (filters + most - 1) / most;
}

int32_t block_size(int32_t filters, int32_t index) {
  const int32_t count = block_count(filters);
  return filters / count + (index < filters % count ? 1 : 0);
}

void prepare_weights(const Plan& plan, int64_t kh, int64_t kw, const float* packed, float* prepared) {
  const int64_t taps = kh * kw;
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    const int64_t row = group.n_channels * taps;
    const float* from = packed + group.weight_pairs * taps;
    float* to = prepared + group.weight_pairs * taps;
    const int32_t count = group.n_filters == 0 ? 0 : block_count(group.n_filters);
    for (int32_t b = 0; b < count; ++b) {
      const int32_t size = block_size(group.n_filters, b);
      for (int64_t c = 0; c < group.n_channels; ++c) {
        for (int64_t kx = 0; kx < kw; ++kx) {
          for (int64_t ky = 0; ky < kh; ++ky) {
            const float* tap = from + c * taps + ky * kw + kx;
            for (int32_t f = 0; f < size; ++f) *to++ = tap[f * row];
          }
        }
      }
      from += size * row;
    }
  }
}

void ConvLayout::set_blocks(const Plan& plan, const ConvShape& s) {
  s_ = s;
  blocks.clear();
  filters.clear();
  dead.clear();
  used_channels.clear();
  mark_.assign(static_cast<size_t>(plan.out_channels()), 0);
  slot_.assign(static_cast<size_t>(plan.in_channels()), -1);
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    for (int32_t c = 0; c < group.n_channels; ++c) slot_[static_cast<size_t>(group.channels[c])] = 0;
    int64_t weight = group.weight_pairs * s.taps();
    int32_t done = 0;
    for (int32_t b = 0; b < block_count(group.n_filters); ++b) {
      FilterBlock entry{};
      entry.filters = block_size(group.n_filters, b);
      entry.steps = g;  // the group, until set_offsets knows the steps
      entry.weight_begin = weight;
      entry.filter_begin = static_cast<int64_t>(filters.size());
      entry.cost = int64_t{entry.filters + (entry.filters < 3 ? 1 : 0)} * group.n_channels * s.taps() + 8;
      weight += int64_t{entry.filters} * group.n_channels * s.taps();
      for (int32_t f = 0; f < entry.filters; ++f) {
        filters.push_back(group.filters[done + f]);
        mark_[static_cast<size_t>(group.filters[done + f])] = 1;
      }
      done += entry.filters;
      blocks.push_back(entry);
    }
  }
  for (int32_t f = 0; f < plan.out_channels(); ++f) {
    if (mark_[static_cast<size_t>(f)] == 0) dead.push_back(f);
  }
  for (int32_t c = 0; c < plan.in_channels(); ++c) {
    int32_t& slot = slot_[static_cast<size_t>(c)];
    if (slot < 0) continue;
    slot = static_cast<int32_t>(used_channels.size());
    used_channels.push_back(c);
  }
}

void ConvLayout::set_bias(const float* values) {
  bias.resize(filters.size());
  for (size_t i = 0; i < filters.size(); ++i) bias[i] = values == nullptr ? 0.0f : values[filters[i]];
}

void ConvLayout::set_geometry(const ConvShape& s, int64_t strip_rows) {
  const bool is_flat = mode == InputMode::kGatherFlat;
  y_variants_.clear();
  x_variants_.clear();
  tap_offset_.clear();
  // Columns: one copy per phase of the stride, or per tap where a copy is as wide as the output.
  // Rows: per phase too, unless the taps lie so far apart that the rows between them would be most of the
  // copy.
  const int64_t span_h = (s.kh - 1) * s.dh / s.sh;
  const bool by_row = span_h > 4 * strip_rows + 16;
  const int64_t extra_rows = by_row ? 0 : span_h;
  const auto variant = [](std::vector<int64_t>* list, int64_t value) {
    for (size_t i = 0; i < list->size(); ++i) {
      if ((*list)[i] == value) return static_cast<int64_t>(i);
    }
    list->push_back(value);
    return static_cast<int64_t>(list->size() - 1);
  };
  in_pitch = is_flat ? s.out_w : s.out_w + (s.kw - 1) * s.dw / s.sw;
  rows_ = strip_rows + extra_rows;
  for (int64_t ky = 0; ky < s.kh; ++ky) variant(&y_variants_, by_row ? ky * s.dh : ky * s.dh % s.sh);
  for (int64_t kx = 0; kx < s.kw; ++kx) variant(&x_variants_, is_flat ? kx * s.dw : kx * s.dw % s.sw);
  const int64_t n_x = static_cast<int64_t>(x_variants_.size());
  const int64_t n_y = static_cast<int64_t>(y_variants_.size());
  const int64_t piece = checked_mul(rows_, in_pitch, "the scratch memory");
  for (int64_t kx = 0; kx < s.kw; ++kx) {
    for (int64_t ky = 0; ky < s.kh; ++ky) {
      const int64_t y = variant(&y_variants_, by_row ? ky * s.dh : ky * s.dh % s.sh);
      const int64_t x = variant(&x_variants_, is_flat ? kx * s.dw : kx * s.dw % s.sw);
      tap_offset_.push_back((y * n_x + x) * piece + (by_row ? 0 : ky * s.dh / s.sh * in_pitch) +
                            (is_flat ? 0 : kx * s.dw / s.sw));
    }
  }
  in_plane = spread(checked_mul(checked_mul(n_x, n_y, "the scratch memory"), piece, "the scratch memory"));
  reuse_rows_ = !is_flat && !by_row && s.kh == 3 && s.sh == 1 && s.dh == 1;
}

void ConvLayout::set_offsets(const Plan& plan, bool by_slot) {
  offsets_.clear();
  const int64_t kernel_rows = reuse_rows_ ? 3 : 1;
  int64_t previous_group = -1;
  for (size_t b = 0; b < blocks.size(); ++b) {
    FilterBlock& entry = blocks[b];
    const int64_t g = entry.steps;
    if (g != previous_group) {
      previous_group = g;
      const Group group = plan.group(static_cast<int32_t>(g));
      entry.offset_begin = static_cast<int64_t>(offsets_.size());
      for (int32_t c = 0; c < group.n_channels; ++c) {
        const int32_t channel = group.channels[c];
        const int64_t at = (by_slot ? slot_[static_cast<size_t>(channel)] : channel) * in_plane;
        for (size_t tap = 0; tap < tap_offset_.size(); tap += static_cast<size_t>(kernel_rows))
          offsets_.push_back(at + tap_offset_[tap]);
      }
    } else {
      entry.offset_begin = blocks[b - 1].offset_begin;
    }
  }
  // Only now may the groups' numbers go: the loop above reads the one before.
  for (size_t b = 0; b < blocks.size(); ++b) {
    const Group group = plan.group(static_cast<int32_t>(blocks[b].steps));
    blocks[b].steps = int64_t{group.n_channels} * (s_.taps() / kernel_rows);
  }
}

void ConvLayout::set_gathered(const ConvShape& s, const Plan& plan, int threads, bool allow_direct) {
  const KernelTable& k = kernels();
  s_ = s;
  const int64_t wanted = threads > 1 ? 2 * int64_t{threads} : 1;
  const int64_t images = std::max<int64_t>(s.batch, 1);
  // The sizes too: what is asked for may be more or less than what the padding gives.
  const bool one = s.kh == 1 && s.kw == 1 && s.sh == 1 && s.sw == 1 && s.ph == 0 && s.pw == 0 &&
                   s.out_h == s.height && s.out_w == s.width;
  if (one && allow_direct && (s.in_plane() % 1024 != 0 || used_channels.size() < 8)) {
    mode = InputMode::kDirectFlat;
    in_pitch = s.width;
    in_plane = s.in_plane();
    exact_ = true;
    reuse_rows_ = false;
    tap_offset_.assign(1, 0);
    const int64_t unit = 8 * k.lanes;
    strip_pixels = round_up(std::max<int64_t>(1, (s.out_plane() * images + wanted - 1) / wanted), unit);
    strip_pixels = std::min(strip_pixels, round_up(s.out_plane(), unit));
    set_offsets(plan, false);
    return;
  }
  mode = !rows_fit(s.out_w) || wide_taps(s) ? InputMode::kGatherFlat : InputMode::kGatherRows;
  int64_t rows = s.out_h;
  const int64_t used = std::max<int64_t>(static_cast<int64_t>(used_channels.size()), 1);
  set_geometry(s, rows);
  while (rows > 16 && static_cast<double>(used) * static_cast<double>(in_plane) * 4.0 > kScratchBytes) {
    rows = std::max<int64_t>(16, round_up(rows / 2, 16));
    set_geometry(s, rows);
  }
  while (rows > 8 && images * ((s.out_h + rows - 1) / rows) < wanted) {
    rows = std::max<int64_t>(8, round_up(rows / 2, 8));
    set_geometry(s, rows);
  }
  strip_pixels = rows * s.out_w;
  checked_mul(checked_mul(used, in_plane, "the scratch memory"), 8, "the scratch memory");
  set_offsets(plan, true);
}

void ConvLayout::set_direct_flat(const ConvShape& s, const Plan& plan, const Planes& in, bool exact) {
  s_ = s;
  mode = InputMode::kDirectFlat;
  in_pitch = in.pitch;
  in_plane = in.plane;
  exact_ = exact;
  reuse_rows_ = false;
  tap_offset_.assign(1, in.origin);
  strip_pixels = s.out_plane();
  set_offsets(plan, false);
}

void ConvLayout::set_direct_rows(const ConvShape& s, const Plan& plan, const Planes& in) {
  s_ = s;
  mode = InputMode::kDirectRows;
  in_pitch = s.sh * in.pitch;
  in_plane = in.plane;
  strip_pixels = s.out_plane();
  tap_offset_.clear();
  for (int64_t kx = 0; kx < s.kw; ++kx) {
    int64_t column = kx * s.dw - s.pw;
    if (in.odd != 0) {
      const ColumnsApart columns = columns_apart(s, kx);
      column = columns.first + (columns.odd ? in.odd : 0);
    }
    for (int64_t ky = 0; ky < s.kh; ++ky)
      tap_offset_.push_back(in.origin + (ky * s.dh - s.ph) * in.pitch + column);
  }
  reuse_rows_ = s.kh == 3 && s.sh <= 2 && s.dh == 1;
  set_offsets(plan, false);
}

bool ConvLayout::pairs_fit() const {
  const KernelTable& k = kernels();
  return k.has_half && mode == InputMode::kDirectRows && reuse_rows_ && s_.sh == 1 && s_.out_w <= k.lanes / 2;
}

int64_t ConvLayout::scratch_floats() const {
  if (!gathered()) return 0;
  return static_cast<int64_t>(used_channels.size()) * in_plane + kSlack;
}

int64_t ConvLayout::table_bytes() const {
  return static_cast<int64_t>(offsets_.size() * sizeof(int64_t) + blocks.size() * sizeof(FilterBlock) +
                              filters.size() * (sizeof(int32_t) + sizeof(float)));
}

int64_t ConvLayout::chunks(const TileSet sets[]) const {
  // Every set that is in use has the same chunks.
  return static_cast<int64_t>(sets[kernels().rows_log[blocks.front().filters]].chunks.size());
}

int64_t ConvLayout::block_share(int64_t part, int64_t parts) const {
  const int64_t count = static_cast<int64_t>(blocks.size());
  if (part >= parts) return count;
  int64_t total = 0;
  for (const FilterBlock& block : blocks) total += block.cost;
  int64_t sum = 0;
  for (int64_t b = 0; b < count; ++b) {
    if ((sum + blocks[static_cast<size_t>(b)].cost / 2) * parts >= part * total) return b;
    sum += blocks[static_cast<size_t>(b)].cost;
  }
  return count;
}

void ConvLayout::build_tiles(int64_t pixels, const Planes& out, int64_t residual_pitch, int64_t chunk_bytes,
                             TileSet sets[], int only_log, bool pairs) {
  const KernelTable& k = kernels();
  bool needed[kMaxRowsLog + 1] = {};
  int64_t most_channels = 1;
  for (const FilterBlock& block : blocks) {
    needed[only_log >= 0 ? only_log : k.rows_log[block.filters]] = true;
    most_channels = std::max(most_channels, block.steps * (reuse_rows_ ? 3 : 1) / s_.taps());
  }
  for (int log = 0; log <= kMaxRowsLog; ++log) {
    TileSet& set = sets[log];
    set.clear();
    if (!needed[log]) continue;
    const auto emit = [&](int rows_log, int32_t tile_mode, const Tile& tile, int32_t column = kTap) {
      const TileChunk& chunk = set.chunks.back();
      if (static_cast<int64_t>(set.runs.size()) > chunk.run_begin) {
        TileRun& last = set.runs.back();
        if (last.rows_log == rows_log && last.mode == tile_mode && last.column == column) {
          last.count++;
          set.tiles.push_back(tile);
          return;
        }
      }
      set.runs.push_back({rows_log, tile_mode, column, static_cast<int64_t>(set.tiles.size()), 1});
      set.tiles.push_back(tile);
    };
    const auto begin_chunk = [&] {
      set.chunks.push_back({static_cast<int64_t>(set.runs.size()), static_cast<int64_t>(set.runs.size())});
    };
    const auto end_chunk = [&] { set.chunks.back().run_end = static_cast<int64_t>(set.runs.size()); };

    if (flat()) {
      const int64_t vectors = (pixels + k.lanes - 1) / k.lanes;
      const int64_t copies = gathered() ? static_cast<int64_t>(x_variants_.size()) : 1;
      const int64_t per_vector = most_channels * copies * k.lanes * 4;
      const int64_t chunk = even_chunk(vectors, chunk_bytes / std::max<int64_t>(1, per_vector));
      for (int64_t v0 = 0; v0 < vectors; v0 += chunk) {
        begin_chunk();
        const int64_t v1 = std::min(vectors, v0 + chunk);
        int64_t v = v0;
        for (int rows_log = log; rows_log >= 0; --rows_log) {
          const int64_t step = int64_t{1} << rows_log;
          for (; v + step <= v1 && (v + step) * k.lanes <= pixels; v += step) {
            const int64_t at = v * k.lanes;
            emit(rows_log, kFull, {at, at, at, k.lanes});
          }
        }
        if (v < v1) {
          const int64_t at = v * k.lanes;
          emit(0, exact_ && !gathered() ? kMasked : kFull, {at, at, at, static_cast<int32_t>(pixels - at)});
        }
        end_chunk();
      }
      continue;
    }

    const int64_t rows = pixels / s_.out_w;
    const int64_t width = s_.out_w;
    const int64_t per_row = most_channels * in_pitch * 4;
    const int64_t chunk = even_chunk(rows, chunk_bytes / std::max<int64_t>(1, per_row));
    // Tiles of one strip may serve others too: only where there is no other is an edge known.
    const bool edges = rows == s_.out_h && only_log < 0;
    const auto at = [&](int64_t y, int64_t x, int32_t lanes) -> Tile {
      return {y * in_pitch + x, y * out.pitch + (out.odd != 0 ? x / 2 : x), y * residual_pitch + x, lanes};
    };
    const int64_t rest = width % k.lanes;
    const bool half = k.has_half && rest > 0 && rest <= k.lanes / 2;
    // Whole vectors, and the rest of a row under a mask where it is more than half a vector.
    const int64_t full_width = half ? width - rest : width;
    const int32_t middle = !reuse_rows_ ? kTap : (s_.sh == 2 ? kColumnBy2 : kColumn);
    const auto column_at = [&](int64_t y, int64_t step) -> int32_t {
      const bool top = edges && s_.sh * y < s_.ph;
      if (middle == kColumnBy2) return top ? kColumnBy2Top : middle;
      if (middle == kColumn) {
        if (top) return kColumnTop;
        if (edges && y + step + 1 - s_.ph >= s_.height) return kColumnBottom;
      }
      return middle;
    };
    for (int64_t y0 = 0; y0 < rows; y0 += chunk) {
      const int64_t y1 = std::min(rows, y0 + chunk);
      begin_chunk();
      int64_t y = y0;
      for (int rows_log = log; rows_log >= 0; --rows_log) {
        const int64_t step = int64_t{1} << rows_log;
        for (; y + step <= y1; y += step) {
          for (int64_t x = 0; x < full_width; x += k.lanes) {
            emit(rows_log, kFull, at(y, x, static_cast<int32_t>(std::min<int64_t>(k.lanes, width - x))),
                 column_at(y, step));
          }
          if (pairs) emit(rows_log, kHalf, at(y, 0, static_cast<int32_t>(rest)), column_at(y, step));
        }
      }
      if (half && !pairs) {
        y = y0;
        for (int rows_log = log; rows_log >= 0; --rows_log) {
          const int64_t step = int64_t{2} << rows_log;
          for (; y + step <= y1; y += step)
            emit(rows_log, kHalf, at(y, full_width, static_cast<int32_t>(rest)), middle);
        }
        if (y < y1) emit(0, kFull, at(y, full_width, static_cast<int32_t>(rest)), middle);
      }
      end_chunk();
    }
  }
}

void ConvLayout::gather(const float* image, const Planes& in, int64_t first_pixel, int64_t pixels,
                        int64_t slot_begin, int64_t slot_end, float* scratch, int64_t ahead) const {
  const KernelTable& k = kernels();
  const int64_t y0 = first_pixel / s_.out_w;
  const int64_t rows = pixels / s_.out_w + (rows_ - strip_pixels / s_.out_w);
  const int64_t piece = rows_ * in_pitch;
  GatherArgs args{};
  args.dst_pitch = in_pitch;
  args.from_pitch = s_.sh * in.pitch;
  args.count = in_pitch;
  args.stride = s_.sw;
  // A channel's copies one after the other, while its plane is in the first-level cache.
  for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
    const float* plane = image + in.origin + used_channels[static_cast<size_t>(slot)] * in.plane;
    float* to = scratch + slot * in_plane;
    for (const int64_t y_shift : y_variants_) {
      // Row r comes from row (y0 + r) * stride + y_shift - padding of the image, for r in [top, bottom).
      const int64_t y = y0 * s_.sh + y_shift - s_.ph;
      const int64_t top = std::min(rows, y >= 0 ? 0 : (-y + s_.sh - 1) / s_.sh);
      const int64_t bottom =
          std::max(top, s_.height - 1 - y < 0 ? 0 : std::min(rows, (s_.height - 1 - y) / s_.sh + 1));
      args.rows = bottom - top;
      for (const int64_t x_shift : x_variants_) {
        const int64_t x = x_shift - s_.pw;
        args.first = std::min(in_pitch, x >= 0 ? 0 : (-x + s_.sw - 1) / s_.sw);
        args.last = std::max(args.first,
                             s_.width - 1 - x < 0 ? 0 : std::min(in_pitch, (s_.width - 1 - x) / s_.sw + 1));
        args.width = s_.width - (x + args.first * s_.sw);
        args.ahead = x_shift == x_variants_.front() ? ahead : 0;
        for (int64_t i = 0; i < top * in_pitch; ++i) to[i] = 0;
        if (bottom > top && args.last > args.first) {
          args.dst = to + top * in_pitch;
          args.from = plane + (y + top * s_.sh) * in.pitch + x;
          k.gather(args);
        } else {
          for (int64_t i = top * in_pitch; i < bottom * in_pitch; ++i) to[i] = 0;
        }
        for (int64_t i = bottom * in_pitch; i < rows * in_pitch; ++i) to[i] = 0;
        to += piece;
      }
    }
  }
}

void ConvLayout::tap_offsets(const Group& group, std::vector<int64_t>* offsets) const {
  offsets->clear();
  for (int32_t c = 0; c < group.n_channels; ++c) {
    const int64_t channel = group.channels[c];
    const int64_t at = (gathered() ? slot_[static_cast<size_t>(channel)] : channel) * in_plane;
    for (int64_t ky = 0; ky < s_.kh; ++ky) {
      for (int64_t kx = 0; kx < s_.kw; ++kx)
        offsets->push_back(at + tap_offset_[static_cast<size_t>(kx * s_.kh + ky)]);
    }
  }
}

void ConvLayout::run(const TileSet sets[], int64_t chunk_begin, int64_t chunk_end, int64_t block_begin,
                     int64_t block_end, const float* in, const float* weights, const float* bias_values,
                     float* out, const Planes& out_planes, const float* residual,
                     const Planes& residual_planes, const Activation& activation, int64_t second) const {
  const KernelTable& k = kernels();
  BlockArgs args{};
  args.in = in;
  args.out = out + out_planes.origin;
  args.residual = residual == nullptr ? nullptr : residual + residual_planes.origin;
  args.out_plane = out_planes.plane;
  args.residual_plane = residual_planes.plane;
  args.out_odd = out_planes.odd;
  args.in_step = flat() ? k.lanes : (reuse_rows_ ? in_pitch / s_.sh : in_pitch);
  args.out_step = flat() ? k.lanes : out_planes.pitch;
  args.residual_step = flat() ? k.lanes : residual_planes.pitch;
  args.activation = &activation;
  for (int64_t chunk = chunk_begin; chunk < chunk_end; ++chunk) {
    for (int64_t b = block_begin; b < block_end; ++b) {
      const FilterBlock& block = blocks[static_cast<size_t>(b)];
      const TileSet& set = sets[k.rows_log[block.filters]];
      args.offsets = offsets_.data() + block.offset_begin;
      args.steps = block.steps;
      args.weights = weights + block.weight_begin;
      args.bias = bias_values + block.filter_begin;
      args.filters = filters.data() + block.filter_begin;
      const TileChunk& runs = set.chunks[static_cast<size_t>(chunk)];
      for (int64_t r = runs.run_begin; r < runs.run_end; ++r) {
        const TileRun& run = set.runs[static_cast<size_t>(r)];
        const int64_t vectors = int64_t{1} << run.rows_log;
        args.in_hi = second != 0 ? second : vectors * in_pitch;
        args.out_hi = second != 0 ? second : vectors * args.out_step;
        args.residual_hi = second != 0 ? second : vectors * args.residual_step;
        args.tiles = set.tiles.data() + run.first;
        args.n_tiles = run.count;
        k.block[block.filters - 1][run.rows_log][run.column][run.mode](args);
      }
    }
  }
}

}  // namespace dsp
