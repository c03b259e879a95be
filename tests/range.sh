#!/usr/bin/env bash
# Runs the tests on each version of torch that RANGE names, in an environment made for it and thrown away after it.
# Arguments go to pytest. Prints pytest's own last line for each version; the whole output is kept. Needs a package
# index, several GB of disk for a torch built for CUDA (PIP_EXTRA_INDEX_URL may name an index of smaller builds), and
# half an hour for each on two cores. Not run by the tests.
set -uo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
logs="$root/runs/range"
mkdir -p "$logs"
cd "$root" || exit 2
failed=0

for version in $RANGE; do
    log="$logs/torch-$version.log"
    # torch and setuptools as this torch wants them, everything else as it is pinned
    { grep -v -E '^(torch|setuptools)==' constraints.txt; echo "torch==$version"; } > "$work/constraints.txt"
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$work/constraints.txt" PIP_BUILD_CONSTRAINT="$root/constraints.txt"
    python3 -m venv "$work/env"
    if ! timeout 1800 "$work/env/bin/python" -m pip install --quiet --editable '.[docs,test]' > "$log" 2>&1; then
        echo "torch $version: not installed, see $log"
        failed=1
    else
        CI=1 timeout 7200 "$work/env/bin/python" -m pytest -p no:cacheprovider -n "${WORKERS:-2}" "$@" >> "$log" 2>&1 || failed=1
        echo "torch $("$work/env/bin/python" -c 'import torch; print(torch.__version__)'): $(tail -n 1 "$log")"
    fi
    rm -rf "$work/env"
done
exit "$failed"
