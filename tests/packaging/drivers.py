"""A CUDA library of fastgen under drivers of several versions, on a machine without a GPU.

    python tests/packaging/drivers.py PATH/fastgen/_cuda.so

The driver is fake (fake_driver.c): the library's CUDA runtime finds it by LD_LIBRARY_PATH and reads its version. The
package around the library, imported by this Python, must then choose PyTorch where the driver is too old, with a
reason, and the kernels elsewhere. Under a torch without CUDA, which fastgen does not load the library into, only the
versions are read. Exit status 1 if an answer is wrong. Requires a C compiler; imports nothing of the repository.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

DRIVERS = {"11.8": 11080, "12.2": 12020, "12.8": 12080, "13.0": 13000, "none": None}

VERSIONS = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
libc.dlopen.restype = libc.dlsym.restype = ctypes.c_void_p
libc.dlopen.argtypes, libc.dlsym.argtypes = [ctypes.c_char_p, ctypes.c_int], [ctypes.c_void_p, ctypes.c_char_p]
libc.dlerror.restype = ctypes.c_char_p
def load():
    return libc.dlopen(sys.argv[1].encode(), 1)  # RTLD_LAZY: a torch without CUDA lacks functions that are not called
handle = load()
if not handle:  # it needs libtorch
    import torch
    handle = load()
if not handle:
    raise SystemExit(libc.dlerror().decode())
def function(name, result, *arguments):
    return ctypes.CFUNCTYPE(result, *arguments)(libc.dlsym(handle, name))
runtime, driver = ctypes.c_int(), ctypes.c_int()
pointer = ctypes.POINTER(ctypes.c_int)
error = function(b"fastgen_cuda_versions", ctypes.c_int, pointer, pointer)(runtime, driver)
build = json.loads(function(b"fastgen_build_info", ctypes.c_char_p)())
print(json.dumps({"error": error, "runtime": runtime.value, "driver": driver.value, "build": build}))
"""

TORCH = "import json, torch; print(json.dumps(torch.version.cuda))"

# A GPU of a given capability, as far as fastgen asks torch about it. A library without kernels gets one.
CHOICE = """
import json, sys
from types import SimpleNamespace
import torch
present, capability, cuda = json.loads(sys.argv[1])
torch.version.cuda = torch.version.cuda or cuda
torch.cuda.is_available = lambda: present
torch.cuda.device_count = lambda: int(present)
torch.cuda.get_device_capability = lambda device=None: tuple(capability)
torch.cuda.get_device_properties = lambda device: SimpleNamespace(
    name="fake", major=capability[0], minor=capability[1], total_memory=2**30, multi_processor_count=132
)
import fastgen, fastgen.ops
from fastgen import backend
name, device = "latent_forward", torch.device("cuda", 0)
if not backend.has_kernel(name, device):
    library = torch.library.Library("fastgen", "IMPL")
    library.impl(name, lambda *arguments: None, "CUDA")
tensor = SimpleNamespace(device=device, dtype=torch.float16)
found = {"package": fastgen.__file__, "auto": backend.select(name, tensor), "info": str(fastgen.info())}
with fastgen.use_backend("compiled"):
    try:
        found["compiled"] = backend.select(name, tensor)
    except RuntimeError as error:
        found["compiled"] = f"RuntimeError: {error}"
print(json.dumps(found))
"""


def build_driver(folder: Path) -> Path:
    """The folder with the fake libcuda.so.1."""
    compiler = os.environ.get("CC") or shutil.which("cc") or "gcc"
    source = Path(__file__).with_name("fake_driver.c")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    command = [*compiler.split(), *flags, str(source), "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return folder


def run_under(folder: Path, version: int | None, program: str, *arguments: str, package: Path | None = None) -> Any:
    """The JSON that a program prints under the driver in ``folder``; None: without it (a real one remains)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FASTGEN_", "FAKE_DRIVER_"))}
    if version is not None:
        paths = [str(folder), *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        environment |= {"FAKE_DRIVER_VERSION": str(version), "LD_LIBRARY_PATH": ":".join(paths)}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def name_of(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def wrong_versions(found: dict[str, Any], driver: int | None) -> list[str]:
    """What is wrong with the versions that a library gives under a driver."""
    wrong = [] if found["error"] == 0 else [f"CUDA error {found['error']}"]
    if found["driver"] != (driver or 0):
        wrong.append(f"expected driver {driver or 0}, got {found['driver']}")
    if found["runtime"] // 1000 != int(found["build"]["cuda"].split(".")[0]):
        wrong.append(f"built with nvcc {found['build']['cuda']}, linked with the runtime {found['runtime']}")
    return wrong


def wrong_choice(found: dict[str, Any], runtime: int, driver: int | None) -> list[str]:
    """What is wrong with the implementation that fastgen chooses, on a GPU for which the library has machine code."""
    too_old = driver is not None and driver // 1000 < runtime // 1000
    wrong = []
    if found["auto"] != ("fastgen_torch" if too_old else "fastgen"):
        wrong.append(f"auto takes {found['auto']}")
    if not too_old:
        return [*wrong, *([] if found["compiled"] == "fastgen" else [f"compiled: {found['compiled']}"])]
    assert driver is not None
    parts = [f"CUDA {name_of(runtime)}", f"CUDA {name_of(driver)}", "install a driver", f"for CUDA {driver // 1000}"]
    for place in ("compiled", "info"):
        wrong += [f"{place} does not say {part!r}: {found[place]}" for part in parts if part not in found[place]]
    return wrong if found["compiled"].startswith("RuntimeError: ") else [*wrong, f"compiled takes {found['compiled']}"]


def capability_of(architectures: list[str]) -> tuple[int, int]:
    """Of a GPU for which a library has machine code."""
    name = next(name for name in architectures if not name.endswith("+PTX"))
    major, minor = divmod(int(name.rstrip("af")), 10)
    return major, minor


def main(path: str, *, labels: Collection[str] = tuple(DRIVERS), pretend: bool = False) -> int:
    """Prints a line for each driver. ``pretend``: a torch without CUDA is taken for one with it (tests)."""
    library, failed = Path(path).resolve(), 0
    with tempfile.TemporaryDirectory() as name:
        folder = build_driver(Path(name))
        has_cuda = pretend or run_under(folder, None, TORCH) is not None
        for label, driver in DRIVERS.items():
            if label not in labels:
                continue
            versions = run_under(folder, driver, VERSIONS, str(library))
            wrong, taken = wrong_versions(versions, driver), "not asked, this torch has no CUDA"
            if has_cuda:
                build = versions["build"]
                gpu = json.dumps([driver is not None, capability_of(build["architectures"]), build["cuda"]])
                choice = run_under(folder, driver, CHOICE, gpu, package=library.parents[1])
                if not Path(choice["package"]).samefile(library.with_name("__init__.py")):
                    wrong.append(f"imported {choice['package']}")
                wrong += wrong_choice(choice, versions["runtime"], driver)
                taken = choice["auto"]
            failed += bool(wrong)
            print(f"driver {label}: runtime {name_of(versions['runtime'])}, auto: {taken}; {'; '.join(wrong) or 'ok'}")
    return int(failed > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    sys.exit(main(sys.argv[1]))
