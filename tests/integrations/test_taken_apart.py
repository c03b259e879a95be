from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from funcghost.integrations.taken_apart import outputs_in, taken_apart


class Reader(nn.Module):
    """Gives out logits [b, t, 5], what they are made of, and a loss made of the logits, as models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.double()

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        hidden = self.embedding(ids).cumsum(1)
        logits = self.head(torch.tanh(hidden))
        found = {"logits": logits, "parts": (hidden,)}
        if labels is not None:
            found["loss"] = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return found


def batch() -> dict[str, Tensor]:
    ids, labels = torch.randint(5, (4, 6)), torch.randint(5, (4, 6))
    for row in range(4):
        labels[row, 1 + row :] = -100
    return {"ids": ids, "labels": labels}


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), retain_graph=True))


def test_a_mean_over_tokens_is_taken_apart_into_its_terms(caplog: pytest.LogCaptureFixture) -> None:
    model, given = Reader(), batch()
    caplog.set_level("INFO", "funcghost")

    def losses(params: Any, given: Any) -> Tensor:
        return taken_apart(lambda: (model(**given)["loss"] / 3).backward(), model, len(given["ids"]))

    whole = model(**given)["loss"] / 3
    logits = model(given["ids"])["logits"]
    tokens = F.cross_entropy(logits.transpose(1, 2), given["labels"], reduction="none").sum(1)
    terms = tokens / (given["labels"] != -100).sum() / 3
    params = dict(model.named_parameters())
    out = fg.grad_and_reduce(losses, reduction="sum")(params, given)
    for found, wanted in zip(out.grads.values(), gradients(model, whole), strict=True):
        assert torch.equal(found, wanted)
    torch.testing.assert_close(out.losses.sum(), whole.detach())
    kept = fg.materialize(fg.pairs(losses)(params, given))
    assert "planning at the very values" not in caplog.text
    for row, term in enumerate(terms):
        for found, wanted in zip(kept.values(), gradients(model, term), strict=True):
            torch.testing.assert_close(found[row], wanted)


def test_rows_of_one_sample_are_added() -> None:
    model, ids = Reader(), torch.randint(5, (6, 3))

    def pairs() -> Tensor:
        chosen, rejected = model(ids)["logits"].logsumexp((1, 2)).chunk(2)
        return F.softplus(rejected - chosen)

    losses = taken_apart(lambda: pairs().mean().backward(), model, 3, rows=2)
    for found, wanted in zip(losses, pairs() / 3, strict=True):
        for one, other in zip(gradients(model, found), gradients(model, wanted), strict=True):
            torch.testing.assert_close(one, other)


def test_what_a_cast_hides_is_found() -> None:
    """accelerate casts the outputs of a model after the model has made its loss of them."""

    class Cast(Reader):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
            found = super().forward(ids, labels)
            return {**found, "logits": found["logits"].float()}

    model, given = Cast(), batch()
    losses = taken_apart(lambda: model(**given)["loss"].backward(), model, 4)
    found, wanted = gradients(model, losses.sum()), gradients(model, model(**given)["loss"])
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "samples", "message"),
    [
        (lambda model, out: (out["loss"] + model.head.weight.square().sum()).backward(), 4, r"a tensor \[5, 4\]"),
        (lambda model, out: (out["logits"].sum() + out["parts"][0].square().sum()).backward(), 4, "goes into 'logits'"),
        (lambda model, out: out["loss"].backward(), 3, "has 4 rows, where 1 for each of 3 samples"),
        (lambda model, out: [out["loss"].backward(), out["loss"].backward()], 4, "more than once"),
        (lambda model, out: None, 4, "nothing that requires gradients"),
    ],
)
def test_what_is_of_no_sample_is_refused(step: Any, samples: int, message: str) -> None:
    model, given = Reader(), batch()
    with pytest.raises(fg.InputError, match=message):
        taken_apart(lambda: step(model, model(**given)), model, samples)


def test_no_backward_is_carried_out() -> None:
    model, given = Reader(), batch()
    found = outputs_in(lambda: model(**given)["loss"].backward(), model)
    assert {"logits", "parts[0]"} == set(found)
    assert all(weight.grad is None for weight in model.parameters())
    assert not model._forward_hooks
