"""benchmarks/model: the static model of a multiprocessor. Listings here are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.model import calibration, chips, loops, predict, sass, tables
from benchmarks.shapes import ATTENTION_SHAPES
from fastgen.backend import plans

HERE = Path(tables.__file__).parent
needs_plans = pytest.mark.skipif(plans.why_not() is not None, reason=str(plans.why_not()))


def listing(*lines: str, symbol: str = "kernel") -> str:
    """A listing of nvdisasm: instructions, and labels that end with a colon."""
    out, address = [f".text.{symbol}:"], 0
    for line in lines:
        if line.endswith(":"):
            out.append(line)
        else:
            out.append(f"        /*{address:04x}*/ {line} ;")
            address += 16
    return "\n".join(out) + "\n"


# A main loop with a rare branch of 3 instructions, an inner loop of products, and a branch around everything.
KERNEL = listing(
    "S2R R0, SR_TID.X",
    ".L_x_head:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@P3 BRA `(.L_x_copied)",
    "LDGSTS.E.BYPASS.128 [R5], desc[UR10][R8.64]",
    "@!PT LDS RZ, [RZ]",
    ".L_x_copied:",
    "@P4 BRA `(.L_x_end)",
    ".L_x_products:",
    "LDSM.16.M88.4 R4, [R3]",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P0 BRA `(.L_x_products)",
    "@!P1 BRA `(.L_x_common)",
    "FSEL R1, R1, -INF , P2",
    "FSEL R2, R2, -INF , P2",
    "IADD3 R3, R3, 0x1, RZ",
    ".L_x_common:",
    "MUFU.EX2 R5, R5",
    "FFMA R6, R6, R7, R8",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    ".L_x_end:",
    "@P5 BRA `(.L_x_head)",
    "EXIT",
)


def test_the_main_loop_is_the_one_with_products_and_a_barrier():
    (code,) = sass.parse(KERNEL).values()
    loop = sass.main_loop(code)
    assert loop is not None
    assert (loop.whole, loop.branches) == (16, 5)
    assert set(loop.paths) == {(0, 0), (0, 1), (2, 0), (2, 1)}
    path = loop.paths[2, 1]
    assert len(path.straight) == 10, "without the three rare instructions"
    assert [len(inner.straight) for inner in path.inner] == [3]
    assert sass.main_loop(sass.parse(listing("HMMA.16816.F32 R4, R8, R12, R4", "EXIT"))["kernel"]) is None


def test_inner_loops_run_as_often_as_the_tile_has_products():
    (code,) = sass.parse(KERNEL).values()
    one = loops.iteration_of(code, matrix=9, copies=1, operands=1, scores=4)
    assert one.instructions == 10 + 8 * 3
    assert one.per_score == 34 / 4
    assert one.pipes == {"issue": 14, "global": 1, "shared": 8, "tensor": 9, "special": 1, "fma": 1}
    assert one.shared_bytes == 512 + 8 * 512
    assert (one.whole, one.outside, one.copied_bytes) == (16, 2, 512)


def test_code_that_does_not_fit_the_tile_is_refused():
    (code,) = sass.parse(KERNEL).values()
    with pytest.raises(ValueError, match="no path has 1 matrix instructions"):
        loops.iteration_of(code, matrix=1, copies=1, operands=1, scores=4)
    with pytest.raises(ValueError, match="no loop with matrix instructions"):
        loops.iteration_of(sass.parse(listing("EXIT"))["kernel"], 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("HMMA.16816.F32.BF16", "tensor"),
        ("MUFU.EX2", "special"),
        ("FFMA", "fma"),
        ("IMAD.WIDE.U32", "imad"),
        ("FMNMX", "alu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("LDSM.16.MT88.4", "shared"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("UIADD3", "issue"),
        ("BRA", "issue"),
    ],
)
def test_instructions_have_pipes(opcode, pipe):
    assert loops.pipe_of(sass.Instruction(0, "", opcode, "")) == pipe
    assert loops.pipe_of(sass.Instruction(0, "@!PT", opcode, "")) == "issue"


def test_names_of_kernels():
    name = loops.name_of("void fastgen::attention::attention_forward<fastgen::BFloat16, 64, 64, true>")
    assert name == loops.Name("attention_forward", "BFloat16", (64, 64), True)
    second = loops.name_of("void fastgen::attention::attention_second_order_query<fastgen::Half, 128, 128>")
    assert second == loops.Name("attention_second_order_query", "Half", (128, 128), False)
    assert loops.name_of("void fastgen::latent::latent_forward<float>") is None


@needs_plans
def test_products_of_a_tile():
    """64 keys for 32 rows of each warp: 2 * 8 * 4 for Q K^T and as many for P V."""
    name = loops.Name("attention_forward", "BFloat16", (64, 64), True)
    tiles = loops.Tiles(warps=4, owned=128, iterated=64, columns=(64, 64), shared_bytes=0)
    assert loops.matrix_instructions(name, tiles) == 128
    assert loops.copied_pieces(name, tiles) == 8
    assert loops.tiles_of(name).scores_per_lane > 0


def test_blocks_per_multiprocessor():
    a100, ada = chips.CHIPS[0], chips.CHIPS[1]
    assert predict.resident_blocks(a100, 255, 65536, 4) == 2
    assert predict.resident_blocks(a100, 128, 0, 4) == 4
    assert predict.resident_blocks(ada, 128, 73728, 4) == 1  # of 100 KiB
    assert predict.resident_blocks(ada, 32, 0, 4) == 12  # 48 warps


def test_causal_work_is_half_and_masked_at_the_diagonal():
    plan = {"block_m": 64, "block_n": 64, "blocks": 16 * 4, "slices": 1, "tiles_per_block": 1}
    shape = ATTENTION_SHAPES["image-lm"]
    assert shape.queries == shape.keys == 1024
    for owns_keys in (False, True):
        work = predict.work_of(shape, plan, owns_keys)
        assert work.average == 8.5
        assert work.most == 16
        assert work.masked == pytest.approx(16 / 136)


def test_more_warps_hide_latency_until_a_pipe_is_full():
    cycles = {"tensor": 1000.0, "special": 500.0, "issue": 800.0}
    alone, two, eight = (predict.clocks(cycles, warps) for warps in (1, 2, 8))
    assert alone == predict.LATENCY + 1500
    assert alone < two < 2 * alone
    assert eight == pytest.approx(4 * two)
    assert predict.clocks(cycles, 8, overlap=50) == pytest.approx(8000, rel=0.01)


def test_device_names():
    assert chips.chip_of("NVIDIA H100 80GB HBM3").name == "H100"
    assert chips.chip_of("NVIDIA A100-SXM4-80GB").name == "A100 80GB"
    assert chips.chip_of("NVIDIA GeForce RTX 5090").name == "RTX 5090"
    assert chips.chip_of("Tesla T4") is None
    assert roofline.chip_of("NVIDIA H200").bandwidth == 4.8e12
    assert roofline.chip_of("NVIDIA H100 80GB HBM3").bandwidth == 3.35e12


def test_the_published_speed_of_flash_attention_is_met_within_a_sixth():
    errors = [row["model"] / row["published"] - 1 for row in calibration.rows()]
    assert max(map(abs, errors)) < 1 / 6, errors


def test_the_committed_table_is_that_of_its_figures_and_says_what_it_is():
    data = json.loads((HERE / "predictions.json").read_text())
    text = (HERE / "predictions.md").read_text()
    assert text == "\n".join(tables.lines(data)) + "\n"
    assert data["what"] == "predicted, not measured"
    assert "**Predicted, not measured.**" in text
    assert data["calibration"] == calibration.rows()
    assert {row["chip"] for row in data["predictions"]} == {chip.name for chip in chips.CHIPS}
    # A prediction is never faster than the roofline.
    assert all(row["of_roofline"] <= 1 for row in data["predictions"])
