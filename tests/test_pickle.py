"""Packed networks as pickles: the same outputs in the same structure, here and elsewhere, and no code."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree

import dsprune
from dsprune.graph import Limits
from dsprune.guards import Operation, Size, evaluate, parse
from dsprune.packed_graph import PackedGraph

# torch's own serialisation warns about the class of its specifications.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclasses.dataclass
class Result:
    logits: Tensor
    features: Tensor


_pytree.register_dataclass(Result)


class Net(nn.Module):
    """Two outputs in a structure of one's choice, after two branches whose sizes must agree."""

    def __init__(self, structure: str) -> None:
        super().__init__()
        self.structure = structure
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = self.b(F.relu(self.a(F.max_pool2d(x, 2))))
        z = F.interpolate(y, scale_factor=2.0) + x.mean(1, keepdim=True)
        return {
            "tensor": lambda: z,
            "tuple of one": lambda: (z,),
            "list": lambda: [y, z],
            "dict in a tuple": lambda: (y, {"z": z, "nothing": None}),
            "named tuple": lambda: Pair(y, z),
            "dataclass": lambda: Result(y, z),
            "model output": lambda: model_output(y, z),
        }[self.structure]()


def model_output(y: Tensor, z: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=z, hidden_states=(y,))


STRUCTURES = ("tensor", "tuple of one", "list", "dict in a tuple", "named tuple", "dataclass", "model output")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 12 * 8).view(2, 3, 12, 8).sin()


@functools.cache
def packed_of(structure: str) -> tuple[dsprune.PackedNetwork, nn.Module]:
    torch.manual_seed(0)
    model = nets.structured_zeros(Net(structure), 0).eval()
    return dsprune.pack(model, torch.randn(2, 3, 8, 8)), model


def same(given: Any, wanted: Any) -> None:
    assert type(given) is type(wanted)
    assert [p for p, _ in _pytree.tree_flatten_with_path(given)[0]] == [
        p for p, _ in _pytree.tree_flatten_with_path(wanted)[0]
    ]
    leaves = zip(_pytree.tree_leaves(given), _pytree.tree_leaves(wanted), strict=True)
    for one, other in leaves:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def by_torch(packed: dsprune.PackedNetwork) -> Any:
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda packed: pickle.loads(pickle.dumps(packed)),
    "torch.save": by_torch,
    "deepcopy": copy.deepcopy,
    "pickle of a deepcopy": lambda packed: pickle.loads(pickle.dumps(copy.deepcopy(packed))),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_comes_back_is_what_went(structure: str, way: str) -> None:
    if structure == "model output":
        pytest.importorskip("transformers.modeling_outputs")
    packed, model = packed_of(structure)
    other = WAYS[way](packed)
    assert packed.fused and other.fused and isinstance(other.network, PackedGraph)
    with torch.no_grad():
        same(other(IMAGES), model(IMAGES))
        if structure == "tensor":
            other.network.get_submodule("b").weight.mul_(2)
            same(packed(IMAGES), model(IMAGES))


@pytest.mark.parametrize("make", [nets.Residual, nets.Zoo])
def test_networks_with_a_program_and_of_many_operators(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    packed = dsprune.pack(nets.structured_zeros(make()).eval(), torch.randn(1, 3, 16, 16))
    x = torch.randn(3, 3, 22, 18)
    with torch.no_grad():
        expected = packed(x)
        other = pickle.loads(pickle.dumps(packed))
        assert torch.equal(other(x), expected)
        assert other.program_reason == packed.program_reason
    assert list(other.state_dict()) == list(packed.state_dict())
    assert [(n.name, str(n.target)) for n in other.network.graph.nodes] == [
        (n.name, str(n.target)) for n in packed.network.graph.nodes
    ]
    saved = other.dense_model().state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in packed.dense_model().state_dict().items())


@pytest.mark.parametrize("train", [False, True])
def test_a_pickle_holds_no_code_and_no_second_copy(train: bool) -> None:
    torch.manual_seed(0)
    packed = dsprune.pack(dsprune.models.cifar_resnet(20).eval(), torch.randn(1, 3, 32, 32), train=train)
    with torch.no_grad():
        packed(torch.randn(1, 3, 32, 32))
    data = pickle.dumps(packed)
    assert not any(word in data for word in (b"def forward", b"import ", b"lambda", b"_code", b"eval("))
    weights = sum(value.numel() * value.element_size() for value in packed.state_dict().values())
    assert len(data) < (1.5 if train else 2.5) * weights  # fused: what it was packed from goes with it


