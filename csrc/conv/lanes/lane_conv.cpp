#include "conv/lanes/lane_conv.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "conv/parts.h"
#include "core/scratch.h"
#include "core/status.h"
#include "core/thread_pool.h"

namespace dsp {
namespace {

constexpr int64_t kChunkBytes = 192 * 1024;  // of input that all blocks read before the next pixels' turn
constexpr int64_t kLeastChunk = 96;
constexpr int64_t kMostChunk = 512;
constexpr int64_t kChunkUnit = 24;  // whole tiles of any number of vectors

int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

}  // namespace

View channels_last(int64_t width, int64_t pad_h, int64_t pad_w, int64_t pitch) {
  const int64_t row = (width + pad_w) * pitch;
  return {pad_h * row + pad_w * pitch, row, pitch, 1};
}

int64_t channels_last_floats(int64_t height, int64_t width, int64_t pad_h, int64_t pad_w, int64_t pitch) {
  return ((height + 2 * pad_h) * (width + pad_w) + pad_w) * pitch;
}

void LaneConv::add_block(const std::vector<int32_t>& order, size_t first, int32_t filters,
                         const int32_t* out_place) {
  const LaneKernels& k = lane_kernels();
  LaneBlock block{};
  block.vectors = (filters + k.lanes - 1) / k.lanes;
  block.filters = filters;
  block.filter_begin = static_cast<int64_t>(filters_.size());
  block.piece_begin = static_cast<int32_t>(pieces_.size());
  const auto place = [&](int32_t f) { return out_place == nullptr ? f : out_place[f]; };
  filters_.insert(filters_.end(), order.begin() + static_cast<int64_t>(first),
                  order.begin() + static_cast<int64_t>(first) + filters);
  const int32_t* mine = filters_.data() + block.filter_begin;
  block.channel = place(mine[0]);
  const bool whole = k.masks_are_free || filters % k.lanes == 0;
  if (!whole || place(mine[filters - 1]) - block.channel != filters - 1) {
    for (int32_t i = 0; i < filters; ++i) {
      const int32_t lane = i % k.lanes;
      if (lane == 0 || place(mine[i]) != place(mine[i - 1]) + 1) {
        if (lane == 0 && i > 0) pieces_.back().last = 1;
        pieces_.push_back({place(mine[i]) - lane, 0, 0, 0});
      }
      pieces_.back().mask |= 1u << lane;
    }
    pieces_.back().last = 1;
    const auto begin = pieces_.begin() + block.piece_begin;
    std::vector<LanePiece> windows;
    for (int32_t i = 0; i < filters;) {
      LanePiece window{place(mine[i]), 0, 0, i};
      for (; i < filters && place(mine[i]) - window.channel < k.lanes; ++i)
        window.mask |= 1u << (place(mine[i]) - window.channel);
      windows.push_back(window);
    }
    // A window is twice a run's work where the machine can expand a vector, else much more.
    block.windows = k.masks_are_free && 2 * static_cast<int64_t>(windows.size()) < pieces_.end() - begin;
    if (block.windows) {
      pieces_.erase(begin, pieces_.end());
      pieces_.insert(pieces_.end(), windows.begin(), windows.end());
    }
    block.pieces = static_cast<int32_t>(pieces_.size()) - block.piece_begin;
  }
  blocks_.push_back(block);
}

void LaneConv::set_blocks(const Plan& plan, const ConvShape& s, const int32_t* in_place,
                          const int32_t* out_place) {
  const LaneKernels& k = lane_kernels();
  s_ = s;
  blocks_.clear();
  filters_.clear();
  rows_.clear();
  groups_.clear();
  pieces_.clear();
  in_place_.assign(static_cast<size_t>(plan.in_channels()), 0);
  std::iota(in_place_.begin(), in_place_.end(), 0);
  if (in_place != nullptr) std::copy(in_place, in_place + plan.in_channels(), in_place_.begin());
  std::vector<char> living(static_cast<size_t>(plan.out_channels()), 0);
  std::vector<char> read(static_cast<size_t>(plan.in_channels()), 0);
  std::vector<int32_t> order, rows;
  const auto by_place = [&](const int32_t* list) {
    return [out_place, list](int32_t a, int32_t b) {
      return out_place == nullptr ? list[a] < list[b] : out_place[list[a]] < out_place[list[b]];
    };
  };
  weight_floats_ = 0;
  int64_t cost = 0;
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    for (int32_t c = 0; c < group.n_channels; ++c) read[static_cast<size_t>(group.channels[c])] = 1;
    rows.resize(static_cast<size_t>(group.n_filters));
    std::iota(rows.begin(), rows.end(), 0);
    std::sort(rows.begin(), rows.end(), by_place(group.filters));
    order.clear();
    for (const int32_t row : rows) {
      order.push_back(group.filters[row]);
      living[static_cast<size_t>(group.filters[row])] = 1;
    }
    // Blocks of whole vectors, as even as they can be.
    const int32_t vectors = (group.n_filters + k.lanes - 1) / k.lanes;
    const int32_t count = (vectors + k.max_vectors - 1) / k.max_vectors;
    int32_t done = 0;
    for (int32_t b = 0; b < count; ++b) {
      const int32_t width = (vectors / count + (b < vectors % count ? 1 : 0)) * k.lanes;
      const int32_t filters = std::min(width, group.n_filters - done);
      add_block(order, static_cast<size_t>(done), filters, out_place);
      groups_.push_back(g);
      rows_.insert(rows_.end(), rows.begin() + done, rows.begin() + done + filters);
      LaneBlock& block = blocks_.back();
      block.steps = int64_t{group.n_channels} * s.taps();
      block.part = part_terms(block.steps);
      block.weight_begin = weight_floats_;
      block.cost = cost;
      cost += (block.steps + 8) * block.vectors;
      weight_floats_ += block.steps * block.vectors * k.lanes;
      done += filters;
    }
  }
  // Filters of no group: sums of nothing.
  rows.clear();
  for (int32_t f = 0; f < plan.out_channels(); ++f) {
    if (living[static_cast<size_t>(f)] == 0) rows.push_back(f);
  }
  if (out_place != nullptr)
    std::sort(rows.begin(), rows.end(), [&](int32_t a, int32_t b) { return out_place[a] < out_place[b]; });
  for (size_t done = 0; done < rows.size();) {
    const size_t filters = std::min(rows.size() - done, static_cast<size_t>(k.max_vectors * k.lanes));
    add_block(rows, done, static_cast<int32_t>(filters), out_place);
    groups_.push_back(-1);
    rows_.insert(rows_.end(), filters, 0);
    blocks_.back().weight_begin = weight_floats_;
    blocks_.back().cost = cost;
    cost += 8;
    done += filters;
  }
  bias_begin_.clear();
  int64_t floats = 0;
  for (const LaneBlock& block : blocks_) {
    bias_begin_.push_back(floats);
    floats += int64_t{block.vectors} * k.lanes;
  }
  bias_.assign(static_cast<size_t>(floats), 0.0f);
  input_channels_ = std::accumulate(read.begin(), read.end(), int64_t{0});
}

