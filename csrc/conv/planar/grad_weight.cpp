#include <algorithm>

#include "conv/planar/conv2d.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace dsp {
namespace {

constexpr int kRowsLog = 2;  // vectors of a tile
constexpr int64_t kOneChunk = int64_t{1} << 40;
constexpr int64_t kScratchBytes = 640 * 1024;
constexpr int64_t kPartialBytes = int64_t{64} << 20;

class GradWeight {
 public:
  GradWeight(const ConvShape& s, const Plan& plan, const float* grad, const float* x)
      : k_(kernels()),
        s_(s),
        plan_(plan),
        grad_(grad),
        x_(x),
        space_(workspace()),
        layout_(space_.layout),
        numel_(plan.pairs() * s.taps()),
        plane_(s.out_plane()) {
    layout_.set_blocks(plan, s);
    // Laid out for one thread whatever the number is: what is added to what must not depend on it.
    layout_.set_gathered(s, plan, 1, true);
    by_rows_ = layout_.reuse_rows() && s.kw == 3;
    most_filters_ = by_rows_ ? (k_.grad_rows[1] != nullptr ? 2 : 1) : kMaxGradFilters;
    const int64_t last_first = (layout_.strips() - 1) * layout_.strip_pixels;
    const Planes planes{0, s.out_w, plane_};
    layout_.build_tiles(std::min(layout_.strip_pixels, plane_), planes, 0, kOneChunk, space_.whole, kRowsLog);
    layout_.build_tiles(plane_ - last_first, planes, 0, kOneChunk, space_.last, kRowsLog);
    // Slices of the batch have sums of their own, added up in order at the end.
    const int64_t image_bytes =
        std::max<int64_t>(1, (layout_.scratch_floats() + s.out_channels * plane_) * 4);
    together_ = layout_.strips() > 1 ? 1 : std::max<int64_t>(1, kScratchBytes / image_bytes);
    slices_ = std::min<int64_t>(16, (s.batch + together_ - 1) / together_);
    slices_ = std::max<int64_t>(1, std::min(slices_, kPartialBytes / (numel_ * 4)));
    set_offsets();
  }

  void run(float* grad_w, int threads) {
    const int64_t n_groups = plan_.n_groups();
    const int64_t parts = slices_ >= threads ? 1 : std::min<int64_t>(2 * int64_t{threads}, n_groups);
    space_.partial.resize(static_cast<size_t>(numel_ * slices_));
    float* partial = space_.partial.data();
    auto body = [&](int64_t task) {
      const int64_t slice = task / parts;
      const int64_t part = task % parts;
      run_slice(slice, static_cast<int32_t>(part * n_groups / parts),
                static_cast<int32_t>((part + 1) * n_groups / parts), partial + slice * numel_);
    };
    parallel_for(threads, slices_ * parts, body);
    for (int64_t i = 0; i < numel_; ++i) {
      float sum = partial[i];
      for (int64_t slice = 1; slice < slices_; ++slice) sum += partial[slice * numel_ + i];
      grad_w[i] = sum;
    }
  }

 private:
  // Offsets of all groups, one after the other.
  void set_offsets() {
    space_.offsets.clear();
    space_.cursor.clear();
    for (int32_t g = 0; g < plan_.n_groups(); ++g) {
      space_.cursor.push_back(static_cast<int64_t>(space_.offsets.size()));
      const Group group = plan_.group(g);
      if (group.n_filters == 0) continue;
      layout_.tap_offsets(group, &space_.group_offsets);
      space_.offsets.insert(space_.offsets.end(), space_.group_offsets.begin(), space_.group_offsets.end());
    }
  }

  void run_slice(int64_t slice, int32_t group_begin, int32_t group_end, float* sums) const {
    for (int32_t g = group_begin; g < group_end; ++g) {
      const Group group = plan_.group(g);
      std::fill_n(sums + group.weight_pairs * s_.taps(),
                  int64_t{group.n_channels} * group.n_filters * s_.taps(), 0.0f);
    }
    const int64_t begin = slice * s_.batch / slices_;
    const int64_t end = (slice + 1) * s_.batch / slices_;
    for (int64_t n = begin; n < end; n += together_) {
      for (int64_t strip = 0; strip < layout_.strips(); ++strip) {
        GradArgs args = strip_args(n, end, strip);
        for (int32_t g = group_begin; g < group_end; ++g) run_group(g, sums, &args);
      }
    }
  }

