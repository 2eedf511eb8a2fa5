#include "program/steps/conv.h"

#include <algorithm>

#include "core/scratch.h"
#include "core/status.h"
#include "core/thread_pool.h"

namespace dsp {
namespace {

constexpr int64_t kChunkBytes = 24 * 1024;

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_CONV>& fields) {
  return std::make_unique<ConvStep>(fields);
}

Shape ConvStep::shape(const Source& source) {
  const Fields<DSP_OP_CONV>& f = fields_;
  const Shape& x = source.shape(f.x);
  const Plan plan(f.plan.data(), static_cast<int64_t>(f.plan.size()));
  const dsp_conv2d_shape sizes{1,          x.height,    x.width,     f.kernel_h,   f.kernel_w,  f.stride_h,
                               f.stride_w, f.padding_h, f.padding_w, f.dilation_h, f.dilation_w};
  shape_ = check_shape(&sizes, plan);
  if (plan.in_channels() != x.channels) fail("program: a convolution's plan has other input channels than x");
  const Shape made{plan.out_channels(), shape_.out_h, shape_.out_w};
  if (f.residual >= 0 && !(source.shape(f.residual) == made))
    fail("program: a convolution's residual has another shape than its output");
  const int64_t numel = plan.pairs() * shape_.taps();
  weights_ = {source.floats().find(f.weight_at, numel, "weight"), numel};
  if (f.bias_at >= 0) bias_ = source.take(f.bias_at, made.channels, "bias");
  return made;
}

int64_t ConvStep::bytes() const {
  int64_t sum = weights_.count() * static_cast<int64_t>(sizeof(float)) + lane_conv_.table_bytes() +
                bytes_of(bias_) + layout_.table_bytes() +
                static_cast<int64_t>(fields_.plan.size() * sizeof(int32_t));
  for (const TileSet* sets : {whole_, last_, of_pairs_}) {
    for (int log = 0; log <= kMaxRowsLog; ++log)
      sum += static_cast<int64_t>(sets[log].tiles.size() * sizeof(Tile));
  }
  return sum;
}

int64_t ConvStep::place_weights(float* to) {
  const Plan plan = Plan::trusted(fields_.plan.data());
  const auto prepare = [&](const float* given, float* prepared) {
    if (lanes_) {
      lane_conv_.prepare(plan, given, prepared);
    } else {
      prepare_weights(plan, shape_.kh, shape_.kw, given, prepared);
    }
  };
  if (to != nullptr) weights_.place(to, prepare);
  return weights_.count();
}

int64_t ConvStep::scratch_floats() const {
  if (lanes_) return lane_conv_.scratch_bytes() / static_cast<int64_t>(sizeof(float));
  return layout_.gathered() ? layout_.scratch_floats() : 0;
}

bool ConvStep::reads(size_t input, Layout layout) const {
  return layout == Layout::kPlanar ? input == 0 || !lanes_ : lanes_;
}

// Places are 32 bits wide: of the values with all the padding that they may get.
bool ConvStep::can_run_in_lanes(const std::vector<Value>& values) const {
  if (most_padding() > kMostPadding) return false;
  const auto fits = [&](const Shape& v) {
    const auto side = [](int64_t size, int64_t reach) {
      return static_cast<double>(size) + static_cast<double>(reach) + 2 * kMostPadding + 1;
    };
    return side(v.height, shape_.kh * shape_.dh) * side(v.width, shape_.kw * shape_.dw) *
               (static_cast<double>(v.channels) + 32) <
           double{1 << 30};
  };
  return fits(values[static_cast<size_t>(inputs.front())]) && fits(values[static_cast<size_t>(result)]);
}

// As measured (bench/native/engines.cpp): shares of a core's two multiply-adds a cycle.
double ConvStep::engine_cycles(bool lanes) const {
  const Plan plan = Plan::trusted(fields_.plan.data());
  const double pixels = static_cast<double>(shape_.out_plane());
  const double taps = static_cast<double>(shape_.taps());
  const int width = lane_kernels().lanes;
  double sum = 0;
  if (!lanes) {
    const bool one = shape_.taps() == 1 && shape_.sh == 1 && shape_.sw == 1;
    const int64_t row = one ? shape_.out_plane() : shape_.out_w;
    const double filled = static_cast<double>(row) / static_cast<double>((row + width - 1) / width * width);
    double share = one ? 0.45 * filled : (rows_fit(row) ? 0.8 : 0.72 * filled);
    if (shape_.sh != 1 || shape_.sw != 1) share *= 0.85;
    return static_cast<double>(plan.pairs()) * taps * pixels / width / 2 / share;
  }
  constexpr double kShare[] = {0, 0.55, 0.65, 0.72, 0.76};
  const int most = lane_kernels().max_vectors;
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    if (group.n_filters == 0) continue;
    const int vectors = (group.n_filters + width - 1) / width;
    const int blocks = (vectors + most - 1) / most;
    // Results are neighbours, or a few runs of them (choose_places).
    const double store = 3.0 * vectors + 5.0;
    sum += pixels * (static_cast<double>(group.n_channels) * taps * vectors / 2 /
                         kShare[(vectors + blocks - 1) / blocks] +
                     store);
  }
  return sum;
}

