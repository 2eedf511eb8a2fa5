"""The cost model: devices, floors, forms, and the predictions of whole networks."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conv_cases import random_layout
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import dsprune
from bench import kernels
from dsp_kernels import GroupLayout, backends, cost
from dsp_kernels.conv import chain, cuda, cuda_work, tiles
from dsp_kernels.layout import gray_order, runs
from dsprune import gpu
from dsprune.models import cifar_resnet, resnet50

H200 = cost.device("H200")
HALF = torch.bfloat16
ONE = GroupLayout(64, 64, [(range(64), range(64))])


def full(channels: int, filters: int) -> GroupLayout:
    return GroupLayout(channels, filters, [(range(channels), range(filters))])


# ---- devices ----


def test_the_table_names_its_sources() -> None:
    table = cost.devices()
    assert {"H200", "H100", "A100", "RTX 3090", "L4", "RTX 4090", "B200"} <= set(table)
    for entry in table.values():
        assert entry.source and entry.bandwidth > 1e11 and entry.shared_memory >= 99 * 1024
        assert entry.matrix["bfloat16"] >= entry.matrix["tf32"] >= 0.4 * entry.matrix["float32"]
        assert 0 < entry.share_bandwidth < 1 and 0 < entry.share_matrix < 1


def test_devices_by_name_and_architecture() -> None:
    assert cost.device("sm_80").name == "A100" and cost.device("H100").arch == "sm_90"
    with pytest.raises(ValueError, match="device must be one of H200"):
        cost.device("H300")
    with pytest.raises(ValueError, match="must be a CUDA device"):
        cost.device(torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "arch", "like"),
    [
        ("NVIDIA H200", "sm_90", "H200"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "H100"),
        ("NVIDIA L40S", "sm_89", "RTX 4090"),
        ("NVIDIA L4", "sm_89", "L4"),
        ("NVIDIA RTX PRO 6000", "sm_120", "B200"),
        ("Tesla T4", "sm_75", "A100"),
    ],
)
def test_a_driver_s_name(name: str, arch: str, like: str) -> None:
    found = cost.match_device(name, arch)
    assert found.arch == arch and found.bandwidth == cost.device(like).bandwidth


def test_measured_ceilings_replace_shares() -> None:
    mine = H200.measured(4e12, {"bfloat16": 7e14})
    assert mine.bytes_per_second() == 4e12 and mine.flops_per_second(torch.bfloat16) == 7e14
    assert mine.flops_per_second(torch.float16) == pytest.approx(H200.flops_per_second(torch.float16))


def test_float32_is_not_tf32() -> None:
    assert H200.flops_per_second(torch.float32) < H200.flops_per_second(torch.float32, tf32=True)
    with pytest.raises(ValueError, match="float64"):
        H200.flops_per_second(torch.float64)


# ---- bytes, FLOPs, padding ----


def test_floor_of_a_dense_convolution_by_hand() -> None:
    conv = cost.Conv(ONE, 256, (56, 56), (3, 3), padding=(1, 1), residual=True)
    pixels = 256 * 56 * 56
    assert conv.pixels == conv.pixels_read == pixels
    assert conv.flops == 2 * 64 * 64 * 9 * pixels
    assert cost.moved(conv, 2) == 2 * (3 * 64 * pixels + 64 * 64 * 9)
    by_hand = max(conv.flops / (0.8 * 989e12), cost.moved(conv, 2) / (0.895 * 4.8e12))
    assert cost.floor(conv, H200, HALF) == pytest.approx(by_hand)


def test_a_strided_pointwise_reads_a_quarter() -> None:
    conv = cost.Conv(ONE, 2, (56, 56), stride=(2, 2))
    assert conv.pixels_read == 2 * 28 * 28
    assert cost.Conv(ONE, 2, (56, 56), (3, 3), (2, 2), (1, 1)).pixels_read == 2 * 56 * 56
    assert cost.Conv(ONE, 1, (4, 4), (1, 1), padding=(1, 1)).pixels_read == 16


def test_memory_comes_in_sectors() -> None:
    layout = GroupLayout(64, 8, [([0, 1, 40], range(8))])
    conv = cost.Conv(layout, 1, (10, 10))
    # In half precision a sector is 16 channels: two of them are read.
    assert cost.moved(conv, 2) == 100 * (32 * 2 + 8 * 2) + 3 * 8 * 2
    assert cost.moved(conv, 2, whole=True) == 100 * (64 * 2 + 8 * 2) + 3 * 8 * 2
    odd = cost.Conv(GroupLayout(13, 8, [([0], range(8))]), 1, (10, 10))
    assert cost.moved(odd, 2) == 100 * (13 * 2 + 8 * 2) + 8 * 2


@given(seed=st.integers(0, 10_000), groups=st.integers(1, 6), taps=st.sampled_from([1, 9]))
def test_padding_is_what_the_kernel_s_tables_hold(seed: int, groups: int, taps: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng, rng.randrange(1, 70), rng.randrange(1, 90), groups)
    kernel = (3, 3) if taps == 9 else (1, 1)
    launch = cost.launch_of(layout, kernel, rng.choice([100, 100_000]), "half", "sm_90")
    mine = cost.padding(layout, taps, launch)
    align = math.gcd(8, layout.in_channels)
    table = tiles.forward_tiles(
        layout, kernel, (0, 0), (1, 1), block_n=launch.BLOCK_N, block_k=launch.BLOCK_K, align=align
    )
    assert mine.macs == table.figures.padded_macs and mine.block_n == launch.BLOCK_N
    assert mine.runs == table.figures.aligned_runs
    if mine.macs:
        assert mine.waste == pytest.approx(1 - table.figures.macs / table.figures.padded_macs)


@given(seed=st.integers(0, 10_000), batch=st.sampled_from([1, 32, 256]), form=st.sampled_from(cost.FORMS))
def test_no_form_beats_the_floor(seed: int, batch: int, form: str) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng, rng.randrange(1, 70), rng.randrange(1, 90), 3)
    conv = cost.Conv(
        layout, batch, (14, 14), (3, 3), padding=(1, 1), residual=bool(seed % 2), activation="relu"
    )
    if form == "cuda" and backends.available_backends()["native"] is not None:
        assert math.isinf(cost.estimate(conv, H200, HALF, form).seconds)
        return
    for where in cost.devices().values():
        found = cost.estimate(conv, where, HALF, form)
        assert found.seconds > cost.floor(conv, where, HALF)
        assert found.flops >= conv.flops and 0 <= found.waste <= 1
        assert found.bound in ("compute", "memory", "cache", "launch")


@given(
    seed=st.integers(0, 10_000),
    batch=st.sampled_from([1, 2, 32]),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 2)]),
    stride=st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    precision=st.sampled_from([0, 2]),
)
def test_work_of_the_cuda_kernels_is_what_their_tables_hold(
    seed: int, batch: int, kernel: tuple[int, int], stride: tuple[int, int], precision: int
) -> None:
    if (reason := backends.available_backends()["native"]) is not None:
        pytest.skip(f"native backend: {reason}")
    rng = random.Random(seed)
    layout = random_layout(rng, rng.randrange(1, 150), rng.randrange(1, 150), rng.randrange(1, 6))
    size, dilation, padding = (
        (rng.randrange(9, 40), rng.randrange(5, 40)),
        rng.choice([(1, 1), (2, 1)]),
        (1, 1),
    )
    mine = cuda_work.cuda_work(
        layout, 2 if precision == 0 else 4, batch, size, kernel, stride, padding, dilation
    )
    words, prepared, _ = cuda._make(
        0, precision, layout, (batch, *size, *kernel, *stride, *padding, *dilation), 396
    )
    status, _, _, blocks, splits, _, macs = backends.native_module().cuda_conv2d_sizes(
        words.data_ptr(), words.numel()
    )
    assert status == 0
    assert (mine.multiply_adds, mine.blocks, mine.splits(396)) == (macs, blocks, splits)
    assert mine.weights * (2 if precision == 0 else 4) == prepared
    assert mine.effort >= mine.multiply_adds


def test_without_the_compiled_core_the_cuda_form_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_work, "available_backends", lambda: {"native": "not built"})
    cuda_work.cuda_work.cache_clear()
    layout = GroupLayout(8, 8, [(range(8), range(8))])
    conv = cost.Conv(layout, 1, (8, 8), (3, 3), padding=(1, 1))
    try:
        assert cost.estimate(conv, cost.device("H200"), HALF, "cuda").seconds == math.inf
    finally:
        cuda_work.cuda_work.cache_clear()


def test_what_the_planner_refuses_is_a_value_error() -> None:
    if (reason := backends.available_backends()["native"]) is not None:
        pytest.skip(f"native backend: {reason}")
    layout = GroupLayout(8, 8, [(range(8), range(8))])
    with pytest.raises(ValueError, match="the CUDA convolution refused: batch is above"):
        cuda_work.cuda_work(layout, 2, 1 << 30, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1))


def test_terms_of_the_cuda_form_by_hand() -> None:
    """A group of 20 filters is multiplied as 24; nine taps share a halo of 10 x 18 pixels, copied once; a
    gather costs eight times as much.
    """
    runs = GroupLayout(32, 40, [(range(16), range(20)), (range(16, 32), range(20, 40))])
    scattered = GroupLayout(32, 40, [(range(0, 32, 2), range(20)), (range(1, 32, 2), range(20, 40))])
    a, b = (
        cuda_work.cuda_work(layout, 2, 4, (16, 32), (3, 3), (1, 1), (1, 1), (1, 1))
        for layout in (runs, scattered)
    )
    pixels = 4 * 16 * 32
    assert a.multiply_adds == b.multiply_adds == 2 * pixels * 9 * 16 * 24
    assert (a.phase_taps, a.halo_rows, a.gathered, b.gathered) == (9, 180, 0, 2)
    assert a.effort == pytest.approx(a.multiply_adds * (1 + (180 + 32) / (9 * 128)))
    assert b.effort == pytest.approx(b.multiply_adds * (1 + (8 * 180 + 32) / (9 * 128)))
    a100 = cost.device("A100")
    conv = cost.Conv(runs, 256, (16, 32), (3, 3), padding=(1, 1))
    found = cost.estimate(conv, a100, torch.float16, "cuda")
    assert found.compute == pytest.approx(64 * 2 * a.effort / a100.flops_per_second(torch.float16))
    assert found.memory == pytest.approx(
        (cost.moved(conv, 2) + 2 * (2 * 9 * 32 * 24 - runs.pairs * 9)) / a100.bytes_per_second()
    )
    # From sm_90 on the matrix rate is that of instructions which these kernels do not use.
    here, there = (cost.estimate(conv, cost.device(d), HALF, "cuda").compute for d in ("A100", "H200"))
    rates = [cost.device(d).flops_per_second(HALF) for d in ("A100", "H200")]
    assert there / here == pytest.approx(rates[0] / rates[1] / cost.MMA_SYNC)


def test_what_passes_through_the_second_level_cache_by_hand() -> None:
    """A 1x1 and a 3x3 of 64 channels on an H200: tiles of 128 pixels and 64 filters, one in width."""
    pixels = 256 * 56 * 56
    flat = cost.Conv(ONE, 256, (56, 56), residual=True)
    launch = cost.launch_of(ONE, (1, 1), pixels, "half", "sm_90")
    assert (launch.BLOCK_M, launch.BLOCK_N, launch.copy) == (128, 64, 16)
    once = 2 * pixels * 64 * 2  # output and residual
    found = cost.estimate(flat, H200, HALF, "grouped")
    assert found.cache * H200.l2_bandwidth == pytest.approx(pixels * 64 * (1 + 64 / 128) * 2 + once)
    taps = cost.Conv(ONE, 256, (56, 56), (3, 3), padding=(1, 1))
    launch = cost.launch_of(ONE, (3, 3), pixels, "half", "sm_90")
    assert (launch.BLOCK_M, launch.BLOCK_N, launch.copy) == (128, 64, 8)
    # Through the first-level cache: its own 128 pixels and two rows of 56 beside them, not nine times 128.
    found = cost.estimate(taps, H200, HALF, "grouped")
    inputs, weights = pixels * 64 * (1 + 2 * 56 / 128), pixels * 9 * 64 * 64 / 128
    assert found.cache * H200.l2_bandwidth == pytest.approx(2 * (inputs + weights) + once / 2)
    assert found.bound == "cache" and found.seconds == pytest.approx(found.cache + H200.launch)
    # Twice the rate, half the time.
    fast = H200.measured(4e12, {}, l2_bandwidth=11e12)
    assert cost.estimate(taps, fast, HALF, "grouped").cache == pytest.approx(found.cache / 2)


def test_wide_groups_get_wide_tiles() -> None:
    """92 filters: one tile of 128 reads the input once, three of 32 three times."""
    groups = [(range(400), range(92)), (range(300, 700), range(92, 184))]
    layout = GroupLayout(704, 184, groups)
    launch = cost.launch_of(layout, (1, 1), 50176, "half", "sm_90")
    assert launch.BLOCK_N == 128 and launch.warps == 4


def test_few_channels_go_to_torch() -> None:
    stem = cost.Conv(full(3, 64), 256, (224, 224), (7, 7), (2, 2), (3, 3), activation="relu")
    chosen = cost.choose_form(stem, H200, HALF)
    assert chosen.form == "torch" and "3 channels" in chosen.reason
    assert cost.choose_form(stem, H200, HALF, forms=("grouped", "merged")).form in ("grouped", "merged")


def test_torch_s_form_pays_for_its_passes() -> None:
    plain = cost.Conv(ONE, 256, (56, 56))
    rest = cost.Conv(ONE, 256, (56, 56), residual=True, activation="relu")
    out = 256 * 56 * 56 * 64 * 2
    a, b = (cost.estimate(c, H200, HALF, "torch") for c in (plain, rest))
    assert b.bytes - a.bytes == 5 * out and (a.launches, b.launches) == (1, 3)
    assert (
        cost.estimate(rest, H200, HALF, "grouped").bytes - cost.estimate(plain, H200, HALF, "grouped").bytes
        == out
    )


def test_arguments_are_refused_by_name() -> None:
    conv = cost.Conv(ONE, 1, (4, 4))
    with pytest.raises(ValueError, match="form must be one of grouped, cuda, merged, torch"):
        cost.estimate(conv, H200, HALF, "dense")
    with pytest.raises(ValueError, match="forms must name"):
        cost.choose_form(conv, H200, HALF, forms=())
    with pytest.raises(ValueError, match="kept must say"):
        cost.chain_estimate([conv], (), H200, HALF)


# ---- choosing ----


def disjoint(groups: int, each: int) -> GroupLayout:
    return GroupLayout(
        groups * each,
        groups * each,
        [(range(g * each, (g + 1) * each), range(g * each, (g + 1) * each)) for g in range(groups)],
    )


def test_disjoint_groups_run_grouped_and_near_dense_ones_merged() -> None:
    apart = cost.Conv(disjoint(4, 64), 256, (28, 28), (3, 3), padding=(1, 1))
    chosen = cost.choose_form(apart, H200, HALF)
    assert chosen.form == "grouped" and chosen.estimates["grouped"].bound == "cache"
    assert chosen.estimates["merged"].seconds > 2 * chosen.seconds
    # Thirty-two groups of two filters that read nearly everything: tiles of 16 would be mostly empty.
    near = GroupLayout(64, 64, [([c for c in range(64) if c != g], [2 * g, 2 * g + 1]) for g in range(32)])
    chosen = cost.choose_form(cost.Conv(near, 256, (28, 28), (3, 3), padding=(1, 1)), H200, HALF)
    assert chosen.form != "grouped" and "predicted" in chosen.reason and not chosen.measured


def test_measurement_overrules_the_model(tmp_path: Path) -> None:
    conv = cost.Conv(disjoint(4, 64), 256, (28, 28), (3, 3), padding=(1, 1))
    table = cost.FormTable()
    table.add("sm_90", conv.key(HALF), "grouped", 50.0)
    assert (
        cost.choose_form(conv, H200, HALF, table=table).form == "grouped"
    )  # one alone compares with nothing
    table.add("sm_90", conv.key(HALF), "torch", 40.0)
    path = tmp_path / "forms.json"
    path.write_text(table.to_json())
    loaded = cost.FormTable.load(path)
    chosen = cost.choose_form(conv, H200, HALF, table=loaded)
    assert chosen.form == "torch" and chosen.measured and "measured: torch 40.0 us" in chosen.reason
    assert cost.choose_form(conv, cost.device("A100"), HALF, table=loaded).form == "grouped"
    assert cost.choose_form(conv, H200, torch.float16, table=loaded).form == "grouped"


def test_the_cuda_form_is_chosen_by_measurement_alone() -> None:
    # Groups of 20 filters: by the model 24 columns and a halo beat a tile of 32.
    groups = [(range(256 * g, 256 * g + 256), range(20 * g, 20 * g + 20)) for g in range(4)]
    layout, where = GroupLayout(1024, 80, groups), cost.device("A100")
    conv = cost.Conv(layout, 100, (16, 32), (3, 3), padding=(1, 1))
    chosen = cost.choose_form(conv, where, HALF)
    assert min(chosen.estimates, key=lambda f: chosen.estimates[f].seconds) == "cuda" != chosen.form
    assert "cuda" not in chosen.reason
    with pytest.raises(ValueError, match=r"none of the forms .*cuda: runs only where it was measured"):
        cost.choose_form(conv, where, HALF, forms=("cuda",))
    table = cost.FormTable()
    for form, time in (("torch", 60.0), ("grouped", 50.0), ("cuda", 40.0)):
        table.add("sm_80", conv.key(HALF), form, time)
    chosen = cost.choose_form(conv, where, HALF, table=table)
    assert chosen.form == "cuda" and chosen.measured and chosen.seconds == pytest.approx(40e-6)
    refused = {"cuda": "no CUDA device"}
    chosen = cost.choose_form(conv, where, HALF, table=table, refused=refused)
    assert chosen.form == "grouped" and chosen.seconds == pytest.approx(50e-6)
    assert chosen.reason == (
        "measured: grouped 50.0 us, cuda 40.0 us, torch 60.0 us; cuda cannot run here: no CUDA device"
    )
    with pytest.raises(ValueError, match="cuda: no CUDA device"):
        cost.choose_form(conv, where, HALF, table=table, forms=("cuda",), refused=refused)


@pytest.mark.parametrize("text", ["[]", "{", '{"sm_90": {"k": {"grouped": -1}}}', '{"sm_90": {"k": 3}}'])
def test_a_broken_table_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "forms.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"forms\.json: not a table of measured forms"):
        cost.FormTable.load(path)


def test_the_key_tells_convolutions_apart() -> None:
    conv = cost.Conv(ONE, 1, (4, 4))
    other = GroupLayout(64, 64, [(range(64), range(63))])
    keys = {
        cost.Conv(ONE, 1, (4, 4), residual=True).key(HALF),
        cost.Conv(ONE, 2, (4, 4)).key(HALF),
        cost.Conv(ONE, 1, (4, 4), stride=(2, 2)).key(HALF),
        cost.Conv(other, 1, (4, 4)).key(HALF),
        conv.key(torch.float32),
        conv.key(HALF),
    }
    assert len(keys) == 6 and conv.key(HALF) == cost.Conv(full(64, 64), 1, (4, 4)).key(HALF)


def test_merging() -> None:
    layout = GroupLayout(6, 8, [([0, 2], [0, 1]), ([2, 5], [4]), ([1], [])])
    assert cost.merged_layout(layout).groups == (((0, 2, 5), (0, 1, 4)),)
    dead = GroupLayout(6, 8, [])
    assert cost.merged_layout(dead) is dead


# ---- run counts ----


@given(seed=st.integers(0, 100_000), groups=st.integers(2, 4))
def test_runs_of_random_layouts(seed: int, groups: int) -> None:
    rng = random.Random(seed)
    membership = [rng.randrange(2**groups) for _ in range(rng.randrange(1, 120))]
    order = gray_order(membership)
    count = sum(len(runs(i for i, c in enumerate(order) if membership[c] >> g & 1)) for g in range(groups))
    assert count <= {2: 2, 3: 4, 4: 8}[groups]


@pytest.fixture(scope="module")
def authors_packed(authors_data: Path) -> dict[int, dsprune.PackedNetwork]:
    out = {}
    for groups in (2, 3, 4):
        model = cifar_resnet(20)
        model.load_state_dict(load_file(authors_data / f"resnet20_g{groups}.safetensors"))
        out[groups] = dsprune.pack(model.eval(), torch.randn(1, 3, 32, 32))
    return out


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_runs_of_the_authors_networks(
    authors_data: Path, authors_packed: dict[int, dsprune.PackedNetwork], groups: int
) -> None:
    """Inside a block the order is the packer's: few runs a layer, and fewer than in the released order."""
    stored = json.loads((authors_data / f"resnet20_g{groups}.json").read_text())["groups"]
    ours = theirs = 0
    for name, layer in authors_packed[groups].layers():
        if not name.endswith("conv_b"):
            continue
        count = sum(len(runs(sorted(c))) for c, f in layer.layout.groups if f)
        assert count <= {2: 2, 3: 4, 4: 8}[groups], name
        ours += count
        theirs += sum(len(runs(sorted(c))) for c, f in stored[name] if f)
    assert 0 < ours < 0.5 * theirs


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_report_of_the_authors_networks(
    authors_packed: dict[int, dsprune.PackedNetwork], groups: int
) -> None:
    packed = authors_packed[groups]
    found = gpu.predict(packed, (256, 3, 32, 32))
    assert found.floor < found.seconds < 20e-3
    text = str(found)
    assert text.startswith("predicted for H200") and "stage1.0.conv_a" in text
    head = next(line for line in text.splitlines() if line.startswith("layer"))
    assert [name for name in head.split() if name in cost.FORMS] == list(cost.FORMS)
    for row in found.rows:
        packed_layer = row.runs > 0 and row.form != "chain"
        assert set(row.predicted) == (set(cost.FORMS) if packed_layer else set())
        assert (
            row.form != "cuda"
            and row.floor <= row.seconds
            and row.form in (*cost.FORMS, "chain")
            and row.reason
        )
    one = gpu.predict(packed, (1, 3, 32, 32))
    assert sum(row.bound == "launch" for row in one.rows) > len(one.rows) / 2


