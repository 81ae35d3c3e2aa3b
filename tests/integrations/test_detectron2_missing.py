"""Without detectron2, which the environment of these tests does not have. The integration itself: tests/detectron2."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = "import sys; sys.modules['detectron2'] = None; "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, check=False)


def test_the_package_of_integrations_needs_none_of_them():
    blocked = "sys.modules['transformers'] = None; import emca_bench.integrations"
    assert run(blocked).returncode == 0


def test_the_integration_says_what_to_install():
    ended = run("import emca_bench.integrations.detectron2")
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("emca_bench.errors.UsageError: detectron2 is needed")
    assert "scripts/install_detectron2.sh" in last
