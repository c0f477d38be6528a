"""The static gates of a release: what a wheel must hold, and must not, before anyone installs it.

usage: python tools/check_wheel.py WHEEL

Each gate is a function that yields its faults. Exits with 1 where there are any. Requires the extra ``release``, torch
(its headers declare the stable ABI) and a C++ compiler (which preprocesses them).
"""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import build_libraries, variants
from tools.wheel_files import Wheel, record_digest, version_key

LARGEST = 100 * 10**6  # bytes: the limit for one file on the public index
STABLE_HEADERS = (  # what the headers of torch/csrc/stable/ include
    "torch/csrc/stable/c/shim.h",
    "torch/csrc/inductor/aoti_torch/c/shim.h",
    "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",
)
TOOLCHAIN = ("__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable")
FORBIDDEN_LIBRARIES = {
    r"libcudart": "the CUDA runtime is linked statically",
    r"libcuda\b": "the driver is found at run time; a machine without one could not load this",
    r"libpython": "one wheel serves every Python",
    r"libtorch_python": "one wheel serves every Python",
}
TORCH_LIBRARIES = re.compile(r"lib(torch|torch_cpu|torch_cuda|c10|c10_cuda)\.so")

# Prints what fastgen_build_info() of argv[1] returns. Lazy binding: a CPU-only torch lacks functions of the CUDA ABI.
ASK_LIBRARY = """
import ctypes, os, sys
libdl = ctypes.CDLL(None)
libdl.dlopen.restype = libdl.dlsym.restype = ctypes.c_void_p
libdl.dlopen.argtypes, libdl.dlsym.argtypes = [ctypes.c_char_p, ctypes.c_int], [ctypes.c_void_p, ctypes.c_char_p]
libdl.dlerror.restype = ctypes.c_char_p
handle = libdl.dlopen(os.fsencode(sys.argv[1]), os.RTLD_LAZY)
address = handle and libdl.dlsym(handle, b"fastgen_build_info")
if not address:
    sys.exit(libdl.dlerror().decode())
print(ctypes.CFUNCTYPE(ctypes.c_char_p)(address)().decode())
"""


@cache
def torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise SystemExit("check_wheel needs torch: its headers declare the stable ABI")
    return Path(found.origin).parent


