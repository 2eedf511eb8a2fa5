// A step that no description has: a value in another layout, or with its padding.
#pragma once

#include <cstdint>
#include <memory>

#include "program/step.h"

namespace dsp {

std::unique_ptr<Step> make_copy_step(int64_t from, int64_t to);

}  // namespace dsp