bool LaneConv::set_views(const Plan& plan, const View& in, const View& out, const View& residual) {
  in_ = in;
  out_ = out;
  residual_ = residual;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const auto fits = [&](const View& view, int64_t rows, int64_t pixels, int64_t channels) {
    // Each of the factors is below 2^31, as is the number of values of an image; with padding they may not
    // be.
    const double last = static_cast<double>(view.origin) +
                        static_cast<double>(rows) * static_cast<double>(view.row) +
                        static_cast<double>(pixels) * static_cast<double>(view.pixel) +
                        static_cast<double>(channels) * static_cast<double>(view.channel);
    return last < static_cast<double>(kMost);
  };
  if (out.channel != 1 || residual.channel > 1) return false;
  int64_t channels = 0;
  for (const int32_t place : in_place_) channels = std::max(channels, int64_t{place} + 1);
  if (!fits(in, s_.height + 2 * s_.ph + s_.kh * s_.dh, s_.width + 2 * s_.pw + s_.kw * s_.dw, channels) ||
      !fits(out, s_.out_h, s_.out_w, s_.out_channels) || !fits(residual, s_.out_h, s_.out_w, s_.out_channels))
    return false;
  offsets_.clear();
  for (size_t b = 0; b < blocks_.size(); ++b) {
    LaneBlock& block = blocks_[b];
    if (b > 0 && groups_[b] == groups_[b - 1]) {
      block.offset_begin = blocks_[b - 1].offset_begin;
      continue;
    }
    block.offset_begin = static_cast<int64_t>(offsets_.size());
    if (groups_[b] < 0) continue;
    const Group group = plan.group(groups_[b]);
    for (int32_t c = 0; c < group.n_channels; ++c) {
      const int64_t at = in_place_[static_cast<size_t>(group.channels[c])] * in.channel;
      // Taps in the planar engine's order.
      for (int64_t kx = 0; kx < s_.kw; ++kx) {
        for (int64_t ky = 0; ky < s_.kh; ++ky)
          offsets_.push_back(static_cast<int32_t>(at + ky * s_.dh * in.row + kx * s_.dw * in.pixel));
      }
    }
  }
  return true;
}

