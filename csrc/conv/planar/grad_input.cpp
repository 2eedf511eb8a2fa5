#include <algorithm>

#include "conv/planar/conv2d.h"
#include "core/scratch.h"
#include "core/thread_pool.h"

namespace dsp {
namespace {

// Who is written by whom: atoms (channels that are read by the same groups) in the place of groups, the
// groups' filters in the place of channels.
class Transposition {
 public:
  Transposition(Workspace& space, const Plan& plan)
      : plan_(plan),
        atom_of_(space.atom_of),
        fresh_(space.fresh),
        position_(space.position),
        cursor_(space.cursor),
        words_(space.transposed) {
    number_atoms();
    write_entries();
    write_channels();
  }

  // The filters of the atoms, and the weights, which come flipped.
  void write_filters(int64_t taps, const float* weight, float* transposed) {
    cursor_.assign(static_cast<size_t>(n_atoms_), 0);
    each_group([&](const Group& group) {
      const float* from = weight + group.weight_pairs * taps;
      for (int32_t i = 0; i < group.n_channels; ++i) {
        const size_t c = static_cast<size_t>(group.channels[i]);
        const int32_t* to = entry(atom_of_[c]);
        for (int32_t f = 0; f < group.n_filters; ++f) {
          const float* w = from + (int64_t{f} * group.n_channels + i) * taps;
          const int64_t column = cursor_[static_cast<size_t>(atom_of_[c])] + f;
          float* out = transposed + (to[4] + int64_t{position_[c]} * to[0] + column) * taps;
          for (int64_t t = 0; t < taps; ++t) out[t] = w[taps - 1 - t];
        }
      }
      each_atom(group, [&](int32_t atom) {
        int64_t& used = cursor_[static_cast<size_t>(atom)];
        for (int32_t f = 0; f < group.n_filters; ++f)
          words_[static_cast<size_t>(entry(atom)[2] + used++)] = group.filters[f];
      });
    });
  }

 private:
  int32_t* entry(int32_t atom) { return words_.data() + DSP_PLAN_HEADER + atom * DSP_PLAN_GROUP; }

  template <typename Visit>
  void each_group(Visit&& visit) {
    for (int32_t g = 0; g < plan_.n_groups(); ++g) {
      const Group group = plan_.group(g);
      if (group.n_filters > 0) visit(group);
    }
  }

  // Which atoms a group reads: those of its channels, each once.
  template <typename Visit>
  void each_atom(const Group& group, Visit&& visit) {
    fresh_.assign(static_cast<size_t>(n_atoms_), 0);
    for (int32_t i = 0; i < group.n_channels; ++i) {
      const int32_t atom = atom_of_[static_cast<size_t>(group.channels[i])];
      if (fresh_[static_cast<size_t>(atom)]++ == 0) visit(atom);
    }
  }

  void number_atoms() {
    const size_t channels = static_cast<size_t>(plan_.in_channels());
    atom_of_.assign(channels, 0);
    // Refine: within each group, channels that were together stay together, apart from those outside.
    int32_t atoms = 1;
    each_group([&](const Group& group) {
      fresh_.assign(static_cast<size_t>(atoms), 0);
      for (int32_t i = 0; i < group.n_channels; ++i) {
        int32_t& atom = atom_of_[static_cast<size_t>(group.channels[i])];
        int32_t& next = fresh_[static_cast<size_t>(atom)];
        if (next == 0) next = atoms++;
        atom = next;
      }
    });
    // Number the atoms that are left by their first channel; atom 0 is what nobody reads.
    fresh_.assign(static_cast<size_t>(atoms), -1);
    for (size_t c = 0; c < channels; ++c) {
      if (atom_of_[c] == 0) {
        atom_of_[c] = -1;
        continue;
      }
      int32_t& number = fresh_[static_cast<size_t>(atom_of_[c])];
      if (number < 0) number = n_atoms_++;
      atom_of_[c] = number;
    }
  }

