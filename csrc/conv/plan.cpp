#include "conv/plan.h"

#include <cstring>
#include <string>

#include "core/scratch.h"

namespace dsp {
namespace {

constexpr int32_t kMostChannels = 1 << 24;  // bounds the memory that checking a plan takes

[[noreturn]] void bad_plan(const std::string& why) { fail("plan: " + why); }

}  // namespace

Plan::Plan(const int32_t* words, int64_t numel) : words_(words) {
  if (words == nullptr) bad_plan("is null");
  if (numel < DSP_PLAN_HEADER) bad_plan("has " + std::to_string(numel) + " words, at least 8 expected");
  if (words[0] != DSP_PLAN_MAGIC) bad_plan("does not start with the plan's magic number");
  if (words[5] != numel)
    bad_plan("says it has " + std::to_string(words[5]) + " words, given are " + std::to_string(numel));
  if (words[7] != 0) bad_plan("has a reserved word that is not 0");
  const int32_t in = words[1];
  const int32_t out = words[2];
  const int32_t groups = words[3];
  if (in < 0 || out < 0 || groups < 0) bad_plan("has a negative count");
  if (in > kMostChannels || out > kMostChannels) bad_plan("has more than 2^24 channels");
  const int64_t lists = DSP_PLAN_HEADER + int64_t{groups} * DSP_PLAN_GROUP;
  if (lists > numel) bad_plan("is too short for its " + std::to_string(groups) + " groups");

  int64_t all_channels = 0;
  for (int32_t g = 0; g < groups; ++g) {
    const int32_t* entry = words + DSP_PLAN_HEADER + int64_t{g} * DSP_PLAN_GROUP;
    if (entry[0] < 0 || entry[0] > in || entry[1] < 0 || entry[1] > out)
      bad_plan("group " + std::to_string(g) + " has an impossible number of channels or filters");
    if (entry[1] > 0 && entry[0] == 0)
      bad_plan("group " + std::to_string(g) + " has filters but no channels");
    all_channels += entry[0];
  }
  int64_t channel_at = lists;
  int64_t filter_at = lists + all_channels;
  int64_t pairs = 0;
  int64_t live = 0;
  for (int32_t g = 0; g < groups; ++g) {
    const int32_t* entry = words + DSP_PLAN_HEADER + int64_t{g} * DSP_PLAN_GROUP;
    if (entry[2] != channel_at || entry[3] != filter_at || entry[4] != pairs)
      bad_plan("group " + std::to_string(g) + " has offsets other than its place in order");
    channel_at += entry[0];
    filter_at += entry[1];
    pairs += int64_t{entry[0]} * entry[1];
    live += entry[1];
  }
  if (filter_at != numel) bad_plan("has lists that do not fill it");
  if (pairs != words[4])
    bad_plan("counts " + std::to_string(words[4]) + " pairs, its groups have " + std::to_string(pairs));
  if (live != words[6]) bad_plan("counts other live filters than its groups have");

  // One mark per channel (the last group that named it) and per filter.
  const size_t marks = (static_cast<size_t>(in) + static_cast<size_t>(out)) * sizeof(int32_t);
  int32_t* seen = reinterpret_cast<int32_t*>(call_scratch().reserve(marks + 64));
  std::memset(seen, 0xff, marks);
  int32_t* seen_filter = seen + in;
  for (int32_t g = 0; g < groups; ++g) {
    const Group found = group(g);
    for (int32_t i = 0; i < found.n_channels; ++i) {
      const int32_t channel = found.channels[i];
      if (channel < 0 || channel >= in)
        bad_plan("group " + std::to_string(g) + " names channel " + std::to_string(channel) + " of " +
                 std::to_string(in));
      if (seen[channel] == g)
        bad_plan("group " + std::to_string(g) + " names channel " + std::to_string(channel) + " twice");
      seen[channel] = g;
    }
    for (int32_t i = 0; i < found.n_filters; ++i) {
      const int32_t filter = found.filters[i];
      if (filter < 0 || filter >= out)
        bad_plan("group " + std::to_string(g) + " names filter " + std::to_string(filter) + " of " +
                 std::to_string(out));
      if (seen_filter[filter] >= 0) bad_plan("filter " + std::to_string(filter) + " is named twice");
      seen_filter[filter] = g;
    }
  }
}

ConvShape check_shape(const dsp_conv2d_shape* shape, const Plan& plan) {
  require(shape != nullptr, "shape is null");
  constexpr int64_t kMost = int64_t{1} << 31;
  const auto within = [](int64_t value, int64_t least, const char* name) {
    if (value < least || value >= kMost)
      fail(std::string(name) + " is " + std::to_string(value) + ", expected " + std::to_string(least) +
           " to 2^31 - 1");
  };
  within(shape->batch, 0, "batch");
  within(shape->height, 1, "height");
  within(shape->width, 1, "width");
  within(shape->kernel_h, 1, "kernel_h");
  within(shape->kernel_w, 1, "kernel_w");
  within(shape->stride_h, 1, "stride_h");
  within(shape->stride_w, 1, "stride_w");
  within(shape->padding_h, 0, "padding_h");
  within(shape->padding_w, 0, "padding_w");
  within(shape->dilation_h, 1, "dilation_h");
  within(shape->dilation_w, 1, "dilation_w");

  ConvShape s{};
  s.batch = shape->batch;
  s.height = shape->height;
  s.width = shape->width;
  s.kh = shape->kernel_h;
  s.kw = shape->kernel_w;
  s.sh = shape->stride_h;
  s.sw = shape->stride_w;
  s.ph = shape->padding_h;
  s.pw = shape->padding_w;
  s.dh = shape->dilation_h;
  s.dw = shape->dilation_w;
  s.in_channels = plan.in_channels();
  s.out_channels = plan.out_channels();
  // Each term is below 2^33 + 2^62: the sums fit in 64 bits.
  if (window_room(s.height, s.kh, s.ph, s.dh) < 0 || window_room(s.width, s.kw, s.pw, s.dw) < 0)
    fail("the kernel is larger than the padded input");
  s.out_h = windows(s.height, s.kh, s.sh, s.ph, s.dh);
  s.out_w = windows(s.width, s.kw, s.sw, s.pw, s.dw);

  checked_mul(
      checked_mul(checked_mul(s.batch, s.in_channels, "the size of x"), s.in_plane(), "the size of x"), 4,
      "the size of x");
  checked_mul(
      checked_mul(checked_mul(s.batch, s.out_channels, "the size of out"), s.out_plane(), "the size of out"),
      4, "the size of out");
  checked_mul(checked_mul(plan.pairs(), checked_mul(s.kh, s.kw, "the kernel"), "the size of weight"), 4,
              "the size of weight");
  return s;
}

void check_tensor(const void* pointer, int64_t numel, int64_t expected, const char* name) {
  if (numel != expected)
    fail(std::string(name) + " has " + std::to_string(numel) + " values, expected " +
         std::to_string(expected));
  if (pointer == nullptr && numel > 0) fail(std::string(name) + " is null");
}

}  // namespace dsp
