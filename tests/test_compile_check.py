"""tests/compile_check.py: parsing of the reports of ptxas and nvdisasm, and comparison with budgets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from tests import compile_check, compile_costs, compile_report
from tests.compile_report import Kernel
from tests.kernel_budgets import Budget

SCALE, SUM = "_ZN1k5scaleIfLb1EEEvPT_", "_ZN1k36_GLOBAL__N__c2de202b_4_a_cu_91af215a3sumEPf"
REPORT = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SCALE}' for 'sm_90a'
ptxas info    : Function properties for {SCALE}
    1448 bytes stack frame, 1412 bytes spill stores, 1604 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1448 bytes cumulative stack size, 400 bytes smem
ptxas info    : Compile time = 21.790 ms
ptxas info    : Compiling entry function '{SUM}' for 'sm_90a'
ptxas info    : Function properties for {SUM}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 0 barriers, 256 bytes cumulative stack size, 376 bytes cmem[0]
ptxas info    : Compile time = 1.806 ms
ptxas info    : Function properties for helper
    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Compiling entry function 'plain' for 'sm_90a'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 16 registers, used 0 barriers
"""
LISTING = f"""\
	.target	sm_90a

//--------------------- .text.{SCALE} --------------------------
	.section	.text.{SCALE},"ax",@progbits
	.align	128
.text.{SCALE}:
        .type           {SCALE},@function
{SCALE}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R8, desc[UR6][R4.64] ;
        /*0020*/              @!P0 LDG.E.LTC128B.64 R6, desc[UR6][R4.64] ;
        /*0030*/                   LDG.E R19, desc[UR4][R24.64+0xc] ;
        /*0040*/             @!UP0 LDG.E.U16 R19, desc[UR4][R24.64+0xc] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R0+0x400], desc[UR6][R4.64] ;
        /*0060*/                   LDSM.16.M88.4 R4, [R3] ;
        /*0070*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0080*/                   HFMA2.MMA R2, -RZ, RZ, 0, 1.78813934326171875e-07 ;
        /*0090*/                   MUFU.EX2 R5, R5 ;
        /*00a0*/                   MUFU.RCP R5, R5 ;
        /*00b0*/              @!P1 BRA `(.L_x_1) ;
.L_x_1:
        /*00c0*/                   STL.128 [R1+0x10], R4 ;
        /*00d0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00e0*/              @P0 SHFL.BFLY PT, R5, R4, 0x10, 0x1f ;
        /*00f0*/                   STG.E.128 desc[UR6][R4.64], R8 ;
//--------------------- .text.{SUM} --------------------------
.text.{SUM}:
{SUM}:
        /*0000*/                   STG.E desc[UR6][R4.64], R3 ;
        /*0010*/                   STG.E desc[UR6][R4.64+0x4], R3 ;
"""
KERNEL = Kernel("a.cu", "80", SCALE, "k::scale<float, true>", 64, 32, 0, 0)
BUDGET = Budget(64, 32)
demangles = pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")


@demangles
def test_a_ptxas_report_is_parsed_into_kernels():
    assert compile_report.parse_ptxas("a.cu", "90a", REPORT) == [
        Kernel("a.cu", "90a", SCALE, "k::scale<float, true>", 32, 400, 1448, 1412 + 1604),
        # Spills and stack of a called function are included.
        Kernel("a.cu", "90a", SUM, "k::(anonymous namespace)::sum", 14, 0, 256, 12),
        Kernel("a.cu", "90a", "plain", "plain", 16, 0, 0, 0),
    ]


@demangles
def test_a_report_without_kernels_is_empty():
    assert compile_report.parse_ptxas("a.cu", "90a", "ptxas info    : 0 bytes gmem\n") == []