  void write_entries() {
    words_.assign(static_cast<size_t>(DSP_PLAN_HEADER + n_atoms_ * DSP_PLAN_GROUP), 0);
    for (const int32_t atom : atom_of_) {
      if (atom >= 0) entry(atom)[1]++;
    }
    each_group([&](const Group& group) {
      each_atom(group, [&](int32_t atom) { entry(atom)[0] += group.n_filters; });
    });
    int32_t at = static_cast<int32_t>(words_.size());
    int32_t pairs = 0;
    int32_t live = 0;
    for (int32_t a = 0; a < n_atoms_; ++a) {
      entry(a)[2] = at;
      entry(a)[4] = pairs;
      at += entry(a)[0];
      pairs += entry(a)[0] * entry(a)[1];
    }
    for (int32_t a = 0; a < n_atoms_; ++a) {
      entry(a)[3] = at;
      at += entry(a)[1];
      live += entry(a)[1];
    }
    words_.resize(static_cast<size_t>(at));
    const int32_t header[DSP_PLAN_HEADER] = {
        DSP_PLAN_MAGIC, plan_.out_channels(), plan_.in_channels(), n_atoms_, pairs, at, live, 0};
    std::copy(header, header + DSP_PLAN_HEADER, words_.begin());
  }

  // Of each atom, ascending.
  void write_channels() {
    cursor_.assign(static_cast<size_t>(n_atoms_), 0);
    position_.assign(atom_of_.size(), 0);
    for (size_t c = 0; c < atom_of_.size(); ++c) {
      if (atom_of_[c] < 0) continue;
      int64_t& used = cursor_[static_cast<size_t>(atom_of_[c])];
      position_[c] = static_cast<int32_t>(used);
      words_[static_cast<size_t>(entry(atom_of_[c])[3] + used++)] = static_cast<int32_t>(c);
    }
  }

  const Plan& plan_;
  std::vector<int32_t>&atom_of_, &fresh_, &position_;
  std::vector<int64_t>& cursor_;
  std::vector<int32_t>& words_;
  int32_t n_atoms_ = 0;
};

// The rows (columns) of x that are `phase` modulo the stride get their gradients from some of the taps only,
// and for these it is a convolution with stride 1: tap i of `count`, which is tap first - i * every of the
// kernel, reads row r + start + i * step of the output's gradient for row r of the phase.
struct PhaseTaps {
  int64_t count = 0, first = 0, every = 1, start = 0, step = 1;
};

PhaseTaps phase_taps(int64_t phase, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  PhaseTaps taps;
  int64_t last = -1;
  for (int64_t k = kernel - 1; k >= 0; --k) {
    if ((phase + padding - k * dilation) % stride != 0) continue;
    if (taps.count == 0) {
      taps.first = k;
      taps.start = (phase + padding - k * dilation) / stride;
    } else if (taps.count == 1) {
      taps.every = last - k;
      taps.step = taps.every * dilation / stride;
    }
    last = k;
    ++taps.count;
  }
  return taps;
}

// `flipped` holds the taps in reverse.
void choose_taps(const PhaseTaps& y, const PhaseTaps& x, const ConvShape& s, int64_t pairs,
                 const float* flipped, float* to) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    for (int64_t i = 0; i < y.count; ++i) {
      const float* row = flipped + pair * s.taps() + (s.kh - 1 - (y.first - i * y.every)) * s.kw;
      for (int64_t j = 0; j < x.count; ++j) *to++ = row[s.kw - 1 - (x.first - j * x.every)];
    }
  }
}

// The gradient of a stride above 1: each phase of rows and columns is a convolution of its own.
class Phases {
 public:
  Phases(Workspace& space, const ConvShape& s, const Plan& back, const float* grad, float* grad_x,
         const float* flipped, float* chosen, float* prepared, int threads)
      : space_(space),
        s_(s),
        back_(back),
        grad_(grad),
        grad_x_(grad_x),
        flipped_(flipped),
        chosen_(chosen),
        prepared_(prepared),
        threads_(threads),
        planes_(s.batch * s.in_channels) {}

  void run(const ConvShape& transposed) {
    const int64_t columns = std::min(s_.sw, s_.width);
    // Columns of x in pairs are put together from two phases at once.
    const bool pairs = s_.sw == 2 && columns == 2;
    ConvShape t = transposed;
    for (int64_t py = 0; py < std::min(s_.sh, s_.height); ++py) {
      const PhaseTaps y = phase_taps(py, s_.kh, s_.sh, s_.ph, s_.dh);
      t.out_h = (s_.height - py + s_.sh - 1) / s_.sh;
      std::array<const float*, 2> phases{};  // null: nothing but zeros
      std::array<int64_t, 2> pitch{};
      for (int64_t px = 0; px < columns; ++px) {
        const size_t slot = pairs ? static_cast<size_t>(px) : 0;
        t.out_w = pitch[slot] = (s_.width - px + s_.sw - 1) / s_.sw;
        phases[slot] = phase(y, phase_taps(px, s_.kw, s_.sw, s_.pw, s_.dw), slot, &t);
        if (!pairs) scatter(py, px, t, phases[0]);
      }
      if (pairs) zip(py, t.out_h, phases, pitch);
    }
  }

