// The kernels of group assignment on a GPU; the mathematics is in dsp_kernels/assignment/reference.py, how
// the work is cut in assignment/cuda_table.h. In memory a weight is O rows of C K elements, channels first or
// (tap_major) taps first. Sums are float, or double for double weights.
#pragma once

#include <math.h>

#include "assignment/cuda_table.h"
#include "cuda/device.h"

namespace dsp {
namespace cuda {
namespace lasso {

// ---- element types -------------------------------------------------------------------------------------

struct Half : F16 {
  using Sum = float;
};
struct Brain : Bf16 {
  using Sum = float;
};
struct Single {
  using Store = float;
  using Sum = float;
  static DSP_DEVICE float load(float value) { return value; }
  static DSP_DEVICE float store(float value) { return value; }
};
struct Double {
  using Store = double;
  using Sum = double;
  static DSP_DEVICE double load(double value) { return value; }
  static DSP_DEVICE double store(double value) { return value; }
};

DSP_DEVICE float exponential(float x) { return ::expf(x); }
DSP_DEVICE double exponential(double x) { return ::exp(x); }
DSP_DEVICE float logarithm(float x) { return ::logf(x); }
DSP_DEVICE double logarithm(double x) { return ::log(x); }
DSP_DEVICE float root(float x) { return ::sqrtf(x); }
DSP_DEVICE double root(double x) { return ::sqrt(x); }

// Squares of norms up to it count as 0 (reference.NORM_FLOOR).
DSP_DEVICE float norm_floor(float) { return 1e-30f; }
DSP_DEVICE double norm_floor(double) { return 1e-200; }

// ---- arguments -------------------------------------------------------------------------------------------

enum Mode : int32_t {
  kNorm,      // S of the weights; ratios s/L and penalties
  kStep,      // the same, with 1/L kept
  kMoved,     // S of the weights after one penalty step
  kMixed,     // T minus what the penalty's own move there takes of it; changes of the ratios
  kShrink,    // W (1 - amount M)
  kProximal,  // W times what is left of its block
  kBackward,  // amount W M
};

// Of a layer in the table of addresses.
enum Address { kWeight, kDirection, kOut, kKeep, kAddresses };

struct Arguments {
  const int64_t* table;
  const int64_t* addresses;
  const void* logs;
  int64_t log_stride;
  const void* rates;  // the amount of a layer is rate times scale
  const void* scales;
  void* columns;
  void* rows;
  void* ratios;
  void* moved;     // ratios at the moved weights
  void* inverses;  // 1/L
  void* changes;   // of the ratios
  void* scalars;   // (layer, group): the coefficient of sqrt(p) in the gradient for log p
  void* group_penalties;
  void* penalties;
  void* squares;
  void* products;
  void* log_out;
  int64_t log_out_stride;
  int32_t mode;
  bool directed;  // D is read beside W, T made beside S
  bool store;     // S and T are kept
  bool stored;    // ... and read, instead of weights with several taps
  bool keep;      // the weights as they were are written too
};

DSP_DEVICE const Header& header_of(const Arguments& a) { return *reinterpret_cast<const Header*>(a.table); }
DSP_DEVICE const Layer& layer_of(const Arguments& a, int64_t index) {
  return reinterpret_cast<const Layer*>(a.table + header_of(a).layers_at)[index];
}
DSP_DEVICE const Tile& tile_of(const Arguments& a) {
  return reinterpret_cast<const Tile*>(a.table + header_of(a).tiles_at)[device::block_x()];
}
template <typename T>
DSP_DEVICE T* address_of(const Arguments& a, int64_t layer, int which) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(a.addresses[layer * kAddresses + which]));
}
template <typename A>
DSP_DEVICE const A* as(const void* pointer) {
  return static_cast<const A*>(pointer);
}
template <typename A>
DSP_DEVICE A* as(void* pointer) {
  return static_cast<A*>(pointer);
}
DSP_DEVICE uint32_t bytes(int64_t count) { return static_cast<uint32_t>(count); }

// ---- shared memory
// -----------------------------------------------------------------------------------------
//
// Of W and, where directed, of D one batch as it lies; then p^2 (filter, group); then up to three matrices of
// pairs (filter, channel).

template <typename A>
struct Shared {
  uint32_t weight, direction, powers, matrix;
};
template <typename A>
DSP_DEVICE Shared<A> shared_of(const Arguments& a) {
  const uint32_t stage = bytes(header_of(a).stage);
  const uint32_t powers = a.directed ? 2 * stage : stage;
  return {0, stage, powers, powers + bytes(kRows * kGroups * static_cast<int>(sizeof(A)))};
}
// Bytes of it, with `matrices`.
inline int64_t shared_bytes(const Header& h, bool directed, int matrices) {
  const int64_t sum = sum_bytes(h.element);
  return h.stage * (directed ? 2 : 1) + kRows * kGroups * sum + matrices * kThreads * kPairs * sum;
}
template <typename A>
DSP_DEVICE uint32_t pair_at(uint32_t base, int matrix, int row, int64_t width, int column) {
  return base + bytes((matrix * kThreads * kPairs + row * width + column) * static_cast<int>(sizeof(A)));
}

template <typename S>
struct alignas(16) Vector {
  static constexpr int kLength = 16 / static_cast<int>(sizeof(S));
  S value[kLength];
};

DSP_DEVICE bool aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }

