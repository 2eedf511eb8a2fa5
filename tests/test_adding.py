"""What docs/developing.md says that one touches to add an activation or a step of programs is enough.

A copy of the tree gets both, is built and runs them: once with a parameter and the output to go by in the
backward, once with the input.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import build_in_place, clean_environment, copy_tree

ROWS_OF_THE_CORE = """
DSP_CURVE(LEAKY_RELU, leaky_relu, 3, 1)
DSP_CURVE(SILU, silu, 4, 0)
"""

CURVES = """
DSP_INLINE Vec curve_leaky_relu(Vec v, const float* p) {
  return add(max(zero(), v), mul(set1(p[0]), min(zero(), v)));
}
DSP_INLINE Vec curve_silu(Vec v, const float*) {
  float lanes[kLanes];
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] /= 1.0f + __builtin_expf(-lanes[i]);
  return load(lanes);
}
"""

ROWS_OF_PYTHON = """
    Activation(
        "leaky_relu",
        3,
        lambda x, slope: F.leaky_relu(x, slope),
        lambda grad, y, slope: torch.where(y > 0, grad, grad * slope),
        "output",
        ("slope",),
    ),
    Activation(
        "silu",
        4,
        lambda x: F.silu(x),
        lambda grad, x: grad * torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
        "input",
    ),
"""

FIELDS = """
// Each pixel scale_h x scale_w times.
DSP_STEP(REPEAT, repeat, 11)
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
import torch
import torch.nn.functional as F

from dsp_kernels import GroupLayout, permuted_grouped_conv2d
from dsp_kernels.backends import native_module
from dsp_kernels.program import Program

assert native_module().cpu_isa() in ("generic", "neon")
torch.manual_seed(0)
layout = GroupLayout(5, 7, [((0, 2, 4), (1, 5, 6)), ((1, 2, 3), (0, 2))])  # filters 3 and 4 are dead
x = torch.randn(2, 5, 9, 10, dtype=torch.float64, requires_grad=True)
weight = torch.randn(layout.weight_numel((3, 3)), dtype=torch.float64, requires_grad=True)
bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
residual = torch.randn(2, 7, 9, 10, dtype=torch.float64, requires_grad=True)
inputs = (x, weight, bias, residual)
ACTS = {"leaky_relu(0.25)": lambda v: F.leaky_relu(v, 0.25), "silu": F.silu}
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
"""


def insert(path: Path, before: str, text: str) -> None:
    old = path.read_text(encoding="utf-8")
    assert old.count(before) == 1, (path, before)
    path.write_text(old.replace(before, text.lstrip("\n") + before), encoding="utf-8")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_an_activation_and_a_step(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path)
    insert(tree / "csrc/core/activations.def", "\n#undef DSP_CLAMP", ROWS_OF_THE_CORE)
    insert(tree / "csrc/core/activate.h", "\n// Out of line:", CURVES)
    insert(tree / "dsp_kernels/activations.py", ")\n\n_found", ROWS_OF_PYTHON)
    insert(tree / "dsp_kernels/activations.py", "import torch.nn.functional", "import torch\n")
    insert(tree / "csrc/program/steps.def", "\n#undef DSP_STEP\n", FIELDS)
    (tree / "csrc/program/steps/repeat.cpp").write_text(STEP, encoding="utf-8")
    # The least instruction set, little optimised: the same sources in a fraction of the time.
    small = "-DDSP_WERROR=ON -DDSP_WIDE=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0"
    built = build_in_place(tree, DSP_KERNELS_NATIVE="1", DSP_KERNELS_CUDA="0", DSP_KERNELS_CMAKE_ARGS=small)
    assert built.returncode == 0, built.stdout[-4000:]
    ran = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tree,
        env=clean_environment(PYTHONPATH=str(tree)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
