#include "program/steps/pooling.h"

#include "core/geometry.h"

namespace dsp {

int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation,
                    bool ceil_mode) {
  const int64_t room = window_room(size, kernel, padding, dilation);
  if (room < 0) fail("program: the pooling window is larger than the padded input");
  int64_t out = (room + (ceil_mode ? stride - 1 : 0)) / stride + 1;
  // A window that would start in the right padding is left out, as torch does.
  if (ceil_mode && (out - 1) * stride >= size + padding) --out;
  return out;
}

}  // namespace dsp
