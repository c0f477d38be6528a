"""benchmarks/model: the static model of a multiprocessor. Listings here are written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.model import calibration, chips, iteration, loops, predict, sass, tables
from benchmarks.model.iteration import Role
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
    assert set(loop.paths) == {(0, 0, 0), (0, 1, 0), (2, 0, 0), (2, 1, 0)}
    path = loop.paths[2, 1, 0]
    assert len(path.straight) == 10, "without the three rare instructions"
    assert [len(inner.straight) for inner in path.inner] == [3]
    assert sass.main_loop(sass.parse(listing("HMMA.16816.F32 R4, R8, R12, R4", "EXIT"))["kernel"]) is None


def test_inner_loops_run_as_often_as_the_tile_has_products():
    (code,) = sass.parse(KERNEL).values()
    one = iteration.iteration_of(code, [Role(matrix=9, copies=1, operands=1)], scores=4)
    assert one.instructions == 10 + 8 * 3
    assert one.per_score == 34 / 4
    assert one.pipes == {"issue": 14, "global": 1, "shared": 8, "tensor": 9, "special": 1, "fma": 1}
    assert one.shared_bytes == 512 + 8 * 512
    assert (one.whole, one.outside, one.copied_bytes, one.barriers) == (16, 2, 512, 1)
    # A mask adds the code beside the path: three instructions.
    assert one.masked == 34 + 3


def test_code_that_does_not_fit_the_tile_is_refused():
    (code,) = sass.parse(KERNEL).values()
    with pytest.raises(ValueError, match=r"no path is that of Role\(matrix=1,"):
        iteration.iteration_of(code, [Role(1, 1, 1)], scores=4)
    with pytest.raises(ValueError, match="no loop with matrix instructions and a barrier"):
        iteration.iteration_of(sass.parse(listing("EXIT"))["kernel"], [Role(1, 1, 1)], 1)


# Warps 0-3 compute scores and their exponentials, the others something longer; then all multiply.
ROLES = listing(
    ".L_x_head:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "LDGSTS.E.BYPASS.128 [R5], desc[UR10][R8.64]",
    "@P1 BRA `(.L_x_other)",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "BAR.SYNC R20, 0x40",
    "MUFU.EX2 R5, R5",
    "BRA `(.L_x_both)",
    ".L_x_other:",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "STS [R5], R4",
    "STS [R5+0x4], R4",
    "STS [R5+0x8], R4",
    "STS [R5+0xc], R4",
    "BAR.ARV R20, 0x40",
    ".L_x_both:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P5 BRA `(.L_x_head)",
    "EXIT",
)


def test_warps_of_one_block_may_take_different_paths():
    (code,) = sass.parse(ROLES).values()
    scores, others = Role(2, 1, 1, exponentials=1, share=0.25), Role(2, 1, 1, exponentials=0, share=0.75)
    one = iteration.iteration_of(code, [scores, others], scores=1)
    assert one.instructions == 0.25 * 10 + 0.75 * 12
    assert one.exponentials == one.pipes["special"] == 0.25
    assert (one.pipes["tensor"], one.pipes["shared"]) == (2, 0.75 * 4)
    assert one.barriers == 3
    assert one.longest is not None
    assert (one.longest.instructions, one.longest.pipes["shared"]) == (12, 4)
    with pytest.raises(ValueError, match="exponentials=2"):
        iteration.iteration_of(code, [scores._replace(exponentials=2)], scores=1)


def test_warps_with_tiles_of_their_own_have_copies_instead_of_a_barrier():
    text = ROLES.replace("BAR.SYNC.DEFER_BLOCKING 0x0", "WARPSYNC.ALL").replace("BAR.SYNC R20, 0x40", "NOP")
    (code,) = sass.parse(text.replace("BAR.ARV R20, 0x40", "NOP")).values()
    role = Role(2, 1, 1)
    assert iteration.iteration_of(code, [role], scores=1, barrier=False).barriers == 0
    with pytest.raises(ValueError, match="a barrier"):
        iteration.iteration_of(code, [role], scores=1)


def test_a_kernel_without_a_main_loop_is_read_as_a_whole():
    """Its paths lead from the entry to an exit: the shortest one leaves after the first product."""
    lines = ("@P1 BRA `(.L_x_all)", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "EXIT", ".L_x_all:", "MUFU.EX2 R5, R5")
    lines += ("BAR.SYNC.DEFER_BLOCKING 0x0", ".L_x_products:", "HMMA.16816.F32.BF16 R4, R8, R12, R4")
    text = listing(*lines, "@P0 BRA `(.L_x_products)", "EXIT")
    (code,) = sass.parse(text).values()
    assert set(sass.whole_kernel(code).paths) == {(1, 0, 0), (1, 0, 1)}
    role = Role(matrix=3, copies=0, operands=0, exponentials=1)
    one = iteration.iteration_of(code, [role], scores=1, once=True)
    assert (one.instructions, one.pipes["tensor"], one.barriers, one.outside) == (4 + 3 * 2, 3, 1, 0)
    with pytest.raises(ValueError, match="no loop"):
        iteration.iteration_of(code, [role], scores=1)


CALLS = (
    "S2R R0, SR_TID.X",
    ".L_x_head:",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    ".L_x_products:",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@!P0 CALL.REL.NOINC `(.L_x_left)",
    "BRA `(.L_x_products)",
    ".L_x_left:",
    "NOP",
    "@P5 BRA `(.L_x_head)",
    "EXIT",
)


def test_a_call_of_a_nop_is_a_branch_and_another_call_is_an_instruction():
    """ptxas leaves some loops by such a call."""
    (code,) = sass.parse(listing(*CALLS)).values()
    loop = sass.main_loop(code)
    assert loop is not None
    (inner,) = loop.paths[1, 0, 0].inner
    assert len(inner.straight) == 3
    (called,) = sass.parse(listing(*CALLS).replace(" NOP ", " FADD R1, R1, R1 ")).values()
    assert sass.main_loop(called) is None, "nothing leads out of the loop of products"


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
    assert iteration.pipe_of(sass.Instruction(0, "", opcode, "")) == pipe
    assert iteration.pipe_of(sass.Instruction(0, "@!PT", opcode, "")) == "issue"


def test_names_of_kernels():
    name = loops.name_of("void fastgen::attention::attention_forward<fastgen::BFloat16, 64, 64, true>")
    assert name == loops.Name("attention_forward", "BFloat16", (64, 64), True)
    second = loops.name_of("void fastgen::attention::attention_second_order_query<fastgen::Half, 128, 128>")
    assert second == loops.Name("attention_second_order_query", "Half", (128, 128), False)
    assert loops.name_of("void fastgen::latent::latent_forward<float>") is None
    space = "fastgen::attention::"
    for kind, plain in ((0, True), (1, False)):
        one_tile = f"void {space}attention_backward_one_tile<fastgen::BFloat16, 64, 96, 1, ({space}OneTileKind){kind}>"
        expected = loops.Name("attention_backward_one_tile", "BFloat16", (64, 64), plain, rows=96)
        assert loops.name_of(one_tile) == expected
    assert loops.name_of(one_tile.replace("OneTileKind)1", "OneTileKind)2")) is None, "with the gradient of a mask"
    one_head = loops.name_of(f"void {space}attention_backward_one_head<fastgen::BFloat16, 64>")
    assert one_head is not None
    assert one_head.is_one_head
    wide = loops.name_of(f"void {space}attention_backward_key_value_wide<fastgen::BFloat16, 512, 512, true>")
    assert wide is not None
    assert wide.is_wide
    assert wide.owns_keys


def roles(bare: str, dims: int, rows: int = 0, plan: dict[str, object] | None = None) -> list[Role]:
    name = loops.Name(bare, "BFloat16", (dims, dims), True, rows)
    return loops.roles_of(name, loops.tiles_of(name, plan))


@needs_plans
def test_roles_of_the_warps_of_each_kernel():
    """Products of 16 x 8 x 16, counted by hand."""
    # 32 keys of a warp: 4 x 4 for Q K^T, 2 x 8 for P V; 64 rows of 128 bytes for 32 lanes.
    assert roles("attention_decode", 64) == [Role(16 + 16, 16, 2)]
    # 64 x 32 scores for 8 warps: 4 x 4 x 32 / 8 and 4 x 2 x 64 / 8.
    assert roles("attention_forward_wide", 512) == [Role(64 + 64, 16, 2)]
    # 32 x 32 scores, 4 warps with S and 4 with dP: 2 x 4 x 32 / 4; then 2 x 2 x 64 / 8 for each result.
    of_query = [Role(64 + 32, 16, 2, exponentials, share=0.5) for exponentials in (8, 0)]
    assert roles("attention_backward_query_wide", 512) == of_query
    of_key_value = [Role(64 + 64, 16, 2, exponentials, share=0.5) for exponentials in (8, 0)]
    assert roles("attention_backward_key_value_wide", 512) == of_key_value
    # 16 x 16 scores, an eighth of the depth each: 2 x 4 for each of 3 or 5 products; then 8 for each weight.
    assert roles("attention_tangent_wide", 512) == [Role(24 + 16, 16, 4)]
    assert roles("attention_second_order_query_wide", 512) == [Role(40 + 16, 16, 4)]
    assert roles("attention_second_order_key_value_wide", 512) == [Role(40 + 24, 12, 3)]
    # 32 keys of a warp and 32 queries: 2 x 2 x 4 x 4, 2 x 2 x 2 x 8; 16 queries and columns, 256 keys: 16 x 2.
    assert roles("attention_backward_one_head", 64) == [Role(64 + 64 + 32, 2, 2)]
    # 16 rows and 64 keys: 2 x 8 x 4 and 4 x 8; then 32 keys and 64 queries: 2 x 4 x 8.
    assert roles("attention_backward_one_tile", 64, 64) == [Role(96 + 64, 16, 4, 32, share=1.0)]
    # 64 queries and 80 keys: 4 of 6 warps have rows, all have 32 keys of dK or dV.
    plan = plans.attention_plan(64, 8, 8, 64, 80, 64, 64, 2, 132, plain=False)["one tile"]
    found = roles("attention_backward_one_tile", 64, 96, plan)
    copies = (64 + 96) * 256 / 16 / 192
    assert found == [
        Role(144 + 64, copies, 4, 48, share=4 / 6),
        Role(64, copies, 4, 0, unrolled=False, share=2 / 6),
    ]


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


def test_split_keys_are_distributed_and_combined():
    shape = ATTENTION_SHAPES["decode"]
    plan = {"block_n": 32, "warps": 4, "slices": 2, "blocks": 512}
    assert predict.decode_work(shape, plan) == (1024, 8, 8, 0)
    one_head = {"block_m": 32, "block_n": 256, "blocks": 384}
    assert predict.one_head_work(ATTENTION_SHAPES["char-lm"], one_head) == (384, 8, 8, 1 / 8)
    wide = {"block_m": 64, "block_n": 32, "blocks": 64, "slices": 1, "splits": 3, "tiles_per_block": 1}
    assert predict.work_of(ATTENTION_SHAPES["vae-mid"], wide, False) == (192, 43, 43, 0)
    name, h100 = loops.Name("attention_decode", "BFloat16", (64, 64), True), chips.CHIPS[3]
    parts = 2 * 512 * 66 * 4 / h100.bandwidth
    expected = parts + max(parts, predict.BLOCK_CLOCKS / h100.clock) + h100.launch
    assert predict.combine_seconds(shape, name, plan, h100) == pytest.approx(expected)
    assert predict.combine_seconds(shape, name, {**plan, "slices": 1}, h100) == 0


@needs_plans
def test_each_shape_has_the_kernels_of_its_launch_plan():
    a100, l40s, h100 = (chips.chip_of(name) for name in ("A100", "L40S", "H100"))
    decode, window, wide = (ATTENTION_SHAPES[name] for name in ("decode", "swin-window", "vae-mid"))
    assert tables.kernels_of("forward", decode, a100) == ("attention_decode",)
    assert tables.kernels_of("backward", window, a100) == ("attention_backward_one_tile",)
    assert tables.kernels_of("tangent", window, a100) == ("attention_tangent",)
    one_head = ATTENTION_SHAPES["transgan-window"]
    assert tables.kernels_of("backward", one_head, h100) == ("attention_backward_one_head",)
    both = ("attention_backward_query", "attention_backward_key_value")
    assert tables.kernels_of("backward", wide, h100) == tuple(f"{one}_wide" for one in both)
    assert tables.kernels_of("backward", wide, l40s) == both, "not enough shared memory for eight warps"
    for chip in (l40s, h100):
        assert tables.kernels_of("tangent", wide, chip) == ("attention_tangent_wide",)


def test_a_warp_waits_at_barriers_and_for_copies_that_nothing_hides():
    one = iteration.Iteration(0, {}, 0, 0, 0, 0, 0, 0, 1, 0, barriers=2)
    forward = loops.Name("attention_forward", "BFloat16", (64, 64), True)
    single = 2 * predict.LATENCY + predict.MEMORY_LATENCY
    assert predict.waits_of(forward, one, {"stages": 2}) == predict.LATENCY
    assert predict.waits_of(forward, one, {"stages": 1}) == single
    assert predict.waits_of(forward, one, {}) == single, "one stage at compile time has two barriers"
    wide = forward._replace(bare="attention_forward_wide")
    assert predict.waits_of(wide, one, {"stages": 1}) == 2 * predict.LATENCY
    tangent = forward._replace(bare="attention_tangent_wide")
    assert predict.waits_of(tangent, one, {"stages": 2}) == 2 * predict.LATENCY
    assert predict.waits_of(tangent, one, {"stages": 1}) == 3 * predict.LATENCY + predict.MEMORY_LATENCY


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


def test_every_shape_of_every_pass_is_predicted():
    data = json.loads((HERE / "predictions.json").read_text())
    found = {(row["chip"], row["pass"], row["shape"]) for row in data["predictions"]}
    every = {(chip.name, name, shape) for chip in chips.CHIPS for name in tables.PASSES for shape in ATTENTION_SHAPES}
    assert found == every


def test_decoding_takes_at_most_a_ninth_longer_than_reading_the_cache():
    data = json.loads((HERE / "predictions.json").read_text())
    shares = {
        row["chip"]: row["of_roofline"]
        for row in data["predictions"]
        if (row["pass"], row["shape"]) == ("forward", "decode")
    }
    assert len(shares) == len(chips.CHIPS)
    assert min(shares.values()) >= 0.9, shares