void LaneConv::set_bias(const float* values) {
  std::fill(bias_.begin(), bias_.end(), 0.0f);
  if (values == nullptr) return;
  for (size_t b = 0; b < blocks_.size(); ++b) {
    for (int32_t i = 0; i < blocks_[b].filters; ++i)
      bias_[static_cast<size_t>(bias_begin_[b] + i)] =
          values[filters_[static_cast<size_t>(blocks_[b].filter_begin + i)]];
  }
}

void LaneConv::prepare(const Plan& plan, const float* packed, float* prepared) const {
  const LaneKernels& k = lane_kernels();
  std::fill(prepared, prepared + weight_floats_, 0.0f);
  const int64_t taps = s_.taps();
  for (size_t b = 0; b < blocks_.size(); ++b) {
    if (groups_[b] < 0) continue;
    const LaneBlock& block = blocks_[b];
    const Group group = plan.group(groups_[b]);
    const float* from = packed + group.weight_pairs * taps;
    const int32_t* rows = rows_.data() + block.filter_begin;
    float* to = prepared + block.weight_begin;
    for (int64_t c = 0; c < group.n_channels; ++c) {
      for (int64_t kx = 0; kx < s_.kw; ++kx) {
        for (int64_t ky = 0; ky < s_.kh; ++ky, to += block.vectors * k.lanes) {
          const float* tap = from + c * taps + ky * s_.kw + kx;
          for (int32_t f = 0; f < block.filters; ++f) to[f] = tap[rows[f] * group.n_channels * taps];
        }
      }
    }
  }
}

int64_t LaneConv::chunk_pixels() const {
  const int64_t bytes =
      std::max<int64_t>(input_channels_, 1) * 4 * std::min(s_.sh, s_.kh) * std::min(s_.sw, s_.kw);
  const int64_t most = std::clamp(kChunkBytes / bytes, kLeastChunk, kMostChunk);
  const int64_t chunks = (s_.out_plane() + most - 1) / most;
  return round_up((s_.out_plane() + chunks - 1) / chunks, kChunkUnit);
}

int64_t LaneConv::scratch_bytes() const {
  const LaneKernels& k = lane_kernels();
  return kMostChunk * (k.max_vectors * k.lanes + 3) * 4 + 4 * 64;
}

int64_t LaneConv::table_bytes() const {
  return static_cast<int64_t>(blocks_.size() * (sizeof(LaneBlock) + 12) +
                              (filters_.size() + rows_.size() + offsets_.size() + in_place_.size()) * 4 +
                              pieces_.size() * sizeof(LanePiece) + bias_.size() * 4);
}

int64_t LaneConv::lane_products() const { return weight_floats_ * s_.out_plane(); }

size_t LaneConv::block_share(int64_t part, int64_t parts) const {
  if (part >= parts) return blocks_.size();
  const LaneBlock& last = blocks_.back();
  const int64_t all = last.cost + (last.steps + 8) * last.vectors;
  const int64_t wanted = all / parts * part + all % parts * part / parts;
  const auto found = std::lower_bound(blocks_.begin(), blocks_.end(), wanted,
                                      [](const LaneBlock& b, int64_t cost) { return b.cost < cost; });
  return static_cast<size_t>(found - blocks_.begin());
}

