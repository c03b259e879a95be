"""Hugging Face's models in a compiled step: what the eager step gives."""

import pytest
import torch

import funcghost as fg
from tests.depth import thinned
from tests.models.architectures import ARCHITECTURES
from tests.models.huggingface import covering, draw_direction, parameters
from tests.naive import assert_close
from tests.versions import compiles, unwrapped

CASES = dict(zip(ARCHITECTURES, covering(ARCHITECTURES).values(), strict=True))
NO_PLAIN_STEP = ("longt5_global", "nystromformer", "patchtst", "qwen3_next")
REFUSED = {
    **dict.fromkeys(NO_PLAIN_STEP, "the compiler fails on a plain step, too"),
    **dict.fromkeys(("switch_transformers", "nllb_moe"), "sizes that depend on data"),
    **dict.fromkeys(("deberta", "flaubert", "vilt"), "numbers read from tensors"),
    **dict.fromkeys(("longformer", "led"), "a logger"),
    **dict.fromkeys(("yoso", "phimoe", "deepseek_v3"), "a Function that is not followed in a graph"),
    **{"recurrent_gemma": "a state that the module keeps", "yolos": "a break of the graph"},
}
"""Models whose losses cannot be in a graph, and why."""


@pytest.mark.parametrize("name", thinned([name for name in ARCHITECTURES if name not in REFUSED], ["llama"]))
@pytest.mark.filterwarnings("ignore")
@compiles
def test_a_compiled_step_gives_the_eager_steps_numbers(name: str) -> None:
    torch._dynamo.reset()
    case = CASES[name]
    model = case.model()
    params, losses, batch = parameters(model), case.losses(model), case.batch()
    direction = draw_direction(params)
    wanted = fg.grad_and_reduce(losses)(params, batch, fg.dot(direction))
    step = torch.compile(fg.grad_and_reduce(losses), backend="aot_eager")
    with unwrapped():
        found = step(params, batch, fg.dot(direction))
    assert_close(found.losses, wanted.losses, case.tolerance)
    assert_close(found.reduced, wanted.reduced, case.tolerance)
