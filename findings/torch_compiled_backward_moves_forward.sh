#!/usr/bin/env bash
# torch.compile computes parts of a custom Function's backward in the forward, from saved tensors as they are there.
#
# Versions: torch 2.13.0, numpy 2.4.6; CPU, Python 3.11, backend aot_eager (and so inductor, which cuts graphs alike).
# Guess: what stands in the backward of an autograd.Function runs in the backward, as it does uncompiled: it sees a
#   saved tensor whose memory is filled in between (`.data`, as FSDP2 frees and refills parameters) as it is by then.
# Seen: what depends on no incoming gradient may stand on either side of the cut between the two graphs. Where its
#   result is smaller than what it is made of, here `seen @ v` [2, 64] beside `v` [64, 64], it is computed in the
#   forward and kept: with `v` as it was, here NaN. No error, no warning; freed memory ends the process.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import torch


class Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seen, v, probe):
        ctx.save_for_backward(seen, v)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        seen, v = ctx.saved_tensors
        return g, None, None, ((seen @ v) * g).sum(1)


def function(x, w, v, probe):
    return Scored.apply(x @ w, x, v, probe).square().sum()


def gradient(run):
    torch.manual_seed(0)
    x, w = torch.randn(2, 64), torch.randn(64, 64, requires_grad=True)
    v, probe = torch.full((64, 64), torch.nan), torch.zeros(2, requires_grad=True)
    value = run(x, w, v, probe)
    v.data.fill_(1.0)  # before the backward
    value.backward()
    return probe.grad


eager, compiled = gradient(function), gradient(torch.compile(function, backend="aot_eager"))
print("torch", torch.__version__, "eager", eager.tolist(), "compiled", compiled.tolist())
assert eager.isfinite().all(), "uncompiled, the backward does not see the values of the time"
assert compiled.isnan().all(), "compiled, the backward sees the values of the time"
PYTHON
venv/bin/python shown.py