// ---- a batch of filters ----------------------------------------------------------------------------------

// Where a thread stands in a tile: the channel of its pairs, and which filters of a batch they are of.
struct Place {
  const Layer& layer;
  const Tile& tile;
  int width, teams, team, column;
  int64_t channel;
  bool live;     // there is such a channel
  int channels;  // that there are in the tile
  int64_t end;   // of the tile's filters
};
DSP_DEVICE Place place_of(const Arguments& a) {
  const Tile& tile = tile_of(a);
  const Layer& layer = layer_of(a, tile.layer);
  const int width = static_cast<int>(layer.width);
  const int column = device::thread() & (width - 1);
  const int64_t left = layer.channels - tile.channel;
  const int channels = left < width ? static_cast<int>(left) : width;
  const int64_t end = tile.row + layer.chunk;
  return {layer,
          tile,
          width,
          kThreads / width,
          device::thread() / width,
          column,
          tile.channel + column,
          column < channels,
          channels,
          end < layer.filters ? end : layer.filters};
}

// How a batch lies in memory and in shared memory: pieces of neighbouring elements, one a filter, or one for
// each filter and tap.
struct Pieces {
  int count, length, pitch, taps;
  int64_t row_step, tap_step, first;
  DSP_DEVICE int64_t at(int piece) const {
    const int row = taps == 1 ? piece : piece / taps;
    return first + row * row_step + (piece - row * taps) * tap_step;
  }
};
DSP_DEVICE Pieces pieces_of(const Place& p, int64_t row, int count) {
  const Layer& l = p.layer;
  const int taps = static_cast<int>(l.taps);
  const int64_t row_step = l.channels * l.taps;
  if (l.tap_major != 0) {
    const int64_t tap_step = l.channels;
    return {count * taps, p.channels, p.width, taps, row_step, tap_step, row * row_step + p.tile.channel};
  }
  return {count, p.channels * taps, p.width * taps, 1, row_step, 0, row * row_step + p.tile.channel * taps};
}

// Begins to bring a batch to shared memory.
template <typename S>
DSP_DEVICE void stage(uint32_t to, const S* from, const Pieces& pieces, bool vectors) {
  constexpr int kSize = static_cast<int>(sizeof(S));
  const int step = vectors && aligned(from) ? Vector<S>::kLength : 1;
  const int each = pieces.length / step;
  for (int i = device::thread(); i < pieces.count * each; i += kThreads) {
    const int piece = i / each;
    const int element = (i - piece * each) * step;
    const S* source = from + pieces.at(piece) + element;
    const uint32_t target = to + bytes((piece * pieces.pitch + element) * kSize);
    if (step > 1)
      device::copy_async16(target, source, true);
    else
      device::store_shared(target, device::load_written(source));
  }
}

