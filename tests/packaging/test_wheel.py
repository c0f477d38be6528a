"""Each gate of tools/check_wheel.py fails on a planted fault."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.packaging.wheels import LIBRARY, Parts, build_info, compile_library
from tools import check_wheel
from tools.build_libraries import DTYPES, cuda_home, find_nvcc
from tools.wheel_files import Wheel

ROOT = Path(__file__).resolve().parents[2]

for package in ("auditwheel", "elftools", "twine"):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'fastgen[release]')")

NVCC = find_nvcc()


def faults(wheel: Path, gate: str) -> list[str]:
    return list(getattr(check_wheel, gate)(Wheel(wheel)))


def test_a_good_wheel_passes_every_gate(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_wheel.main([str(parts.write())]) == 0
    assert f"0 of {len(check_wheel.GATES)} gates failed" in capsys.readouterr().out


# -- libraries ---------------------------------------------------------------------------------------------------------


def calls(symbol: str) -> str:
    return LIBRARY + f"extern void {symbol}(void);\nEXPORTED void fastgen_planted(void) {{ {symbol}(); }}\n"


def with_library(parts: Parts, source: str, *flags: str, stripped: bool = True) -> Path:
    data = compile_library(parts.folder / "_cpu.so", source, *flags, info=build_info("cpu"), stripped=stripped)
    parts.libraries["fastgen/_cpu.so"] = data
    return parts.write()


@pytest.mark.parametrize(
    ("gate", "symbol", "message"),
    [
        ("stable_symbols", "_ZN3c106detail14torchCheckFailEPKcS2_jS2_", r"c10::detail::torchCheckFail\(.* stable ABI"),
        ("stable_symbols", "_ZN5torch7Library3defEv", r"torch::Library::def\(\) is not in the stable ABI"),
        ("stable_symbols", "torch_tag_core", "torch_tag_core is not in the stable ABI of torch 2.10"),  # since 2.12
        ("stable_symbols", "cudaMalloc", "cudaMalloc is not in the stable ABI"),
        ("python_symbols", "PyErr_SetString", "PyErr_SetString ties the wheel to one Python"),
        ("python_symbols", "_PyObject_New", "_PyObject_New ties"),
    ],
)
def test_an_undefined_symbol_outside_of_the_stable_abi_is_found(
    parts: Parts, gate: str, symbol: str, message: str
) -> None:
    wheel = with_library(parts, calls(symbol))
    (fault,) = faults(wheel, gate)
    assert re.search(message, fault)
    assert not faults(wheel, "python_symbols" if gate == "stable_symbols" else "stable_symbols")


def test_the_stable_functions_are_those_of_torch_2_10() -> None:
    assert {"aoti_torch_get_dim", "torch_call_dispatcher", "aoti_torch_get_current_cuda_stream"} <= (
        check_wheel.stable_functions()
    )
    assert not {"torch_tag_core", "torch_from_blob", "cudaMalloc"} & check_wheel.stable_functions()


@pytest.mark.parametrize(
    ("soname", "message"),
    [
        ("libcudart.so.13", "needs libcudart.so.13: the CUDA runtime is linked statically"),
        ("libcuda.so.1", "needs libcuda.so.1: the driver is found at run time"),
        ("libpython3.11.so.1.0", "one wheel serves every Python"),
        ("libtorch_python.so", "one wheel serves every Python"),
        ("libother.so.2", "is not a library of torch or of manylinux_2_34"),
    ],
)
def test_a_library_that_must_not_be_needed_is_found(parts: Parts, soname: str, message: str) -> None:
    compile_library(parts.folder / "libplanted.so", "", f"-Wl,-soname,{soname}")
    wheel = with_library(parts, LIBRARY, "-Wl,--no-as-needed", f"-L{parts.folder}", "-lplanted")
    (fault,) = faults(wheel, "needed_libraries")
    assert message in fault


def test_libraries_of_torch_may_be_needed(parts: Parts) -> None:
    compile_library(parts.folder / "libplanted.so", "", "-Wl,-soname,libtorch_cpu.so")
    wheel = with_library(parts, LIBRARY, "-Wl,--no-as-needed", f"-L{parts.folder}", "-lplanted")
    assert not faults(wheel, "needed_libraries")


def test_a_search_path_is_found(parts: Parts) -> None:
    wheel = with_library(parts, LIBRARY, "-Wl,-rpath,/opt/build/lib")
    assert "searches /opt/build/lib" in faults(wheel, "search_paths")[0]


def test_a_system_version_newer_than_the_tag_is_found(parts: Parts) -> None:
    (parts.folder / "versions").write_text("GLIBC_2.35 { global: planted; };")
    script = f"-Wl,--version-script={parts.folder / 'versions'}"
    source = '__attribute__((visibility("default"))) void planted(void) {}'
    compile_library(parts.folder / "libplanted.so", source, "-Wl,-soname,libm.so.6", script)
    wheel = with_library(parts, calls("planted"), f"-L{parts.folder}", "-lplanted")
    (fault,) = faults(wheel, "system_versions")
    assert "needs GLIBC_2.35, newer than manylinux_2_34: planted" in fault
    parts.tag = "py3-none-manylinux_2_35_x86_64"
    assert not faults(parts.write(), "system_versions")


@pytest.mark.parametrize("name", ["fast_helper", "_ZN7fastgen4planEv"])
def test_an_exported_symbol_that_is_not_ours_is_found(parts: Parts, name: str) -> None:
    wheel = with_library(parts, LIBRARY + f"EXPORTED void {name}(void) {{}}\n")
    (fault,) = faults(wheel, "exported_symbols")
    assert re.search(r"exports (fast_helper|fastgen::plan\(\)): expected only names that begin with fastgen_", fault)


def test_a_library_without_build_info_is_found(parts: Parts) -> None:
    wheel = with_library(parts, LIBRARY.replace("fastgen_build_info", "fastgen_other"))
    assert "does not export fastgen_build_info" in faults(wheel, "exported_symbols")[0]
    assert any("fastgen_build_info() failed" in fault for fault in faults(wheel, "versions"))


def test_a_library_that_is_not_stripped_is_found(parts: Parts) -> None:
    found = faults(with_library(parts, LIBRARY, "-g", stripped=False), "stripped")
    assert any(".symtab" in fault for fault in found)
    assert any(".debug_info" in fault for fault in found)


def test_a_large_wheel_is_found(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_wheel, "LARGEST", 1000)
    assert re.search(r"the wheel has .* \(fastgen/_cpu.so .* MB\)", faults(parts.write(), "size")[0])


BUILT = sorted((ROOT / "fastgen").glob("_c*.so"))


@pytest.mark.skipif(not BUILT, reason="nothing is compiled in this checkout")
@pytest.mark.parametrize(
    "gate", ["stable_symbols", "python_symbols", "needed_libraries", "search_paths", "exported_symbols"]
)
def test_the_libraries_of_this_checkout_pass(parts: Parts, gate: str) -> None:
    parts.libraries = {f"fastgen/{path.name}": path.read_bytes() for path in BUILT}
    assert not faults(parts.write(), gate)


# -- files and metadata ------------------------------------------------------------------------------------------------


def swap(member: str, old: str, new: str) -> Callable[[Parts], None]:
    """Replaces text of a file; in names, INFO is the dist-info folder."""

    def change(parts: Parts) -> None:
        name = member.replace("INFO/", parts.info)
        assert old in parts.files[name]
        parts.files[name] = parts.files[name].replace(old, new)

    return change


def add(member: str) -> Callable[[Parts], None]:
    return lambda parts: parts.files.__setitem__(member, "planted")


def remove(member: str) -> Callable[[Parts], None]:
    return lambda parts: parts.files.pop(member.replace("INFO/", parts.info)) and None


def tagged(tag: str) -> Callable[[Parts], None]:
    return lambda parts: setattr(parts, "tag", tag)


def recorded(member: str, row: str | None) -> Callable[[Parts], None]:
    return lambda parts: parts.record.__setitem__(member, row)


@pytest.mark.parametrize(
    ("gate", "plant", "message"),
    [
        ("contents", add("tests/test_planted.py"), "tests/test_planted.py: expected only fastgen/ and fastgen-0.1.0"),
        ("contents", add("benchmarks/suite.py"), "benchmarks/suite.py: expected only"),
        ("contents", add("fastgen.libs/libgomp.so.1"), "fastgen.libs/libgomp.so.1: expected only"),
        ("contents", add("fastgen/kernel.cu"), "kernel.cu: sources and objects do not belong"),
        ("contents", lambda parts: parts.libraries.clear(), "expected fastgen/_cpu.so, got none"),
        ("contents", lambda parts: parts.libraries.update({"fastgen/_C.so": parts.libraries["fastgen/_cpu.so"]}),
         "expected fastgen/_cpu.so, got fastgen/_C.so, fastgen/_cpu.so"),
        ("platform_tag", tagged("py3-none-linux_x86_64"), "expected manylinux_2_..., got linux_x86_64"),
        ("platform_tag", tagged("cp311-cp311-manylinux_2_28_x86_64"), "expected py3-none, got cp311-cp311"),
        ("platform_tag", swap("INFO/WHEEL", "manylinux_2_34", "linux"), "WHEEL names the tags py3-none-linux_x86_64"),
        ("record", recorded("fastgen/__init__.py", None), "RECORD lacks fastgen/__init__.py"),
        ("record", recorded("x", "fastgen/gone.py,sha256=x,1"), "RECORD names fastgen/gone.py, which is not"),
        ("record", recorded("fastgen/version.py", "fastgen/version.py,sha256=AAAA,1"), "hash and size of fastgen/vers"),
        ("versions", swap("INFO/METADATA", "Version: 0.1.0+cpu", "Version: 0.1.0"), "got 0.1.0 in METADATA"),
        ("versions", swap("fastgen/version.py", "+cpu", "+cu130"), "got 0.1.0+cu130 in fastgen.version"),
        ("versions", swap("fastgen/_build_report.json", "0.1.0+cpu", "0.2"), "got 0.2 in _build_report.json"),
        ("versions", swap("fastgen/_build_report.json", '"cuda":', '"cpu":'), "libraries were not built"),
        ("licenses", remove("INFO/licenses/LICENSE"), "METADATA names"),
        ("licenses", swap("INFO/licenses/LICENSE", "Apache", "Other"), "the text of the Apache license is missing"),
        ("description", swap("INFO/METADATA", "text/markdown\n\n# fastgen", "text/x-rst\n\n.. planted::"), "twine"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_found(parts: Parts, gate: str, plant: Callable[[Parts], None], message: str) -> None:
    assert not faults(parts.write(), gate)
    plant(parts)
    assert any(message in fault for fault in faults(parts.write(), gate)), faults(parts.write(), gate)


def test_the_version_of_a_library_has_to_be_that_of_the_wheel(parts: Parts) -> None:
    info = {**build_info("cpu"), "version": "0.0.9"}
    parts.libraries["fastgen/_cpu.so"] = compile_library(parts.folder / "_cpu.so", LIBRARY, info=info)
    assert any("got 0.0.9 in fastgen/_cpu.so" in fault for fault in faults(parts.write(), "versions"))


def test_a_failed_gate_fails_the_command(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    tagged("py3-none-linux_x86_64")(parts)
    assert check_wheel.main([str(parts.write())]) == 1
    assert "FAILED  platform tag" in capsys.readouterr().out


# -- CUDA --------------------------------------------------------------------------------------------------------------

KERNEL = (
    '__global__ void kernel(float* x) { *x = 1; }\nextern "C" void fastgen_launch(float* x) { kernel<<<1, 1>>>(x); }'
)


def cuda_wheel(
    parts: Parts, cubin: str | None, named: str = "90a", cuda: str = "12.4", dtypes: Sequence[str] = DTYPES
) -> Path:
    """A wheel of the variant cu12-smoke, whose promise is 90a; without nvcc's part if cubin is None."""
    library, kernel, flags = parts.folder / "_cuda.so", parts.folder / "kernel.cu", []
    if cubin is not None:
        kernel.write_text(KERNEL)
        options = [f"-gencode=arch=compute_{cubin},code=sm_{cubin}", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        command = [NVCC, *options, "-c", kernel, "-o", kernel.with_suffix(".o")]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
        flags = [str(kernel.with_suffix(".o")), *(f"-L{cuda_home(NVCC)}/{folder}" for folder in ("lib64", "lib"))]
        flags += ["-lcudart_static", "-lstdc++", "-ldl", "-lrt", "-lpthread"]
    compile_library(library, LIBRARY, *flags, info={**build_info("cu124", cuda, (named,)), "dtypes": [*dtypes]})
    cpu = compile_library(parts.folder / "_cpu.so", LIBRARY, info=build_info("cu124"))
    libraries = {"fastgen/_cpu.so": cpu, "fastgen/_cuda.so": library.read_bytes()}
    return replace(parts, local="cu124", libraries=libraries, files={}).write()


needs_cuobjdump = pytest.mark.skipif(check_wheel.find_cuobjdump() is None, reason="no cuobjdump")


@needs_cuobjdump
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_the_code_of_the_cuda_library_has_to_be_what_is_promised(parts: Parts) -> None:
    good = cuda_wheel(parts, "90a")
    for gate in ("architectures", "versions", "contents", "licenses"):
        assert not faults(good, gate)
    assert "the library has code for ['90']" in faults(cuda_wheel(parts, "90"), "architectures")[0]


@needs_cuobjdump
def test_the_build_info_of_the_cuda_library_has_to_be_what_is_promised(parts: Parts) -> None:
    assert "the library names ['80']" in faults(cuda_wheel(parts, None, named="80"), "architectures")[0]
    assert "built with 13.0" in faults(cuda_wheel(parts, None, cuda="13.0"), "architectures")[0]
    fewer = faults(cuda_wheel(parts, None, dtypes=("bfloat16",)), "architectures")[0]
    assert fewer == "dtypes: expected bfloat16, float16, float32, the library names bfloat16"
    (fault,) = faults(cuda_wheel(parts, None), "architectures")
    assert "the library has code for []" in fault


def test_a_cuda_wheel_needs_its_library_and_nvidia_s_notice(parts: Parts) -> None:
    parts = replace(parts, local="cu126", libraries=dict(parts.libraries), files={})
    parts.libraries["fastgen/_cuda.so"] = parts.libraries["fastgen/_cpu.so"]
    assert not faults(parts.write(), "licenses")
    parts.files[f"{parts.info}licenses/csrc/THIRD_PARTY_NOTICES"] = "none"
    assert "NVIDIA's license" in faults(parts.write(), "licenses")[0]
    del parts.libraries["fastgen/_cuda.so"]
    assert "expected fastgen/_cpu.so, fastgen/_cuda.so, got fastgen/_cpu.so" in faults(parts.write(), "contents")[0]


def test_architectures_are_read_from_cuobjdump() -> None:
    listing = (
        "ELF file    1: _cuda.1.sm_90a.cubin\nELF file    2: _cuda.2.sm_120.cubin\nPTX file    1: _cuda.1.sm_120.ptx"
    )
    assert check_wheel.listed_architectures(listing) == {"90a", "120", "120+PTX"}


def test_the_notice_of_the_repository_names_the_static_runtime(parts: Parts) -> None:
    parts = replace(parts, local="cu126", libraries={**parts.libraries, "fastgen/_cuda.so": b""}, files={})
    notice = (ROOT / "csrc" / "THIRD_PARTY_NOTICES").read_text(encoding="utf-8")
    parts.files[f"{parts.info}licenses/csrc/THIRD_PARTY_NOTICES"] = notice
    parts.files[f"{parts.info}licenses/LICENSE"] = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert not faults(parts.write(), "licenses")
