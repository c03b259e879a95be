#!/usr/bin/env bash
# On the CPU, the gradient of a LayerNorm's bias in bfloat16 stops growing at 256 tokens.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11.
# Guess: gradients are summed in float32 and rounded once, as those of Linear are: off by less than 1 %.
# Seen: bias gradients are summed in bfloat16: 4096 ones give 256. With a real signal over 4096 tokens the bias'
#   gradient is off by most of its norm. The same sum in Linear is right. Training in bfloat16 on a CPU, and any
#   comparison of per-sample gradients with .grad there, are what this hurts.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch

torch.manual_seed(0)
print("torch", torch.__version__)


def bias_gradient(layer, tokens, dtype, g):
    layer = layer.to(dtype)
    layer(torch.randn(tokens, 16, dtype=dtype)).backward(g.to(dtype))
    return layer.bias.grad.float()


ones = torch.ones(4096, 16)
found = bias_gradient(torch.nn.LayerNorm(16), 4096, torch.bfloat16, ones)[0].item()
linear = bias_gradient(torch.nn.Linear(16, 16), 4096, torch.bfloat16, ones)[0].item()
g = torch.randn(4096, 16) + 1
low, truth = (bias_gradient(torch.nn.LayerNorm(16), 4096, dtype, g) for dtype in (torch.bfloat16, torch.float32))
off = ((low - truth).norm() / truth.norm()).item()
print(f"the sum of 4096 ones: LayerNorm {found}, Linear {linear}; of random numbers: LayerNorm off by {off:.2f}")
assert linear == 4096
assert found == 256, "the sum is right, or wrong otherwise"
assert off > 0.5
PYTHON
venv/bin/python shown.py