# ---- the roofline of ResNet-50 ----


@pytest.fixture(scope="module")
def dense50() -> torch.nn.Module:
    torch.manual_seed(0)
    return dsprune.pack(resnet50().eval(), torch.randn(1, 3, 32, 32))


def test_dense_resnet50(dense50: torch.nn.Module) -> None:
    """The roofline by hand: 4249 us at batch 256 in bfloat16, with one kernel a convolution, 4.3 TB/s, 790
    TFLOP/s, and each activation written once and read once by each reader.
    """
    found = gpu.predict(dense50, (256, 3, 224, 224), chain="off")
    assert 1e6 * found.floor == pytest.approx(4249, abs=1)
    # What passes through the second-level cache takes longer: the bytes from memory are the bound of few.
    assert 1.4 < found.seconds / found.floor < 1.8
    assert sum(row.bound == "cache" for row in found.rows) > 30
    stem = found.rows[0]
    assert stem.form == "torch" and "3 channels" in stem.reason


def test_what_a_chain_copies_by_hand() -> None:
    """Two groups of 20 filters over 27 of 40 channels, 56 x 56 pixels, a stream of 256 channels, 40 after."""
    triple = kernels.Triple("stage 1, pruned", "bf16", 90)
    kept = triple.config()
    assert (kept.block_m, kept.tiles, kept.tile_n, kept.n3, kept.resident, kept.copy) == (
        64,
        2,
        32,
        64,
        True,
        8,
    )
    # The first group reads channels 0 to 26, one block of 32; the other one 13 to 39, from 8 on.
    steps = 9 * 2
    first, rest = steps * 32 * 32 / 64, (64 * 256 + 256 * 64) / 64
    # Of the nine taps the first-level cache has all but the tile's pixels and the two rows beside it.
    halo = 1 + 2 * 56 / 64
    assert chain.copied(triple.convs(), kept) == pytest.approx(steps * 32 * halo / 9 + first)
    streamed = replace(kept, resident=False, copy=16)
    assert chain.copied(triple.convs(), streamed) == pytest.approx(steps * 32 + first + rest)
    assert kept.shared_bytes(2) == 2 * (2 * 64 * 256 + 4 * (64 * 32 + 32 * 32) + 64 * 64) + 12288
    # None where the weights would take registers, or more than there is.
    older = kernels.Triple("stage 1, pruned", "bf16", 80).config()
    wider = kernels.Triple("stage 2, pruned", "bf16", 90).config()
    assert not older.resident and not wider.resident
    assert not kernels.Triple("stage 1, pruned", "tf32", 90).config().resident