std::vector<int32_t> ConvStep::groups_of_filters() const {
  const Plan plan = Plan::trusted(fields_.plan.data());
  std::vector<int32_t> groups(static_cast<size_t>(plan.out_channels()), plan.n_groups());
  for (int32_t g = 0; g < plan.n_groups(); ++g) {
    const Group group = plan.group(g);
    for (int32_t f = 0; f < group.n_filters; ++f) groups[static_cast<size_t>(group.filters[f])] = g;
  }
  return groups;
}

int64_t ConvStep::macs() const {
  return Plan::trusted(fields_.plan.data()).pairs() * shape_.taps() * shape_.out_plane();
}

int64_t ConvStep::most_padding() const { return std::max(shape_.ph, shape_.pw); }

bool ConvStep::can_write_apart() const {
  return !lanes_ && shape_.out_w % kernels().lanes == 0 && !wide_taps(shape_);
}

bool ConvStep::can_read_apart() const {
  return !lanes_ && shape_.sh == 2 && shape_.sw == 2 && rows_fit(shape_.out_w);
}

void ConvStep::lay_out(const std::vector<Value>& values) {
  const Plan plan = Plan::trusted(fields_.plan.data());
  const ConvShape& s = shape_;
  const auto value = [&](int64_t id) -> const Value& { return values[static_cast<size_t>(id)]; };
  const bool callers = value(inputs.front()).callers();
  const Value& x = value(inputs.front());
  const Planes& out = value(result).planes;
  const int64_t width = s.out_w;
  const int64_t residual_pitch = adds() ? value(residual()).planes.pitch : 0;
  if (lanes_) {
    lay_out_lanes(values);
    return;
  }
  layout_.set_blocks(plan, s);
  layout_.set_bias(bias_.empty() ? nullptr : bias_.data());
  if (layout_.blocks.empty()) return;
  const bool unit = s.sh == 1 && s.sw == 1;
  const bool one = unit && s.kh == 1 && s.kw == 1 && s.ph == 0 && s.pw == 0;
  const bool flat_out = out.pitch == width && (!adds() || residual_pitch == width);
  if (one && flat_out && out.odd == 0 && x.planes.pitch == x.width) {
    layout_.set_direct_flat(s, plan, x.planes, callers);
  } else if (x.planes.odd != 0 ||
             (unit && !callers && x.pad_h >= s.ph && x.pad_w >= s.pw && rows_fit(width))) {
    layout_.set_direct_rows(s, plan, x.planes);
  } else {
    layout_.set_gathered(s, plan, 1, false);
    if (layout_.flat() && !flat_out) fail("program: a convolution's kernel is too wide for its output");
  }
  const int64_t plane = s.out_plane();
  const int64_t last_first = (layout_.strips() - 1) * layout_.strip_pixels;
  layout_.build_tiles(std::min(layout_.strip_pixels, plane), out, residual_pitch, kChunkBytes, whole_);
  layout_.build_tiles(plane - last_first, out, residual_pitch, kChunkBytes, last_);
}

