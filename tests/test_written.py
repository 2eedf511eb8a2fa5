"""Weights that were written, however that was done, are the weights that run; what is kept is bounded."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsprune
from dsp_kernels import _written, tail
from dsp_kernels._kept import Kept

# torch about the class of its own specifications, when they are copied.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

packing = sys.modules["dsprune.pack"]  # `dsprune.pack` is the function
X = torch.linspace(-1, 1, 2 * 3 * 10 * 10).view(2, 3, 10, 10).sin()


def packed_net() -> dsprune.PackedNetwork:
    torch.manual_seed(0)
    return dsprune.pack(nets.structured_zeros(nets.Plain()).eval(), torch.randn(1, 3, 10, 10))


def as_layers(packed: dsprune.PackedNetwork) -> Tensor:
    """What the layers give now, in torch's own arithmetic: a copy has nothing that was kept."""
    with torch.no_grad():
        return copy.deepcopy(packed.network)(X)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda w: torch.optim.SGD(w, 0.1),
    "fused SGD": lambda w: torch.optim.SGD(w, 0.1, momentum=0.9, fused=True),
    "fused Adam": lambda w: torch.optim.Adam(w, 0.1, fused=True),
    "fused AdamW": lambda w: torch.optim.AdamW(w, 0.1, fused=True),
    "fused Adagrad": lambda w: torch.optim.Adagrad(w, 0.1, fused=True),
    "fused, one layer": lambda w: torch.optim.AdamW(w[-1:], 0.1, fused=True),
    "fused, two groups": lambda w: torch.optim.AdamW(
        [{"params": w[:1]}, {"params": w[1:2]}], 0.1, fused=True
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_are_seen(name: str) -> None:
    packed = packed_net()
    weights = list(packed.network.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = OPTIMIZERS[name](weights)
    for _ in range(2):
        with torch.no_grad():
            before = packed(X)
            assert packed.program_reason is None
        packed(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = packed(X)
        assert packed.program_reason is None and not torch.allclose(after, before, rtol=1e-3)
        torch.testing.assert_close(after, as_layers(packed), rtol=1e-4, atol=1e-4)


def test_an_optimizer_of_a_flat_buffer_is_seen() -> None:
    """As those of sharded training: the network's weights are views of what the optimizer writes."""
    packed = packed_net()
    head = packed.network.head
    assert isinstance(head, nn.Linear)
    flat = nn.Parameter(torch.cat([head.weight.detach().flatten(), head.bias.detach()]))
    count = head.weight.numel()
    head.weight = nn.Parameter(flat.detach()[:count].view_as(head.weight), requires_grad=False)
    with torch.no_grad():
        before = packed(X)
    flat.grad = torch.ones_like(flat)
    torch.optim.SGD([flat], 1.0, fused=True).step()
    with torch.no_grad():
        after = packed(X)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, as_layers(packed), rtol=1e-4, atol=1e-4)


def test_an_optimizer_of_other_weights_changes_nothing() -> None:
    packed, other = packed_net(), nn.Linear(2, 2)
    with torch.no_grad():
        packed(X)
        kept = packed._runner(packed.network).find((X,))
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1, fused=True).step()
    with torch.no_grad():
        assert kept is not None and packed._runner(packed.network).find((X,)) is kept


def by_numpy(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        array = weight.detach().numpy()
        array *= 2


def by_dlpack(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(weight.detach())).mul_(2)


def by_kernel(weights: list[nn.Parameter]) -> None:
    with torch.no_grad():
        torch._fused_sgd_(
            weights, [-w.detach() for w in weights], [], weight_decay=0.0, momentum=0.0, lr=1.0,
            dampening=0.0, nesterov=False, maximize=False, is_first_step=True,
        )  # fmt: skip


UNCOUNTED: dict[str, Callable[[list[nn.Parameter]], None]] = {
    "data": lambda weights: [w.data.mul_(2) for w in weights] and None,
    "new data": lambda weights: [setattr(w, "data", 2 * w.data) for w in weights] and None,
    "vector_to_parameters": lambda weights: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(weights), weights
    ),
    "numpy": by_numpy,
    "dlpack": by_dlpack,
    "fused kernel": by_kernel,
}


@pytest.mark.filterwarnings("ignore:.*dlpack.*")
@pytest.mark.parametrize("how", UNCOUNTED)
def test_refresh_after_writes_that_torch_does_not_count(how: str) -> None:
    packed = packed_net()
    with torch.no_grad():
        before = packed(X)
        UNCOUNTED[how](list(packed.network.parameters()))
        packed.refresh()
        after = packed(X)
    assert packed.program_reason is None and not torch.allclose(after, before)
    torch.testing.assert_close(after, as_layers(packed), rtol=1e-4, atol=1e-4)


def test_exported_linear_layers_hear_of_optimizers() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    x = torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(tail.linear(x, weight, None), torch.full((2, 3), 4.0))
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 1.0, fused=True).step()
    with torch.no_grad():
        assert torch.equal(tail.linear(x, weight, None), torch.zeros(2, 3))


def test_listeners_go_with_their_networks() -> None:
    gc.collect()
    before = sum(reference() is not None for reference in _written._listeners)
    packed = packed_net()
    with torch.no_grad():
        packed(X)
    assert sum(reference() is not None for reference in _written._listeners) > before
    del packed
    gc.collect()
    assert sum(reference() is not None for reference in _written._listeners) <= before


def test_optimizers_still_compile() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], 1.0)
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert torch.equal(weight.detach(), torch.zeros(3))


# ---- train ----


def test_train_on_a_fused_network_says_that_it_does_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3)).eval()
    packed = dsprune.pack(model, X)
    with pytest.warns(UserWarning, match=r"fused for inference.*train=True"):
        assert packed.train() is packed
    outer = nn.Sequential(packed).train().eval().train()  # said once
    assert packed.training and torch.equal(packed(X), packed(X))
    torch.testing.assert_close(outer(X), model(X), rtol=1e-4, atol=1e-4)
    assert not packed.eval().training


def test_train_on_packed_layers_trains() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3)).eval()
    packed = dsprune.pack(model, X, train=True)
    torch.manual_seed(0)
    assert not torch.equal(packed.train()(X), packed(X))
    assert torch.equal(packed.eval()(X), packed(X))


# ---- plans for other sizes ----


class Fixed(nn.Module):
    """Its export fixes the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(x.reshape(int(x.shape[0]), 6, -1).mean(-1))


def test_few_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "KEPT_VARIANTS", 2)
    torch.manual_seed(0)
    model = nets.structured_zeros(Fixed()).eval()
    packed = dsprune.pack(model, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        for batch in (3, 4, 5, 3, 2):
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)
            assert len(packed._variants) <= 2 and len(packed._caches) <= 3
    assert len(packed._variants) == 2


def test_the_cache() -> None:
    kept: Kept[str, int] = Kept(2)
    kept["a"], kept["b"] = 1, 2
    assert kept["a"] == 1 and kept.get("c") is None and kept.put("c", 3) == 3
    assert list(kept.items()) == [("a", 1), ("c", 3)] and "b" not in kept and len(kept) == 2
    list(kept.values())
    kept["d"] = 4
    assert list(kept) == ["c", "d"]
    kept.drop(lambda value: value == 3)
    assert list(kept) == ["d"] and kept.pop("c", None) is None
    for other in (copy.copy(kept), copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert not other and other.limit == 2
    with pytest.raises(ValueError, match="limit"):
        Kept(0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: kept.put(str(i % 7), i) and kept.get(str(i % 5)), range(2000)))
    assert len(kept) == 2
