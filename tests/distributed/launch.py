"""Two ranks on this machine, by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun(script: str, *args: str, ranks: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script of this folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(ranks), "--max-restarts", "0", str(Path(__file__).with_name(script)), *args]
    return subprocess.run(
        command,
        env=os.environ | SETTINGS | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
