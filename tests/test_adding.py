"""What docs/developing.md says that one touches to add an activation, a step of programs or an operator is
enough.

A copy of the tree gets them, is built and runs them: an activation with a parameter and the output to go by
in the backward, another with the input.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import build_in_place, clean_environment, copy_tree

ROWS_OF_THE_CORE = """
DSP_CURVE(THRESHOLD, threshold, 14, 2)
DSP_CURVE(ERF, erf, 15, 0)
"""

CURVES = """
DSP_INLINE Vec curve_threshold(Vec v, const float* p) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = lanes[i] <= p[0] ? p[1] : lanes[i];
  return load(lanes);
}
DSP_INLINE Vec curve_erf(Vec v, const float*) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = __builtin_erff(lanes[i]);
  return load(lanes);
}
"""

ROWS_OF_PYTHON = """
    Activation(
        "threshold",
        14,
        lambda x, least, value: F.threshold(x, least, value),
        lambda grad, y, least, value: torch.where(y == value, 0, grad),
        "output",
        ("least", "value"),
    ),
    Activation(
        "erf",
        15,
        lambda x: x.erf(),
        lambda grad, x: grad * (-x * x).exp() * (2 / math.pi**0.5),
        "input",
    ),
"""

OPERATORS = """
    _activated(aten.threshold.default, named=lambda threshold, value: f"threshold({threshold}, {value})"),
    _activated(aten.erf.default, named="erf"),
    Operator(
        (aten.repeat_interleave.self_int,),
        "move",
        step=lambda program, x, repeats, dim: program.step(
            "repeat", x=x, scale_h=repeats if dim == 2 else 1, scale_w=repeats if dim == 3 else 1
        ),
    ),
"""

FIELDS = """
// Each pixel scale_h x scale_w times.
DSP_STEP(REPEAT, repeat, 18)
DSP_VALUE(x)
DSP_SIZE(scale_h)
DSP_SIZE(scale_w)
DSP_END(REPEAT, repeat)
"""

STEP = """
#include "program/fields.h"

namespace dsp {
namespace {

class RepeatStep final : public PlanarStep {
 public:
  explicit RepeatStep(const Fields<DSP_OP_REPEAT>& fields) : f_(fields) {}

  Shape shape(const Source& source) override {
    const Shape& x = source.shape(f_.x);
    return {x.channels, x.height * f_.scale_h, x.width * f_.scale_w};
  }

 protected:
  void run_channels(const Place& at, int64_t begin, int64_t end) const override {
    const Shape& y = at.value(result);
    const Rows<const float> in = at.const_rows(inputs[0]);
    const Rows<float> out = at.rows(result);
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t row = 0; row < y.height; ++row) {
        const float* from = in(c, row / f_.scale_h);
        for (int64_t x = 0; x < y.width; ++x) out(c, row)[x] = from[x / f_.scale_w];
      }
    }
  }

 private:
  Fields<DSP_OP_REPEAT> f_;
};

}  // namespace

std::unique_ptr<Step> make_step(const Fields<DSP_OP_REPEAT>& fields) {
  return std::make_unique<RepeatStep>(fields);
}

}  // namespace dsp
"""

USE = """
import copy

import torch
import torch.nn.functional as F

from dsp_kernels import GroupLayout, permuted_grouped_conv2d
from dsp_kernels.backends import native_module
from dsp_kernels.program import Program
import dsprune

