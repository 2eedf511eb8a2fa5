"""Exported graphs freed of in-place operators: against the network itself, and against tracing it again."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsprune import functional, graph


class Written(nn.Module):
    """A convolution whose result is written into in the ways that a name says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = self.conv(x)
        if self.how == "activation":
            return F.relu(self.norm(y), inplace=True) * y
        if self.how == "name read after":
            F.relu_(y)
            return y + 1
        if self.how == "read before and after":
            z = y * 2
            y.add_(z)
            return y - z
        if self.how == "twice":
            z = F.relu(y, inplace=True)
            z.add_(1)
            return z * 2 + y
        if self.how == "several":
            a = F.hardtanh(y, -0.5, 0.5, inplace=True)
            b = F.silu(a, inplace=True)
            return y, b.mul_(3.0), a.clamp_(min=0.25)
        if self.how == "view before":
            z = y[:, 1:]
            y.relu_()
            return z * 2
        if self.how == "view between":
            z = F.relu(y, inplace=True)
            v = y.view(y.shape[0], -1)
            z.add_(1)
            return v * 2
        if self.how == "view written":
            y[:, :2].relu_()
            return y
        if self.how == "dropout before":
            z = self.drop(y)
            y.relu_()
            return z
        if self.how == "dropout between":
            return self.drop(F.relu(y, inplace=True)).add_(1) - y
        if self.how == "parameter":
            return y.add_(self.norm.weight.view(4, 1, 1)).mul_(self.norm.running_var.view(4, 1, 1))
        if self.how == "two names":
            z = F.relu(y, inplace=True)
            return y.add_(z), z
        if self.how == "comparison":
            return y.gt_(0.1) * 0.5
        if self.how == "wider":
            return y.half().add_(y) * y
        if self.how == "itself":
            return y.mul_(y)
        if self.how == "input":
            x.relu_()
            return self.conv(x)
        if self.how == "chunks":
            a, b = y.chunk(2, 1)
            a.relu_()
            return torch.cat([a, b, y], 1)
        raise AssertionError(self.how)


REWRITTEN = (
    "activation", "name read after", "read before and after", "twice", "several", "itself", "parameter",
    "two names", "dropout before", "dropout between",
)  # fmt: skip
TRACED_AGAIN = (
    "view before", "view between", "view written", "comparison", "wider", "input", "chunks",
)  # fmt: skip


def targets(module: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("how", [*REWRITTEN, *TRACED_AGAIN])
def test_values_are_the_networks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Written(how).eval()
    x = torch.randn(2, 3, 6, 5)
    simple: list[bool] = []

    def asked(exported: fx.Graph) -> bool:
        simple.append(functional.is_simple(exported))
        return simple[-1]

    monkeypatch.setattr(graph, "is_simple", asked)
    rewritten = graph.trace(model, x).module
    assert simple == [how in REWRITTEN]
    monkeypatch.setattr(graph, "is_simple", lambda _: False)
    if "dropout" not in how:  # torch's own functional form of it is no longer the same tensor
        assert targets(rewritten) == targets(graph.trace(model, x).module)
    for size in ((2, 3, 6, 5), (3, 3, 4, 7)):
        images = torch.randn(size)
        theirs, ours = images.clone(), images.clone()
        with torch.no_grad():
            expected, actual = model(theirs), rewritten(ours)
        torch.testing.assert_close((actual, ours), (expected, theirs), rtol=0, atol=0)
    assert (how == "input") == any(  # what forward writes into its arguments stays
        node.target._schema.is_mutable
        for node in rewritten.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )


def test_a_training_batch_norm_is_not_taken_for_one_in_evaluation() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

    module = graph.trace(Own().eval(), torch.randn(2, 3, 4, 4)).module
    x = 3 + 2 * torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(module(x), Own()(x), rtol=1e-6, atol=1e-6)
