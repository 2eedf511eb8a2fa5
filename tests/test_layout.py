"""GroupLayout: what it accepts, what it refuses, and what it says about itself."""

from __future__ import annotations

import copy
import json
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from conv_cases import random_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from dsp_kernels import GroupLayout

EXAMPLE = GroupLayout(5, 6, [([4, 0, 2], [1, 4]), (range(5), [0]), ([3], [])])

layouts = st.builds(
    lambda seed, i, o, g: random_layout(random.Random(seed), i, o, g),
    st.integers(0, 2**31),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 8),
)


@pytest.mark.parametrize(
    "of",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda v: torch.tensor(v, dtype=torch.int32),
        lambda v: map(np.int64, v),
    ],
    ids=["list", "tuple", "numpy", "tensor", "int32 tensor", "iterator of numpy ints"],
)
def test_any_index_sequence_gives_the_same_layout(of: Any) -> None:
    layout = GroupLayout(5, 6, [(of([4, 0, 2]), of([1, 4])), (range(5), of([0])), ([3], [])])
    assert layout == EXAMPLE
    assert all(type(i) is int for group in layout.groups for part in group for i in part)


def test_order_is_kept_and_counts_follow() -> None:
    assert EXAMPLE.groups == (((4, 0, 2), (1, 4)), ((0, 1, 2, 3, 4), (0,)), ((3,), ()))
    assert EXAMPLE.pairs == 2 * 3 + 1 * 5
    assert EXAMPLE.weight_numel(3) == 99
    assert EXAMPLE.weight_numel((3, 2)) == 66
    assert EXAMPLE.live_filters == (0, 1, 4)
    assert EXAMPLE.dead_filters == (2, 3, 5)
    assert GroupLayout(9, 4, [([7, 2], [3]), ([2, 5], [0]), ([8], [])]).used_channels == (2, 5, 7)


@pytest.mark.parametrize(
    "empty",
    [[], (), np.array([], dtype=np.int64), torch.tensor([])],
    ids=["list", "tuple", "numpy", "tensor"],
)
def test_a_group_without_filters_or_anything_is_kept(empty: Any) -> None:
    layout = GroupLayout(3, 2, [([0], empty), (empty, empty)])
    assert layout.groups == (((0,), ()), ((), ()))
    assert layout.pairs == 0
    assert layout.used_channels == ()