// The batches of a tile, brought to shared memory ahead of their use: up to kSlots are under way. Sums over
// taps that were stored are read where they are instead.
template <typename E>
struct Batches {
  using A = typename E::Sum;
  using S = typename E::Store;

  DSP_DEVICE Batches(const Arguments& arguments, const Place& place)
      : a(arguments),
        p(place),
        stored(arguments.stored && place.layer.taps > 1),
        size(static_cast<int>(stored ? place.layer.stored_batch : place.layer.batch)),
        slots(static_cast<int>(place.layer.slots)) {}

  DSP_DEVICE int count(int64_t row) const {
    return p.end - row < size ? static_cast<int>(p.end - row) : size;
  }
  DSP_DEVICE uint32_t slot_of(int64_t row) const {
    const int64_t index = (row - p.tile.row) / size;
    return bytes((index & (slots - 1)) * p.layer.slot);
  }

  DSP_DEVICE void bring(int64_t row) const {
    if (row < p.end) {
      const Shared<A> shared = shared_of<A>(a);
      const Pieces pieces = pieces_of(p, row, count(row));
      const bool vectors = p.layer.vectors != 0;
      const uint32_t slot = slot_of(row);
      stage(shared.weight + slot, address_of<const S>(a, p.tile.layer, kWeight), pieces, vectors);
      if (a.directed)
        stage(shared.direction + slot, address_of<const S>(a, p.tile.layer, kDirection), pieces, vectors);
    }
    device::commit_copies();
  }
  DSP_DEVICE void start() const {
    if (stored) return;
    for (int i = 0; i < slots; ++i) bring(p.tile.row + i * size);
  }
  // Once all threads are done with a batch, the next one takes its place.
  DSP_DEVICE void next(int64_t row) const {
    device::barrier();
    if (!stored) bring(row + slots * size);
  }
  DSP_DEVICE void finish() const { device::wait_copies<0>(); }

  // The sums over the taps of a thread's pairs: S and, where directed, T.
  DSP_DEVICE void sums(int64_t row, A (&s)[kPairs], A (&t)[kPairs]) const {
    DSP_UNROLL
    for (int i = 0; i < kPairs; ++i) s[i] = t[i] = A(0);
    const int filters = count(row);
    if (stored) {
      DSP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const int r = p.team + i * p.teams;
        if (r >= filters || !p.live) continue;
        const int64_t at = p.layer.squares_at + (row + r) * p.layer.channels + p.channel;
        s[i] = device::load_written(as<A>(a.squares) + at);
        if (a.directed) t[i] = device::load_written(as<A>(a.products) + at);
      }
      return;
    }
    if (slots == 1)
      device::wait_copies<0>();
    else if (slots == 2)
      device::wait_copies<1>();
    else
      device::wait_copies<3>();
    device::barrier();
    const Shared<A> shared = shared_of<A>(a);
    constexpr int kSize = static_cast<int>(sizeof(S));
    const uint32_t slot = slot_of(row);
    const int taps = static_cast<int>(p.layer.taps);
    const int step = p.layer.tap_major != 0 ? p.width : 1;
    const int first = p.layer.tap_major != 0 ? p.column : p.column * taps;
    DSP_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int r = p.team + i * p.teams;
      if (r >= filters || !p.live) continue;
      const uint32_t from = slot + bytes((r * p.width * taps + first) * kSize);
      for (int k = 0; k < taps; ++k) {
        const uint32_t at = from + bytes(k * step * kSize);
        const A w = E::load(device::load_shared<S>(shared.weight + at));
        s[i] += w * w;
        if (a.directed) t[i] += w * A(E::load(device::load_shared<S>(shared.direction + at)));
      }
    }
  }

  const Arguments& a;
  const Place& p;
  const bool stored;
  const int size, slots;
};