def test_instructions_are_counted_for_each_kernel():
    once = ["LDG.128", "LDG.64", "LDG.32", "LDG.U16", "LDGSTS.128", "STG.128", "LDSM", "HMMA", "MUFU.EX2", "STL"]
    assert compile_report.parse_sass(LISTING) == {SCALE: dict.fromkeys([*once, "BAR", "SHFL"], 1), SUM: {"STG.32": 2}}


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("k::scale<k::Half, true>", "scale"),
        ("k::scale<k::Pair<float, k::Half>, 3u>", "scale"),
        ("k::Family<float>::run<3>", "run"),
        ("k::(anonymous namespace)::sum", "sum"),
        ("plain", "plain"),
    ],
)
def test_a_budget_is_found_by_the_bare_name(name, bare):
    assert compile_report.bare_name(name) == bare


@pytest.mark.parametrize(
    ("change", "budget", "problems"),
    [
        ({}, BUDGET, []),
        ({"registers": 65}, BUDGET, ["65 registers, budget 64"]),
        ({"shared_bytes": 48}, BUDGET, ["48 shared bytes, budget 32"]),
        ({"stack_bytes": 16}, BUDGET, ["16 stack bytes, budget 0"]),
        ({"stack_bytes": 16}, Budget(64, 32, 16), []),
        ({"spill_bytes": 8}, BUDGET, ["8 bytes of spills"]),
        ({"spill_bytes": 8}, Budget(64, 32, 16), ["8 bytes of spills"]),
        ({"instructions": {"LDL": 2, "STL": 1, "BAR": 4}}, BUDGET, ["3 accesses of local memory (LDL, STL), budget 0"]),
        ({"instructions": {"LDL": 2, "STL": 1}}, Budget(64, 32, 16), []),
    ],
)
def test_resources_are_compared_with_the_budget(change, budget, problems):
    found = compile_check.compare([KERNEL._replace(**change)], {"scale": budget}, everything=True)
    assert found == [f"k::scale<float, true> for sm_80: {problem}" for problem in problems]


def test_architectures_without_budgets_may_spill_a_few_words():
    kernel = KERNEL._replace(arch="120", registers=200, spill_bytes=compile_check.SPILLS_ELSEWHERE)
    assert compile_check.compare([kernel], {"scale": BUDGET}, everything=True) == []
    worse = kernel._replace(spill_bytes=compile_check.SPILLS_ELSEWHERE + 8)
    assert compile_check.compare([worse], {"scale": BUDGET}, everything=True) == [
        "k::scale<float, true> for sm_120: 136 bytes of spills"
    ]


def test_a_kernel_without_a_budget_is_named_once():
    kernels = [KERNEL, KERNEL._replace(arch="90a")]
    assert compile_check.compare(kernels, {}, everything=True) == [
        "scale has no budget: declare one in tests/kernel_budgets.py"
    ]


def test_a_budget_without_a_kernel_is_named_if_all_sources_were_compiled():
    budgets = {"scale": BUDGET, "gone": BUDGET}
    assert compile_check.compare([KERNEL], budgets, everything=False) == []
    assert compile_check.compare([KERNEL], budgets, everything=True) == [
        "tests/kernel_budgets.py: no kernel is called gone"
    ]


def test_tables_omit_columns_that_are_zero(capsys):
    compile_check.print_tables([KERNEL._replace(instructions={"LDG.128": 7, "BAR": 1})])
    first, second = capsys.readouterr().out.split("\n\n")
    assert " ".join(first.split()) == "arch regs smem stack spills kernel 80 64 32 0 0 k::scale<float, true>"
    assert " ".join(second.split()) == "arch BAR LDG.128 kernel 80 1 7 k::scale<float, true>"


SOURCE = """
namespace k {
// 64 live values in the 32 registers that 2 blocks of 1024 threads allow.
__global__ void __launch_bounds__(1024, 2) tight(float* p) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = p[i * blockDim.x + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * blockDim.x + threadIdx.x + 1] = a[i] * a[(i * 5 + 3) % 64];
}
__global__ void easy(float* p) {
  __shared__ float shared[32];
  shared[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = shared[31 - threadIdx.x];
}
}  // namespace k
"""


