"""Prune masks on any layer, of any grain, and on shared weights: packed, finetuned, in files and back."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import dsprune


class Net(nn.Module):
    """A layer of each kind that a mask may be on, and one convolution with channels to drop."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.line = nn.Conv1d(6, 4, 3)
        self.fc = nn.Linear(4, 5)
        with torch.no_grad():
            self.b.weight[:4, [1, 2]] = 0
            self.b.weight[4:, [5]] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(F.relu(self.b(F.relu(self.norm(self.a(x))))))
        return self.fc(self.line(x.flatten(2)).mean(2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in "ab")
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(F.relu(self.a(x)))


SITES = [
    ("a", "weight"), ("a", "bias"), ("b", "weight"), ("b", "bias"), ("norm", "weight"), ("norm", "bias"),
    ("up", "weight"), ("line", "weight"), ("line", "bias"), ("fc", "weight"), ("fc", "bias"),
]  # fmt: skip
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
ignore_unused = pytest.mark.filterwarnings("ignore:the masks of:UserWarning")


def masked_net(amount: float = 0.3) -> Net:
    model = Net().eval()
    prune.custom_from_mask(model.b, "weight", model.b.weight != 0)
    for name, tensor in SITES:
        prune.random_unstructured(model.get_submodule(name), tensor, amount)
    return model


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in model.state_dict().items() if n.endswith("_mask")}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every weight as it is used."""
    return {
        f"{prefix}.{tensor}": getattr(module, tensor).detach().clone()
        for prefix, module in model.named_modules()
        for tensor in ("weight", "bias")
        if getattr(module, tensor, None) is not None
    }


def exact(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The masked network by float64, from its own forward pass."""
    with torch.no_grad():
        model(x)  # a mask's weight is what the last pass made it
        out = dsprune.graph.clean_copy(model).double().eval()(x.double())
    return out


def trained(network: nn.Module, x: torch.Tensor, steps: int = 3) -> nn.Module:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        network(x).square().sum().backward()
        optimizer.step()
    return network.eval()


@ignore_unused
def test_masks_of_any_layer_and_grain_survive_packed_finetuning() -> None:
    model = masked_net()
    before = masks(model)
    packed = trained(dsprune.pack(model, X, train=True), X)
    assert dsprune.unpack(packed, model) is model
    assert {n: bool(torch.equal(v, before[n])) for n, v in masks(model).items()} == dict.fromkeys(
        before, True
    )
    now = weights(model)  # before any forward pass of it
    for name, mask in before.items():
        assert not now[name.removesuffix("_mask")][mask == 0].any(), name
    with torch.no_grad():
        torch.testing.assert_close(packed(X).double(), exact(model, X), rtol=1e-4, atol=1e-4)


