#!/usr/bin/env bash
# Time of the first value from `pip install` on, for each recipe of a trainer: an empty environment, funcghost's wheel with
# the recipe's extra, and the ten lines. Prints a table. Needs a package index (or
# PIP_FIND_LINKS); not run by the tests.
#
#     tests/recipes.sh [transformers accelerate lightning trl opacus]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT="$root/constraints.txt" PIP_BUILD_CONSTRAINT="$root/constraints.txt"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONPATH

python3 -m venv "$work/builder"
"$work/builder/bin/pip" install --quiet hatchling
(cd "$root" && "$work/builder/bin/hatchling" build -t wheel -d "$work" > /dev/null)
wheel="$(ls "$work"/funcghost-*.whl)"

declare -A wanted=(
    [transformers]="$wheel[transformers]" [trl]="$wheel[trl]" [lightning]="$wheel[lightning]"
    [accelerate]="$wheel accelerate" [opacus]="$wheel opacus"
)
echo "| recipe | \`pip install\` | ten lines | first value after |"
echo "|---|---|---|---|"
for recipe in "${@:-transformers accelerate lightning trl opacus}"; do
    for name in $recipe; do
        rm -rf "$work/empty" && python3 -m venv "$work/empty"
        script="$root/examples/trainer_$name.py"
        [ "$name" = opacus ] && script="$root/examples/opacus_numbers.py"
        cp "$script" "$work/recipe.py"
        start=$SECONDS
        # shellcheck disable=SC2086  # a wheel and a library
        "$work/empty/bin/pip" install --quiet ${wanted[$name]}
        installed=$((SECONDS - start))
        (cd "$work" && "$work/empty/bin/python" recipe.py > "$work/$name.log" 2>&1) || { tail -20 "$work/$name.log"; exit 1; }
        echo "| $name | $installed s | $((SECONDS - start - installed)) s | $((SECONDS - start)) s |"
    done
done
