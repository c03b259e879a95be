#!/usr/bin/env bash
# A torch function mode sees another op for `x.double()` while AOTAutograd traces than when the same code runs eagerly.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: a TorchFunctionMode stands above everything that torch.compile does below, so it sees the same calls in both.
# Seen: eagerly `torch.Tensor.double`, traced `torch.Tensor.to`: the tensors that functionalization hands out define
#   float, double, half, bfloat16, bool, byte, char, int, long and cpu as Python methods that call `to`
#   (since github.com/pytorch/pytorch/pull/125628). Every other op has one name in both.
# Hurts: whoever compares what a mode saw of a function with what it sees of it in a graph, as a plan or a profile does.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch.overrides import TorchFunctionMode, resolve_name

names = []


class Names(TorchFunctionMode):
    def __torch_function__(self, op, types, args=(), kwargs=None):
        names.append(resolve_name(op))
        return op(*args, **(kwargs or {}))


def function(x):
    with Names():
        return x.double().sin()


x = torch.ones(2, requires_grad=True)
function(x)
eager = list(names)
names.clear()
aot_function(function, fw_compiler=nop)(x)
print("eager: ", eager)
print("traced:", sorted(set(names)))
assert eager == ["torch.Tensor.double", "torch.Tensor.sin"]
assert set(names) == {"torch.Tensor.to", "torch.Tensor.sin"}
PYTHON
venv/bin/python -W ignore shown.py
