"""`fg.per_example` of models of Hugging Face's transformers, with padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.func import functional_call

import funcghost as fg
from tests.models.small import like
from tests.naive import assert_close, assert_scores, assert_trees_close, expected, gradient

hf: Any = transformers  # typed for literal arguments, not for sizes handed on from one place
hf.logging.set_verbosity_error()

Params = dict[str, Tensor]
B, T, D, H = 3, 5, 2, 4


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
MODELS: dict[str, Callable[[str], nn.Module]] = {
    "gpt2": lambda attention: hf.GPT2LMHeadModel(hf.GPT2Config(n_positions=32, attn_implementation=attention, **SIZES)),
    "llama": lambda attention: hf.LlamaForCausalLM(
        hf.LlamaConfig(intermediate_size=48, num_key_value_heads=2, attn_implementation=attention, **SIZES)
    ),
}


def causal_mask(kept: Tensor) -> Tensor:
    """Which key each query of a row sees, [t, t]."""
    return kept.bool() & torch.ones(len(kept), len(kept), dtype=torch.bool).tril()


def hugging_face(name: str, attention: str) -> tuple[Any, Any, Params]:
    model = MODELS[name](attention).double().eval()

    def terms(output: Any, batch: dict[str, Tensor]) -> Tensor:
        targets = batch["input_ids"].masked_fill(batch["kept"] == 0, -100)[:, 1:]
        return F.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="none").sum(1)

    def batched(p: Params, batch: dict[str, Tensor]) -> Tensor:
        arguments = {k: v for k, v in batch.items() if k != "kept"}
        return terms(functional_call(model, p, (), arguments), batch)

    def loss(p: Params, example: dict[str, Tensor]) -> Tensor:
        return batched(p, {k: v[None] for k, v in example.items()})[0]

    return batched, loss, dict(model.named_parameters())


def padded(kind: str) -> dict[str, Tensor]:
    kept = (torch.arange(7) < torch.tensor([7, 5, 3])[:, None]).long()
    if kind in ("none", "ones"):
        kept = torch.ones_like(kept)
    batch = {"input_ids": torch.randint(3, 61, (3, 7)), "kept": kept}
    if kind == "four axes":
        batch["attention_mask"] = torch.stack([causal_mask(row)[None] for row in kept])
    elif kind != "none":
        batch["attention_mask"] = kept
    return batch


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("attention", "kind"),
    [("eager", "none"), ("eager", "padded"), ("sdpa", "none"), ("sdpa", "ones"), ("sdpa", "four axes")],
)
def test_hugging_face(name: str, attention: str, kind: str) -> None:
    batched, loss, params = hugging_face(name, attention)
    batch, direction = padded(kind), like(params)
    found = fg.grad_and_reduce(fg.per_example(loss))(params, batch, fg.dot(direction))
    assert_scores(found.reduced, expected(batched, params, batch, direction), 1e-8)
    assert_trees_close(found.grads, gradient(batched, params, batch)[0])


def test_the_remedy_for_padding_masks_gives_the_same_losses() -> None:
    batched, loss, params = hugging_face("llama", "sdpa")
    batch = padded("padded")
    with pytest.raises(fg.InputError, match="four axes"):
        fg.per_example(loss)(params, batch)
    masks = torch.stack([causal_mask(row)[None] for row in batch["kept"]])
    found = fg.per_example(loss)(params, batch | {"attention_mask": masks})
    assert_close(found.detach(), batched(params, batch).detach(), 1e-12)
    eager, direction = hugging_face("llama", "eager"), like(params)
    fg.reduce(fg.per_example(eager[1]))(eager[2], batch, fg.dot(direction))