def test_no_groups_means_all_filters_are_dead() -> None:
    layout = GroupLayout(3, 4, [])
    assert layout.dead_filters == (0, 1, 2, 3)
    assert layout.weight_numel(3) == 0
    assert not layout.mask().any()
    assert layout.pack(torch.ones(4, 3, 1, 1)).shape == (0,)
    assert layout.unpack(torch.ones(0), 2).equal(torch.zeros(4, 3, 2, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0, 1, []), ValueError, "in_channels must be at least 1, got 0"),
        ((1, -2, []), ValueError, "out_channels must be at least 1, got -2"),
        ((1.5, 1, []), TypeError, "in_channels must be an int"),
        ((True, 1, []), TypeError, "in_channels must be an int"),
        (("3", 1, []), TypeError, "in_channels must be an int"),
        ((2, 2, 7), TypeError, "groups must be a sequence"),
        ((2, 2, "ab"), TypeError, "groups must be a sequence"),
        ((2, 2, [[0]]), TypeError, r"groups\[0\] must be a pair"),
        ((2, 2, [([0], [1]), 3]), TypeError, r"groups\[1\] must be a pair"),
        ((2, 2, [([0], 1)]), TypeError, r"groups\[0\] filters must be a sequence"),
        ((2, 2, [("01", [1])]), TypeError, r"groups\[0\] channels must be a sequence"),
        ((2, 2, [([0.0], [1])]), TypeError, r"groups\[0\] channels must hold integers, got 0.0"),
        ((2, 2, [([True], [1])]), TypeError, r"groups\[0\] channels must hold integers, got True"),
        ((2, 2, [(torch.tensor([0.0]), [1])]), TypeError, "1-D sequence of integers, got torch.float32"),
        ((2, 2, [(np.array([[0]]), [1])]), TypeError, "1-D sequence of integers, got int64 of shape"),
        ((2, 2, [(np.array([True]), [1])]), TypeError, "1-D sequence of integers, got bool"),
        ((2, 2, [([2], [1])]), ValueError, r"groups\[0\] channels holds index 2; accepted are 0 to 1"),
        ((2, 2, [([-1], [1])]), ValueError, r"groups\[0\] channels holds index -1"),
        ((2, 2, [([0], [0]), ([1], [2])]), ValueError, r"groups\[1\] filters holds index 2"),
        ((3, 2, [([0, 2, 0], [1])]), ValueError, r"groups\[0\] channels holds index 0 more than once"),
        ((3, 2, [([0], [1, 1])]), ValueError, r"groups\[0\] filters holds index 1 more than once"),
        ((3, 3, [([0], [1]), ([1], [2, 1])]), ValueError, r"groups\[1\] holds filter 1, which groups\[0\]"),
        ((3, 6, [([], [0, 1, 2, 3, 4])]), ValueError, "has filters .*5 in all.* but no channels"),
        ((2**31, 1, []), ValueError, "in_channels is 2147483648; a plan holds at most"),
    ],
)
def test_bad_layouts_are_refused_by_name(
    arguments: tuple[Any, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        GroupLayout(*arguments)


@settings(max_examples=50)
@given(layouts)
def test_mask_says_who_reads_what(layout: GroupLayout) -> None:
    mask = layout.mask()
    assert mask.dtype == torch.bool
    reads = {(f, c) for channels, filters in layout.groups for f in filters for c in channels}
    assert {(f, c) for f, c in mask.nonzero().tolist()} == reads
    assert mask.shape == (layout.out_channels, layout.in_channels)


@settings(max_examples=50)
@given(layouts)
def test_from_mask_groups_equal_rows_in_the_order_of_their_first_filter(layout: GroupLayout) -> None:
    mask = layout.mask()
    again = GroupLayout.from_mask(mask)
    assert again.mask().equal(mask)
    firsts = [filters[0] for _, filters in again.groups]
    assert firsts == sorted(firsts)
    assert all(list(part) == sorted(part) for group in again.groups for part in group)
    assert len({channels for channels, _ in again.groups}) == len(again.groups)
    assert GroupLayout.from_mask(mask.numpy()) == again
    assert again.live_filters == layout.live_filters


def test_from_mask_counts_only_rows_that_are_not_empty() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    mask[2] = False
    assert len(GroupLayout.from_mask(mask, max_groups=3).groups) == 3
    with pytest.raises(ValueError, match="mask has 3 distinct rows that are not empty, max_groups is 2"):
        GroupLayout.from_mask(mask, max_groups=2)
    with pytest.raises(ValueError, match="mask has 33 distinct rows"):
        GroupLayout.from_mask(torch.eye(33, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mask", "error", "says"),
    [
        (torch.ones(2, 3), TypeError, "mask must be a bool tensor, got torch.float32"),
        (np.ones((2, 3), dtype=np.int64), TypeError, "mask must be a bool tensor, got int64"),
        ([[True]], TypeError, "mask must be a bool tensor, got list"),
        (torch.ones(3, dtype=torch.bool), ValueError, r"mask must have shape .* got \(3,\)"),
        (torch.ones(3, 2, 1, 1, dtype=torch.bool), ValueError, r"mask must have shape .* got \(3, 2, 1, 1\)"),
        (torch.ones(0, 2, dtype=torch.bool), ValueError, r"mask must have shape .* got \(0, 2\)"),
    ],
)
def test_bad_masks_are_refused_by_name(mask: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        GroupLayout.from_mask(mask)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (2.0, TypeError), (None, TypeError)])
def test_bad_max_groups_is_refused(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_groups must be"):
        GroupLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), max_groups=value)


@settings(max_examples=50)
@given(layouts, st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_pack_and_unpack(layout: GroupLayout, kernel: tuple[int, int]) -> None:
    weight = torch.randn(layout.out_channels, layout.in_channels, *kernel)
    packed = layout.pack(weight)
    assert packed.shape == (layout.weight_numel(kernel),)
    expected = [
        weight[f, c].reshape(-1) for channels, filters in layout.groups for f in filters for c in channels
    ]
    assert packed.equal(torch.cat(expected) if expected else torch.empty(0))
    assert layout.unpack(packed, kernel).equal(torch.where(layout.mask()[:, :, None, None], weight, 0.0))
    assert layout.pack(layout.unpack(packed, kernel)).equal(packed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8])
def test_pack_and_unpack_keep_the_dtype(dtype: torch.dtype) -> None:
    weight = torch.randint(-9, 9, (6, 5, 3, 3)).to(dtype)
    packed = EXAMPLE.pack(weight)
    assert packed.dtype == dtype
    assert EXAMPLE.unpack(packed, 3).dtype == dtype
    assert EXAMPLE.unpack(packed, 3).equal(weight * EXAMPLE.mask()[:, :, None, None].to(dtype))


def test_pack_takes_strided_weights() -> None:
    weight = torch.randn(6, 5, 3, 3)
    assert EXAMPLE.pack(weight.contiguous(memory_format=torch.channels_last)).equal(EXAMPLE.pack(weight))
    assert EXAMPLE.pack(weight.flip(3)).equal(EXAMPLE.pack(weight.flip(3).contiguous()))


def test_pack_and_unpack_are_differentiable() -> None:
    weight = torch.randn(6, 5, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(EXAMPLE.pack, weight)
    packed = EXAMPLE.pack(weight).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: EXAMPLE.unpack(p, (2, 1)), packed)


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (torch.ones(5, 6, 3, 3), ValueError, r"weight must have shape \(6, 5, kh, kw\), got \(5, 6, 3, 3\)"),
        (torch.ones(6, 5), ValueError, r"weight must have shape \(6, 5, kh, kw\), got \(6, 5\)"),
        (np.ones((6, 5, 3, 3)), TypeError, "weight must be a tensor, got ndarray"),
    ],
)
def test_pack_refuses_by_name(weight: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        EXAMPLE.pack(weight)


@pytest.mark.parametrize(
    ("packed", "kernel", "error", "says"),
    [
        (torch.ones(98), 3, ValueError, r"packed must be 1-D with 99 elements \(11 pairs, kernel 3x3\)"),
        (torch.ones(99, 1), 3, ValueError, "packed must be 1-D with 99 elements"),
        (None, 3, TypeError, "packed must be a tensor, got NoneType"),
        (torch.ones(99), 0, ValueError, "kernel_size must be an int or two ints of at least 1, got 0"),
        (torch.ones(99), (3, 3, 3), ValueError, "kernel_size must be an int or two ints"),
        (torch.ones(99), "33", TypeError, "kernel_size must be an int"),
    ],
)
def test_unpack_refuses_by_name(packed: Any, kernel: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        EXAMPLE.unpack(packed, kernel)


def test_equality_and_hash_go_by_content() -> None:
    same = GroupLayout(5, 6, EXAMPLE.groups)
    assert same == EXAMPLE
    assert hash(same) == hash(EXAMPLE)
    assert len({same, EXAMPLE, GroupLayout(5, 7, EXAMPLE.groups)}) == 2
    assert GroupLayout(5, 6, [([0, 4, 2], [1, 4]), *EXAMPLE.groups[1:]]) != EXAMPLE
    assert EXAMPLE != "a layout"


@pytest.mark.parametrize("name", ["in_channels", "groups", "_plan", "new"])
def test_it_is_immutable(name: str) -> None:
    with pytest.raises(AttributeError, match="immutable"):
        setattr(EXAMPLE, name, 1)
    with pytest.raises(AttributeError, match="immutable"):
        delattr(EXAMPLE, name)


def test_copies_and_pickles_are_equal() -> None:
    assert copy.copy(EXAMPLE) == EXAMPLE
    assert copy.deepcopy({"a": EXAMPLE})["a"] == EXAMPLE
    again = pickle.loads(pickle.dumps(EXAMPLE))
    assert again == EXAMPLE
    assert again.plan().equal(EXAMPLE.plan())


def test_repr_is_short_and_says_the_sizes() -> None:
    assert repr(EXAMPLE) == "GroupLayout(5, 6, groups=[3->2, 5->1, 1->0], 3 dead)"
    assert "dead" not in repr(GroupLayout(2, 2, [([0], [0, 1])]))


@settings(max_examples=25)
@given(layouts)
def test_json_round_trip(layout: GroupLayout) -> None:
    assert GroupLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize(
    "obj",
    [
        None,
        [1, 2],
        {},
        {"in_channels": 2, "out_channels": 2},
        {"in_channels": 2, "out_channels": 2, "groups": [], "more": 1},
        {"in_channels": 2, "out_channels": 2, "groups": [[[0], [5]]]},
        {"in_channels": 2.5, "out_channels": 2, "groups": []},
        {"in_channels": 2, "out_channels": 2, "groups": None},
    ],
)
def test_bad_json_is_refused(obj: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        GroupLayout.from_json(obj)


def test_the_plan_is_a_real_tensor_whatever_surrounds_its_making() -> None:
    with FakeTensorMode():
        under_fake = GroupLayout(3, 2, [([0, 2], [1])])
    with torch.device("meta"):
        under_meta = GroupLayout(3, 2, [([0, 2], [1])])
        mask = under_meta.mask()
    with torch.inference_mode():
        under_inference = GroupLayout(3, 2, [([0, 2], [1])])
    for layout in (under_fake, under_meta, under_inference):
        plan = layout.plan()
        assert not isinstance(plan, FakeTensor)
        assert plan.device.type == "cpu"
        assert not plan.is_inference()
        assert plan.equal(GroupLayout(3, 2, [([0, 2], [1])]).plan())
    assert mask.tolist() == [[False, False, False], [True, False, True]]