@ignore_unused
def test_packed_finetuning_is_masked_finetuning() -> None:
    model = masked_net().double()
    packed = trained(dsprune.pack(model, X.double(), train=True), X.double())
    trained(model, X.double())(X.double())  # a weight under a mask is as the last pass made it
    fresh = masked_net().double()
    dsprune.unpack(packed, fresh)
    for (name, one), other in zip(weights(model).items(), weights(fresh).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


@ignore_unused
@pytest.mark.parametrize("train", [False, True])
def test_masks_survive_files(tmp_path, train: bool) -> None:
    model = masked_net()
    packed = dsprune.pack(model, X, train=train)
    with torch.no_grad():
        expected = packed.eval()(X)
    dsprune.save(packed, tmp_path / "p")
    filled = Net()
    loaded = dsprune.load(tmp_path / "p", filled).eval()
    with torch.no_grad():
        assert torch.equal(loaded(X), expected)
        torch.testing.assert_close(filled.eval()(X), expected, rtol=1e-4, atol=1e-4)
    other = masked_net(0.5)
    with torch.no_grad():
        other(X)
    dsprune.unpack(loaded, other)
    assert all(torch.equal(v, masks(model)[n]) for n, v in masks(other).items())
    if train:  # the file's masks are held from now on
        again = masked_net()
        dsprune.unpack(trained(loaded, X), again)
        for name, mask in masks(model).items():
            assert not weights(again)[name.removesuffix("_mask")][mask == 0].any(), name


class Named(Tied):
    """A layer by two names, whose weight another one has too."""

    def __init__(self) -> None:
        super().__init__()
        self.c = self.a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(F.relu(super().forward(x)))


@ignore_unused
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["layers", "finetuned", "named", "tied"])
def test_a_loaded_network_is_saved_as_the_same_bytes(tmp_path, kind: str, train: bool) -> None:
    make, x = (Net, X) if kind in ("layers", "finetuned") else (Named, Y)
    model = masked_net() if make is Net else make().eval()
    if kind == "tied":
        prune.ln_structured(model.a, "weight", 0.5, 2, 1)
        prune.ln_structured(model.b, "weight", 0.25, 2, 0)
    elif kind == "named":
        with torch.no_grad():
            model.a.weight[:, ::2] *= -0.0
    packed = dsprune.pack(model, x, train=train or kind == "finetuned")
    if kind == "finetuned":
        packed = trained(packed, x)
    dsprune.save(packed, tmp_path / "0")
    for i in range(2):
        again = dsprune.load(tmp_path / str(i), make(), train=train)
        dsprune.save(dsprune.load(tmp_path / str(i), make()), tmp_path / str(i + 1))
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(x), packed.eval()(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@ignore_unused
def test_masks_survive_packing_twice_and_copies() -> None:
    model = masked_net()
    packed = trained(dsprune.pack(model, X, train=True), X, 1)
    packed.train()(X)  # masked tensors are results of autograd now
    copied = copy.deepcopy(packed).eval()
    again = dsprune.pack(packed.eval(), X)
    with torch.no_grad():
        assert torch.equal(copied(X), packed(X))
        torch.testing.assert_close(again(X), packed(X), rtol=1e-4, atol=1e-4)
    dsprune.unpack(again, other := masked_net(0.6))
    assert all(torch.equal(v, masks(model)[n]) for n, v in masks(other).items())


@ignore_unused
@pytest.mark.parametrize("train", [False, True])
def test_a_network_that_cannot_be_traced_keeps_its_masks(train: bool) -> None:
    class Branch(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if float(x.sum()) > -1e9 else x

    model = Branch().eval()
    prune.l1_unstructured(model.b, "weight", 0.4)
    prune.l1_unstructured(model.fc, "weight", 0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = dsprune.pack(model, X, train=train)
    before = masks(model)
    dsprune.unpack(trained(packed, X, 1), model)
    assert all(torch.equal(v, before[n]) for n, v in masks(model).items())


def tied(how: str) -> Tied:
    model = Tied().eval()
    if how == "channels":
        prune.ln_structured(model.b, "weight", 0.5, 2, 1)
    elif how == "finer":
        prune.l1_unstructured(model.a, "weight", 0.5)
    elif how == "both":
        prune.ln_structured(model.a, "weight", 0.5, 2, 1)
        prune.custom_from_mask(model.b, "weight", model.a.weight_mask)
    elif how == "apart":
        prune.ln_structured(model.a, "weight", 0.25, 2, 1)
        prune.ln_structured(model.b, "weight", 0.5, 2, 0)
    return model


@ignore_unused
@pytest.mark.parametrize("how", ["channels", "finer", "both", "apart"])
def test_a_mask_on_one_user_of_a_shared_weight_leaves_the_other_alone(tmp_path, how: str) -> None:
    model = tied(how)
    shared = (model.a._parameters.get("weight_orig", model.a._parameters.get("weight"))).detach().double()
    of_a, of_b = (shared * getattr(m, "weight_mask", torch.ones(())) for m in (model.a, model.b))
    want = F.conv2d(F.relu(F.conv2d(Y.double(), of_a, padding=1)), of_b, padding=1)
    for train in (False, True):
        packed = dsprune.pack(model, Y, train=train)
        with torch.no_grad():
            torch.testing.assert_close(packed(Y).double(), want, rtol=1e-4, atol=1e-4)
        dsprune.save(packed, tmp_path / "p")
        fresh = Tied().eval()
        loaded = dsprune.load(tmp_path / "p", fresh).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(Y).double(), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(fresh(Y).double(), want, rtol=1e-4, atol=1e-4)


@ignore_unused
@pytest.mark.parametrize("how", ["none", "channels", "both", "apart"])
def test_shared_weights_train_as_one(how: str) -> None:
    model = tied(how).double()
    packed = trained(dsprune.pack(model, Y.double(), train=True), Y.double())
    trained(model, Y.double())
    dsprune.unpack(packed, fresh := tied(how).double())
    with torch.no_grad():
        torch.testing.assert_close(fresh(Y.double()), model(Y.double()), rtol=1e-9, atol=1e-9)


def test_unpack_refuses_several_values_for_one_weight() -> None:
    apart = Tied()
    apart.b.weight = nn.Parameter(apart.a.weight.detach() + 1)
    packed = dsprune.pack(apart.eval(), Y, train=True)
    model = Tied()
    before = model.a.weight.detach().clone()
    with pytest.raises(ValueError, match="are one tensor"):
        dsprune.unpack(packed, model)
    assert torch.equal(model.a.weight, before)


def test_masks_that_save_nothing_are_named() -> None:
    class Centred(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    image = torch.randn(1, 3, 8, 8)
    for model, x in (
        (nn.Sequential(Centred(3, 16, 3), nn.ReLU(), Centred(16, 16, 3)), image),
        (nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 3)), torch.randn(1, 3, 8, 8, 8)),
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3)), torch.randn(1, 3, 9)),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3)), image),
    ):
        prune.ln_structured(model[2], "weight", 0.5, 2, 1)
        with pytest.warns(UserWarning, match=r"the masks of \['2.weight'\]"):
            packed = dsprune.pack(model.eval(), x)
        torch.testing.assert_close(packed(x), model(x), rtol=1e-4, atol=1e-4)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    prune.l1_unstructured(model[2], "weight", 0.1)
    with pytest.warns(UserWarning, match=r"the masks of \['2.weight'\]"):
        dsprune.pack(model, image)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)).eval()
    prune.ln_structured(model[2], "weight", 0.5, 2, 1)
    for train in (False, True):
        dsprune.pack(model, image, train=train)  # a warning would be an error