@pytest.mark.skipif(compile_check.find_nvcc() is None, reason="no nvcc")
@demangles
def test_spills_and_kernels_over_their_budget_fail_the_check(tmp_path, capsys):
    (tmp_path / "bad.cu").write_text(SOURCE)
    (tmp_path / "good.cu").write_text(SOURCE.replace("64", "8"))
    roomy, table = Budget(255, 128, 4096), tmp_path / "table.json"
    arguments = ["--arch", "90a", "--json", str(table)]

    assert compile_check.main([*arguments, str(tmp_path / "good.cu")], {"tight": roomy, "easy": roomy}) == 0
    assert not capsys.readouterr().err
    assert {entry["name"]: entry["shared_bytes"] for entry in json.loads(table.read_text())} == {
        "k::tight": 0,
        "k::easy": 128,
    }

    assert compile_check.main([*arguments, str(tmp_path / "bad.cu")], {"tight": roomy, "easy": Budget(255)}) == 1
    spilled, over = sorted(capsys.readouterr().err.splitlines(), reverse=True)
    assert spilled.startswith("k::tight for sm_90a: ")
    assert spilled.endswith("bytes of spills")
    assert over == "k::easy for sm_90a: 128 shared bytes, budget 0"


def test_cpu_time_includes_the_processes_that_a_compiler_starts(tmp_path):
    spin = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    start = f"import subprocess, sys\nprint('started', flush=True)\nsubprocess.run([sys.executable, '-c', {spin!r}])"
    done = compile_costs.run_compiler([sys.executable, "-c", start], tmp_path / "report")
    assert done.returncode == 0
    assert done.output == "started\n"
    assert done.seconds > 0.2
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    assert compile_costs.run_compiler(failing, tmp_path / "report").returncode == 3


def test_a_source_with_too_much_machine_code_fails(capsys):
    kib = compile_costs.MOST_KIB
    costs = {
        ("csrc/a.cu", "90a"): compile_costs.Cost(31.0, kib + 1),
        ("csrc/b.cu", "90a"): compile_costs.Cost(29.0, kib - 1),
        ("csrc/b.cu", "80"): compile_costs.Cost(2.5, 40.0),
    }
    (problem,) = compile_costs.large_sources(costs)
    assert problem.startswith(f"csrc/a.cu for sm_90a: {kib + 1} KiB of machine code, at most {kib}")
    compile_costs.print_costs(costs)
    assert f"90a      60.0{2 * kib:>7}  all" in capsys.readouterr().out


def test_a_builds_log_has_the_kernels_of_its_sources():
    log = f"  fastgen: ninja\n  [1/3] csrc/a.cpp\n  [2/3] csrc/b.cu\n{REPORT}  [3/3] build/_cuda.so\n"
    kernels = compile_check.parse_build("90a", log)
    assert kernels == compile_report.parse_ptxas("csrc/b.cu", "90a", REPORT)
    assert len(kernels) == 3