// exp(power log p) of a batch's filters for kGroups groups, 0 for groups that there are not; barriers around.
template <typename A>
DSP_DEVICE void stage_powers(const Arguments& a, const Place& p, int64_t row, int count, int64_t group0,
                             A power) {
  const Shared<A> shared = shared_of<A>(a);
  const int64_t groups = header_of(a).groups;
  device::barrier();
  for (int i = device::thread(); i < count * kGroups; i += kThreads) {
    const int r = i / kGroups;
    const int64_t group = group0 + i % kGroups;
    A value = A(0);
    if (group < groups)
      value = exponential(power * as<A>(a.logs)[group * a.log_stride + p.layer.filter_at + row + r]);
    device::store_shared(shared.powers + bytes(i * static_cast<int>(sizeof(A))), value);
  }
  device::barrier();
}
template <typename A>
DSP_DEVICE A power_at(const Shared<A>& shared, int row, int group) {
  return device::load_shared<A>(shared.powers + bytes((row * kGroups + group) * static_cast<int>(sizeof(A))));
}

// Adds, for a thread's pairs, the sums over all groups of powers times each matrix (group, channel).
template <typename A, int N>
DSP_DEVICE void mix(const Arguments& a, const Place& p, int64_t row, int count, A power,
                    const void* const (&matrices)[N], A (&sums)[N][kPairs]) {
  const Header& h = header_of(a);
  const Shared<A> shared = shared_of<A>(a);
  DSP_UNROLL
  for (int n = 0; n < N; ++n) {
    DSP_UNROLL
    for (int i = 0; i < kPairs; ++i) sums[n][i] = A(0);
  }
  for (int64_t group0 = 0; group0 < h.groups; group0 += kGroups) {
    stage_powers<A>(a, p, row, count, group0, power);
    const int last = h.groups - group0 < kGroups ? static_cast<int>(h.groups - group0) : kGroups;
    for (int g = 0; g < last && p.live; ++g) {
      const int64_t at = (group0 + g) * h.pitch + p.layer.channel_at + p.channel;
      DSP_UNROLL
      for (int n = 0; n < N; ++n) {
        if (matrices[n] == nullptr) continue;
        const A value = as<A>(matrices[n])[at];
        DSP_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          const int r = p.team + i * p.teams;
          if (r < count) sums[n][i] += power_at(shared, r, g) * value;
        }
      }
    }
  }
}

template <typename A>
DSP_DEVICE A amount_of(const Arguments& a, int64_t layer) {
  return as<A>(a.rates)[layer] * as<A>(a.scales)[layer];
}

// At the moved weights: s becomes the factor f = 1 - amount M, moved S f^2, t minus the penalty's own move.
template <typename A>
DSP_DEVICE void move(const Arguments& a, const Place& p, int64_t row, int count, const A (&s)[kPairs],
                     A (&t)[kPairs], A (&moved)[kPairs]) {
  const A amount = amount_of<A>(a, p.tile.layer);
  A sums[2][kPairs];
  const void* const matrices[2] = {a.ratios, a.directed ? a.moved : nullptr};
  mix<A, 2>(a, p, row, count, A(2), matrices, sums);
  DSP_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const A factor = A(1) - amount * sums[0][i];
    moved[i] = s[i] * factor * factor;
    if (a.directed) t[i] -= amount * (s[i] * factor * sums[1][i]);
  }
}

// ---- sums over filters
// -------------------------------------------------------------------------------------