void LaneConv::run_blocks(const float* in, const float* weights, const float* residual, float* out,
                          const Activation& activation, bool settled, int64_t pixel, int64_t pixels,
                          size_t block_begin, size_t block_end) const {
  const LaneKernels& k = lane_kernels();
  Carver carve(task_scratch().reserve(static_cast<size_t>(scratch_bytes())));
  const size_t count = static_cast<size_t>(pixels);
  int32_t* in_at = carve.take<int32_t>(count);
  int32_t* out_at = carve.take<int32_t>(count);
  int32_t* residual_at = carve.take<int32_t>(count);
  float* partial = carve.take<float>(count * static_cast<size_t>(k.max_vectors * k.lanes));
  const auto place = [&](int32_t* to, const View& view, int64_t sh, int64_t sw, int64_t ph, int64_t pw) {
    int64_t y = pixel / s_.out_w;
    int64_t x = pixel % s_.out_w;
    for (int64_t i = 0; i < pixels; ++y, x = 0) {
      const int64_t end = std::min(pixels, i + s_.out_w - x);
      int64_t at = view.origin + (y * sh - ph) * view.row + (x * sw - pw) * view.pixel;
      for (; i < end; ++i, at += sw * view.pixel) to[i] = static_cast<int32_t>(at);
    }
  };
  place(in_at, in_, s_.sh, s_.sw, s_.ph, s_.pw);
  place(out_at, out_, 1, 1, 0, 0);
  if (residual != nullptr) place(residual_at, residual_, 1, 1, 0, 0);

  LaneArgs args{};
  args.in = in;
  args.in_at = in_at;
  args.out_at = out_at;
  args.residual_at = residual_at;
  args.partial = partial;
  args.activation = &activation;
  for (size_t b = block_begin; b < block_end; ++b) {
    const LaneBlock& block = blocks_[b];
    const int64_t width = int64_t{block.vectors} * k.lanes;
    args.bias = bias_.data() + bias_begin_[b];
    if (settled && block.steps == 0 &&
        std::all_of(args.bias, args.bias + width, [](float value) { return value == 0.0f; }))
      continue;
    args.tail = static_cast<int32_t>(block.filters - (block.vectors - 1) * k.lanes);
    args.pieces = block.pieces == 0 ? nullptr : pieces_.data() + block.piece_begin;
    const int64_t shift = block.pieces == 0 ? block.channel : 0;
    args.windows = block.windows ? block.pieces : 0;
    args.out = out + shift;
    args.residual = residual == nullptr ? nullptr : residual + shift;
    const int64_t most = k.max_pixels[block.vectors];
    const int64_t tiles = (pixels + most - 1) / most;
    const int64_t large = pixels % tiles;
    const int64_t size = pixels / tiles;
    int64_t step = 0;
    do {
      args.steps = std::min(block.part, block.steps - step);
      args.first = step == 0;
      args.last = step + args.steps == block.steps;
      args.offsets = offsets_.data() + block.offset_begin + step;
      args.weights = weights + block.weight_begin + step * width;
      step += args.steps;
      // What is read next: the next part, or the next block's first. The first pixels alone find weights that
      // are not in the cache.
      const int64_t next = block.weight_begin + step * width;
      const int64_t end = pixel > 0 ? next : std::min(weight_floats_, next + kPartTerms * width);
      args.ahead = reinterpret_cast<const char*>(weights + next);
      args.ahead_end = reinterpret_cast<const char*>(weights + end);
      // The next pixels' are fetched two tiles before they are read, by the first block that does.
      args.in_ahead = pixel > 0 && b == block_begin && args.first
                          ? (s_.kh - 1) * s_.dh * in_.row + 2 * most * s_.sw * in_.pixel
                          : 0;
      if (large > 0) k.tiles[block.vectors - 1][size](args, 0, large);
      args.ahead += large * args.steps / 2 * 64;
      k.tiles[block.vectors - 1][size - 1](args, large * (size + 1), tiles - large);
    } while (step < block.steps);
  }
}

void LaneConv::run_pixels(const float* in, const float* weights, const float* residual, float* out,
                          const Activation& activation, bool settled, int64_t pixel, int64_t pixels) const {
  const int64_t chunk = chunk_pixels();
  for (const int64_t end = pixel + pixels; pixel < end; pixel += chunk)
    run_blocks(in, weights, residual, out, activation, settled, pixel, std::min(chunk, end - pixel), 0,
               blocks_.size());
}

void LaneConv::run(const float* in, const float* weights, const float* residual, float* out,
                   const Activation& activation, bool settled, int threads) const {
  const int64_t plane = s_.out_plane();
  if (blocks_.empty() || plane == 0) return;
  const int64_t n_blocks = static_cast<int64_t>(blocks_.size());
  int64_t chunk = chunk_pixels();
  const int64_t wanted = threads > 1 ? 3 * int64_t{threads} : 1;
  if (wanted > n_blocks) {
    const int64_t pieces = (wanted + n_blocks - 1) / n_blocks;
    chunk = std::min(chunk, round_up((plane + pieces - 1) / pieces, kChunkUnit));
  }
  const int64_t chunks = (plane + chunk - 1) / chunk;
  const int64_t parts = std::min(n_blocks, (wanted + chunks - 1) / chunks);
  auto body = [&](int64_t task) {
    const int64_t first = task / parts * chunk;
    run_blocks(in, weights, residual, out, activation, settled, first, std::min(chunk, plane - first),
               block_share(task % parts, parts), block_share(task % parts + 1, parts));
  };
  parallel_for(threads, chunks * parts, body);
}

}  // namespace dsp
