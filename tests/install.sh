#!/usr/bin/env bash
# Installs funcghost by pip into empty environments, from the folder and from its sdist, and runs the self-check there.
# Needs a package index; takes some minutes, most of them for torch. Not run by the tests.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$root/constraints.txt" PIP_BUILD_CONSTRAINT="$root/constraints.txt"

python3 -m venv "$work/builder"
"$work/builder/bin/pip" install --quiet hatchling
(cd "$root" && "$work/builder/bin/hatchling" build -t sdist -d "$work")

for what in "$root" "$work"/funcghost-*.tar.gz; do
    rm -rf "$work/empty"
    python3 -m venv "$work/empty"
    start=$SECONDS
    "$work/empty/bin/pip" install --quiet "$what"
    echo "$(basename "$what"): installed in $((SECONDS - start)) s"
    start=$SECONDS
    (cd "$work" && "$work/empty/bin/python" -W error -m funcghost doctor)
    echo "$(basename "$what"): first numbers after $((SECONDS - start)) s"
done
