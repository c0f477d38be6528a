"""Import of fastgen: its cost, and what it registers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules_after(code: str) -> set[str]:
    """Names in sys.modules of a fresh process after it ran the code."""
    ending = "\nimport sys; print('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code + ending], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_import_brings_operators_and_submodules_and_leaves_the_compiler_out():
    code = (
        "import fastgen, torch, sys\n"
        "assert torch.ops.fastgen.attention_forward\n"
        "fastgen.functional, fastgen.nn, fastgen.losses, fastgen.ops, fastgen.info, fastgen.use_backend\n"
        "q = torch.randn(1, 1, 4, 8, requires_grad=True)\n"
        "fastgen.functional.scaled_dot_product_attention(q, q, q).sum().backward()\n"
        "fastgen.nn.TransformerEncoderLayer(8, 2)(q[0])\n"
        "assert 'fastgen.models' not in sys.modules\n"
        "assert fastgen.models.GAN"
    )
    imported = modules_after(code)
    assert "fastgen.models" in imported
    assert not imported & {"torch._dynamo", "torch._inductor", "sympy"}


def test_compiled_calls_stay_whole_in_the_graph_although_the_compiler_came_later():
    code = (
        "import fastgen, torch\n"
        "from torch._dynamo.testing import CompileCounterWithBackend\n"
        "count = CompileCounterWithBackend('eager')\n"
        "q = torch.randn(1, 1, 4, 8, requires_grad=True)\n"
        "layer = fastgen.nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0)\n"
        "torch.compile(layer, backend=count, fullgraph=True)(q[0])\n"
        "print(*(node.target.__module__ + '.' + node.target.__name__ for node in count.graphs[0].graph.nodes"
        " if node.op == 'call_function' and 'fastgen' in node.target.__module__))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    called = ran.stdout.split()
    assert sum("norm" in name for name in called) == 2
    assert "fastgen.ops.attention.autograd.attention" in called
    assert "fastgen.ops.projection.autograd.projection" in called


def test_version_help_and_mistakes_need_no_torch():
    code = (
        "import sys; sys.argv = ['/usr/bin/fastgen', '--help']\n"
        "from fastgen.cli import main\n"
        "assert [main(words) for words in (['--version'], ['--help'], ['paint'], [])] == [0, 0, 2, 2]"
    )
    imported = modules_after(code)
    assert "fastgen.cli" in imported
    assert "torch" not in imported


def test_python_m_fastgen_needs_no_torch_for_its_version():
    command = [sys.executable, "-X", "importtime", "-m", "fastgen", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastgen ")
    assert "argparse" in done.stderr
    assert "torch" not in done.stderr


def test_the_command_has_the_package_s_names_all_the_same():
    code = (
        "import sys; sys.argv = ['fastgen']\n"
        "import fastgen\n"
        "assert 'torch' not in sys.modules\n"
        "from fastgen import functional, accelerate\n"
        "assert fastgen.info().backend == 'auto'\n"
        "assert set(fastgen.__all__) <= set(dir(fastgen))\n"
        "import torch; assert torch.ops.fastgen.attention_forward"
    )
    assert "fastgen.functional" in modules_after(code)


@pytest.mark.parametrize(
    ("stand_in", "message"),
    [
        (None, "fastgen requires PyTorch 2.10 or newer (pip install torch): No module named 'torch'"),
        ("__version__ = '2.9.1+cpu'", "fastgen requires PyTorch 2.10 or newer (pip install torch), got 2.9.1+cpu"),
        ("import no_such_library", "No module named 'no_such_library'"),
    ],
)
def test_a_missing_or_old_torch_is_named(stand_in, message, tmp_path):
    """``stand_in``: a module torch in place of the real one."""
    if stand_in is not None:
        (tmp_path / "torch.py").write_text(stand_in + "\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import fastgen"
    command = [sys.executable, "-I", "-S", "-c", code]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("Error: " + message)
