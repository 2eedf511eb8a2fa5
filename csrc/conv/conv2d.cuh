// The kernels of the permuted grouped convolution on a GPU, channels last. conv/cuda_table.h says how the
// work is cut; a kernel reads all of it from the table, so that one instance a precision serves every shape.
#pragma once

#include "conv/cuda_table.h"
#include "cuda/device.h"

namespace dsp {
namespace cuda {

struct ConvArguments {
  const int32_t* table;
  const void* x;         // the gradient of the output, where the input's gradient is made
  const void* grad;      // for the gradient of the weight
  const void* weight;    // laid out, but for the kernel that lays it out
  const void* bias;      // or null
  const void* residual;  // or null
  void* out;
  float* workspace;
  int32_t activation;
  int32_t wide;  // 1: out and residual start at multiples of 16 bytes
};

DSP_DEVICE const TableHeader& header_of(const ConvArguments& a) {
  return *reinterpret_cast<const TableHeader*>(a.table);
}
template <typename T>
DSP_DEVICE const T& entry(const ConvArguments& a, int32_t at, int64_t index) {
  return reinterpret_cast<const T*>(a.table + at)[index];
}
DSP_DEVICE int64_t joined(const int32_t (&words)[2]) {
  return static_cast<int64_t>(static_cast<uint32_t>(words[0])) | static_cast<int64_t>(words[1]) << 32;
}
DSP_DEVICE int quotient(int value, int32_t magic) {
  return static_cast<int>((static_cast<uint32_t>(value) * static_cast<uint32_t>(magic)) >> 22);
}

// Where 16 bytes lie in a tile of rows of 64 bytes. Eight rows that follow one another, read at the same
// unit, touch all 32 banks once.
DSP_DEVICE uint32_t place(int row, int unit) {
  return static_cast<uint32_t>(row * kRowBytes + ((unit ^ (row >> 1 & 3)) << 4));
}
template <typename T>
DSP_DEVICE uint32_t element_place(int row, int column) {
  constexpr int kUnit = 16 / static_cast<int>(sizeof(T));
  return place(row, column / kUnit) +
         static_cast<uint32_t>(column % kUnit) * static_cast<uint32_t>(sizeof(T));
}

// Where the pixels of a block start on the grid of its class.
struct Box {
  int n, y, x;
};

DSP_DEVICE Box box_of(const TableClass& c, int tile) {
  const int row = tile / c.tiles_w;
  const int image = row / c.tiles_h;
  return {image * c.tile_n, (row - image * c.tiles_h) * c.tile_h, (tile - row * c.tiles_w) * c.tile_w};
}

// The box of the next tile.
DSP_DEVICE void next_box(const TableClass& c, Box& box) {
  box.x += c.tile_w;
  if (box.x < c.grid_w) return;
  box.x = 0;
  box.y += c.tile_h;
  if (box.y < c.grid_h) return;
  box.y = 0;
  box.n += c.tile_n;
}

struct Pixel {
  int n, y, x;  // in the box
};

DSP_DEVICE Pixel pixel_of(const TableClass& c, int index) {
  const int row = quotient(index, c.tile_w_magic);
  const int image = quotient(row, c.tile_h_magic);
  return {image, row - image * c.tile_h, index - row * c.tile_w};
}

DSP_DEVICE bool in_grid(const TableClass& c, const Box& box, const Pixel& p) {
  return p.n < c.tile_n && box.n + p.n < c.batch && box.y + p.y < c.grid_h && box.x + p.x < c.grid_w;
}

// The pixel's place in the tensor that is written.
DSP_DEVICE int64_t out_pixel(const TableClass& c, const Box& box, const Pixel& p) {
  const int y = (box.y + p.y) * c.out_step_h + c.out_offset_h;
  const int x = (box.x + p.x) * c.out_step_w + c.out_offset_w;
  return (static_cast<int64_t>(box.n + p.n) * c.out_h + y) * c.out_w + x;
}

// The halo row of tap (0, 0) of an output pixel.
DSP_DEVICE int halo_row(const TableClass& c, const Pixel& p) {
  return (p.n * c.halo_h + p.y * c.row_step_h) * c.halo_w + p.x * c.row_step_w;
}

// The input pixel of a halo row, or -1 outside the image. tap_h and tap_w: the first tap of the phase.
DSP_DEVICE int64_t halo_pixel(const TableClass& c, const Box& box, int tap_h, int tap_w, int row) {
  const int line = quotient(row, c.halo_w_magic);
  const int image = quotient(line, c.halo_h_magic);
  const int n = box.n + image;
  const int y =
      box.y * c.in_step_h + c.in_offset_h + tap_h * c.tap_step_h + (line - image * c.halo_h) * c.halo_step_h;
  const int x =
      box.x * c.in_step_w + c.in_offset_w + tap_w * c.tap_step_w + (row - line * c.halo_w) * c.halo_step_w;
  if (n >= c.batch || y < 0 || y >= c.in_h || x < 0 || x >= c.in_w) return -1;
  return (static_cast<int64_t>(n) * c.in_h + y) * c.in_w + x;
}

DSP_DEVICE uint32_t raw(uint16_t value) { return value; }
DSP_DEVICE uint32_t raw(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Brings `rows` pixels' channels of one chunk to shared memory: by asynchronous copies of 16 bytes, or one
// channel after the other. find(row) is the pixel, or -1 for zeros.
template <typename Store, typename Find>
DSP_DEVICE void fill_rows(const Store* tensor, int32_t channels, const TableChunk& chunk, int rows,
                          uint32_t to, Find find) {
  using namespace device;
  const int units = chunk.steps * 2;
  if (chunk.gather == 0) {
    const int unit = thread() % kUnits;
    if (unit >= units) return;
    const int32_t first = chunk.unit[unit];
    for (int row = thread() / kUnits; row < rows; row += kThreads / kUnits) {
      const int64_t pixel = find(row);
      const bool valid = first >= 0 && pixel >= 0;
      copy_async16(to + place(row, unit), valid ? tensor + pixel * channels + first : tensor, valid);
    }
    return;
  }
  constexpr int kWords = kRowBytes / 4;
  constexpr int kEach = 4 / static_cast<int>(sizeof(Store));
  const int word = thread() % kWords;
  if (word / 4 >= units) return;
  int32_t channel[kEach];
  for (int i = 0; i < kEach; ++i) channel[i] = chunk.channel[word * kEach + i];
  const uint32_t column = static_cast<uint32_t>(word % 4) * 4;
  DSP_UNROLL_2
  for (int row = thread() / kWords; row < rows; row += kThreads / kWords) {
    const int64_t pixel = find(row);
    uint32_t bits = 0;
    for (int i = 0; i < kEach; ++i) {
      if (pixel >= 0 && channel[i] >= 0)
        bits |= raw(load_global(tensor + pixel * channels + channel[i])) << 16 * i;
    }
    store_shared(to + place(row, word / 4) + column, bits);
  }
}

// 1 bits where a register of the left operand holds a channel that the group reads. A channel that is not
// read must not meet its zero weight: it may be infinite.
template <typename Store>
DSP_DEVICE uint32_t read_mask(uint32_t used, int unit) {
  const int quad = device::lane() % 4;
  if constexpr (sizeof(Store) == 2) {
    const uint32_t two = used >> (unit * 8 + quad * 2);
    return ((two & 1) != 0 ? 0xffffu : 0u) | ((two & 2) != 0 ? 0xffff0000u : 0u);
  } else {
    return (used >> (unit * 4 + quad) & 1) != 0 ? 0xffffffffu : 0u;
  }
}

constexpr int kWarpBlocks = 2;  // of 16 pixels, for each warp

struct Sums {
  float at[kWarpBlocks][kMaxOctets][4];
};

DSP_DEVICE void clear(Sums& sums) {
  DSP_UNROLL
  for (int i = 0; i < kWarpBlocks; ++i) {
    DSP_UNROLL
    for (int octet = 0; octet < kMaxOctets; ++octet) {
      for (int k = 0; k < 4; ++k) sums.at[i][octet][k] = 0.0f;
    }
  }
}

// The products of one tap and one chunk, by matrix instructions. rows: the halo rows that this lane's address
// is for.
template <typename E>
DSP_DEVICE void multiply_tap(Sums& sums, const TableChunk& chunk, const int (&rows)[kWarpBlocks], int shift,
                             uint32_t halo, uint32_t weights, int octets) {
  using namespace device;
  const uint32_t used = static_cast<uint32_t>(chunk.used);
  const bool masked = chunk.full == 0;
  for (int step = 0; step < chunk.steps; ++step) {
    uint32_t a[kWarpBlocks][4];
    for (int i = 0; i < kWarpBlocks; ++i) {
      load_matrix<4, false>(a[i], halo + place(rows[i] + shift, step * 2 + (lane() >> 4)));
    }
    if (masked) {
      for (int half = 0; half < 2; ++half) {
        const uint32_t mask = read_mask<typename E::Store>(used, step * 2 + half);
        for (int i = 0; i < kWarpBlocks; ++i) {
          a[i][half * 2] &= mask;
          a[i][half * 2 + 1] &= mask;
        }
      }
    }
    const int unit = step * 2 + (lane() >> 3 & 1);
    const int row = (lane() >> 4) * 8 + lane() % 8;
    DSP_UNROLL
    for (int pair = 0; pair < kMaxOctets / 2; ++pair) {
      if (pair * 2 + 1 < octets) {
        uint32_t b[4];
        load_matrix<4, false>(b, weights + place(pair * 16 + row, unit));
        const uint32_t left[2] = {b[0], b[1]};
        const uint32_t right[2] = {b[2], b[3]};
        for (int i = 0; i < kWarpBlocks; ++i) {
          E::multiply(sums.at[i][pair * 2], a[i], left);
          E::multiply(sums.at[i][pair * 2 + 1], a[i], right);
        }
      } else if (pair * 2 < octets) {
        uint32_t b[2];
        load_matrix<2, false>(b, weights + place(pair * 16 + lane() % 8, unit));
        for (int i = 0; i < kWarpBlocks; ++i) E::multiply(sums.at[i][pair * 2], a[i], b);
      }
    }
  }
}

struct Four {
  alignas(16) float v[4];
};

// The same by multiply-adds; rows: the halo rows of the pixels whose sums this lane holds.
DSP_DEVICE void add_tap(Sums& sums, const TableChunk& chunk, const int (&rows)[kWarpBlocks][2], int shift,
                        uint32_t halo, uint32_t weights, int octets) {
  using namespace device;
  const uint32_t used = static_cast<uint32_t>(chunk.used);
  for (int unit = 0; unit < chunk.steps * 2; ++unit) {
    Four a[kWarpBlocks][2];
    for (int i = 0; i < kWarpBlocks; ++i) {
      for (int half = 0; half < 2; ++half) {
        a[i][half] = load_shared<Four>(halo + place(rows[i][half] + shift, unit));
        if (chunk.full == 0) {
          for (int k = 0; k < 4; ++k)
            if ((used >> (unit * 4 + k) & 1) == 0) a[i][half].v[k] = 0.0f;
        }
      }
    }
    DSP_UNROLL
    for (int octet = 0; octet < kMaxOctets; ++octet) {
      if (octet >= octets) continue;
      for (int column = 0; column < 2; ++column) {
        const Four b = load_shared<Four>(weights + place(octet * 8 + lane() % 4 * 2 + column, unit));
        for (int i = 0; i < kWarpBlocks; ++i) {
          for (int half = 0; half < 2; ++half) {
            float& sum = sums.at[i][octet][half * 2 + column];
            for (int k = 0; k < 4; ++k) sum += a[i][half].v[k] * b.v[k];
          }
        }
      }
    }
  }
}

// What a block works on.
struct Work {
  const TableClass* c;
  const TableItem* item;
  Box box;
};

DSP_DEVICE Work work_of(const ConvArguments& a) {
  const TableHeader& header = header_of(a);
  const auto block = static_cast<int32_t>(device::block_x());
  int32_t index = 0;
  while (index + 1 < header.n_classes &&
         entry<TableClass>(a, header.classes_at, index + 1).first_block <= block)
    ++index;
  const TableClass& c = entry<TableClass>(a, header.classes_at, index);
  // Blocks of the same pixels follow one another: they find them in the second-level cache.
  const int32_t tile = (block - c.first_block) / c.n_items;
  const int32_t item = block - c.first_block - tile * c.n_items;
  return {&c, &entry<TableItem>(a, header.items_at, int64_t{c.items_at} + item), box_of(c, tile)};
}

DSP_DEVICE float activate(float value, int32_t activation) {
  // Comparisons that are false for NaN let it through.
  if (activation != 0 && value < 0.0f) value = 0.0f;
  if (activation == 2 && value > 6.0f) value = 6.0f;
  return value;
}

// Where four sums of a pixel lie in shared memory, of the kStaged that are there at a time. What a quarter of
// a warp reads, and what half of one writes, touches all 32 banks once.
DSP_DEVICE uint32_t staged_place(int pixel, int four) {
  const int turn = (pixel << 1 & 6) | (pixel >> 2 & 1);
  return static_cast<uint32_t>((pixel * kStaged + ((four ^ turn) << 2)) * 4);
}

struct Two {
  alignas(8) float v[2];
};

// What is written, or read, 16 bytes at a time.
template <typename Store>
struct Unit {
  static constexpr int kLength = 16 / static_cast<int>(sizeof(Store));
  alignas(16) Store v[kLength];
};

// Puts the sums of up to four octets to shared memory, with their bias: rows of pixels, whole units of
// filters.
template <typename E>
DSP_DEVICE void stage_sums(const ConvArguments& a, const Work& work, const Sums& sums, int first) {
  using namespace device;
  const int32_t* filters = a.table + work.item->filters_at;
  const auto* bias = static_cast<const typename E::Store*>(a.bias);
  DSP_UNROLL
  for (int k = 0; k < kStaged / 8; ++k) {
    const int octet = first + k;
    if (octet >= work.item->octets) continue;
    float added[2] = {0.0f, 0.0f};
    if (bias != nullptr) {
      for (int column = 0; column < 2; ++column) {
        const int32_t filter = load_global(filters + octet * 8 + lane() % 4 * 2 + column);
        if (filter >= 0) added[column] = E::load(load_global(bias + filter));
      }
    }
    DSP_UNROLL
    for (int i = 0; i < kWarpBlocks; ++i) {
      DSP_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int pixel = warp() * 32 + i * 16 + half * 8 + lane() / 4;
        const float* from = sums.at[i][octet] + half * 2;
        store_shared(staged_place(pixel, k * 2 + lane() % 4 / 2) + static_cast<uint32_t>(lane() % 2 * 8),
                     Two{{from[0] + added[0], from[1] + added[1]}});
      }
    }
  }
}

// Adds bias and residual, applies the activation, and stores each filter to its channel: by way of shared
// memory, in units of 16 bytes where the table has whole ones. A warp keeps to its own 32 pixels there.
template <typename E>
DSP_DEVICE void finish(const ConvArguments& a, const Work& work, const Sums& sums) {
  using namespace device;
  using Store = typename E::Store;
  constexpr int kLength = Unit<Store>::kLength;
  constexpr int kEach = kStaged / kLength;  // units of a pixel that are there at a time
  const TableClass& c = *work.c;
  const int64_t channels = header_of(a).out_channels;
  const int32_t* filters = a.table + work.item->filters_at;
  const int32_t* units = a.table + work.item->units_at;
  const int count = work.item->octets * 8 / kLength;
  const auto* residual = static_cast<const Store*>(a.residual);
  auto* out = static_cast<Store*>(a.out);
  int64_t pixels[4];
  for (int i = 0; i < 4; ++i) {
    const Pixel p = pixel_of(c, warp() * 32 + i * 8 + lane() % 8);
    pixels[i] = in_grid(c, work.box, p) ? out_pixel(c, work.box, p) * channels : -1;
  }
  barrier();  // nobody reads the halo and the weights any more
  DSP_UNROLL
  for (int first = 0; first < kMaxOctets; first += kStaged / 8) {
    if (first >= work.item->octets) continue;
    stage_sums<E>(a, work, sums, first);
    sync_warp();
    DSP_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int column = i / 4 * 4 + lane() / 8;  // the unit, of those that are there
      const int index = first * 8 / kLength + column;
      if (index >= count || pixels[i % 4] < 0) continue;
      const int pixel = warp() * 32 + i % 4 * 8 + lane() % 8;
      Four values[kLength / 4];
      for (int k = 0; k < kLength / 4; ++k)
        values[k] = load_shared<Four>(staged_place(pixel, column * (kLength / 4) + k));
      // The residual, which may be the output, goes not by way of the read-only cache.
      const int32_t channel = a.wide != 0 ? load_global(units + index) : -1;
      if (channel >= 0) {
        const int64_t at = pixels[i % 4] + channel;
        Unit<Store> result;
        if (residual != nullptr) result = load_written(reinterpret_cast<const Unit<Store>*>(residual + at));
        for (int k = 0; k < kLength; ++k) {
          float value = values[k / 4].v[k % 4];
          if (residual != nullptr) value += E::load(result.v[k]);
          result.v[k] = E::store(activate(value, a.activation));
        }
        store_global(reinterpret_cast<Unit<Store>*>(out + at), result);
      } else {
        for (int k = 0; k < kLength; ++k) {
          const int32_t filter = load_global(filters + index * kLength + k);
          if (filter < 0) continue;
          const int64_t at = pixels[i % 4] + filter;
          float value = values[k / 4].v[k % 4];
          if (residual != nullptr) value += E::load(load_written(residual + at));
          store_global(out + at, E::store(activate(value, a.activation)));
        }
      }
    }
    sync_warp();
  }
}

DSP_DEVICE int64_t sums_place(const TableHeader& header, int split, int i, int octet, int index) {
  const int64_t each = int64_t{header.octets} * 8;
  const int64_t block = static_cast<int64_t>(split) * header.blocks + device::block_x();
  return (block * each + (i * header.octets + octet) * 4 + index) * kThreads + device::thread();
}

// A step of the sum: a tap of a phase. Counts up instead of dividing.
struct Step {
  int chunk;         // of the phase
  int tap_h, tap_w;  // the phase's first tap
  int y, x;          // the tap in the phase
  int stage;         // where its weights are
  int buffer;        // where its halo is