// For each channel of a tile and each group, the sum over the tile's filters of p^2 times S, S at the moved
// weights, or the mixed product's T.
template <typename E>
DSP_KERNEL(kThreads, 4)
lasso_columns_kernel(const Arguments a) {
  using A = typename E::Sum;
  const Header& h = header_of(a);
  const Place p = place_of(a);
  const Shared<A> shared = shared_of<A>(a);
  const Batches<E> batches(a, p);
  for (int64_t group0 = 0; group0 < h.groups; group0 += kGroups) {
    A sums[kGroups];
    DSP_UNROLL
    for (int g = 0; g < kGroups; ++g) sums[g] = A(0);
    batches.start();
    for (int64_t row = p.tile.row; row < p.end; row += batches.size) {
      const int count = batches.count(row);
      A s[kPairs], t[kPairs];
      batches.sums(row, s, t);
      if (a.store && p.layer.taps > 1 && group0 == 0) {
        DSP_UNROLL
        for (int i = 0; i < kPairs; ++i) {
          const int r = p.team + i * p.teams;
          if (r >= count || !p.live) continue;
          const int64_t at = p.layer.squares_at + (row + r) * p.layer.channels + p.channel;
          device::store_global(as<A>(a.squares) + at, s[i]);
          if (a.directed) device::store_global(as<A>(a.products) + at, t[i]);
        }
      }
      if (a.mode == kMoved || a.mode == kMixed) {
        A moved[kPairs];
        move<A>(a, p, row, count, s, t, moved);
        DSP_UNROLL
        for (int i = 0; i < kPairs; ++i) s[i] = a.mode == kMixed ? t[i] : moved[i];
      }
      stage_powers<A>(a, p, row, count, group0, A(2));
      DSP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const int r = p.team + i * p.teams;
        if (r >= count) continue;
        DSP_UNROLL
        for (int g = 0; g < kGroups; ++g) sums[g] += power_at(shared, r, g) * s[i];
      }
      batches.next(row);
    }
    batches.finish();
    // The batches' place is free: there the teams' sums meet, and are added in order.
    DSP_UNROLL
    for (int g = 0; g < kGroups; ++g)
      device::store_shared(bytes((g * kThreads + device::thread()) * static_cast<int>(sizeof(A))), sums[g]);
    device::barrier();
    const int last = h.groups - group0 < kGroups ? static_cast<int>(h.groups - group0) : kGroups;
    for (int g = p.team; g < last && p.live; g += p.teams) {
      A sum = A(0);
      for (int team = 0; team < p.teams; ++team)
        sum += device::load_shared<A>(
            bytes((g * kThreads + team * p.width + p.column) * static_cast<int>(sizeof(A))));
      const int64_t at = (p.tile.chunk * h.groups + group0 + g) * p.layer.channels + p.channel;
      device::store_global(as<A>(a.columns) + (p.layer.columns_at + at), sum);
    }
    device::barrier();
  }
}

// The sum of a value over the threads, in the same order at each run.
template <typename A>
DSP_DEVICE A block_sum(A value) {
  constexpr int kSize = static_cast<int>(sizeof(A));
  const auto at = [](int thread) { return bytes(thread * kSize); };
  device::barrier();
  device::store_shared(at(device::thread()), value);
  device::barrier();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (device::thread() < half) {
      const A other = device::load_shared<A>(at(device::thread() + half));
      value += other;
      device::store_shared(at(device::thread()), value);
    }
    device::barrier();
  }
  return device::load_shared<A>(at(0));
}

// From the sums for the channels to L and what the next kernels multiply with; a block for each layer and
// group.
template <typename A>
DSP_KERNEL(kThreads, 4)
lasso_norms_kernel(const Arguments a) {
  const Header& h = header_of(a);
  const int64_t layer = device::block_x();
  const int64_t group = device::block_y();
  const Layer& l = layer_of(a, layer);
  A roots = A(0);
  for (int64_t o = device::thread(); o < l.filters; o += kThreads)
    roots += exponential(A(0.5) * as<A>(a.logs)[group * a.log_stride + l.filter_at + o]);
  const A q = block_sum(roots);
  const A size = q * q;
  const A* columns = as<A>(a.columns) + l.columns_at + group * l.channels;
  const int64_t target = group * h.pitch + l.channel_at;
  A norms = A(0), moves = A(0);
  for (int64_t c = device::thread(); c < l.channels; c += kThreads) {
    A sum = A(0);
    for (int64_t chunk = 0; chunk < l.chunks; ++chunk)
      sum += device::load_written(columns + (chunk * h.groups * l.channels + c));
    if (a.mode == kMixed) {
      const A inverse = as<A>(a.inverses)[target + c];
      const A change = sum * inverse;
      moves += change;
      device::store_global(as<A>(a.changes) + (target + c), -as<A>(a.ratios)[target + c] * change * inverse);
      continue;
    }
    // A NaN is no dead norm, and comes through.
    const bool dead = sum <= norm_floor(A(0));
    const A norm = dead ? A(0) : root(sum);
    const A inverse = dead ? A(0) : A(1) / norm;
    norms += norm;
    if (a.mode == kProximal) {
      const A left = A(1) - amount_of<A>(a, layer) * size * inverse;
      device::store_global(as<A>(a.ratios) + (target + c), dead || left < A(0) ? A(0) : left);
    } else {
      device::store_global(as<A>(a.mode == kMoved ? a.moved : a.ratios) + (target + c), size * inverse);
    }
    if (a.mode == kStep && a.directed) device::store_global(as<A>(a.inverses) + (target + c), inverse);
  }
  if (a.mode == kProximal) return;
  const int64_t own = layer * h.groups + group;
  const A total = block_sum(a.mode == kMixed ? moves : norms);
  if (device::thread() != 0) return;
  if (a.mode == kMixed) {
    device::store_global(as<A>(a.scalars) + own, device::load_written(as<A>(a.scalars) + own) + total * q);
    return;
  }
  device::store_global(as<A>(a.scalars) + own, total * q);
  if (a.mode == kNorm)
    device::store_global(as<A>(a.group_penalties) + own, as<A>(a.scales)[layer] * size * total);
}