  // A strip of the images from n on; those before `end` are gathered for it.
  GradArgs strip_args(int64_t n, int64_t end, int64_t strip) const {
    const int64_t first = strip * layout_.strip_pixels;
    const bool last = strip == layout_.strips() - 1;
    const int64_t pixels = last ? plane_ - first : layout_.strip_pixels;
    const TileSet& set = (last ? space_.last : space_.whole)[kRowsLog];
    const int64_t in_image = s_.in_channels * s_.in_plane();
    const int64_t out_image = s_.out_channels * plane_;
    GradArgs args{};
    args.images = std::min(together_, end - n);
    args.x = x_ + n * in_image + first;
    args.x_image = in_image;
    if (layout_.gathered()) {
      const Planes planes{0, s_.width, s_.in_plane()};
      const int64_t floats = layout_.scratch_floats();
      float* scratch = reinterpret_cast<float*>(
          task_scratch().reserve(static_cast<size_t>(floats * args.images) * sizeof(float)));
      for (int64_t i = 0; i < args.images; ++i) {
        layout_.gather(x_ + (n + i) * in_image, planes, first, pixels, 0,
                       static_cast<int64_t>(layout_.used_channels.size()), scratch + i * floats,
                       n + together_ + i < end ? together_ * in_image : 0);
      }
      args.x = scratch;
      args.x_image = floats;
    }
    args.grad = grad_ + n * out_image + first;
    args.grad_image = out_image;
    args.x_step = layout_.flat() ? k_.lanes : layout_.in_pitch;
    args.grad_step = layout_.flat() ? k_.lanes : s_.out_w;
    args.grad_plane = plane_;
    args.tiles = set.tiles.data();
    args.runs = set.runs.data();
    args.n_runs = static_cast<int64_t>(set.runs.size());
    return args;
  }

  void run_group(int32_t g, float* sums, GradArgs* args) const {
    const Group group = plan_.group(g);
    const int64_t columns = group.n_channels * s_.taps();
    args->out_row = columns;
    const int64_t* offsets = space_.offsets.data() + space_.cursor[static_cast<size_t>(g)];
    const int32_t blocks = (group.n_filters + most_filters_ - 1) / most_filters_;
    int32_t f = 0;
    for (int32_t b = 0; b < blocks; ++b) {
      const int32_t size = group.n_filters / blocks + (b < group.n_filters % blocks ? 1 : 0);
      args->filters = group.filters + f;
      float* row = sums + group.weight_pairs * s_.taps() + f * columns;
      int64_t t = 0;
      while (t < columns) {
        const int kind = columns - t >= 9 && k_.max_grad_taps >= 9 ? 2 : (columns - t >= 3 ? 1 : 0);
        args->offsets = offsets + t;
        args->out = row + t;
        if (by_rows_) {
          k_.grad_rows[size - 1](*args);
          t += 9;
          continue;
        }
        k_.grad[size - 1][kind](*args);
        t += kind == 2 ? 9 : (kind == 1 ? 3 : 1);
      }
      f += size;
    }
  }

  const KernelTable& k_;
  const ConvShape& s_;
  const Plan& plan_;
  const float *grad_, *x_;
  Workspace& space_;
  ConvLayout& layout_;
  int64_t numel_, plane_;
  bool by_rows_ = false;
  int most_filters_ = 0;
  int64_t together_ = 0, slices_ = 0;  // images at a time; sums of their own
};

}  // namespace

void conv_grad_weight(const ConvShape& s, const Plan& plan, const float* grad, const float* x, float* grad_w,
                      int threads) {
  if (plan.pairs() == 0) return;
  GradWeight(s, plan, grad, x).run(grad_w, threads);
}

}  // namespace dsp
