"""A small network to check, and what a report names."""

from typing import Any

import torch
from torch import Tensor, nn

import funcghost as fg

Params = dict[str, Tensor]


Made = tuple[Any, Params, Any]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def of_module(module: nn.Module, batch: Tensor) -> Made:
    return (
        fg.module_losses(module, lambda out, _: out.square().flatten(1).sum(1)),
        dict(module.named_parameters()),
        batch,
    )


def net(dtype: torch.dtype = torch.float64) -> Made:
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return of_module(module, normal(4, 6, dtype=dtype))


def named(report: fg.Report) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report.rows}


# -- defects -------------------------------------------------------------------------------------


def all_but_the_first(a: Any) -> Tensor:
    return (torch.arange(4) > 0).double().unsqueeze(1)