template <typename A>
DSP_KERNEL(kThreads, 4)
lasso_total_kernel(const Arguments a) {
  const Header& h = header_of(a);
  const int64_t layer = device::block_x() * kThreads + device::thread();
  if (layer >= h.layers) return;
  A sum = A(0);
  for (int64_t g = 0; g < h.groups; ++g) sum += as<A>(a.group_penalties)[layer * h.groups + g];
  device::store_global(as<A>(a.penalties) + layer, sum);
}

// ---- sums over channels ----------------------------------------------------------------------------------

template <typename A>
DSP_DEVICE A warp_sum(A value) {
  device::sync_warp();  // lanes had different numbers of terms
  DSP_UNROLL
  for (int lanes = 16; lanes > 0; lanes /= 2) value += device::shuffle_xor(value, lanes);
  return value;
}

// For each filter of a batch and each group, the sum over the tile's channels of the matrices of pairs in
// shared memory, weighed by matrices (group, channel): a warp for each of them.
template <typename A, int N>
DSP_DEVICE void add_channels(const Arguments& a, const Place& p, int64_t row, int count,
                             const void* const (&matrices)[N]) {
  const Header& h = header_of(a);
  const Shared<A> shared = shared_of<A>(a);
  const int groups = static_cast<int>(h.groups);
  for (int task = device::warp(); task < count * groups; task += kThreads / 32) {
    const int r = task / groups;
    const int64_t g = task - r * groups;
    const int64_t from = g * h.pitch + p.layer.channel_at + p.tile.channel;
    A sum = A(0);
    for (int c = device::lane(); c < p.channels; c += 32) {
      DSP_UNROLL
      for (int n = 0; n < N; ++n)
        sum += as<A>(matrices[n])[from + c] *
               device::load_shared<A>(pair_at<A>(shared.matrix, n, r, p.width, c));
    }
    sum = warp_sum(sum);
    if (device::lane() == 0) {
      const int64_t at = (p.tile.block * h.groups + g) * p.layer.filters + row + r;
      device::store_global(as<A>(a.rows) + (p.layer.rows_at + at), sum);
    }
  }
}

template <typename A>
DSP_DEVICE void put_pairs(const Arguments& a, const Place& p, int count, int matrix,
                          const A (&values)[kPairs]) {
  const Shared<A> shared = shared_of<A>(a);
  DSP_UNROLL
  for (int i = 0; i < kPairs; ++i) {
    const int r = p.team + i * p.teams;
    if (r < count) device::store_shared(pair_at<A>(shared.matrix, matrix, r, p.width, p.column), values[i]);
  }
}

