"""The plan tensor, and the order of channels that keeps groups contiguous."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from conv_cases import random_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_kernels import GroupLayout
from dsp_kernels.layout import MAGIC, decode, encode, gray_order, read_header, runs

EXAMPLE = GroupLayout(5, 6, [([4, 0, 2], [1, 5]), ([3], []), ([1], [0])])


def test_the_format() -> None:
    # fmt: off
    assert EXAMPLE.plan().tolist() == [
        0x44535031, 5, 6, 3, 7, 31, 3, 0,
        3, 2, 23, 28, 0,
        1, 0, 26, 30, 6,
        1, 1, 27, 30, 6,
        4, 0, 2, 3, 1,
        1, 5, 0,
    ]
    # fmt: on
    plan = EXAMPLE.plan()
    assert plan.dtype == torch.int32
    assert plan.is_contiguous()
    assert plan.device.type == "cpu"
    assert plan.tolist()[0] == MAGIC


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.integers(0, 8))
def test_decode_is_the_inverse(seed: int, in_channels: int, out_channels: int, n_groups: int) -> None:
    layout = random_layout(random.Random(seed), in_channels, out_channels, max(n_groups, 1))
    if n_groups == 0:
        layout = GroupLayout(in_channels, out_channels, [])
    plan = layout.plan()
    assert decode(plan) == layout
    header = read_header(plan)
    assert (header.pairs, header.live_filters) == (layout.pairs, len(layout.live_filters))
    assert encode(in_channels, out_channels, layout.groups) == plan.tolist()


@pytest.mark.parametrize("position", range(23))
@pytest.mark.parametrize("change", [1, -1, 1000, -(2**30)])
def test_a_changed_header_word_is_refused(position: int, change: int) -> None:
    plan = EXAMPLE.plan().clone()
    plan[position] += change
    # More channels than the lists name is another valid layout.
    harmless = position in (1, 2) and change > 0
    if harmless:
        assert decode(plan).groups == EXAMPLE.groups
    else:
        with pytest.raises(ValueError, match=r"plan is not a plan|holds"):
            decode(plan)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(-(2**31), 2**31 - 1)), min_size=1, max_size=4))
def test_noise_gives_a_valid_layout_or_a_value_error(changes: list[tuple[int, int]]) -> None:
    plan = EXAMPLE.plan().clone()
    for position, value in changes:
        plan[position] = value
    try:
        layout = decode(plan)
    except ValueError:
        return
    assert layout.plan().equal(plan)


@pytest.mark.parametrize("length", [0, 7, 8, 20, 30])
def test_a_truncated_plan_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="plan is not a plan"):
        decode(EXAMPLE.plan()[:length])


def test_a_longer_plan_and_other_tensors_are_refused() -> None:
    plan = EXAMPLE.plan()
    with pytest.raises(ValueError, match="31 elements and has 32"):
        decode(torch.cat([plan, plan[-1:]]))
    with pytest.raises(TypeError, match=r"int32 tensor, got torch\.int64"):
        decode(plan.long())
    with pytest.raises(ValueError, match=r"1-D, got shape \(1, 31\)"):
        decode(plan[None])


def test_sizes_beyond_32_bits_are_refused() -> None:
    channels, filters = range(70000), range(70000)
    with pytest.raises(ValueError, match="pairs is 4900000000; a plan holds at most"):
        GroupLayout(70000, 70000, [(channels, filters)])


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ([], []),
        ([3], [(3, 1)]),
        ([4, 5, 6, 2, 3], [(4, 3), (2, 2)]),
        ([2, 1, 0], [(2, 1), (1, 1), (0, 1)]),
        (range(9), [(0, 9)]),
        ([0, 2, 3, 5], [(0, 1), (2, 2), (5, 1)]),
    ],
)
def test_runs(indices: Any, expected: list[tuple[int, int]]) -> None:
    assert runs(indices) == expected
    assert [i for start, length in expected for i in range(start, start + length)] == list(indices)


def total_runs(masks: list[int], order: list[int], n_groups: int) -> int:
    return sum(
        len(runs(position for position, old in enumerate(order) if masks[old] >> g & 1))
        for g in range(n_groups)
    )


@pytest.mark.parametrize(("n_groups", "most"), [(1, 1), (2, 2), (3, 4), (4, 8)])
def test_all_atoms_present_reach_the_bound(n_groups: int, most: int) -> None:
    masks = list(range(2**n_groups)) * 2
    random.Random(0).shuffle(masks)
    assert total_runs(masks, gray_order(masks), n_groups) == most


@pytest.mark.parametrize(("n_groups", "most"), [(2, 2), (3, 4)])
def test_every_choice_of_atoms_stays_within_the_bound(n_groups: int, most: int) -> None:
    for size in range(2**n_groups + 1):
        for masks in itertools.combinations(range(2**n_groups), size):
            assert total_runs(list(masks), gray_order(masks), n_groups) <= most


@settings(max_examples=100)
@given(st.lists(st.integers(0, 15), max_size=40))
def test_four_groups_stay_within_eight_runs(masks: list[int]) -> None:
    order = gray_order(masks)
    assert sorted(order) == list(range(len(masks)))
    assert total_runs(masks, order, 4) <= 8
    seen = [masks[i] for i in order]
    assert len(runs_of_equal(seen)) == len(set(masks)), "an atom is torn apart"
    if 0 in masks:
        assert seen[-1] == 0, "channels that nobody reads come last"
    for atom in set(masks):
        members = [i for i in order if masks[i] == atom]
        assert members == sorted(members), "an atom keeps its old order"


def runs_of_equal(values: list[int]) -> list[int]:
    return [value for value, _ in itertools.groupby(values)]


@settings(max_examples=50)
@given(st.lists(st.sets(st.integers(0, 4)), max_size=20))
def test_sets_and_bit_masks_give_the_same_order(sets: list[set[int]]) -> None:
    masks = [sum(1 << g for g in s) for s in sets]
    used = sorted(set().union(*sets))
    dense = [sum(1 << used.index(g) for g in s) for s in sets]
    assert total_runs(masks, gray_order(sets), 5) == total_runs(dense, gray_order(dense), len(used))
    assert gray_order([frozenset(s) for s in sets]) == gray_order(dense)


def test_gray_order_never_needs_more_runs_than_the_given_order() -> None:
    rng = random.Random(1)
    for n_groups in (2, 3, 4, 5, 6):
        masks = [rng.randrange(2**n_groups) for _ in range(64)]
        assert total_runs(masks, gray_order(masks), n_groups) < total_runs(masks, list(range(64)), n_groups)


def test_gray_order_takes_named_groups_and_many() -> None:
    assert gray_order([{"b"}, {"a"}, {"a", "b"}, set()]) in ([0, 2, 1, 3], [1, 2, 0, 3])
    masks = [1 << g for g in range(32)]
    assert total_runs(masks, gray_order(masks), 32) == 32


@pytest.mark.parametrize(
    ("membership", "error"), [([1, -1], ValueError), ([1, {0}], TypeError), ([{0}, 3], TypeError)]
)
def test_gray_order_refuses(membership: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="groups_membership"):
        gray_order(membership)
