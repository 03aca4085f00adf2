"""docs-check itself: it fails where a page is wrong, and (slow) pages that bring something of one's own run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(*paths: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/check_docs.py"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_the_pages_for_ones_own_run() -> None:
    done = check(*(ROOT / f"docs/your-{what}.md" for what in ("model", "data", "metric")))
    assert done.returncode == 0, done.stdout
    assert "FAILED" not in done.stdout and "executed" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_what_is_wrong_fails(tmp_path: Path) -> None:
    """Each block alone is enough."""
    wrong = [
        "```python\nassert 1 + 1 == 3\n```\n",
        "```yaml\ntraining: {batch_szie: 3}\n```\n",
        "```bash\nentrecipes run digits/demo training.batch_szie=3\n```\n",
        "```bash\nentrecipes generate outputs/digits/demo --steeps 3\n```\n",
        "```bash\npython scripts/benchmark_noise.py --no-such-flag\n```\n",
        "```bash\npip install 'entrecipes[no_such_extra]'\n```\n",
        "```bash\nrm -rf outputs\n```\n",
        "```bash\naccelerate launch --config_file recipes/accelerate/ddq.yaml scripts/train.py digits/demo\n```\n",
        "```console\n$ entrecipes ls nois\nerror: all is well\n```\n",
        "```\nwhich language?\n```\n",
        "```bash\nmake coffee\n```\n",
    ]
    right = (
        "```bash\nmake test; entrecipes ls noise\n```\n\n```python\nfrom entrecipes import InfoNoiseScheduler\n```\n"
    )
    (tmp_path / "page.md").write_text("\n".join([right, *wrong]))
    done = check(tmp_path / "page.md")
    assert done.returncode == 1 and done.stdout.count("\nFAILED") + done.stdout.startswith("FAILED") == len(wrong), (
        done.stdout + done.stderr
    )