  // The first step of a phase.
  static DSP_DEVICE Step at(const TableClass& c, int chunks, int phase) {
    const int group = phase / chunks;
    const int across = c.taps_w / c.phase_w;
    const int row = group / across;
    return {phase - group * chunks, row * c.phase_h, (group - row * across) * c.phase_w, 0, 0, 0, 0};
  }
  DSP_DEVICE void advance(const TableClass& c, int chunks, int buffers) {
    stage = stage + 1 == kStages ? 0 : stage + 1;
    if (++x < c.phase_w) return;
    x = 0;
    if (++y < c.phase_h) return;
    y = 0;
    buffer = buffer + 1 == buffers ? 0 : buffer + 1;
    if (++chunk < chunks) return;
    chunk = 0;
    tap_w += c.phase_w;
    if (tap_w < c.taps_w) return;
    tap_w = 0;
    tap_h += c.phase_h;
  }
};

// Forward, and the gradient of the input: 128 pixels of up to 64 filters. With several splits each block sums
// some of the phases and leaves its sums in the workspace.
template <typename E>
DSP_KERNEL(kThreads, 3)
conv2d_kernel(ConvArguments a) {
  using namespace device;
  using Store = typename E::Store;
  const TableHeader& header = header_of(a);
  const Work work = work_of(a);
  const TableClass& c = *work.c;
  const TableItem& item = *work.item;
  const auto* x = static_cast<const Store*>(a.x);
  const int octets = item.octets;
  const int chunks = item.n_chunks;
  const int taps = c.phase_h * c.phase_w;
  const int phases = chunks * (c.taps_h / c.phase_h) * (c.taps_w / c.phase_w);
  const int split = block_y();
  const int splits = blocks_y();
  const int first_phase = static_cast<int>(static_cast<int64_t>(phases) * split / splits);
  const int last_phase = static_cast<int>(static_cast<int64_t>(phases) * (split + 1) / splits);
  const int steps = (last_phase - first_phase) * taps;
  const int halo_rows = c.tile_n * c.halo_h * c.halo_w;
  const int buffers = taps == 1 ? kStages : 2;
  const uint32_t weight_bytes = static_cast<uint32_t>(header.octets * 8 * kRowBytes);
  const uint32_t halo_bytes = static_cast<uint32_t>(halo_rows * kRowBytes);
  const auto weights_of = [&](const Step& at) { return static_cast<uint32_t>(at.stage) * weight_bytes; };
  const auto halo_of = [&](const Step& at) {
    return kStages * weight_bytes + static_cast<uint32_t>(at.buffer) * halo_bytes;
  };
  const auto chunk_of = [&](const Step& at) -> const TableChunk& {
    return entry<TableChunk>(a, item.chunks_at, at.chunk);
  };
  const char* laid_out =
      static_cast<const char*>(a.weight) +
      (joined(item.weights) + static_cast<int64_t>(first_phase) * taps * octets * 8) * kRowBytes;

  // Starts the copies of a step: its weights, and with the first tap of a phase the halo.
  const auto prefetch = [&](const Step& at) {
    const TableChunk& chunk = chunk_of(at);
    const int unit = thread() % kUnits;
    if (unit < chunk.steps * 2) {
      const char* from = laid_out + unit * 16;
      const uint32_t to = weights_of(at);
      for (int row = thread() / kUnits; row < octets * 8; row += kThreads / kUnits)
        copy_async16(to + place(row, unit), from + row * kRowBytes, true);
    }
    if (at.y == 0 && at.x == 0)
      fill_rows(x, header.in_channels, chunk, halo_rows, halo_of(at),
                [&](int row) { return halo_pixel(c, work.box, at.tap_h, at.tap_w, row); });
  };

  Sums sums;
  clear(sums);

  // Pixels beyond the box read rows of its halo, which keep to their own banks where any row has all its
  // taps; their sums are not stored.
  const int pixels = c.tile_n * c.tile_h * c.tile_w;
  const bool spare = taps == 1 && halo_rows >= 8;
  const auto row_of = [&](int index) {
    return index < pixels ? halo_row(c, pixel_of(c, index)) : spare ? index % 8 : 0;
  };
  int rows[kWarpBlocks];
  int sum_rows[kWarpBlocks][2];
  for (int i = 0; i < kWarpBlocks; ++i) {
    if constexpr (E::kMatrix) {
      rows[i] = row_of(warp() * 32 + i * 16 + lane() % 16);
    } else {
      for (int half = 0; half < 2; ++half)
        sum_rows[i][half] = row_of(warp() * 32 + i * 16 + half * 8 + lane() / 4);
    }
  }

  // The copies run kStages - 1 steps ahead of the products; one loop for both, so that the code is there
  // once.
  Step now{};
  Step ahead{};
  if (steps > 0) now = ahead = Step::at(c, chunks, first_phase);
  DSP_UNROLL_1
  for (int step = 1 - kStages; step < steps; ++step) {
    if (step >= 0) {
      wait_copies<kStages - 2>();
      // All have the copies of this step, and nobody reads the buffers of the one before.
      barrier();
    }
    if (step + kStages - 1 < steps) {
      prefetch(ahead);
      ahead.advance(c, chunks, buffers);
      laid_out += octets * 8 * kRowBytes;
    }
    commit_copies();
    if (step < 0) continue;
    sync_warp();  // its lanes copied different rows
    const int shift = now.y * c.row_tap_h * c.halo_w + now.x * c.row_tap_w;
    if constexpr (E::kMatrix) {
      multiply_tap<E>(sums, chunk_of(now), rows, shift, halo_of(now), weights_of(now), octets);
    } else {
      add_tap(sums, chunk_of(now), sum_rows, shift, halo_of(now), weights_of(now), octets);
    }
    now.advance(c, chunks, buffers);
  }
  wait_copies<0>();

  if (splits == 1) {
    finish<E>(a, work, sums);
    return;
  }
  DSP_UNROLL
  for (int i = 0; i < kWarpBlocks; ++i) {
    DSP_UNROLL
    for (int octet = 0; octet < kMaxOctets; ++octet) {
      if (octet >= octets) continue;
      for (int k = 0; k < 4; ++k)
        store_global(a.workspace + sums_place(header, split, i, octet, k), sums.at[i][octet][k]);
    }
  }
}

// Adds the splits' sums in their order.
template <typename E>
DSP_KERNEL(kThreads, 3)
conv2d_finish_kernel(ConvArguments a) {
  using device::load_written;
  const TableHeader& header = header_of(a);
  const Work work = work_of(a);
  Sums sums;
  clear(sums);
  DSP_UNROLL_1
  for (int split = 0; split < header.splits; ++split) {
    DSP_UNROLL
    for (int i = 0; i < kWarpBlocks; ++i) {
      DSP_UNROLL
      for (int octet = 0; octet < kMaxOctets; ++octet) {
        if (octet >= work.item->octets) continue;
        for (int k = 0; k < 4; ++k)
          sums.at[i][octet][k] += load_written(a.workspace + sums_place(header, split, i, octet, k));
      }
    }
  }
  finish<E>(a, work, sums);
}

// Lays packed weights out in rows of 64 bytes: for each item its steps, for each step its filters' columns.
// Only bits are moved: one instance for each size of element.
template <typename Store>
DSP_KERNEL(kThreads, 4)
conv2d_prepare_kernel(ConvArguments a) {
  using namespace device;
  constexpr int kEach = Unit<Store>::kLength;
  const TableHeader& header = header_of(a);
  const int64_t index = block_x();
  const TableItem& item = entry<TableItem>(a, header.items_at, index);
  int32_t of = 0;
  while (of + 1 < header.n_classes && entry<TableClass>(a, header.classes_at, of + 1).items_at <= index) ++of;
  const TableClass& c = entry<TableClass>(a, header.classes_at, of);
  const auto* weight = static_cast<const Store*>(a.weight);
  auto* to = static_cast<Unit<Store>*>(a.out) + joined(item.weights) * kUnits;
  const int filters = item.octets * 8;
  const int taps = c.phase_h * c.phase_w;
  const int groups_w = c.taps_w / c.phase_w;
  const int64_t rows = static_cast<int64_t>(item.n_chunks) * c.taps_h * c.taps_w * filters;
  const int unit = thread() % kUnits;
  // The kernel's width in taps: classes of the input's gradient have some of its taps.
  const int kernel_w = header.kernel_w;
  for (int64_t row = static_cast<int64_t>(block_y()) * (kThreads / kUnits) + thread() / kUnits; row < rows;
       row += static_cast<int64_t>(blocks_y()) * (kThreads / kUnits)) {
    const auto step = static_cast<int>(row / filters);
    const auto filter = static_cast<int>(row - static_cast<int64_t>(step) * filters);
    const int phase = step / taps;
    const int group = phase / item.n_chunks;
    const int chunk = phase - group * item.n_chunks;
    const int tap_h = group / groups_w * c.phase_h + (step - phase * taps) / c.phase_w;
    const int tap_w = group % groups_w * c.phase_w + (step - phase * taps) % c.phase_w;
    const int tap = (c.tap_first_h + tap_h * c.tap_next_h) * kernel_w + c.tap_first_w + tap_w * c.tap_next_w;
    const int32_t* pairs = a.table + item.pairs_at +
                           (static_cast<int64_t>(chunk) * filters + filter) * (kRowBytes / sizeof(Store)) +
                           unit * kEach;
    Unit<Store> values;
    for (int i = 0; i < kEach; ++i) {
      const int32_t pair = pairs[i];
      values.v[i] =
          pair < 0 ? Store{0} : load_global(weight + static_cast<int64_t>(pair) * header.taps + tap);
    }
    store_global(to + (row * kUnits + unit), values);
  }
}

// ---- the gradient of the weight ----

// A block sums, over its share of the pixels, a chunk of channels times a chunk of output channels for up to
// twelve taps; each warp has its taps, or with one or two taps its share of each box of pixels.
template <typename E>
struct WeightTile {
  static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(typename E::Store));
  static constexpr int kBlocks = kColumns / 16;  // of 16 channels
  static constexpr int kOctets = kColumns / 8;   // of 8 output channels
  static constexpr int kSlots = kMaxTaps / (kThreads / 32);
  float at[kSlots][kBlocks][kOctets][4];
};

