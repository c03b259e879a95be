#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes: the cuda tests, the benchmarks at sizes that fill
# a GPU, and how much of a step is Python. Writes one JSON and one table to --out (default runs/on_gpu).
#
#     tests/benchmarks/on_gpu.sh                          # one GPU, such as an H200 with torch 2.11 and CUDA 13
#     tests/benchmarks/on_gpu.sh --device cpu --tiny      # shows that it runs
#
# It installs nothing and needs no network. What the machine's Python lacks is taken from wheels/ beside this script (or
# the folder WHEELS), which are unpacked for this run. Fill it where there is a network:
#
#     pip download --no-deps --only-binary :all: --python-version 3.12 -d tests/benchmarks/wheels \
#         optree pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers
#
# Most are pure Python; optree and hypothesis are for the Python and platform of the machine.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
python="${PYTHON:-python3}"
unpacked="$(mktemp -d)"
trap 'rm -rf "$unpacked"' EXIT
for wheel in "${WHEELS:-$here/wheels}"/*.whl; do
    [ -e "$wheel" ] || continue
    "$python" -c 'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])' "$wheel" "$unpacked"
done
# What is installed comes first, so that only what lacks is taken from the wheels.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" FUNCGHOST_WHEELS="$unpacked"
cd "$root"
"$python" - "$@" <<'SCRIPT'
import os, subprocess, sys
from importlib.util import find_spec
from pathlib import Path

folder = Path(os.environ["FUNCGHOST_WHEELS"])
lacking = [path for path in folder.iterdir() if path.suffix != ".dist-info" and find_spec(path.stem) is None]
chosen = folder / "chosen"
chosen.mkdir()
for path in lacking:
    (chosen / path.name).symlink_to(path)
os.environ["PYTHONPATH"] += f":{chosen}"
sys.exit(subprocess.run([sys.executable, "tests/benchmarks/on_gpu.py", *sys.argv[1:]]).returncode)
SCRIPT
