"""benchmarks/model: products of warpgroups, simulated. Listings here are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.model import hopper, hopper_derivatives, hopper_wide, sass, warpgroups
from benchmarks.model.chips import CHIPS
from benchmarks.shapes import ATTENTION_SHAPES, AttentionShape

CHIP = next(chip for chip in CHIPS if chip.name == "H100")
DATA = json.loads((Path(hopper.__file__).parent / "predictions.json").read_text())
BACKWARD = tuple(hopper_derivatives.KINDS["backward"].kernels)
NO_LATENCY = warpgroups.Latencies().times(0)


def code(*lines):
    """The instructions of a listing."""
    text = "\n".join(f"        /*{16 * place:04x}*/ {line} ;" for place, line in enumerate(lines))
    return sass.parse(f".text.kernel:\n{text}\n")["kernel"].instructions


SCORES = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0"
VALUES = "HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR16].tnspB, R88, gsb0"


@pytest.mark.parametrize(
    ("line", "clocks", "read"),
    [
        (SCORES, 64, 128 * 32 + 64 * 32),
        (VALUES, 64, 128 * 32),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT", 32, 64 * 32 + 64 * 32),
        ("HGMMA.64x32x16.F32 R24, gdesc[UR16], RZ, !UPT", 24, 32 * 32 + 64 * 32),  # shared memory is slower
        ("HGMMA.64x80x16.F32.BF16 R24, gdesc[UR16], R24", 40, 80 * 32 + 64 * 32),
    ],
)
def test_a_product_takes_as_long_as_its_columns_or_its_bytes(line, clocks, read):
    found = warpgroups.product_of(code(line)[0])
    assert (found.clocks, found.bytes) == (clocks, read)
    assert found.closes == ("gsb0" in line)


def test_a_group_without_products_takes_no_time():
    found = warpgroups.product_of(code("HGMMA.64 x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0")[0])
    assert (found.clocks, found.bytes, found.closes) == (0, 0, True)


def test_another_product_is_refused():
    with pytest.raises(ValueError, match="unknown product"):
        warpgroups.product_of(code("HGMMA.SP.64x128x32.F32.BF16 R24, gdesc[UR16], R24")[0])


# A warpgroup that multiplies for 128 clocks, and has exponentials for 160.
EXPONENTIALS = [f"MUFU.EX2 R{i}, R{i}" for i in range(24, 44)]
ALONE = code(SCORES, SCORES, "WARPGROUP.DEPBAR.LE gsb0, 0x0", *EXPONENTIALS)
IN_TURN = code(
    "BAR.SYNC.DEFER_BLOCKING R4, 0x100", SCORES, SCORES, "BAR.ARV R9, 0x100", "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    *EXPONENTIALS,
)  # fmt: skip


def test_one_warpgroup_waits_for_its_products():
    found = warpgroups.simulate(ALONE, 1, CHIP, NO_LATENCY)
    assert found.clocks == pytest.approx(128 + 160, abs=12)  # the next product starts beside the last exponential
    assert found.tensor == 128
    slower = warpgroups.simulate(ALONE, 1, CHIP)
    assert slower.clocks > found.clocks


@pytest.mark.parametrize("latency", [0, 1])
def test_the_exponentials_of_one_run_beside_the_products_of_another(latency):
    found = warpgroups.simulate(IN_TURN, 2, CHIP, warpgroups.Latencies().times(latency))
    assert 2 * 160 <= found.clocks <= 1.1 * 2 * 160  # less than 2 (128 + 160)
    assert found.busy["special"] > 0.9


def test_a_wait_for_all_but_the_newest_products_leaves_them_running():
    early = code(SCORES, VALUES, "WARPGROUP.DEPBAR.LE gsb0, 0x1", *EXPONENTIALS, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    late = code(SCORES, VALUES, "WARPGROUP.DEPBAR.LE gsb0, 0x0", *EXPONENTIALS)
    assert warpgroups.simulate(early, 1, CHIP, NO_LATENCY).clocks == pytest.approx(64 + 160, abs=12)
    assert warpgroups.simulate(late, 1, CHIP, NO_LATENCY).clocks == pytest.approx(128 + 160, abs=12)


def test_a_product_may_block_its_warp_until_another_has_run():
    early = code(*[VALUES] * 4, *EXPONENTIALS, "WARPGROUP.DEPBAR.LE gsb0, 0x0")
    assert warpgroups.simulate(early, 1, CHIP, NO_LATENCY).clocks == pytest.approx(4 * 64, abs=12)
    blocked = warpgroups.simulate(early, 1, CHIP, NO_LATENCY, queue=0)
    assert blocked.clocks == pytest.approx(3 * 64 + 160, abs=12)


def test_an_instruction_waits_for_its_operands():
    chain = code(SCORES, *["FADD R1, R1, R2"] * 50)
    apart = code(SCORES, *[f"FADD R{i}, R1, R2" for i in range(3, 53)])
    latency = warpgroups.Latencies()
    slow, fast = (warpgroups.simulate(one, 1, CHIP).clocks for one in (chain, apart))
    assert slow >= 50 * latency.arithmetic
    assert fast < 70


def test_consumers_that_never_pass_their_turn_are_refused():
    with pytest.raises(ValueError, match="every consumer waits"):
        warpgroups.simulate(code("BAR.SYNC R4, 0x100", SCORES), 2, CHIP)
    with pytest.raises(ValueError, match="no products"):
        warpgroups.simulate(code(*EXPONENTIALS), 2, CHIP)


def test_names_of_kernels():
    assert hopper.kernel_of("void fastgen::scale<float>(float*)", 32, sass.Listing([], {})) is None
    name = "void fastgen::attention::sm90::attention_forward_sm90<fastgen::BFloat16, 64, 3, 128, false>"
    with pytest.raises(ValueError, match="no main loop"):
        hopper.kernel_of(name, 128, sass.Listing(code("EXIT"), {}))


@pytest.mark.parametrize("mask", ["", "causal"])
def test_tiles_of_queries_have_the_keys_that_they_see(mask):
    shape = AttentionShape("s", 1, 2, 400, 400, 64, 64, mask)
    found = list(hopper.tiles_of(shape, 128, 128))
    if mask:  # the longest first, of both heads
        assert found == [(4, 1), (4, 1), (3, 1), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1)]
    else:
        assert found == [(4, 1)] * 8


@pytest.mark.parametrize("mask", ["", "causal"])
@pytest.mark.parametrize("name", BACKWARD)
def test_owned_tiles_of_the_backward_pass_have_the_tiles_that_they_see(mask, name):
    """400 keys are four tiles of 128; iterated ones have 64 rows, of which the seventh has 16."""
    shape = AttentionShape("s", 1, 1, 400, 400, 64, 64, mask)
    found = list(hopper_derivatives.tiles_of(shape, name, 64))
    if not mask:
        assert found == [(7, 1)] * 4
    elif name == "backward_query":  # the last queries have most keys
        assert found == [(7, 1), (6, 2), (4, 2), (2, 2)]
    else:  # the first keys have most queries
        assert found == [(7, 3), (5, 3), (3, 3), (1, 1)]


def test_the_scores_of_a_kernel_are_the_products_of_two_operands_in_shared_memory():
    name = "void fastgen::attention::sm90::attention_backward_query_sm90<fastgen::BFloat16, 64, false>"
    with pytest.raises(ValueError, match="no main loop"):
        hopper.kernel_of(name, 168, sass.Listing(code("EXIT"), {}))
    path = tuple(code("HGMMA.64 x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0", VALUES, SCORES.replace("x128", "x96")))
    kernel = hopper.Kernel("backward_query", 128, 2, False, 168, path, 3, ())
    assert kernel.keys == 96
    assert kernel.least == 2 * (64 + 48)


# --------------------------------------------------------------------------------------------------
# The committed figures


def test_every_backward_kernel_is_in_the_table():
    found = {(row["name"], row["dim"], row["padded"]) for row in DATA["hopper_backward_kernels"]}
    assert found == {(name, dim, padded) for name in BACKWARD for dim in (64, 128) for padded in (0, 1)}
    for row in DATA["hopper_backward_kernels"]:
        assert 0.7 < row["share"] <= 1
        assert row["simulated"] >= 0.99 * row["least"]


def test_the_backward_pass_of_long_sequences_reaches_60_percent_of_the_peak_in_the_model():
    """Of at most 71%: 5 of 7 products are counted."""
    shares = {(row["chip"], row["shape"]): row["share"] for row in DATA["hopper_backward_predictions"]}
    assert max(shares.values()) <= 5 / 7
    for chip in ("H100", "H200"):
        assert shares[chip, "16k, d=128"] >= 0.6
        assert shares[chip, "16k, d=64"] >= 0.55
    text = "\n".join(hopper_derivatives.lines(DATA))
    for one in hopper_derivatives.PUBLISHED:
        assert f"{one.tflops:g} ({one.code})" in text


def test_every_kernel_is_in_the_table():
    found = {(row["dim"], row["consumers"], row["keys"], row["padded"]) for row in DATA["hopper_kernels"]}
    plain = {(64, 2, 128), (64, 3, 128), (128, 2, 128), (128, 2, 160), (192, 2, 96), (256, 2, 80)}
    padded = {(64, 2, 128), (128, 2, 128), (192, 2, 96), (256, 2, 64)}
    assert found == {(*one, False) for one in plain} | {(*one, True) for one in padded}
    for row in DATA["hopper_kernels"]:
        assert 0.4 < row["share"] <= 1
        assert row["simulated"] >= 0.99 * row["least"]
        assert row["otherwise"]["1.5 x latency"] >= 0.99 * row["simulated"]


def test_long_sequences_reach_70_percent_of_the_peak_in_the_model():
    """The aim for head dim 128; wider heads have as many products per exponential or more."""
    shares = {(row["chip"], row["shape"]): row["share"] for row in DATA["hopper_predictions"]}
    assert max(shares.values()) <= 1
    for chip in ("H100", "H200"):
        assert shares[chip, "16k, d=128"] >= 0.7
        assert shares[chip, "16k, d=256"] >= 0.7
        assert shares[chip, "16k, d=64"] >= 0.6
        assert {shape for one, shape in shares if one == chip} & set(ATTENTION_SHAPES) >= {"long", "image-lm", "dit-xl"}


def test_published_figures_are_beside_the_predictions():
    text = "\n".join(hopper.lines(DATA))
    for one in hopper.PUBLISHED:
        assert f"{one.tflops:g} ({one.code})" in text
    assert "There is no measurement of this code" in text
    assert "expected, TFLOP/s" in text


def test_the_tangent_reaches_80_percent_of_the_peak_in_the_model():
    found = {(row["dim"], row["padded"], row["keys"]) for row in DATA["hopper_tangent_kernels"]}
    assert found == {(64, False, 96), (64, True, 64), (128, False, 80), (128, True, 64)}
    for row in DATA["hopper_tangent_kernels"]:
        assert 0.8 < row["share"] <= 1.01
    shares = {(row["chip"], row["shape"]): row["share"] for row in DATA["hopper_tangent_predictions"]}
    assert max(shares.values()) <= 1
    assert min(shares[chip, f"16k, d={dim}"] for chip in ("H100", "H200") for dim in (64, 128)) >= 0.8


def test_output_and_tangent_in_one_sweep_are_faster_than_in_two_in_the_model():
    found = {(row["dim"], row["padded"], row["keys"]) for row in DATA["hopper_forward_tangent_kernels"]}
    assert found == {(64, False, 96), (64, True, 64)}
    times = {
        kind: {(row["chip"], row["shape"]): row["microseconds"] for row in DATA[f"hopper_{kind}predictions"]}
        for kind in ("", "tangent_", "forward_tangent_")
    }
    places = times["forward_tangent_"].keys() & times[""].keys() & times["tangent_"].keys()  # not few queries: "decode"
    assert {shape for _, shape in places} >= {"image-lm", "transgan-window", "16k, d=64"}
    for place in places:
        together = times["forward_tangent_"][place]
        assert together["forward_tangent"] < times[""][place] + times["tangent_"][place]["tangent"]


def test_the_written_design_of_head_dim_512_is_the_one_with_the_lowest_bounds():
    written, *others = (hopper_wide.bounds(products) for products in hopper_wide.DESIGNS.values())
    assert written["tensor"] == 2 * 64 * 64 * (512 + 512) / 4096
    for other in others:
        assert written["tensor"] + written["shared memory"] < other["tensor"] + other["shared memory"]
        assert written["L2"] == other["L2"]


@pytest.mark.parametrize("one", hopper.FLASH_ATTENTION, ids=lambda one: str(one.dim))
def test_the_model_is_above_published_speeds(one):
    """It knows neither the power limit nor memory, so what it predicts is divided by how far it is above them."""
    assert one.least == 2 * one.queries * one.keys * 2 * one.dim / 4096
    assert one.least <= one.simulated <= one.slow
    assert 0.55 < one.ratio < 0.75