assert native_module().cpu_isa() in ("generic", "neon")
torch.manual_seed(0)
layout = GroupLayout(5, 7, [((0, 2, 4), (1, 5, 6)), ((1, 2, 3), (0, 2))])  # filters 3 and 4 are dead
x = torch.randn(2, 5, 9, 10, dtype=torch.float64, requires_grad=True)
weight = torch.randn(layout.weight_numel((3, 3)), dtype=torch.float64, requires_grad=True)
bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
residual = torch.randn(2, 7, 9, 10, dtype=torch.float64, requires_grad=True)
inputs = (x, weight, bias, residual)
ACTS = {"threshold(0.25, -1)": lambda v: F.threshold(v, 0.25, -1.0), "erf": torch.erf}
for name, act in ACTS.items():

    def call(*given, name=name, backend=None):
        x, weight, bias, residual = given
        how = dict(kernel_size=3, padding=1, activation=name, backend=backend)
        return permuted_grouped_conv2d(x, weight, layout, bias, residual=residual, **how)

    dense = layout.unpack(weight, (3, 3))
    expected = act(F.conv2d(x, dense, bias, padding=1) + residual)
    torch.testing.assert_close(call(*inputs), expected)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, grad)
    torch.testing.assert_close(torch.autograd.grad(call(*inputs), inputs, grad), wanted)
    floats = [value.detach().float().requires_grad_() for value in inputs]
    with torch.no_grad():
        torch.testing.assert_close(call(*floats, backend="native"), expected.float())
    out = call(*floats, backend="native")
    torch.testing.assert_close(out, expected.float())
    torch.testing.assert_close(
        torch.autograd.grad(out, floats, grad.float()), tuple(value.float() for value in wanted)
    )
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)

    program = Program((5, 9, 10))
    added = program.conv(
        program.input, weight.detach().float(), layout, bias.detach().float(), kernel_size=3, padding=1
    )
    made = program.conv2d(added, dense.detach().float()[:, [0, 1, 2, 3, 4, 0, 1]], padding=1, activation=name)
    made = program.step("repeat", x=made, scale_h=2, scale_w=3)
    program.build(program.activation(made, name))
    first = F.conv2d(x, dense, bias, padding=1)
    second = act(F.conv2d(first, dense[:, [0, 1, 2, 3, 4, 0, 1]], padding=1))
    repeated = second.repeat_interleave(2, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(program(x.detach().float()), act(repeated).float(), rtol=1e-5, atol=1e-5)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        with torch.no_grad():
            self.b.weight[:3, 2:4] = 0
            self.c.weight[:, 1] = 0  # filter 1 of b goes, through the repetition

    def forward(self, x):
        y = self.b(F.threshold(self.a(x), 0.3, 0.1)).erf()
        return F.threshold(self.c(y.repeat_interleave(2, 3)), 0.0, -0.5)


model = Net().eval()
packed = dsprune.pack(model, torch.randn(1, 3, 8, 8))
layers = {getattr(layer, "dense_name", None): layer for layer in packed.modules()}
assert layers["b"].weight.numel() == (2 * 4 + 3 * 6) * 9  # the filter that nobody reads is dead
fused = [layers[name].activation for name in "abc"]
assert fused == ["threshold(0.3, 0.1)", "erf", "threshold(0.0, -0.5)"]
for size in (8, 11):
    x = torch.randn(2, 3, size, size + 1)
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(packed(x), expected.float(), rtol=1e-4, atol=1e-5)
    assert packed.program_reason is None, packed.program_reason
"""


def insert(path: Path, before: str, text: str) -> None:
    old = path.read_text(encoding="utf-8")
    assert old.count(before) == 1, (path, before)
    path.write_text(old.replace(before, text.lstrip("\n") + before), encoding="utf-8")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_activation_a_step_and_an_operator(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    insert(tree / "csrc/core/activations.def", "\n#undef DSP_CLAMP", ROWS_OF_THE_CORE)
    insert(tree / "csrc/core/activate.h", "\n// Out of line:", CURVES)
    insert(tree / "dsp_kernels/activations.py", ")\n\n_found", ROWS_OF_PYTHON)
    insert(tree / "csrc/program/steps.def", "\n#undef DSP_STEP\n", FIELDS)
    (tree / "csrc/program/steps/repeat.cpp").write_text(STEP, encoding="utf-8")
    insert(tree / "python/dsprune/operators.py", ")\n\n_UNKNOWN", OPERATORS)
    # The least instruction set, little optimised: the same sources in a fraction of the time.
    small = "-DDSP_WERROR=ON -DDSP_WIDE=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    built = build_in_place(tree, DSP_KERNELS_NATIVE="1", DSP_KERNELS_CUDA="0", DSP_KERNELS_CMAKE_ARGS=small)
    assert built.returncode == 0, built.stdout[-4000:]
    ran = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tree,
        env=clean_environment(PYTHONPATH=f"{tree}:{tree / 'python'}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