// The gradient's sums over channels at the moved weights: of ratio' S' and, where directed, of change S + 2
// ratio (T minus the penalty's own move).
template <typename E>
DSP_KERNEL(kThreads, 4)
lasso_turn_kernel(const Arguments a) {
  using A = typename E::Sum;
  const Place p = place_of(a);
  const Batches<E> batches(a, p);
  batches.start();
  for (int64_t row = p.tile.row; row < p.end; row += batches.size) {
    const int count = batches.count(row);
    A s[kPairs], t[kPairs], moved[kPairs];
    batches.sums(row, s, t);
    move<A>(a, p, row, count, s, t, moved);
    put_pairs<A>(a, p, count, 0, moved);
    if (a.directed) {
      DSP_UNROLL
      for (int i = 0; i < kPairs; ++i) t[i] *= A(2);
      put_pairs<A>(a, p, count, 1, s);
      put_pairs<A>(a, p, count, 2, t);
    }
    device::barrier();
    if (a.directed) {
      const void* const matrices[3] = {a.moved, a.changes, a.ratios};
      add_channels<A, 3>(a, p, row, count, matrices);
    } else {
      const void* const matrices[1] = {a.moved};
      add_channels<A, 1>(a, p, row, count, matrices);
    }
    batches.next(row);
  }
  batches.finish();
}

// ---- the second pass over the weights
// ----------------------------------------------------------------------

// Every (filter, channel) is multiplied by its factor; kBackward adds up ratio S over the channels as well.
template <typename E>
DSP_KERNEL(kThreads, 4)
lasso_apply_kernel(const Arguments a) {
  using A = typename E::Sum;
  using S = typename E::Store;
  constexpr int kSize = static_cast<int>(sizeof(S));
  const Place p = place_of(a);
  const Shared<A> shared = shared_of<A>(a);
  const S* weight = address_of<const S>(a, p.tile.layer, kWeight);
  S* out = address_of<S>(a, p.tile.layer, kOut);
  S* keep = address_of<S>(a, p.tile.layer, kKeep);
  const Batches<E> batches(a, p);
  const int taps = p.layer.tap_major != 0 ? 1 : static_cast<int>(p.layer.taps);
  const A amount = amount_of<A>(a, p.tile.layer);
  const bool vectors = p.layer.vectors != 0 && aligned(weight) && aligned(out) && (!a.keep || aligned(keep));
  batches.start();
  for (int64_t row = p.tile.row; row < p.end; row += batches.size) {
    const int count = batches.count(row);
    A s[kPairs], t[kPairs], factor[1][kPairs];
    batches.sums(row, s, t);
    const void* const ratios[1] = {a.ratios};
    mix<A, 1>(a, p, row, count, a.mode == kProximal ? A(1) : A(2), ratios, factor);
    if (a.mode != kProximal) {
      DSP_UNROLL
      for (int i = 0; i < kPairs; ++i)
        factor[0][i] = a.mode == kShrink ? A(1) - amount * factor[0][i] : amount * factor[0][i];
    }
    if (a.mode == kBackward) put_pairs<A>(a, p, count, 0, s);
    put_pairs<A>(a, p, count, 1, factor[0]);
    device::barrier();
    const Pieces pieces = pieces_of(p, row, count);
    const uint32_t slot = batches.slot_of(row);
    const int step = vectors ? Vector<S>::kLength : 1;
    const int each = pieces.length / step;
    for (int i = device::thread(); i < pieces.count * each; i += kThreads) {
      const int piece = i / each;
      const int element = (i - piece * each) * step;
      const int r = p.layer.tap_major != 0 ? piece / static_cast<int>(p.layer.taps) : piece;
      const int64_t to = pieces.at(piece) + element;
      const uint32_t from = shared.weight + slot + bytes((piece * pieces.pitch + element) * kSize);
      int c = element / taps;
      int tap = element - c * taps;
      const auto factor_at = [&] {
        const A value = device::load_shared<A>(pair_at<A>(shared.matrix, 1, r, p.width, c));
        if (++tap == taps) {
          tap = 0;
          ++c;
        }
        return value;
      };
      if (vectors) {
        const auto old = device::load_shared<Vector<S>>(from);
        Vector<S> fresh;
        DSP_UNROLL
        for (int n = 0; n < Vector<S>::kLength; ++n)
          fresh.value[n] = E::store(A(E::load(old.value[n])) * factor_at());
        device::store_global(reinterpret_cast<Vector<S>*>(out + to), fresh);
        if (a.keep) device::store_global(reinterpret_cast<Vector<S>*>(keep + to), old);
      } else {
        const S old = device::load_shared<S>(from);
        device::store_global(out + to, static_cast<S>(E::store(A(E::load(old)) * factor_at())));
        if (a.keep) device::store_global(keep + to, old);
      }
    }
    if (a.mode == kBackward) add_channels<A, 1>(a, p, row, count, ratios);
    batches.next(row);
  }
  batches.finish();
}

