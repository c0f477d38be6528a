"""Compiles the package's shared libraries, fastgen/_cpu.so and fastgen/_cuda.so, with ninja. setup.py calls it.

The libraries contain no Python and use the stable ABI of LibTorch 2.10: one build serves every Python and every torch
from 2.10 on. torch.utils.cpp_extension is not used: it imports torch, refuses a CUDA toolkit of another major version
than torch's, and writes no dependencies of .cu files under a torch without CUDA. Here, only torch's headers and
libraries are read.

Objects stay in build/libraries/, and ninja compiles again what changed. Environment variables: CXX, CXXFLAGS, LDFLAGS;
CUDA_HOME; TORCH_CUDA_ARCH_LIST; FASTGEN_DTYPES; MAX_JOBS; FASTGEN_COMPILER_LAUNCHER, such as ccache; FASTGEN_SANITIZE.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("bfloat16", "float16", "float32")  # of the kernels
DEFAULT_ARCHITECTURES = "8.0;9.0a;10.0+PTX;12.0"
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
GIB_PER_JOB = 1  # a job peaks at 0.6 GiB


class Torch(NamedTuple):
    """A PyTorch installation, which need not be importable here."""

    folder: Path
    version: str
    cuda: str | None


class Library(NamedTuple):
    """One shared library: sources with their flags, flags of the link."""

    name: str
    sources: dict[str, str]
    link: str


def _environment_folders() -> list[Path]:
    """Where the environment that is installed into keeps its packages.

    In an isolated build, pip hides these from sys.path; uv builds in another environment and sets VIRTUAL_ENV.
    """
    folders = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    active = os.environ.get("VIRTUAL_ENV")
    if active:
        folders.append(Path(active, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages"))
    return folders


def find_torch() -> Torch | None:
    """The torch that this interpreter imports, else the one of the environment that is installed into."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    places += [folder / "torch" for folder in _environment_folders()]
    for place in places:
        version = place / "version.py"
        if not version.is_file() or not (place / "include" / "torch" / "csrc" / "stable").is_dir():
            continue
        text = version.read_text()
        found = {
            name: re.search(rf"^{name}\b[^=]*= *'([^']+)'", text, re.MULTILINE) for name in ("__version__", "cuda")
        }
        if found["__version__"]:
            return Torch(place, found["__version__"][1], found["cuda"][1] if found["cuda"] else None)
    return None


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of PyPI's cuda-toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(found).resolve() for found in [shutil.which("nvcc")] if found]
    candidates += [Path(entry, "nvidia", "cu13", "bin", "nvcc") for entry in sys.path]
    return next((str(path) for path in candidates if path.is_file()), None)


def find_compiler() -> str | None:
    """The C++ compiler and its arguments: CXX, c++ or g++."""
    for command in (os.environ.get("CXX", ""), "c++", "g++"):
        if command and shutil.which(shlex.split(command)[0]):
            return command
    return None


def find_ninja() -> str | None:
    found = shutil.which("ninja")
    if found is None and importlib.util.find_spec("ninja") is not None:
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
    return found