void ConvStep::lay_out_lanes(const std::vector<Value>& values) {
  const Plan plan = Plan::trusted(fields_.plan.data());
  const auto view = [&](int64_t id) { return values[static_cast<size_t>(id)].view(); };
  const auto places = [&](int64_t id) {
    const std::vector<int32_t>& list = values[static_cast<size_t>(id)].places;
    return list.empty() ? nullptr : list.data();
  };
  lane_conv_.set_blocks(plan, shape_, places(inputs.front()), places(result));
  lane_conv_.set_bias(bias_.empty() ? nullptr : bias_.data());
  if (!lane_conv_.set_views(plan, view(inputs.front()), view(result), adds() ? view(residual()) : View{}))
    fail("program: a convolution's values are too large");
  weights_.set_count(lane_conv_.weight_floats());
}

bool ConvStep::choose_pairs(const std::vector<Value>& values) {
  if (lanes_ || layout_.blocks.empty() || !layout_.pairs_fit()) return false;
  if (adds() && values[static_cast<size_t>(residual())].callers()) return false;  // lies elsewhere
  pairs_ = true;
  const int64_t residual_pitch = adds() ? values[static_cast<size_t>(residual())].planes.pitch : 0;
  layout_.build_tiles(shape_.out_plane(), values[static_cast<size_t>(result)].planes, residual_pitch,
                      kChunkBytes, of_pairs_, -1, true);
  return true;
}

int64_t ConvStep::overwrites(const std::vector<Value>& values) const {
  if (!adds() || residual() == inputs.front()) return -1;
  const Value& old = values[static_cast<size_t>(residual())];
  const Value& made = values[static_cast<size_t>(result)];
  const bool alike = old.layout == made.layout && old.pad_h == made.pad_h && old.pad_w == made.pad_w &&
                     old.pixel == made.pixel && old.planes.odd == made.planes.odd &&
                     old.planes.pitch == made.planes.pitch && old.planes.plane == made.planes.plane;
  const bool free = !old.callers() && old.last_use == made.made && old.second == made.second;
  return alike && free ? residual() : -1;
}

// Where one run reads and writes.
struct ConvStep::Tensors {
  const float* in;
  float* out;
  const float* residual;  // or null
  Planes in_planes, out_planes, residual_planes;
};

ConvStep::Tensors ConvStep::tensors(const Place& at) const {
  Tensors t{at.read(inputs.front()),         at.write(result),        nullptr,
            at.value(inputs.front()).planes, at.value(result).planes, {}};
  if (adds()) {
    t.residual = at.read(residual());
    t.residual_planes = at.value(residual()).planes;
  }
  return t;
}

void ConvStep::fill_dead(const Tensors& t) const {
  float* out = t.out + t.out_planes.origin;
  for (const int32_t f : layout_.dead) {
    const float* residual = nullptr;
    if (t.residual != nullptr) residual = t.residual + t.residual_planes.origin + f * t.residual_planes.plane;
    const float value = bias_.empty() ? 0.0f : bias_[static_cast<size_t>(f)];
    if (residual_stays_ && value == 0.0f) continue;  // what is to be written is there
    kernels().fill(out + f * t.out_planes.plane, t.out_planes.pitch, t.out_planes.odd, residual,
                   t.residual_planes.pitch, value, shape_.out_h, shape_.out_w, fields_.activation);
  }
}

int64_t ConvStep::pixels_of(int64_t strip) const {
  const int64_t size = layout_.strip_pixels;
  return strip == layout_.strips() - 1 ? shape_.out_plane() - strip * size : size;
}

const TileSet* ConvStep::tiles_of(int64_t strip) const {
  return strip == layout_.strips() - 1 ? last_ : whole_;
}

void ConvStep::run_strip(const Tensors& t, int64_t strip, int64_t chunk_begin, int64_t chunk_end,
                         int64_t block_begin, int64_t block_end, const float* from) const {
  const int64_t first = strip * layout_.strip_pixels;
  const int64_t row = layout_.flat() ? 0 : first / shape_.out_w;
  const int64_t out_at = layout_.flat() ? first : row * t.out_planes.pitch;
  const int64_t residual_at = layout_.flat() ? first : row * t.residual_planes.pitch;
  layout_.run(tiles_of(strip), chunk_begin, chunk_end, block_begin, block_end, from, weights_.data(),
              layout_.bias.data(), t.out + out_at, t.out_planes,
              t.residual == nullptr ? nullptr : t.residual + residual_at, t.residual_planes,
              fields_.activation);
}