@pytest.mark.parametrize("change", ["load_state_dict", "step", "data", "mask", "layer"])
def test_a_fused_network_whose_layers_changed_is_not_taken_apart(tmp_path, change: str) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            with torch.no_grad():
                self.b.weight[:, ::2] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(F.relu(self.a(x)))

    model = Wide().eval()
    packed = dsprune.pack(model, X)
    same = packed.state_dict()
    packed.load_state_dict(same)
    dsprune.save(packed.to(torch.float64).to(torch.float32), tmp_path / "p")
    layer = next(module for _, module in packed.layers())
    if change == "load_state_dict":
        packed.load_state_dict({n: v + 1 if v.is_floating_point() else v for n, v in same.items()})
    elif change == "step":
        layer.weight.requires_grad_(True)
        packed(X).sum().backward()
        torch.optim.SGD([layer.weight], 0.1).step()
    elif change == "data":
        layer.weight.data[0] += 1
    elif change == "mask":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        packed.network.extra = nn.Linear(1, 1)
    for call in (
        lambda: dsprune.save(packed, tmp_path / "q"),
        lambda: dsprune.unpack(packed, Wide()),
        lambda: packed.dense_model(),
        lambda: dsprune.pack(packed, X),
        lambda: dsprune.save(packed.to(torch.float64), tmp_path / "q"),
    ):
        with pytest.raises(ValueError, match="were changed after it was packed"):
            call()
    assert not (tmp_path / "q").exists()


def test_another_size_of_a_changed_fused_network_is_refused() -> None:
    class Fixed(nn.Module):
        """Its sizes are constants of the graph."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            with torch.no_grad():
                self.b.weight[:, ::2] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(F.relu(self.a(x)))
            return x.reshape(int(x.shape[0]), int(x.shape[1]), int(x.shape[2] * x.shape[3]))

    packed = dsprune.pack(Fixed().eval(), X)
    small = X[:, :, :6, :5]
    if packed._limits.admit([small.shape]):
        pytest.skip("the tracer kept these sizes free")
    with torch.no_grad():
        packed(small)
        next(module for _, module in packed.layers()).weight.add_(1)
        with pytest.raises(ValueError, match="were changed after it was packed"):
            packed(small)


@pytest.mark.parametrize("how", ["prune", "weight_norm", "replaced"])
def test_what_save_accepts_load_takes(tmp_path, how: str) -> None:
    packed = dsprune.pack(Net().eval(), X, train=True)
    if how == "prune":
        prune.l1_unstructured(packed.network.b, "weight", 0.3)
        prune.random_unstructured(packed.network.fc, "bias", 0.5)
    elif how == "weight_norm":
        parametrizations.weight_norm(packed.network.fc)
    else:
        packed.network.fc = nn.Linear(4, 7)
    with torch.no_grad():
        expected = packed.eval()(X)
    try:
        dsprune.save(packed, tmp_path / "p")
    except ValueError as error:
        assert how != "prune" and "none of the dense network's" in str(error)
        return
    assert how == "prune"
    with torch.no_grad():
        assert torch.equal(dsprune.load(tmp_path / "p", Net()).eval()(X), expected)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_a_network_with_computed_weights_loads_into_a_fresh_one(tmp_path, norm: Any, train: bool) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        with torch.no_grad():
            model[2].weight[:4, ::2] = 0
        norm(model[0])
        norm(model[2])
        return model.eval()

    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        expected = model(X)
    packed = dsprune.pack(model, X, train=train)
    assert [name for name, _ in packed.layers()] and (packed.fused or train)
    dsprune.save(packed, tmp_path / "p")
    fresh = build()
    with torch.no_grad():
        scale = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(packed(X), expected, rtol=0, atol=scale)
        loaded = dsprune.load(tmp_path / "p", fresh)
        assert torch.equal(loaded(X), packed(X))
        assert loaded.fused or "network.0.weight" in dict(loaded.named_parameters())
        torch.testing.assert_close(fresh(X), expected, rtol=0, atol=scale)
        assert torch.equal(model(X), expected)  # left alone