def test_hooks_and_replaced_layers_go_along() -> None:
    packed = copy.deepcopy(packed_of("tensor")[0])
    packed.network.register_forward_hook(_double)
    packed.network.b = nn.Conv2d(packed.network.b.in_channels, 8, 1)  # type: ignore[union-attr,arg-type]
    other = pickle.loads(pickle.dumps(packed))
    with torch.no_grad():
        same(other.network(IMAGES), packed.network(IMAGES))
    assert len(other.network._forward_hooks) == 1


def _double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_a_function_without_a_name_is_refused() -> None:
    packed = copy.deepcopy(packed_of("tensor")[0])
    graph = packed.network.graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    node.target = lambda *args: args[0]
    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(packed)


def _run(packed: dsprune.PackedNetwork, x: Tensor, out: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        out.put((packed(x).tolist(), packed.program_reason))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_another_process(method: str) -> None:
    torch.manual_seed(0)
    packed = dsprune.pack(nets.structured_zeros(nets.Residual()).eval(), torch.randn(1, 3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = packed(x)
    context = multiprocessing.get_context(method)
    out = context.Queue()
    process = context.Process(target=_run, args=(packed, x, out))
    process.start()
    values, reason = out.get(timeout=1200)
    process.join(60)
    assert process.exitcode == 0 and reason == packed.program_reason
    assert torch.equal(torch.tensor(values), expected)


def test_a_file_read_by_a_process_that_has_never_packed(tmp_path: Path) -> None:
    packed, model = packed_of("dict in a tuple")
    path = tmp_path / "packed.pt"
    torch.save(packed, path)
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2])\n"
        "p = torch.load(sys.argv[1], weights_only=False)\n"
        "x = torch.linspace(-1, 1, 2 * 3 * 12 * 8).view(2, 3, 12, 8).sin()\n"
        "with torch.no_grad(): y, rest = p(x)\n"
        "torch.save((y, rest), sys.argv[1] + '.out')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(path), str(Path(__file__).parent)], check=True)
    with torch.no_grad():
        same(torch.load(f"{path}.out", weights_only=True), model(IMAGES))


# ---- assumptions on sizes ----


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("L['x'].size()[2] == 2*(L['x'].size()[2]//2)", lambda h, w: h % 2 == 0),
        ("2 <= L['x'].size()[3] and (L['x'].size()[2] + -1) % 3 != 0", lambda h, w: w >= 2 and (h - 1) % 3),
        ("1 < L['x'].size()[2] <= L['x'].size()[3] < 9", lambda h, w: 1 < h <= w < 9),
        (
            "not max(L['x'].size()[2], 4) > min(7, L['x'].size()[3]) or False",
            lambda h, w: max(h, 4) <= min(7, w),
        ),
        ("L['x'].size()[2] / 2 == 2.5", lambda h, w: h == 5),
        ("abs(-L['x'].size()[2] ** 2) > 17", lambda h, w: h * h > 17),
    ],
)
def test_guards_are_what_python_makes_of_them(text: str, wanted: Any) -> None:
    guard = pickle.loads(pickle.dumps(parse([text], {"L['x']": 0})))
    for h in range(1, 10):
        for w in range(1, 10):
            assert bool(evaluate(guard, [(1, 3, h, w)])) == bool(wanted(h, w)), (h, w)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "L['y'].size()[0] == 1", "x.size()[0]", "(lambda: 1)()", "L['x'].shape[0]", "1 +",
     "L['x'].size()[0] if 1 else 2", "[1][0]", "'a' == 'a'", "(" * 300 + "1" + ")" * 300],
)  # fmt: skip
def test_other_guards_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        parse([text], {"L['x']": 0})


def test_long_guards_are_refused() -> None:
    with pytest.raises(ValueError, match="more than"):
        parse(["L['x'].size()[0] == 1 and " * 20_000 + "True"], {"L['x']": 0})


def test_limits_compare_as_data() -> None:
    guard = parse(["L['x'].size()[2] == L['y'].size()[2]"], {"L['x']": 0, "L['y']": 1})
    nested = parse(["L['x']['y'][1].size()[0] == 3"], {"L['x']['y'][1]": 2})
    assert evaluate(nested, [None, None, (3,)]) is True
    assert guard == Operation("and", (Operation("==", (Size(0, 2), Size(1, 2))),))
    ranges = (((0, None), (3, 3), (0, None), (0, 64)),) * 2
    limits = Limits(ranges, guard)
    assert hash(limits) == hash(pickle.loads(pickle.dumps(limits))) and limits == Limits(ranges, guard)
    assert limits.admit([(1, 3, 5, 64), (1, 3, 5, 4)]) and not limits.admit([(1, 3, 5, 4), (1, 3, 6, 4)])
    assert not limits.admit([(1, 3, 5, 65), (1, 3, 5, 4)])
