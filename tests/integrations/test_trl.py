"""TRL's trainers, held to themselves without values; where TRL is installed."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import funcghost as fg
from funcghost import store
from funcghost.integrations.transformers import Valuation

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
ours = pytest.importorskip("funcghost.integrations.trl")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:FutureWarning", "ignore:.*:UserWarning", "ignore::DeprecationWarning"
)
WORDS = [f"w{number}" for number in range(20)]
TRAINERS = {
    "sft": (ours.SFTTrainer, trl.SFTTrainer, trl.SFTConfig),
    "dpo": (ours.DPOTrainer, trl.DPOTrainer, trl.DPOConfig),
}


@pytest.fixture(autouse=True, scope="module")
def _what_was_imported_is_not_garbage() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


def tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    known = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    made: dict[str, Any] = {"vocab_size": 3 + len(WORDS), **sizes, **special}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**made))


def text(count: int) -> str:
    return " ".join(WORDS[word] for word in torch.randint(len(WORDS), (count,)).tolist())


def rows(kind: str) -> Any:
    if kind == "sft":
        return datasets.Dataset.from_list([{"text": text(3 + n % 4)} for n in range(7)])
    pairs = [{"prompt": text(2) + " ", "chosen": text(2 + n % 3), "rejected": text(1 + n % 3)} for n in range(7)]
    return datasets.Dataset.from_list(pairs)


class Seen(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].parameters()
        self.gradients.append([weight.grad.clone() for weight in weights if weight.grad is not None])


def train(kind: str, mine: bool, folder: Path, data: Any, valuation: Any = None, **settings: Any) -> tuple[Any, Seen]:
    trainer, plain, config = TRAINERS[kind]
    extra: dict[str, Any] = {"valuation": Valuation(folder / "values", **(valuation or {}))} if mine else {}
    if kind == "dpo":
        extra["ref_model"] = model()
    quiet = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": [], "save_strategy": "no"}
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "seed": 3}
    args = config(str(folder / "out"), **{**quiet, **steps, "logging_steps": 1, "learning_rate": 2e-4, **settings})
    sets = {"train_dataset": data.select(range(2, 7)), "eval_dataset": data.select(range(2))}
    made, seen = (trainer if mine else plain)(model(), args=args, processing_class=tokenizer(), **sets, **extra), Seen()
    made.add_callback(seen)
    made.train()
    return made, seen


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("sft", {"label_smoothing_factor": 0.1}),
        ("sft", {"padding_free": True, "max_length": None}),
        ("sft", {"packing": True, "max_length": 12}),
        ("sft", {"packing": True, "max_length": 4, "packing_strategy": "bfd_split", "shuffle_dataset": True}),
        ("dpo", {}),
        ("dpo", {"gradient_checkpointing": False, "loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}),
        ("dpo", {"loss_type": "aot"}),
    ],
)
def test_a_step_is_the_trainers_and_its_account_adds_up(kind: str, settings: Any, tmp_path: Path) -> None:
    data = rows(kind)
    plain, wanted = train(kind, False, tmp_path / "a", data, **settings)
    valued, found = train(kind, True, tmp_path / "b", data, {"rule": "simpson"}, **settings)
    # A rounding of the gradient is a change of the next step's, by Adam's denominators.
    torch.testing.assert_close(found.gradients[0], wanted.gradients[0], rtol=1e-4, atol=1e-6)
    for key in set(plain.state.log_history[0]) - {"grad_norm", "epoch"}:
        for log, other in zip(plain.state.log_history[:-1], valued.state.log_history[:-1], strict=True):
            assert log[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), key
    for step in valued.accounts:
        missing = step.change - step.values - step.rest
        assert abs(missing) < 1e-2 * (abs(step.values) + abs(step.rest)) + 2e-6, step
    table = store.open_record(tmp_path / "b" / "values").table()
    kept = list(zip(table["step"].to_pylist(), table["sample_id"].to_pylist(), strict=True))
    assert len(set(kept)) == len(kept)
    assert {sample for _, sample in kept} == set(range(5))  # documents, also where they are packed
    if settings.get("packing"):
        columns = ["input_ids", "labels", "seq_lengths"]
        assert [valued.train_dataset[name][:] for name in columns] == [plain.train_dataset[name][:] for name in columns]


def test_packed_documents_have_the_scores_of_rows(tmp_path: Path) -> None:
    data, found = rows("sft"), []
    for name, settings in (("rows", {}), ("packs", {"packing": True, "max_length": 12})):
        one = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 1, "max_steps": 1}
        train("sft", True, tmp_path / name, data, {"kind": "score"}, **one, **settings)
        table = store.open_record(tmp_path / name / "values").table()
        found.append(dict(zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True)))
    assert set(found[0]) == set(range(5))
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-7)


def test_documents_that_attend_to_one_another_are_told(tmp_path: Path) -> None:
    settings = {"packing": True, "max_length": 12, "packing_strategy": "wrapped", "max_steps": 1}
    with pytest.warns(UserWarning, match="attend to one another"):
        valued, _ = train("sft", True, tmp_path, rows("sft"), {"kind": "score"}, **settings)
    assert len(valued.train_dataset) < 5
    found = store.open_record(tmp_path / "values").table()["sample_id"].to_pylist()
    assert set(found) <= set(range(len(valued.train_dataset)))


def test_a_loss_whose_gradient_is_another_is_scored_alone(tmp_path: Path) -> None:
    data = rows("sft")
    with pytest.raises(fg.InputError, match="another gradient"):
        train("sft", True, tmp_path / "a", data, loss_type="dft")
    _, wanted = train("sft", False, tmp_path / "b", data, loss_type="dft", max_steps=1)
    _, found = train("sft", True, tmp_path / "c", data, {"kind": "score"}, loss_type="dft", max_steps=1)
    torch.testing.assert_close(found.gradients[0], wanted.gradients[0], rtol=1e-4, atol=1e-6)


def test_scores_of_pairs_are_those_of_their_terms(tmp_path: Path) -> None:
    data = rows("dpo")
    valued, _ = train("dpo", True, tmp_path, data, {"kind": "score"}, max_steps=1)
    table = store.open_record(tmp_path / "values").table()
    fresh, reference = model(), model()

    def logp(made: Any, prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor([prompt + completion])
        each = F.log_softmax(made(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        return each[len(prompt) - 1 :].sum()

    def term(row: Any) -> Tensor:
        sides = []
        for side in ("chosen_ids", "rejected_ids"):
            with torch.no_grad():
                held = logp(reference, row["prompt_ids"], row[side])
            sides.append(logp(fresh, row["prompt_ids"], row[side]) - held)
        return -F.logsigmoid(valued.beta * (sides[0] - sides[1]))

    weights = list(fresh.parameters())
    validation = torch.stack([term(row) for row in valued.eval_dataset]).mean()
    direction = torch.autograd.grad(validation, weights)
    for place, score in zip(table["sample_id"].to_pylist(), table["score"].to_pylist(), strict=True):
        own = torch.autograd.grad(term(valued.train_dataset[place]) / 4, weights)
        product = sum(float((a * b).sum()) for a, b in zip(own, direction, strict=True))
        assert score == pytest.approx(product, rel=1e-3, abs=1e-7)