def architecture_names(arch_list: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST as names: "8.0;12.0+PTX" -> ["80", "120", "120+PTX"]."""
    names = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, got {entry!r} in {arch_list!r}"
            )
        number = entry.replace(".", "")
        names += [number.removesuffix("+PTX"), number] if number.endswith("+PTX") else [number]
    return names


def cuda_architectures() -> list[str]:
    return architecture_names(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)


def cuda_dtypes() -> tuple[str, ...]:
    """FASTGEN_DTYPES: dtypes of the CUDA kernels, such as "bfloat16,float32"; by default all."""
    text = os.environ.get("FASTGEN_DTYPES", "").strip()
    chosen = [name.strip() for name in text.split(",")] if text else DTYPES
    for name in chosen:
        if name not in DTYPES:
            raise SystemExit(
                f"FASTGEN_DTYPES: expected names of {', '.join(DTYPES)}, separated by commas, got {name!r} in {text!r}"
            )
    return tuple(name for name in DTYPES if name in chosen)


def _generate(name: str) -> str:
    """nvcc's flag for an architecture by name: machine code, or PTX."""
    number = name.removesuffix("+PTX")
    return f"-gencode=arch=compute_{number},code={'compute' if name.endswith('+PTX') else 'sm'}_{number}"


def _ask_nvcc(nvcc: str, pattern: str, *arguments: str) -> str:
    done = subprocess.run([nvcc, *arguments], check=True, capture_output=True, text=True)
    return re.findall(pattern, done.stdout + done.stderr)[0]


def cuda_release(nvcc: str) -> str:
    """Version of the toolkit, such as "13.0"."""
    return _ask_nvcc(nvcc, r"release (\d+\.\d+)", "--version")


def cuda_home(nvcc: str) -> str:
    return os.path.realpath(_ask_nvcc(nvcc, r"TOP=(\S+)", "--dryrun", "-E", "-x", "cu", os.devnull))


def _sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def _string_macro(name: str, value: str) -> str:
    quoted = value.replace('"', r"\"")
    return shlex.quote(f'-D{name}="{quoted}"')


def _cxx_flags(device: str, torch: Torch) -> str:
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    flags += ["-Wall", "-Wno-maybe-uninitialized", "-Icsrc", f"-isystem {shlex.quote(str(torch.folder / 'include'))}"]
    flags += ["-DFASTGEN_NAMESPACE=fastgen", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    flags += [f"-DFASTGEN_DISPATCH_KEY={device}", f"-DUSE_{device}", os.environ.get("CXXFLAGS", "")]
    return " ".join(flags)


def _with_info(sources: dict[str, str], **values: str) -> dict[str, str]:
    """Only build_info.cpp has the versions, so that a new version compiles one file."""
    macros = " ".join(_string_macro(f"FASTGEN_{name}", value) for name, value in values.items())
    return sources | {file: f"{sources[file]} {macros}" for file in sources if file.endswith("/build_info.cpp")}


def cpu_library(torch: Torch, version: str) -> Library:
    """The CPU kernels, and the launch plans of every kernel."""
    # No vector crosses a call: its ABI, which depends on the instruction set, does not matter.
    vectorized = "-fopenmp-simd -fno-math-errno -fno-trapping-math -Wno-psabi"
    link = f"-L{shlex.quote(str(torch.folder / 'lib'))} -ltorch_cpu"
    # FASTGEN_SANITIZE=address,undefined: for tests/fuzz. The library aborts where it reads out of bounds.
    sanitizers = os.environ.get("FASTGEN_SANITIZE", "")
    if sanitizers:
        vectorized += f" -fsanitize={sanitizers} -fno-sanitize-recover=all -fno-wrapv -fno-omit-frame-pointer -O1"
        link += f" -fsanitize={sanitizers}"
    flags = f"{_cxx_flags('CPU', torch)} {vectorized}"
    files = _sources("csrc/*/cpu/*.cpp", "csrc/latent/api.cpp", "csrc/plans.cpp", "csrc/common/build_info.cpp")
    info = {"VERSION": version, "TORCH_VERSION": torch.version, "DTYPES": " ".join(DTYPES)}
    sources = _with_info(dict.fromkeys(files, flags), **info)
    return Library("_cpu", sources, link)


def host_compiler(cxx: str) -> str:
    """The compiler in CXX without a launcher before it, such as in "ccache g++", which nvcc does not take."""
    words = [word for word in shlex.split(cxx) if Path(word).name not in ("ccache", "sccache", "distcc")]
    return next(iter(words), "c++")


def dtype_of(source: str) -> str | None:
    """The dtype of an instantiation file, which ends its name; None for sources that dispatch by dtype."""
    last = Path(source).stem.rpartition("_")[2]
    return last if last in DTYPES else None


def cuda_library(
    torch: Torch, version: str, nvcc: str, architectures: list[str], dtypes: Collection[str] = DTYPES
) -> Library:
    """The CUDA kernels, with a static CUDA runtime."""
    home = cuda_home(nvcc)
    without = [f"-DFASTGEN_WITHOUT_{name.upper()}" for name in DTYPES if name not in dtypes]
    flags = " ".join([_cxx_flags("CUDA", torch), f"-isystem {shlex.quote(home)}/include", *without])
    # Line numbers for profilers would triple the machine code: NVCC_APPEND_FLAGS=-lineinfo adds them.
    device = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc", *without]
    device += [f"-ccbin={host_compiler(os.environ['CXX'])}"] if os.environ.get("CXX") else []
    files = dict.fromkeys(_sources("csrc/*/api.cpp", "csrc/common/*.cpp"), flags)
    info = {"CUDA_VERSION": cuda_release(nvcc), "CUDA_ARCHITECTURES": " ".join(architectures)}
    info["DTYPES"] = " ".join(name for name in DTYPES if name in dtypes)
    sources = _with_info(files, VERSION=version, TORCH_VERSION=torch.version, **info)
    for source in _sources("csrc/**/*.cu"):
        # Folders called sm90 have the instructions of sm_90a, which no other architecture has.
        names = [name for name in architectures if name == "90a"] if "/sm90/" in source else architectures
        if names and dtype_of(source) in (None, *dtypes):
            sources[source] = " ".join([*device, *(_generate(name) for name in names)])
    # libtorch brings libtorch_cuda, wherever the torch that loads this has it.
    link = [f"-L{shlex.quote(str(torch.folder / 'lib'))}", "-Wl,--no-as-needed -ltorch"]
    link += [f"-L{shlex.quote(home)}/{folder}" for folder in ("lib64", "lib")]
    link += ["-lcudart_static -ldl -lrt -lpthread"]
    return Library("_cuda", sources, " ".join(link))


def manifest(libraries: list[Library], out: str, nvcc: str | None) -> str:
    """build.ninja, to be run in the project's root. ``out``: folder of the objects, relative to the root."""
    launcher = os.environ.get("FASTGEN_COMPILER_LAUNCHER", "")
    # Exports only our functions: not the templates of libstdc++, which -fvisibility=hidden leaves visible.
    exports = "-Wl,--version-script=csrc/exports.map"
    shared = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else f"-shared {exports}"
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {out}",
        f"cxx = {find_compiler()}",
        f"launcher = {launcher}",
        "rule cxx",
        "  command = $launcher $cxx -MD -MF $out.d $flags -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = $launcher {shlex.quote(nvcc or 'nvcc')} -MD -MF $out.d $flags -c $in -o $out",
        "  description = $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  description = $out",
        f"  command = $cxx {shared} $in -o $out $libs {os.environ.get('LDFLAGS', '')}",
    ]
    for library in libraries:
        objects = []
        for source, flags in library.sources.items():
            objects.append(f"{out}/{library.name}/{source}.o")
            rule = "nvcc" if source.endswith(".cu") else "cxx"
            lines += [f"build {objects[-1]}: {rule} {source}", f"  flags = {flags.replace('$', '$$')}"]
        inputs = f"{' '.join(objects)} | csrc/exports.map"
        lines += [f"build {out}/{library.name}.so: link {inputs}", f"  libs = {library.link}"]
    return "\n".join(lines) + "\n"


def jobs() -> int:
    """MAX_JOBS; by default one job per core, as far as the memory allows."""
    chosen = os.environ.get("MAX_JOBS")
    if chosen:
        if not chosen.isdigit() or int(chosen) < 1:
            raise SystemExit(f"MAX_JOBS: expected a positive integer, got {chosen!r}")
        return int(chosen)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(cores, int(gib / GIB_PER_JOB)))


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Serializes builds in one folder."""
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        yield


def build(
    libraries: list[Library], nvcc: str | None, out: Path = ROOT / "build" / "libraries"
) -> dict[str, Path | str]:
    """Builds the libraries.

    Args:
        libraries: the libraries.
        nvcc: the CUDA compiler, needed for sources that end in .cu.
        out: folder of objects and libraries, in the project.

    Returns:
        For each library its file, or the reason why it was not built.
    """
    ninja = find_ninja()
    if ninja is None:
        return {library.name: "ninja was not found (pip install ninja)" for library in libraries}
    results: dict[str, Path | str] = {}
    folder = out.relative_to(ROOT).as_posix()
    with _alone(out):
        text, path = manifest(libraries, folder, nvcc), out / "build.ninja"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        for library in libraries:
            target = f"{folder}/{library.name}.so"
            command = [ninja, "-f", str(path), "-j", str(jobs()), target]
            print("fastgen:", shlex.join(command), flush=True)
            lines = []
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as run:
                for line in run.stdout or []:
                    print(line, end="", flush=True)
                    lines.append(line)
            failed = run.returncode != 0
            results[library.name] = _reason(lines) if failed else out / f"{library.name}.so"
    return results


def _reason(lines: list[str]) -> str:
    """The first error of a failed build."""
    after = [line.strip() for line in lines if line.strip()]
    start = next((i for i, line in enumerate(after) if line.startswith("FAILED:")), 0)
    complaint = next((line for line in after[start:] if re.search(r"\b(error|fatal|not found)\b", line)), "")
    return f"the build failed: {complaint or (after[start + 2 : start + 3] or after[-1:] or ['ninja failed'])[0]}"
