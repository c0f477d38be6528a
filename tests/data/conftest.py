"""Without the extras of ``fastgen[train]`` the tests of data are left out."""

from __future__ import annotations

from tests.extras import MISSING

collect_ignore_glob = ["test_*.py"] if MISSING else []
