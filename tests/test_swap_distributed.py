"""DDP and FSDP2 in both orders; the work is done in two processes by distributed_swap.py."""

import socket
import subprocess
import sys
from pathlib import Path


def test_ddp_and_fsdp2_in_both_orders():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed_swap", str(port)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = [line for line in done.stdout.splitlines() if line.startswith("ok: ")]
    assert len(cases) == 2 * 3 * 2 + 3, cases