// Strips side by side, each with a copy of its input.
void ConvStep::run_strips(const Tensors& t, int threads) const {
  const int64_t n_blocks = static_cast<int64_t>(layout_.blocks.size());
  const int64_t slots = static_cast<int64_t>(layout_.used_channels.size());
  auto body = [&](int64_t strip) {
    const float* from = t.in;
    if (layout_.gathered()) {
      float* scratch = reinterpret_cast<float*>(
          task_scratch().reserve(static_cast<size_t>(layout_.scratch_floats()) * sizeof(float)));
      layout_.gather(t.in, t.in_planes, strip * layout_.strip_pixels, pixels_of(strip), 0, slots, scratch);
      from = scratch;
    }
    run_strip(t, strip, 0, layout_.chunks(tiles_of(strip)), 0, n_blocks, from);
  };
  parallel_for(threads, layout_.strips(), body);
}

// One image on several threads: all of them read the same copy of the input.
void ConvStep::share_strips(const Tensors& t, int threads) const {
  const int64_t n_blocks = static_cast<int64_t>(layout_.blocks.size());
  const int64_t slots = static_cast<int64_t>(layout_.used_channels.size());
  for (int64_t strip = 0; strip < layout_.strips(); ++strip) {
    const float* from = t.in;
    if (layout_.gathered()) {
      float* scratch = reinterpret_cast<float*>(
          call_scratch().reserve(static_cast<size_t>(layout_.scratch_floats()) * sizeof(float)));
      const int64_t shares = std::min<int64_t>(slots, 2 * int64_t{threads});
      auto gather = [&](int64_t share) {
        layout_.gather(t.in, t.in_planes, strip * layout_.strip_pixels, pixels_of(strip),
                       share * slots / shares, (share + 1) * slots / shares, scratch);
      };
      parallel_for(threads, shares, gather);
      from = scratch;
    }
    const int64_t chunks = layout_.chunks(tiles_of(strip));
    const int64_t wanted = 3 * int64_t{threads};
    const int64_t chunk_parts = std::min(chunks, wanted);
    const int64_t block_parts = std::min(n_blocks, (wanted + chunk_parts - 1) / chunk_parts);
    auto body = [&](int64_t task) {
      const int64_t c = task / block_parts;
      const int64_t b = task % block_parts;
      run_strip(t, strip, c * chunks / chunk_parts, (c + 1) * chunks / chunk_parts,
                layout_.block_share(b, block_parts), layout_.block_share(b + 1, block_parts), from);
    };
    parallel_for(threads, chunk_parts * block_parts, body);
  }
}

void ConvStep::run(const Place& at, int threads) const {
  if (lanes_) {
    lane_conv_.run(at.read(inputs.front()), weights_.data(), adds() ? at.read(residual()) : nullptr,
                   at.write(result), fields_.activation, residual_stays_, threads);
    return;
  }
  const Tensors t = tensors(at);
  fill_dead(t);
  if (layout_.blocks.empty()) return;
  if (threads <= 1 || layout_.strips() >= threads) {
    run_strips(t, threads);
  } else {
    share_strips(t, threads);
  }
}

void ConvStep::run_pixels(const Place& at, int64_t pixel, int64_t pixels) const {
  lane_conv_.run_pixels(at.read(inputs.front()), weights_.data(), adds() ? at.read(residual()) : nullptr,
                        at.write(result), fields_.activation, residual_stays_, pixel, pixels);
}

void ConvStep::run_pair(const Place& first, int64_t second) const {
  const Tensors t = tensors(first);
  fill_dead(t);
  fill_dead(tensors({first.values, first.in, first.image + 1, first.arena, second}));
  layout_.run(of_pairs_, 0, layout_.chunks(of_pairs_), 0, static_cast<int64_t>(layout_.blocks.size()), t.in,
              weights_.data(), layout_.bias.data(), t.out, t.out_planes, t.residual, t.residual_planes,
              fields_.activation, second);
}

}  // namespace dsp