template <typename E>
DSP_KERNEL(kThreads, 3)
conv2d_grad_weight_kernel(ConvArguments a) {
  using namespace device;
  using Store = typename E::Store;
  using Tile = WeightTile<E>;
  constexpr int kWarps = kThreads / 32;
  constexpr int kDepth = sizeof(Store) == 2 ? 16 : 8;  // pixels of a matrix instruction
  const TableHeader& header = header_of(a);
  const TableClass& c = entry<TableClass>(a, header.classes_at, 0);
  const TableItem& item = entry<TableItem>(a, header.items_at, block_x());
  const TableChunk& columns = entry<TableChunk>(a, item.chunks_at, 0);
  const TableChunk& filters = entry<TableChunk>(a, item.grad_chunk_at, 0);
  const auto* x = static_cast<const Store*>(a.x);
  const auto* grad = static_cast<const Store*>(a.grad);
  const int taps = item.taps_h * item.taps_w;
  const int shares = header.partials;
  const int share = warp() % shares;
  const int first_tap = warp() / shares;
  const int pixels = c.tile_n * c.tile_h * c.tile_w;
  const int halo_rows = c.tile_n * c.halo_h * c.halo_w;
  // One row more than the halo: zeros, for pixels beyond the image. 0 * NaN would be NaN.
  const uint32_t halo_bytes = static_cast<uint32_t>((halo_rows + 1) * kRowBytes);
  const uint32_t stage_bytes = halo_bytes + kTilePixels * kRowBytes;
  const int first_tile = static_cast<int>(static_cast<int64_t>(c.pixel_tiles) * block_y() / blocks_y());
  const int last_tile = static_cast<int>(static_cast<int64_t>(c.pixel_tiles) * (block_y() + 1) / blocks_y());

  if (thread() < kWeightStages * kUnits) {
    store_shared(static_cast<uint32_t>(thread() / kUnits) * stage_bytes + place(halo_rows, thread() % kUnits),
                 Four{{0.0f, 0.0f, 0.0f, 0.0f}});
  }
  // Of each of this warp's taps: how far its halo row is from that of the first.
  int shifts[Tile::kSlots];
  for (int slot = 0; slot < Tile::kSlots; ++slot) {
    const int tap = first_tap + slot * (kWarps / shares);
    const int down = tap / item.taps_w;
    shifts[slot] = down * c.row_tap_h * c.halo_w + (tap - down * item.taps_w) * c.row_tap_w;
  }
  const auto prefetch = [&](int tile, const Box& box) {
    if (tile < last_tile) {
      const uint32_t stage = static_cast<uint32_t>(tile % kWeightStages) * stage_bytes;
      fill_rows(x, header.in_channels, columns, halo_rows, stage,
                [&](int row) { return halo_pixel(c, box, item.tap_h, item.tap_w, row); });
      fill_rows(grad, header.out_channels, filters, kTilePixels, stage + halo_bytes, [&](int row) {
        const Pixel p = pixel_of(c, row);
        return in_grid(c, box, p) ? out_pixel(c, box, p) : int64_t{-1};
      });
    }
    commit_copies();
  };

  Tile sums;
  for (int slot = 0; slot < Tile::kSlots; ++slot)
    for (int i = 0; i < Tile::kBlocks; ++i)
      for (int octet = 0; octet < Tile::kOctets; ++octet)
        for (int k = 0; k < 4; ++k) sums.at[slot][i][octet][k] = 0.0f;

  Box ahead = box_of(c, first_tile);
  Box box = ahead;
  DSP_UNROLL_1
  for (int tile = first_tile - 1; tile < last_tile; ++tile) {
    prefetch(tile + 1, ahead);
    next_box(c, ahead);
    if (tile < first_tile) continue;
    wait_copies<1>();
    barrier();
    const uint32_t halo = static_cast<uint32_t>(tile % kWeightStages) * stage_bytes;
    const uint32_t out = halo + halo_bytes;
    const auto row_of = [&](int index) {
      const Pixel p = pixel_of(c, index);
      return in_grid(c, box, p) ? halo_row(c, p) : halo_rows;
    };
    const int range = kTilePixels / shares;
    for (int at = share * range; at < (share + 1) * range && at < pixels; at += kDepth) {
      if constexpr (sizeof(Store) == 2) {
        uint32_t b[Tile::kOctets / 2][4];
        for (int pair = 0; pair < Tile::kOctets / 2; ++pair) {
          if (pair < filters.steps)
            load_matrix<4, true>(
                b[pair], out + place(at + (lane() >> 3 & 1) * 8 + lane() % 8, pair * 2 + (lane() >> 4)));
        }
        const int row = row_of(at + (lane() >> 4) * 8 + lane() % 8);
        DSP_UNROLL
        for (int slot = 0; slot < Tile::kSlots; ++slot) {
          const int tap = first_tap + slot * (kWarps / shares);
          if (tap >= taps) continue;
          const int from = row == halo_rows ? row : row + shifts[slot];
          for (int i = 0; i < Tile::kBlocks; ++i) {
            if (i >= columns.steps) continue;
            uint32_t left[4];
            const uint32_t address = halo + place(from, i * 2 + (lane() >> 3 & 1));
            load_matrix<4, true>(left, address);
            for (int pair = 0; pair < Tile::kOctets / 2; ++pair) {
              if (pair >= filters.steps) continue;
              const uint32_t low[2] = {b[pair][0], b[pair][1]};
              const uint32_t high[2] = {b[pair][2], b[pair][3]};
              E::multiply(sums.at[slot][i][pair * 2], left, low);
              E::multiply(sums.at[slot][i][pair * 2 + 1], left, high);
            }
          }
        }
      } else if constexpr (E::kMatrix) {
        const int quad = lane() % 4;
        const int column = lane() / 4;
        uint32_t b[Tile::kOctets][2];
        for (int octet = 0; octet < Tile::kOctets; ++octet) {
          if (octet >= filters.steps) continue;
          for (int k = 0; k < 2; ++k)
            b[octet][k] =
                load_shared<uint32_t>(out + element_place<Store>(at + quad + k * 4, octet * 8 + column));
        }
        const int rows[2] = {row_of(at + quad), row_of(at + quad + 4)};
        DSP_UNROLL
        for (int slot = 0; slot < Tile::kSlots; ++slot) {
          const int tap = first_tap + slot * (kWarps / shares);
          if (tap >= taps) continue;
          uint32_t left[4];
          for (int k = 0; k < 4; ++k) {
            const int row = rows[k / 2] == halo_rows ? halo_rows : rows[k / 2] + shifts[slot];
            left[k] = k % 2 >= columns.steps
                          ? 0u
                          : load_shared<uint32_t>(halo + element_place<Store>(row, column + k % 2 * 8));
          }
          for (int octet = 0; octet < Tile::kOctets; ++octet)
            if (octet < filters.steps) E::multiply(sums.at[slot][0][octet], left, b[octet]);
        }
      } else {
        for (int k = 0; k < kDepth; ++k) {
          const int row = row_of(at + k);
          for (int slot = 0; slot < Tile::kSlots; ++slot) {
            const int tap = first_tap + slot * (kWarps / shares);
            if (tap >= taps) continue;
            const int from = row == halo_rows ? row : row + shifts[slot];
            for (int half = 0; half < 2; ++half) {
              if (half >= columns.steps) continue;
              const float left = load_shared<float>(halo + element_place<float>(from, half * 8 + lane() / 4));
              for (int octet = 0; octet < Tile::kOctets; ++octet) {
                if (octet >= filters.steps) continue;
                for (int i = 0; i < 2; ++i)
                  sums.at[slot][0][octet][half * 2 + i] +=
                      left *
                      load_shared<float>(out + element_place<float>(at + k, octet * 8 + lane() % 4 * 2 + i));
              }
            }
          }
        }
      }
    }
    next_box(c, box);
    barrier();
  }
  wait_copies<0>();

  // (slice, share, item, tap) x output channels x channels
  const int64_t part = static_cast<int64_t>(block_y()) * shares + share;
  for (int slot = 0; slot < Tile::kSlots; ++slot) {
    const int tap = first_tap + slot * (kWarps / shares);
    if (tap >= taps) continue;
    float* to =
        a.workspace + ((part * blocks_x() + block_x()) * taps + tap) * Tile::kColumns * Tile::kColumns;
    for (int i = 0; i < Tile::kBlocks; ++i)
      for (int octet = 0; octet < Tile::kOctets; ++octet)
        for (int k = 0; k < 4; ++k)
          store_global(
              to + ((octet * 8 + lane() % 4 * 2 + k % 2) * Tile::kColumns + i * 16 + k / 2 * 8 + lane() / 4),
              sums.at[slot][i][octet][k]);
  }
}

