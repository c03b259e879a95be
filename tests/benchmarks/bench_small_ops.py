"""Losses that are many small ops, in plain steps: a loop over positions, one over samples, and samples of any length.

Every round times each in turn, in CPU time of one thread; a new length is another one in every round. Recurrent layers
over packed sequences and bags that start at offsets are one op of many steps, of which data say whose they are.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import funcghost as fg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.common import parser_of, positive, table

Params = dict[str, Tensor]
RAGGED = ("packed LSTM", "packed GRU", "bags")
AIMS = {
    "step": {"positions": 6.0, "samples": 4.0},
    "new length": {"positions": 12.0, "samples": 12.0},
    "step with norms": dict.fromkeys(RAGGED, 2.0),
}


def over_positions(p: Params, x: Tensor) -> Tensor:
    """A recurrent net, one position after the other."""
    h = x.new_zeros(len(x), 16)
    for t in range(x.shape[1]):
        h = torch.tanh(x[:, t] @ p["w"] + h @ p["u"])
    return h.square().sum(1)


def over_samples(p: Params, xs: list[Tensor]) -> Tensor:
    """Samples of their own lengths, one after the other."""
    return torch.stack([torch.tanh(torch.tanh(x @ p["w"]).mean(0) @ p["u"]).square().sum() for x in xs])


class Packed(nn.Module):
    """A recurrent layer of width 256 over packed sequences of embedded tokens."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = (
            nn.Embedding(1000, 128),
            kind(128, 256, batch_first=True),
            nn.Linear(256, 8),
        )

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """From the last state of each."""
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        state = self.layer(packed)[1]
        out: Tensor = self.head((state[0] if isinstance(state, tuple) else state)[-1])
        return out


class Bags(nn.Module):
    """A mean over the embeddings of each bag."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.body, self.head = nn.EmbeddingBag(5000, 128), nn.Linear(128, 512), nn.Linear(512, 8)

    def forward(self, index: Tensor, offsets: Tensor) -> Tensor:
        """Through two layers."""
        out: Tensor = self.head(F.relu(self.body(self.bags(index, offsets))))
        return out


def lengths(count: int, shift: int) -> Tensor:
    """From 10 to 50."""
    return 10 + (7 * torch.arange(count) + shift) % 41


def tokens(shift: int) -> tuple[Tensor, Tensor]:
    """For packing."""
    return torch.randint(1000, (32, 50)), lengths(32, shift)


def bags(shift: int) -> tuple[Tensor, Tensor]:
    """One behind the other, and where each starts."""
    ends = lengths(128, shift).cumsum(0)
    return torch.randint(5000, (int(ends[-1]),)), torch.cat([ends.new_zeros(1), ends[:-1]])


Case = tuple[Callable[[Params, Any], Tensor], Callable[[int], Any], Params]


def of_model(model: nn.Module, make: Callable[[int], Any]) -> Case:
    """The squares of what a model gives."""
    return fg.module_losses(model, lambda out, _: out.square().sum(1)), make, dict(model.named_parameters())


def loops() -> Params:
    """The parameters of the loops."""
    return {"w": torch.randn(6, 16) * 0.3, "u": torch.randn(16, 16) / 4}


CASES: dict[str, Callable[[], Case]] = {
    "positions": lambda: (over_positions, lambda k: torch.randn(8, 31 + k, 6), loops()),
    "samples": lambda: (over_samples, lambda k: [torch.randn(1 + (i + k) % 5, 6) for i in range(64 + k)], loops()),
    "packed LSTM": lambda: of_model(Packed(nn.LSTM), tokens),
    "packed GRU": lambda: of_model(Packed(nn.GRU), tokens),
    "bags": lambda: of_model(Bags(), bags),
}


def measure(name: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    losses, make, params = CASES[name]()
    batch, direction = make(0), {key: torch.randn_like(value) for key, value in params.items()}
    step, norms = fg.grad_and_reduce(losses), fg.reduce(losses)

    def differentiated() -> tuple[Tensor, list[Tensor]]:
        leaves = {key: value.detach().clone().requires_grad_() for key, value in params.items()}
        return losses(leaves, batch), list(leaves.values())

    def plain() -> None:
        values, leaves = differentiated()
        torch.autograd.grad(values.mean(), leaves)

    def naive() -> None:
        values, leaves = differentiated()
        for value in values:
            torch.autograd.grad(value, leaves, retain_graph=True)

    lengths = iter(range(1, rounds + 1))
    routes: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "step": lambda: step(params, batch, fg.dot(direction)),
        "new length": lambda: step(params, make(next(lengths)), fg.dot(direction)),
        "norms": lambda: norms(params, batch, fg.squared_norm()),
        "step with norms": lambda: step(params, batch, fg.squared_norm()),
        "a backward per sample": naive,
    }
    for what, route in routes.items():
        if what != "new length":
            route()
    seconds: dict[str, list[float]] = {what: [] for what in routes}
    for _ in range(rounds):
        for what, route in routes.items():
            start = time.process_time()
            route()
            seconds[what].append(time.process_time() - start)
    return [
        {
            "case": name,
            "what": what,
            "ratio": median(own / base for own, base in zip(seconds[what], seconds["plain"], strict=True)),
            "aim": AIMS.get(what, {}).get(name),
        }
        for what in routes
        if what != "plain"
    ]


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measures, prints the table and gives what --out writes."""
    parser = parser_of("Times losses that are many small ops.", quick="fewer rounds")
    parser.add_argument("--rounds", type=positive(int), help="default 41, with --quick 15")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES), help="default all")
    parser.add_argument("--threads", type=positive(int), default=1, help="CPU threads; default 1")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = [row for name in args.cases for row in measure(name, args.rounds or (15 if args.quick else 41))]
    cells = [(row["case"], row["what"], f"{row['ratio']:.2f}", str(row["aim"] or "")) for row in rows]
    print(table([("a loop over", "", "x plain", "aim"), *cells]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
