#include "assignment/cuda_table.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "assignment/cuda_cut.h"
#include "core/status.h"

namespace dsp {
namespace cuda {
namespace lasso {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // filters, channels, taps, tiles

// Elements of a tile: many tiles for a small network, few partial sums for a large one.
constexpr int64_t kLeastTile = 2048, kMostTile = 16384, kTiles = 2048;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
constexpr int64_t words_in() {
  return static_cast<int64_t>(sizeof(T) / sizeof(int64_t));
}

Layer shape_of(const int64_t* words, int64_t index) {
  Layer l{};
  l.filters = words[0];
  l.channels = words[1];
  l.taps = words[2];
  l.tap_major = words[3];
  const std::string name = "layer " + std::to_string(index);
  for (const int64_t value : {l.filters, l.channels, l.taps})
    if (value < 1 || value > kMost)
      fail(name + ": filters, channels and taps must lie between 1 and " + std::to_string(kMost) + ", got " +
           std::to_string(value));
  if (l.tap_major != 0 && l.tap_major != 1)
    fail(name + ": the memory order is " + std::to_string(l.tap_major) + ", expected 0 or 1");
  checked_mul(checked_mul(l.filters, l.channels, "a layer's size"), checked_mul(l.taps, 8, "a layer's size"),
              "a layer's size");
  return l;
}

void cut(Layer& l, int64_t element, int64_t target) {
  const int64_t bytes = element_bytes(element);
  l.width = 4;
  while (l.width < kThreads && l.width < l.channels) l.width *= 2;
  while (l.width > 1 && l.width * l.taps * bytes > kStage) l.width /= 2;
  const int64_t row = l.width * l.taps * bytes;
  const int64_t pairs = std::min<int64_t>(kPairs * (kThreads / l.width), kRows);
  l.batch = std::min(pairs, kStage / row);
  l.stored_batch = pairs;
  l.slot = divide_up(l.batch * row, 16) * 16;
  l.slots = 1;
  while (l.slots < kSlots && 2 * l.slots * l.slot <= kStage) l.slots *= 2;
  l.chunk = std::min(std::max<int64_t>(target / (l.width * l.taps), 1), l.filters);
  l.chunk = divide_up(l.chunk, l.batch) * l.batch;
  l.chunks = divide_up(l.filters, l.chunk);
  l.blocks = divide_up(l.channels, l.width);
  const int64_t vector = 16 / bytes;
  l.vectors = l.channels % vector == 0 && l.width % vector == 0 ? 1 : 0;
}

struct Cut {
  Header header;
  std::vector<Layer> layers;
};

Cut make(int64_t element, int64_t groups, const int64_t* shapes, int64_t shapes_numel, int64_t tile) {
  if (element < kFloat32 || element > kBfloat16)
    fail("element is " + std::to_string(element) + ", expected 0 to 3");
  if (groups < 1 || groups > kMostGroups)
    fail("groups is " + std::to_string(groups) + ", expected 1 to " + std::to_string(kMostGroups));
  require(shapes != nullptr && shapes_numel > 0 && shapes_numel % DSP_CUDA_LASSO_SHAPE == 0,
          "the shapes of the layers are missing or have a wrong length");
  Cut out{};
  Header& h = out.header;
  h.magic = kMagic;
  h.element = element;
  h.groups = groups;
  h.layers = shapes_numel / DSP_CUDA_LASSO_SHAPE;
  int64_t total = 0;
  for (int64_t i = 0; i < h.layers; ++i) {
    const Layer l = shape_of(shapes + i * DSP_CUDA_LASSO_SHAPE, i);
    if (l.taps * element_bytes(element) > kStage)
      fail("layer " + std::to_string(i) + ": " + std::to_string(l.taps) +
           " taps are too many for the CUDA kernels: at most " +
           std::to_string(kStage / element_bytes(element)));
    total = checked_add(total, l.filters * l.channels * l.taps, "all layers");
    out.layers.push_back(l);
  }
  const int64_t target = tile > 0 ? tile : std::min(kMostTile, std::max(kLeastTile, total / kTiles));
  for (Layer& l : out.layers) {
    cut(l, element, target);
    l.filter_at = h.filters;
    l.channel_at = h.pitch;
    l.columns_at = h.columns;
    l.rows_at = h.rows;
    l.squares_at = h.squares;
    h.filters = checked_add(h.filters, l.filters, "filters");
    h.pitch = checked_add(h.pitch, l.channels, "channels");
    const auto sums = [&](int64_t parts, int64_t each) {
      return checked_mul(checked_mul(parts, each, "partial sums"), groups, "partial sums");
    };
    h.columns = checked_add(h.columns, sums(l.chunks, l.channels), "partial sums");
    h.rows = checked_add(h.rows, sums(l.blocks, l.filters), "partial sums");
    if (l.taps > 1) h.squares = checked_add(h.squares, l.filters * l.channels, "sums over taps");
    h.tiles = checked_add(h.tiles, checked_mul(l.chunks, l.blocks, "tiles"), "tiles");
    h.row_tiles = checked_add(h.row_tiles, divide_up(l.filters, kThreads), "tiles");
    h.stage = std::max(h.stage, l.slots * l.slot);
  }
  if (h.tiles > kMost || h.row_tiles > kMost || h.layers > kMost)
    fail("the network is too large for the CUDA kernels: " + std::to_string(h.tiles) + " tiles");
  // The teams' sums meet there too.
  h.stage = std::max<int64_t>(h.stage, kGroups * kThreads * sum_bytes(element));
  h.layers_at = words_in<Header>();
  h.tiles_at = h.layers_at + h.layers * words_in<Layer>();
  h.row_tiles_at = h.tiles_at + h.tiles * words_in<Tile>();
  h.words = h.row_tiles_at + h.row_tiles * words_in<RowTile>();
  return out;
}

template <typename T>
int64_t* put(int64_t* to, const T& value) {
  std::memcpy(to, &value, sizeof(T));
  return to + words_in<T>();
}

void write(const Cut& cut, int64_t* words) {
  int64_t* at = put(words, cut.header);
  for (const Layer& l : cut.layers) at = put(at, l);
  for (int64_t i = 0; i < cut.header.layers; ++i) {
    const Layer& l = cut.layers[static_cast<size_t>(i)];
    for (int64_t chunk = 0; chunk < l.chunks; ++chunk)
      for (int64_t block = 0; block < l.blocks; ++block)
        at = put(at, Tile{i, chunk * l.chunk, block * l.width, chunk, block});
  }
  for (int64_t i = 0; i < cut.header.layers; ++i)
    for (int64_t filter = 0; filter < cut.layers[static_cast<size_t>(i)].filters; filter += kThreads)
      at = put(at, RowTile{i, filter});
}

}  // namespace

std::vector<int64_t> make_table(int64_t element, int64_t groups, const int64_t* shapes, int64_t shapes_numel,
                                int64_t tile) {
  const Cut cut = make(element, groups, shapes, shapes_numel, tile);
  std::vector<int64_t> words(static_cast<size_t>(cut.header.words));
  write(cut, words.data());
  return words;
}

const Header& read_table(const int64_t* words, int64_t numel) {
  constexpr const char* kWrong = "table is not one of dsp_cuda_lasso_table";
  require(words != nullptr && numel > words_in<Header>(), kWrong);
  const Header& h = *reinterpret_cast<const Header*>(words);
  require(h.magic == kMagic && h.words == numel && h.layers >= 1 && h.layers <= numel, kWrong);
  require(h.layers_at == words_in<Header>() && h.tiles_at == h.layers_at + h.layers * words_in<Layer>(),
          kWrong);
  return h;
}

Workspace workspace_of(const Header& h, int32_t operation, bool directed) {
  Workspace w{};
  const auto take = [&](bool wanted, int64_t count) {
    if (!wanted) return int64_t{-1};
    const int64_t at = w.size;
    // Each begins at 16 bytes.
    w.size = checked_add(w.size, divide_up(count, 4) * 4, "the work space");
    return at;
  };
  const bool step = operation == DSP_LASSO_STEP_GRADIENT;
  const bool gradient = step || operation == DSP_LASSO_BACKWARD;
  const int64_t matrix = checked_mul(h.groups, h.pitch, "the work space");
  w.columns = take(true, h.columns);
  w.ratios = take(true, matrix);
  w.scalars = take(true, h.layers * h.groups);
  w.penalties = take(!step, h.layers * h.groups);
  w.rows = take(gradient, h.rows);
  w.moved = take(step, matrix);
  w.inverses = take(step && directed, matrix);
  w.changes = take(step && directed, matrix);
  w.squares = take(step, h.squares);
  w.products = take(step && directed, h.squares);
  return w;
}

}  // namespace lasso
}  // namespace cuda
}  // namespace dsp

extern "C" {

dsp_status dsp_cuda_lasso_table(int32_t element, int64_t groups, const int64_t* shapes, int64_t shapes_numel,
                                int64_t* words, int64_t words_numel, int64_t* needed) {
  using namespace dsp::cuda::lasso;
  return dsp::guard([&] {
    const auto cut = make(element, groups, shapes, shapes_numel, 0);
    if (needed != nullptr) *needed = cut.header.words;
    if (words == nullptr) return;
    if (words_numel != cut.header.words)
      dsp::fail("words has " + std::to_string(words_numel) + " values, expected " +
                std::to_string(cut.header.words));
    write(cut, words);
  });
}

dsp_status dsp_cuda_lasso_sizes(const int64_t* table, int64_t table_numel, int32_t operation,
                                int32_t directed, dsp_cuda_lasso_layout* sizes) {
  using namespace dsp::cuda::lasso;
  return dsp::guard([&] {
    dsp::require(sizes != nullptr, "sizes is null");
    const Header& h = read_table(table, table_numel);
    const Workspace w = workspace_of(h, operation, directed != 0);
    *sizes = {h.filters, w.size, h.tiles, h.stage};
  });
}
}
