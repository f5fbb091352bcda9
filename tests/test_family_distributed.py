"""DDP, and FSDP2 in both orders, on every family; the work is done in two processes by family_distributed.py."""

import socket
import subprocess
import sys
from pathlib import Path

from tests.family_distributed import CASES


def test_ddp_and_fsdp2():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.family_distributed", str(port)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [line for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert len(cases) == len(CASES) == 19, cases