 private:
  const float* phase(const PhaseTaps& y, const PhaseTaps& x, size_t slot, ConvShape* t) {
    if (y.count == 0 || x.count == 0) return nullptr;
    t->kh = y.count;
    t->kw = x.count;
    t->dh = y.step;
    t->dw = x.step;
    t->ph = -y.start;
    t->pw = -x.start;
    choose_taps(y, x, s_, back_.pairs(), flipped_, chosen_);
    prepare_weights(back_, t->kh, t->kw, chosen_, prepared_);
    std::vector<float>& values = space_.phase[slot];
    values.resize(static_cast<size_t>(planes_ * t->out_plane()));
    convolve(space_, *t, back_, grad_, prepared_, nullptr, nullptr, values.data(), Activation{}, threads_);
    return values.data();
  }

  void scatter(int64_t py, int64_t px, const ConvShape& t, const float* values) {
    auto one_plane = [&](int64_t plane) {
      for (int64_t row = 0; row < t.out_h; ++row) {
        float* to = grad_x_ + plane * s_.in_plane() + (row * s_.sh + py) * s_.width + px;
        const float* from = values == nullptr ? nullptr : values + (plane * t.out_h + row) * t.out_w;
        for (int64_t column = 0; column < t.out_w; ++column)
          to[column * s_.sw] = from == nullptr ? 0.0f : from[column];
      }
    };
    parallel_for(threads_, planes_, one_plane);
  }

  void zip(int64_t py, int64_t rows, const std::array<const float*, 2>& phases,
           const std::array<int64_t, 2>& pitch) {
    const KernelTable& k = kernels();
    auto one_plane = [&](int64_t plane) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t at = plane * rows + row;
        k.zip(grad_x_ + plane * s_.in_plane() + (row * s_.sh + py) * s_.width,
              phases[0] == nullptr ? nullptr : phases[0] + at * pitch[0],
              phases[1] == nullptr ? nullptr : phases[1] + at * pitch[1], s_.width);
      }
    };
    parallel_for(threads_, planes_, one_plane);
  }

  Workspace& space_;
  const ConvShape& s_;
  const Plan& back_;
  const float* grad_;
  float* grad_x_;
  const float* flipped_;
  float *chosen_, *prepared_;
  int threads_;
  int64_t planes_;
};

}  // namespace

void conv_grad_input(const ConvShape& s, const Plan& plan, const float* grad, const float* weight,
                     float* grad_x, int threads) {
  Workspace& space = workspace();
  const size_t numel = static_cast<size_t>(plan.pairs() * s.taps());
  Carver sizes(nullptr);
  for (int i = 0; i < 3; ++i) sizes.take<float>(numel);
  Carver carve(call_scratch().reserve(sizes.used() + 64));
  float* flipped = carve.take<float>(numel);
  float* chosen = carve.take<float>(numel);
  float* prepared = carve.take<float>(numel);
  Transposition(space, plan).write_filters(s.taps(), weight, flipped);
  const Plan back = Plan::trusted(space.transposed.data());
  ConvShape t = s;
  t.in_channels = s.out_channels;
  t.out_channels = s.in_channels;
  t.height = s.out_h;
  t.width = s.out_w;
  t.sh = 1;
  t.sw = 1;
  if (s.sh != 1 || s.sw != 1) {
    Phases(space, s, back, grad, grad_x, flipped, chosen, prepared, threads).run(t);
    return;
  }
  // The gradient of a convolution is one with the padding that is left: it may be below 0.
  t.out_h = s.height;
  t.out_w = s.width;
  t.ph = s.dh * (s.kh - 1) - s.ph;
  t.pw = s.dw * (s.kw - 1) - s.pw;
  prepare_weights(back, s.kh, s.kw, flipped, prepared);
  convolve(space, t, back, grad, prepared, nullptr, nullptr, grad_x, Activation{}, threads);
}

}  // namespace dsp
