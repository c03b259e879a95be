"""From Opacus to `clipping.clipped_gradient`: the same sum of clipped gradients, and its accountant as it is.

Opacus makes a step of `(sum_i clip(grad_i) + noise) / expected_batch_size`, with noise of standard deviation
`noise_multiplier * max_grad_norm`. The sum is `clipped_gradient(losses)(params, batch, max_grad_norm)` for losses that
are not divided by the size of the batch, to 1e-6: Opacus adds that to every norm. What moves over: the losses as a
function, any model that has them (Opacus needs a hook for each kind of layer, and refuses the others), and the noise,
which is added here. What stays: Poisson sampling by `opacus.data_loader.DPDataLoader`, and the accountant.

    pip install opacus && python examples/opacus_numbers.py
"""

import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.func import functional_call

from funcghost.training import clipping

MAX_NORM, NOISE, SIZE, SHARE = 0.5, 1.1, 16, 0.01


def network() -> nn.Sequential:
    """Two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def by_opacus(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What Opacus adds noise to."""
    model = GradSampleModule(network())
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=MAX_NORM, expected_batch_size=SIZE)
    F.cross_entropy(model(x), y).backward()
    optimizer.clip_and_accumulate()
    return {name.removeprefix("_module."): p.summed_grad for name, p in model.named_parameters()}


def main() -> tuple[float, float]:
    """How far the two sums are apart, and the epsilon of a hundred steps by Opacus' accountant."""
    x, y, model = torch.randn(SIZE, 8).double(), torch.randint(3, (SIZE,)), network()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def losses(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (batch[0],)), batch[1], reduction="none")

    clipped, accountant = clipping.clipped_gradient(losses), RDPAccountant()
    first = clipped(params, (x, y), MAX_NORM).grads
    off = max(float((first[name] - value).abs().max()) for name, value in by_opacus(x, y).items())
    for _ in range(100):
        summed = clipped(params, (x, y), MAX_NORM).grads
        noisy = {name: value + NOISE * MAX_NORM * torch.randn_like(value) for name, value in summed.items()}
        params = {name: value - 0.1 * noisy[name] / SIZE for name, value in params.items()}
        accountant.step(noise_multiplier=NOISE, sample_rate=SHARE)
    epsilon = float(accountant.get_epsilon(delta=1e-5))
    print(f"sums of clipped gradients: {off:.1e} apart; epsilon {epsilon:.3f} at delta 1e-5")
    return off, epsilon


if __name__ == "__main__":
    main()