@cache
def stable_functions() -> frozenset[str]:
    """The C functions that torch's stable headers declare for the oldest torch that a wheel serves."""
    compiler = build_libraries.find_compiler()
    if compiler is None:
        raise SystemExit("check_wheel needs a C++ compiler (c++, g++ or CXX), which preprocesses torch's headers")
    source = "".join(f"#include <{header}>\n" for header in STABLE_HEADERS)
    target = f"-DTORCH_TARGET_VERSION={build_libraries.TORCH_TARGET}"
    command = [*shlex.split(compiler), "-E", "-P", "-std=c++20", "-x", "c++", "-DUSE_CUDA", target]
    done = subprocess.run(
        [*command, "-isystem", str(torch_folder() / "include"), "-"],
        input=source,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", done.stdout))


@cache
def demangled(name: str) -> str:
    if not name.startswith("_Z") or not (tool := shutil.which("c++filt")):
        return name
    return subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()


def is_python(name: str) -> bool:
    return re.match(r"_?Py[A-Z_]", name) is not None


def stable_symbols(wheel: Wheel) -> Iterator[str]:
    """Every undefined symbol belongs to a system library (it has a version) or to torch's stable C functions."""
    for library in wheel.libraries:
        for symbol in library.undefined:
            of_system = symbol.version or (symbol.weak and symbol.name in TOOLCHAIN)
            if not of_system and not is_python(symbol.name) and symbol.name not in stable_functions():
                yield f"{library.name}: {demangled(symbol.name)} is not in the stable ABI of torch 2.10"


def python_symbols(wheel: Wheel) -> Iterator[str]:
    for library in wheel.libraries:
        for symbol in filter(is_python, (symbol.name for symbol in library.undefined)):
            yield f"{library.name}: {symbol} ties the wheel to one Python"


def needed_libraries(wheel: Wheel) -> Iterator[str]:
    system = policy(wheel)["lib_whitelist"]
    for library in wheel.libraries:
        for name in library.needed:
            reason = next((why for pattern, why in FORBIDDEN_LIBRARIES.items() if re.match(pattern, name)), None)
            if reason:
                yield f"{library.name} needs {name}: {reason}"
            elif name not in system and not name.startswith("ld-linux") and not TORCH_LIBRARIES.fullmatch(name):
                yield f"{library.name} needs {name}, which is not a library of torch or of {policy(wheel)['name']}"


def search_paths(wheel: Wheel) -> Iterator[str]:
    for library in wheel.libraries:
        for path in library.search_paths:
            yield f"{library.name} searches {path} for libraries: expected no RPATH and no RUNPATH"


def policy(wheel: Wheel) -> dict[str, Any]:
    """What auditwheel knows of the platform tag; of several, the oldest."""
    text = importlib.resources.files("auditwheel.policy").joinpath("manylinux-policy.json").read_text()
    tags = wheel.tag[2].split(".")
    found = [p for p in json.loads(text) if any(f"{p['name']}_x86_64" == tag for tag in tags)]
    return (
        max(found, key=lambda p: p["priority"]) if found else {"name": "", "symbol_versions": {}, "lib_whitelist": []}
    )


def system_versions(wheel: Wheel) -> Iterator[str]:
    """Versions of GLIBC, GLIBCXX, CXXABI and GCC are among those of the tag."""
    allowed = policy(wheel)["symbol_versions"].get("x86_64", {})
    for library in wheel.libraries:
        for version in sorted(set(library.versions.values()), key=version_key):
            name, _, number = version.partition("_")
            if number not in allowed.get(name, []):
                users = [symbol.name for symbol in library.undefined if symbol.version == version]
                tag = policy(wheel)["name"] or "a manylinux tag"
                yield f"{library.name} needs {version}, newer than {tag}: {', '.join(map(demangled, users)) or '-'}"


def exported_symbols(wheel: Wheel) -> Iterator[str]:
    for library in wheel.libraries:
        for name in library.exported:
            if not re.fullmatch(r"fastgen_[a-z0-9_]+", name):
                yield f"{library.name} exports {demangled(name)}: expected only names that begin with fastgen_"
        if "fastgen_build_info" not in library.exported:
            yield f"{library.name} does not export fastgen_build_info"


def stripped(wheel: Wheel) -> Iterator[str]:
    for library in wheel.libraries:
        for section in library.sections:
            if section == ".symtab" or section.startswith(".debug"):
                yield f"{library.name} has the section {section}: expected a stripped library"


def size(wheel: Wheel) -> Iterator[str]:
    if (found := wheel.path.stat().st_size) >= LARGEST:
        sizes = ", ".join(f"{library.name} {library.size / 1e6:.1f} MB" for library in wheel.libraries)
        yield f"the wheel has {found / 1e6:.1f} MB ({sizes}): expected less than {LARGEST / 1e6:.0f} MB"


def contents(wheel: Wheel) -> Iterator[str]:
    """The package, its metadata and the promised libraries; no tests, benchmarks, or copies of system libraries."""
    for name in wheel.members:
        if not name.startswith(("fastgen/", wheel.info)):
            yield f"{name}: expected only fastgen/ and {wheel.info}"
        elif Path(name).suffix in (".cpp", ".cu", ".cuh", ".h", ".o", ".a", ".pyc"):
            yield f"{name}: sources and objects do not belong in a wheel"
    variant = variants.of_version(wheel.version)
    expected = {"fastgen/_cpu.so", *([] if variant.cuda is None else ["fastgen/_cuda.so"])}
    found = {library.name for library in wheel.libraries}
    if found != expected:
        yield f"libraries: expected {', '.join(sorted(expected))}, got {', '.join(sorted(found)) or 'none'}"


def platform_tag(wheel: Wheel) -> Iterator[str]:
    python, abi, platform = wheel.tag
    if (python, abi) != ("py3", "none"):
        yield f"tag: expected py3-none, got {python}-{abi}"
    if not re.match(r"manylinux_2_\d+_", platform):
        yield f"tag: expected manylinux_2_..., got {platform} (auditwheel repair sets it)"
    tags = wheel.message("WHEEL").get_all("Tag", [])
    if sorted(tags) != sorted(f"{python}-{abi}-{single}" for single in platform.split(".")):
        yield f"WHEEL names the tags {', '.join(tags)}, the file name {'-'.join(wheel.tag)}"


def record(wheel: Wheel) -> Iterator[str]:
    rows = wheel.record()
    unhashed = {wheel.info + "RECORD"}
    for name in sorted({*wheel.members} - rows.keys()):
        yield f"RECORD lacks {name}"
    for name in sorted(rows.keys() - {*wheel.members}):
        yield f"RECORD names {name}, which is not in the wheel"
    for name in sorted(({*wheel.members} & rows.keys()) - unhashed):
        data = wheel.read(name)
        if rows[name] != (record_digest(data), str(len(data))):
            yield f"RECORD: hash and size of {name} differ from the file"
    if len(wheel.members) != len({*wheel.members}):
        yield "the archive has two files of one name"


def licenses(wheel: Wheel) -> Iterator[str]:
    files = {name: wheel.read(name).decode() for name in wheel.members if name.startswith(f"{wheel.info}licenses/")}
    declared = {f"{wheel.info}licenses/{name}" for name in wheel.metadata.get_all("License-File", [])}
    if declared != {*files}:
        yield f"License-File: METADATA names {sorted(declared)}, the wheel has {sorted(files)}"
    if not any("Apache License" in text for text in files.values()):
        yield "the text of the Apache license is missing"
    if wheel.has_cuda and not any("NVIDIA" in text and "libcudart_static" in text for text in files.values()):
        yield "a notice of NVIDIA's license for the static CUDA runtime is missing (csrc/THIRD_PARTY_NOTICES)"


@cache
def build_info(wheel: Wheel, library: str) -> dict[str, Any]:
    """What the library says of its own build. Loads it in another process."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(torch_folder() / "lib")}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", ASK_LIBRARY, wheel.archive.extract(library, folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LookupError(f"{library}: fastgen_build_info() failed: {(done.stderr.strip() or 'no message')[-300:]}")
    return dict(json.loads(done.stdout))


def versions(wheel: Wheel) -> Iterator[str]:
    """One version in the file's name, METADATA, fastgen.version, the report of the build and the libraries."""
    found = {"METADATA": wheel.metadata["Version"]}
    with tempfile.TemporaryDirectory() as folder:
        wheel.archive.extract("fastgen/version.py", folder)
        wheel.archive.extract("fastgen/_build_report.json", folder)
        found["fastgen.version"] = runpy.run_path(f"{folder}/fastgen/version.py")["__version__"]
    report = json.loads(wheel.read("fastgen/_build_report.json"))
    found["_build_report.json"] = report.get("version")
    if report.get("missing", {}).keys() - ({"cuda"} if not wheel.has_cuda else set()):
        yield f"_build_report.json: libraries were not built: {report['missing']}"
    for library in wheel.libraries:
        try:
            found[library.name] = build_info(wheel, library.name)["version"]
        except LookupError as error:
            yield str(error)
    for place, version in found.items():
        if version != wheel.version:
            yield f"version: expected {wheel.version} as in the file's name, got {version} in {place}"


def find_cuobjdump() -> str | None:
    """cuobjdump of CUDA_HOME, of PATH, or of PyPI's nvidia-cuda-cuobjdump."""
    homes = [os.environ["CUDA_HOME"] + "/bin"] if "CUDA_HOME" in os.environ else []
    packaged = [f"{entry}/nvidia/cu13/bin" for entry in sys.path]
    return shutil.which("cuobjdump", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), *packaged]))


