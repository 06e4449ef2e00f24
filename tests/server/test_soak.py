"""scripts/soak, small: a server of its own, clients some of whom hang up, and nothing left at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--kv-memory", "1MiB", "--max-num-seqs", "6", "--prefill-chunk", "32", "--page-size", "16",
    "--question-chars", "50", "--shared-chars", "100", "--prompts", "12",
)  # fmt: skip


def test_a_small_soak(folder: Path, tmp_path: Path) -> None:
    record = tmp_path / "soak.json"
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "scripts" / "soak"), "--clients", "12", "--minutes", "0.07",
            "--model", str(folder), "--policy", "42", *TINY, "--output", str(record),
        ],
        capture_output=True, text=True, timeout=100,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert found["env"]["command"].startswith("scripts/soak --clients 12 ")
    assert found["ok"] and all(found["checks"].values()) and len(found["checks"]) == 8
    assert found["completed"] > 20 and found["hung_up"] > 0 and found["wrong"] == 0
    assert found["answers_with_a_cached_prefix"] > 0 and len(found["memory_mib"]) > 5