// Adds the shares in order and puts each weight in its place.
template <typename E>
DSP_KERNEL(kThreads, 4)
conv2d_add_weight_kernel(ConvArguments a) {
  using namespace device;
  using Store = typename E::Store;
  constexpr int kColumns = WeightTile<E>::kColumns;
  const TableHeader& header = header_of(a);
  const TableClass& c = entry<TableClass>(a, header.classes_at, 0);
  const TableItem& item = entry<TableItem>(a, header.items_at, block_x());
  const int taps = item.taps_h * item.taps_w;
  const int64_t parts = static_cast<int64_t>(header.splits) * header.partials;
  const int64_t each = static_cast<int64_t>(blocks_x()) * taps * kColumns * kColumns;
  for (int at = block_y() * kThreads + thread(); at < taps * kColumns * kColumns;
       at += blocks_y() * kThreads) {
    const int tap = at / (kColumns * kColumns);
    const int32_t pair = a.table[item.pairs_at + at % (kColumns * kColumns)];
    if (pair < 0) continue;
    const float* from = a.workspace + (block_x() * taps * kColumns * kColumns + at);
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += load_written(from + part * each);
    const int kernel_tap = (item.tap_h + tap / item.taps_w) * c.taps_w + item.tap_w + tap % item.taps_w;
    store_global(static_cast<Store*>(a.out) + (static_cast<int64_t>(pair) * header.taps + kernel_tap),
                 E::store(sum));
  }
}

}  // namespace cuda
}  // namespace dsp