// The gradient for log p: factor (p^2 sum + coefficient sqrt(p)), where the factor is the scale at the moved
// weights, else the amount.
template <typename A>
DSP_KERNEL(kThreads, 4)
lasso_rows_kernel(const Arguments a) {
  const Header& h = header_of(a);
  const RowTile& tile = reinterpret_cast<const RowTile*>(a.table + h.row_tiles_at)[device::block_x()];
  const Layer& l = layer_of(a, tile.layer);
  const int64_t group = device::block_y();
  const int64_t o = tile.filter + device::thread();
  if (o >= l.filters) return;
  A sum = A(0);
  const A* rows = as<A>(a.rows) + l.rows_at + group * l.filters + o;
  for (int64_t block = 0; block < l.blocks; ++block)
    sum += device::load_written(rows + block * h.groups * l.filters);
  const A log = as<A>(a.logs)[group * a.log_stride + l.filter_at + o];
  const A value = exponential(A(2) * log) * sum +
                  as<A>(a.scalars)[tile.layer * h.groups + group] * exponential(A(0.5) * log);
  const A factor = a.mode == kMoved ? as<A>(a.scales)[tile.layer] : amount_of<A>(a, tile.layer);
  device::store_global(as<A>(a.log_out) + (group * a.log_out_stride + l.filter_at + o), factor * value);
}

// ---- samples
// -----------------------------------------------------------------------------------------------

struct SampleArguments {
  const void* logits;  // or the gradient for log p
  const void* other;   // the noise, or log p
  void* out;
  int64_t groups, count, stride, other_stride;
  double temperature;
  bool divide;  // the noise too
};

// log softmax over the groups of x / temperature + noise, or of (x + noise) / temperature.
template <typename A>
DSP_KERNEL(kThreads, 4)
sample_forward_kernel(const SampleArguments a) {
  const int64_t at = device::block_x() * kThreads + device::thread();
  if (at >= a.count) return;
  const A temperature = static_cast<A>(a.temperature);
  const auto score = [&](int64_t g) {
    const A x = as<A>(a.logits)[g * a.stride + at];
    const A noise = as<A>(a.other)[g * a.other_stride + at];
    return a.divide ? (x + noise) / temperature : x / temperature + noise;
  };
  A largest = score(0);
  for (int64_t g = 1; g < a.groups; ++g) {
    const A value = score(g);
    largest = value <= largest ? largest : value;  // a NaN comes through
  }
  A total = A(0);
  for (int64_t g = 0; g < a.groups; ++g) total += exponential(score(g) - largest);
  const A shift = logarithm(total);
  for (int64_t g = 0; g < a.groups; ++g)
    device::store_global(as<A>(a.out) + (g * a.count + at), score(g) - largest - shift);
}

// (gradient - p sum over the groups of gradient) / temperature.
template <typename A>
DSP_KERNEL(kThreads, 4)
sample_backward_kernel(const SampleArguments a) {
  const int64_t at = device::block_x() * kThreads + device::thread();
  if (at >= a.count) return;
  const A temperature = static_cast<A>(a.temperature);
  A total = A(0);
  for (int64_t g = 0; g < a.groups; ++g) total += as<A>(a.logits)[g * a.stride + at];
  for (int64_t g = 0; g < a.groups; ++g) {
    const A gradient = as<A>(a.logits)[g * a.stride + at];
    const A p = exponential(as<A>(a.other)[g * a.other_stride + at]);
    device::store_global(as<A>(a.out) + (g * a.count + at), (gradient - p * total) / temperature);
  }
}

}  // namespace lasso
}  // namespace cuda
}  // namespace dsp