LOOP = """\
.text.loop:
.L_x_1:
        /*0000*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0010*/                   LDGSTS.E.BYPASS.128 [R0+0x400], desc[UR6][R4.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   FSEL R1, R1, R2, P1 ;
.L_x_2:
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
GROWN        /*0060*/              @!P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""
ADDED = "        /*0058*/                   FADD R1, R1, R2 ;\n"


def counted(grown=""):
    kernel = Kernel("a.cu", "90a", "loop", "void k::product<k::Half>", 64, 0, 0, 0)
    return compile_check.count_loops([kernel, KERNEL], LOOP.replace("GROWN", grown), ["product<Half>"])


def test_main_loops_of_the_chosen_kernels_are_counted():
    first, second = counted()
    # The branch around FSEL is taken: 6 of 7 instructions, for 2 products.
    assert first.loop == (7, 3.0)
    assert second.loop is None


def test_a_main_loop_that_grows_fails():
    budgets = compile_check.tightened(counted(), {})
    assert budgets == {"90a": {"product<Half>": {"loop": 8, "per_score": 3.1}}}
    check = {"budgets": budgets, "names": ["product<Half>"], "everything": True}
    assert compile_check.compare_loops(counted()[:1], **check) == []
    assert compile_check.compare_loops(counted(ADDED)[:1], **check) == [
        "product<Half> for sm_90a: 3.50 instructions of the main loop (per_score), budget 3.10"
    ]
    assert compile_check.compare_loops(counted(2 * ADDED)[:1], **check) == [
        "product<Half> for sm_90a: 9.00 instructions of the main loop (loop), budget 8.00",
        "product<Half> for sm_90a: 4.00 instructions of the main loop (per_score), budget 3.10",
    ]


def test_a_main_loop_without_a_count_or_a_budget_is_reported():
    check = {"names": ["product<Half>", "gone"], "everything": True}
    assert compile_check.compare_loops(counted()[:1], budgets={}, **check) == [
        "product<Half> for sm_90a: no budget of its main loop; --tighten writes one",
        "gone for sm_90a: its main loop was not counted (no such kernel, or no nvdisasm or cuobjdump)",
    ]
    assert compile_check.compare_loops([], budgets={}, names=["gone"], everything=False) == []


def test_every_kernel_with_a_loop_budget_has_one_for_both_architectures():
    table = compile_check.load("tests/kernel_budgets.py")
    budgets = json.loads(compile_check.LOOP_BUDGETS.read_text())
    assert {arch: sorted(found) for arch, found in budgets.items()} == {
        arch: sorted(name for name in table.LOOP_KERNELS if arch == "90a" or "_sm90<" not in name)
        for arch in compile_check.WITH_BUDGETS
    }


PRODUCTS = """
namespace k {
template <int kRows>
__global__ void product(float* p, const unsigned* a, int count) {
  float c[4] = {};
  for (int i = 0; i < count; ++i) {
    __syncthreads();
    const unsigned* b = a + i * 6;
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(b[4]), "r"(b[5]));
  }
  for (int i = 0; i < 4; ++i) p[i] = c[i];
}
template __global__ void product<1>(float*, const unsigned*, int);
}  // namespace k
"""  # noqa: E501
NVCC = compile_check.find_nvcc()
TOOLS = [NVCC and compile_check.find_tool(NVCC, name) for name in ("nvdisasm", "cuobjdump")]


@pytest.mark.skipif(not all(TOOLS), reason="no nvcc, nvdisasm or cuobjdump")
@demangles
def test_main_loops_are_counted_in_sources_and_in_libraries(tmp_path, capsys):
    source, library, budgets = tmp_path / "product.cu", tmp_path / "product.so", tmp_path / "budgets.json"
    source.write_text(PRODUCTS)
    check = {"budgets": {"product": Budget(255)}, "loop_kernels": ["product<1>"], "loop_file": budgets}
    assert compile_check.main(["--arch", "90a", str(source)], **check) == 1
    assert "no budget of its main loop; --tighten writes one" in capsys.readouterr().err
    assert compile_check.main(["--arch", "90a", "--tighten", str(source)], **check) == 0
    allowed = json.loads(budgets.read_text())["90a"]["product<1>"]
    assert allowed["loop"] > 0

    command = [
        NVCC,
        "-std=c++20",
        "-O3",
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-arch=sm_90a",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    kernel = Kernel("product.cu", "90a", "_ZN1k7productILi1EEEvPfPKji", "void k::product<1>", 32, 0, 0, 0)
    (found,), error = compile_check.count_library_loops([kernel], library, NVCC, ["product<1>"])
    assert error == ""
    assert allowed["loop"] / compile_check.SLACK**2 <= found.loop.loop <= allowed["loop"]


def test_serialized_products_and_ignored_register_counts_fail_the_check():
    """Messages of ptxas, which exits with 0."""
    report = (
        "ptxas info    : (C7520) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...\n"
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored; ...\n"
    )
    found = compile_report.serializations(REPORT + report)
    assert [line[:7] for line in found] == ["(C7520)", "(C7508)"]
    assert compile_report.serializations(REPORT) == []


def test_exponentials_between_the_waits_for_two_products_are_counted():
    """Not those before a product, nor those after the last wait."""
    one, product = "MUFU.EX2 R1, R2", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0"

    def count(*code):
        lines = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(code)]
        return compile_report.parse_sass("\n".join([".text.k:", *lines]))["k"][compile_report.BESIDE_PRODUCTS]

    assert count(one, product, product, wait, one, one, wait, one, one, one) == 2
    assert count(product, wait, one, one, product, wait, one) == 0
    assert count(product, product, wait, wait, one, one) == 0


def test_instructions_that_a_kernel_must_have_or_must_not_have():
    required = {"HGMMA": True, "HMMA": False}
    kernel = Kernel("a.cu", "90a", "k", "n::k", 168, 0, 0, 0, instructions={"HGMMA": 3})
    assert compile_check.compare_instructions(kernel, required) == []
    assert compile_check.compare_instructions(kernel._replace(instructions=None), required) == []
    wrong = compile_check.compare_instructions(kernel._replace(instructions={"HMMA": 1}), required)
    assert wrong == ["n::k for sm_90a: no HGMMA", "n::k for sm_90a: has HMMA"]


def test_sources_for_sm_90a_are_compiled_for_it_alone():
    special = {path for path in compile_check.library_sources("90a") if "sm90" in path.parts}
    assert special
    for arch in ("80", "100", "120", "sm_80"):
        assert set(compile_check.library_sources(arch)) == set(compile_check.library_sources("90a")) - special
    assert {path.stem for path in compile_check.unit_kernels("sm_90a")} > {"unit_sm90", "unit_sm90a"}
    assert "unit_sm90a" not in {path.stem for path in compile_check.unit_kernels("120")}
    assert "unit_sm90" not in {path.stem for path in compile_check.unit_kernels("80")}


def test_sources_of_one_dtype_can_be_left_out_where_no_wheel_is_built():
    every, some = compile_check.library_sources("80"), compile_check.library_sources("80", ["bfloat16", "float32"])
    left_out = set(every) - set(some)
    assert left_out
    assert {path.stem.rpartition("_")[2] for path in left_out} == {"float16"}
    assert any(path.stem == "launch" for path in some)  # of no dtype
    assert {path.stem for path in some} >= {path.stem.replace("float16", "bfloat16") for path in left_out}
    jobs = compile_check.all_jobs(["80", "90a"], "90a", ["bfloat16"])
    assert {arch for path, arch in jobs if "csrc" in path.parts} == {"80"}  # a wheel has all dtypes
    with pytest.raises(SystemExit):
        compile_check.main(["--arch", "80", "--dtype", "float64"])


def test_a_library_has_the_kernels_for_sm_90a_only_with_that_architecture(monkeypatch):
    builder = compile_check.load("tools/build_libraries.py")
    monkeypatch.setattr(builder, "cuda_home", lambda _: "/cuda")
    monkeypatch.setattr(builder, "cuda_release", lambda _: "13.0")
    torch = builder.Torch(compile_check.ROOT, "2.13.0", None)

    def flags(*architectures):
        library = builder.cuda_library(torch, "1.0", "nvcc", list(architectures))
        return {source: flags for source, flags in library.sources.items() if "/sm90/" in source}

    assert not flags("80", "120")
    for found in flags("80", "90a", "90", "120+PTX").values():
        assert found.count("-gencode") == 1
        assert "code=sm_90a" in found


def test_a_budget_of_a_kernel_for_sm_90a_is_unused_only_where_that_was_compiled():
    budgets = {"k": Budget(32), "forward_sm90": Budget(168)}
    kernel = Kernel("a.cu", "80", "k", "n::k", 32, 0, 0, 0)
    assert compile_check.compare([kernel], budgets, everything=True) == []
    (problem,) = compile_check.compare([kernel._replace(arch="90a")], budgets, everything=True)
    assert "no kernel is called forward_sm90" in problem
