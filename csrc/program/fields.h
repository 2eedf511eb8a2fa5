// The fields of each kind of step, as steps.def has them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/activation.h"
#include "dsp.h"
#include "program/step.h"

namespace dsp {

template <dsp_program_op OP>
struct Fields;

// clang-format off
#define DSP_STEP(NAME, name, code) template <> struct Fields<DSP_OP_##NAME> {
#define DSP_VALUE(x) int64_t x = 0;
#define DSP_MAYBE_VALUE(x) int64_t x = -1;
#define DSP_VALUES(x) std::vector<int64_t> x;
#define DSP_INT(x, least, most) int64_t x = 0;
#define DSP_ACT(x) Activation x;
#define DSP_FLOATS(x) int64_t x##_at = 0;
#define DSP_MAYBE_FLOATS(x) int64_t x##_at = -1;
#define DSP_PLAN(x) std::vector<int32_t> x;
#define DSP_END(NAME, name) };
#include "program/steps.def"
// clang-format on

// Each steps/*.cpp has the one of its kind.
#define DSP_STEP(NAME, name, code) std::unique_ptr<Step> make_step(const Fields<DSP_OP_##NAME>& fields);
#include "program/steps.def"

}  // namespace dsp