def test_chains_lower_the_floor(dense50: torch.nn.Module) -> None:
    shape = (256, 3, 224, 224)
    off = gpu.predict(dense50, shape, chain="off")
    first = gpu.predict(dense50, shape, chain="unlimited", within="layer1")
    two = gpu.predict(dense50, shape, chain="unlimited", within="layer1,layer2")
    everywhere = gpu.predict(dense50, shape, chain="unlimited")
    assert off.floor > first.floor > two.floor > everywhere.floor
    chains = [row for row in everywhere.rows if row.form == "chain"]
    assert len(chains) == 15 and all(len(row.names) == 3 for row in chains)
    # One chain by hand: x, residual, stream, next and weights once; no inner activation.
    row = next(r for r in first.rows if r.names[0] == "layer1.1.conv2")
    pixels = 256 * 56 * 56
    moved = 2 * (pixels * (64 + 256 + 256 + 64) + 9 * 64 * 64 + 2 * 64 * 256)
    flops = 2 * pixels * (9 * 64 * 64 + 2 * 64 * 256)
    assert row.floor == pytest.approx(max(moved / (0.895 * 4.8e12), flops / (0.8 * 989e12)))


def test_only_a_fused_network_is_predicted() -> None:
    with pytest.raises(TypeError, match="packed: expected a fused PackedNetwork"):
        gpu.predict(torch.nn.Conv2d(3, 3, 1), (1, 3, 4, 4))
    packed = dsprune.pack(torch.nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="chain: expected"):
        gpu.predict(packed, (1, 3, 4, 4), chain="all")