def listed_architectures(text: str) -> set[str]:
    """The output of cuobjdump --list-elf --list-ptx, as names: 90a, 120, 120+PTX."""
    kinds = (("cubin", ""), ("ptx", "+PTX"))
    return {f"{name}{suffix}" for kind, suffix in kinds for name in re.findall(rf"\.sm_(\w+)\.{kind}\b", text)}


def architectures(wheel: Wheel) -> Iterator[str]:
    """The code in the CUDA library, and what it says of itself, are as promised. A wheel serves all dtypes."""
    if not wheel.has_cuda:
        return
    variant = variants.of_version(wheel.version)
    promised = {*build_libraries.architecture_names(variants.architecture_list(variant))}
    try:
        info = build_info(wheel, "fastgen/_cuda.so")
        if {*info["architectures"]} != promised:
            yield f"architectures: expected {sorted(promised)}, the library names {sorted(info['architectures'])}"
        if info["cuda"] != variant.cuda:
            yield f"CUDA: expected {variant.cuda}, the library was built with {info['cuda']}"
        if {*info["dtypes"]} != {*build_libraries.DTYPES}:
            yield f"dtypes: expected {', '.join(build_libraries.DTYPES)}, the library names {', '.join(info['dtypes'])}"
    except LookupError as error:
        yield str(error)
    if (tool := find_cuobjdump()) is None:
        yield "cuobjdump was not found (pip install nvidia-cuda-cuobjdump)"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = wheel.archive.extract("fastgen/_cuda.so", folder)
        done = subprocess.run([tool, "--list-elf", "--list-ptx", path], capture_output=True, text=True, check=False)
    found = listed_architectures(done.stdout)
    if found != promised:
        yield f"architectures: expected {sorted(promised)}, the library has code for {sorted(found)} {done.stderr}"


def description(wheel: Wheel) -> Iterator[str]:
    """The page of an index renders."""
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        yield f"twine check --strict: {(done.stdout + done.stderr).strip()[-500:]}"


Gate = Callable[[Wheel], Iterator[str]]
GATES: tuple[Gate, ...] = (
    contents,
    platform_tag,
    record,
    versions,
    licenses,
    size,
    stable_symbols,
    python_symbols,
    needed_libraries,
    search_paths,
    system_versions,
    exported_symbols,
    stripped,
    architectures,
    description,
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the static gates of a release")
    parser.add_argument("wheel", type=Path, metavar="WHEEL")
    options = parser.parse_args(arguments)
    if not options.wheel.is_file():
        parser.error(f"WHEEL: expected a file, got {options.wheel}")
    wheel = Wheel(options.wheel)
    failed = 0
    for gate in GATES:
        faults = list(gate(wheel))
        failed += bool(faults)
        print(f"{'FAILED' if faults else 'ok':8}{gate.__name__.replace('_', ' ')}")
        for fault in faults:
            print(f"        {fault}")
    sizes = "".join(f", {library.name} {library.size / 1e6:.1f} MB" for library in wheel.libraries)
    print(f"{wheel.path.name}: {wheel.path.stat().st_size / 1e6:.1f} MB{sizes}; {failed} of {len(GATES)} gates failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
