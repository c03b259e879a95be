"""transformers' Trainer, held to itself without values and to gradients taken one by one."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import funcghost as fg
from funcghost import store
from funcghost.integrations.transformers import Trainer, Valuation, Valued

pytestmark = pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:UserWarning:torch.utils.data")

VOCABULARY = 12
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True, scope="module")
def _what_was_imported_is_not_garbage() -> Iterator[None]:
    """A Trainer collects garbage before it trains, which takes a second for what has been imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def model(**config: Any) -> Any:
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **config}))
    return made.double()


def texts(count: int) -> list[dict[str, Tensor]]:
    """Rows with padding, and with unlike numbers of labels."""
    found = []
    for number in range(count):
        row = torch.randint(VOCABULARY, (7,))
        labels = torch.where(torch.arange(7) < 3 + number % 4, row, -100)
        mask = (torch.arange(7) < 4 + number % 4).long()
        found.append({"input_ids": row, "labels": labels, "attention_mask": mask})
    return found


class Seen(transformers.TrainerCallback):
    """Keeps the gradients that each step is made of, clipped."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].parameters()
        self.gradients.append([weight.grad.clone() for weight in weights if weight.grad is not None])


def train(kind: Any, made: Any, folder: Path, rows: Any, valuation: Any = None, **settings: Any) -> tuple[Any, Seen]:
    extra = {} if valuation is None else {"valuation": Valuation(folder / "values", **valuation)}
    extra |= {name: settings.pop(name) for name in ("data_collator", "compute_loss_func") if name in settings}
    resumed, held = settings.pop("resume", None), settings.pop("validation", 2)
    default = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 1, "seed": 3}
    quiet = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "logging_steps": 1, "save_strategy": "no"}
    given: dict[str, Any] = {**default, **quiet, "learning_rate": 1e-3, **settings}
    args = transformers.TrainingArguments(str(folder / "out"), **given)
    trainer, seen = kind(made, args, train_dataset=rows[held:], eval_dataset=rows[:held], **extra), Seen()
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer, seen


def assert_adds_up(trainer: Any, tolerance: float) -> None:
    assert trainer.accounts
    for step in trainer.accounts:
        missing = step.change - step.values - step.rest
        rounding = 1e-6  # of losses, which transformers takes in float32 whatever the model is of
        assert abs(missing) < tolerance * (abs(step.values) + abs(step.rest)) + rounding, step


def smoothed(made: Any, row: dict[str, Tensor], epsilon: float) -> Tensor:
    """The sum of a text's losses over its labels."""
    logits = made(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0, :-1]
    labels, each = row["labels"][1:], -F.log_softmax(logits, -1)
    kept = labels != -100
    nll = each.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return ((1 - epsilon) * nll + epsilon * each.mean(1))[kept].sum()


SETTINGS: dict[str, Any] = {"max_grad_norm": 0.1}


def test_a_step_is_the_trainers_and_its_account_adds_up(tmp_path: Path) -> None:
    """Two batches to a step of unlike numbers of labels, the last step short; clipped."""
    rows = texts(9)
    plain, wanted = train(transformers.Trainer, model(), tmp_path / "a", rows, **SETTINGS)
    valued, found = train(Trainer, model(), tmp_path / "b", rows, {"rule": "simpson"}, **SETTINGS)
    assert len(wanted.gradients) == 2
    for mine, theirs in zip(found.gradients, wanted.gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    for log, other in zip(plain.state.log_history[:2], valued.state.log_history[:2], strict=True):
        assert log["loss"] == pytest.approx(other["loss"], rel=1e-12)
        assert log["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-12)
        assert other["values_change"] == pytest.approx(other["values"] + other["values_rest"], rel=1e-2)
    assert_adds_up(valued, 1e-5)


def test_scores_are_those_of_the_terms_of_a_smoothed_loss(tmp_path: Path) -> None:
    rows, epsilon = texts(9), 0.1
    settings = {**SETTINGS, "label_smoothing_factor": epsilon}
    _, wanted = train(transformers.Trainer, model(), tmp_path / "a", rows, **settings)
    _, found = train(Trainer, model(), tmp_path / "b", rows, {"kind": "score"}, **settings)
    for mine, theirs in zip(found.gradients, wanted.gradients, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    table = store.open_record(tmp_path / "b" / "values").table()
    assert sorted(table["sample_id"].to_pylist()) == list(range(7))
    assert table["step"].to_pylist() == [0, 0, 0, 0, 1, 1, 1]
    fresh, places = model(), table["sample_id"].to_pylist()[:4]
    weights = list(fresh.parameters())
    items = sum(int((rows[2 + place]["labels"][1:] != -100).sum()) for place in places)
    total = sum(int((row["labels"][1:] != -100).sum()) for row in rows[:2])
    validation = torch.stack([smoothed(fresh, row, epsilon) for row in rows[:2]]).sum() / total
    direction = torch.autograd.grad(validation, weights)
    for place, score in zip(places, table["score"].to_pylist(), strict=False):
        own = torch.autograd.grad(smoothed(fresh, rows[2 + place], epsilon) / items, weights)
        product = sum(float((a * b).sum()) for a, b in zip(own, direction, strict=True))
        assert score == pytest.approx(product, rel=1e-5, abs=1e-8)


class Own(transformers.Trainer):
    """With a loss of one's own, which the trainer adds up over the batches of a step."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        loss = F.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return (loss, None) if return_outputs else loss


class OwnValued(Valued, Own):
    pass


class Penalised(Valued, transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss + model.lm_head.weight.square().sum()


def test_a_loss_of_ones_own_is_valued_as_it_is_optimised(tmp_path: Path) -> None:
    rows = texts(6)
    _, wanted = train(Own, model(), tmp_path / "a", rows)
    valued, found = train(OwnValued, model(), tmp_path / "b", rows, {"pairs_memory": 0}, learning_rate=1e-4)
    for mine, theirs in zip(found.gradients[0], wanted.gradients[0], strict=True):
        assert torch.equal(mine, theirs)
    assert_adds_up(valued, 1e-2)


def test_a_term_of_no_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fg.InputError, match=r"\[12, 8\] that is trained otherwise"):
        train(Penalised, model(), tmp_path, texts(4), {})


def test_adapters_checkpoints_and_dropout(tmp_path: Path) -> None:
    """The random numbers of a step are the trainer's."""

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", lora_dropout=0.2)
        return peft.get_peft_model(model(), config, autocast_adapter_dtype=False)

    rows = texts(6)
    settings: dict[str, Any] = {"gradient_checkpointing": True, "gradient_accumulation_steps": 1, "learning_rate": 0.05}
    _, wanted = train(transformers.Trainer, adapted(), tmp_path / "a", rows, **settings)
    valued, found = train(Trainer, adapted(), tmp_path / "b", rows, {"rule": "simpson"}, **settings)
    for mine, theirs in zip(found.gradients, wanted.gradients, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert_adds_up(valued, 1e-2)


def test_a_compiled_model(tmp_path: Path) -> None:
    """The compiler's products are those of the plain model, which is what is differentiated."""
    rows = texts(4)
    settings: dict[str, Any] = {"gradient_accumulation_steps": 1}
    _, wanted = train(transformers.Trainer, model(), tmp_path / "a", rows, **settings)
    settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
    valued, found = train(Trainer, model(), tmp_path / "b", rows, {"rule": "simpson"}, **settings)
    torch.testing.assert_close(found.gradients, wanted.gradients)
    assert_adds_up(valued, 1e-5)


def test_weights_of_16_bits_are_told_what_to_do_and_scored(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "max_grad_norm": 0.1}
    with pytest.raises(fg.InputError, match=r"float32 master weights .* bf16=True"):
        train(Trainer, model().bfloat16(), tmp_path / "a", texts(6), {}, **settings)
    train(Trainer, model().bfloat16(), tmp_path / "b", texts(6), {"kind": "score"}, **settings)
    settings |= {"bf16": True, "learning_rate": 0.02}  # a change that is more than the rounding of the losses
    valued, _ = train(Trainer, model().float(), tmp_path / "c", texts(6), {"rule": "simpson"}, **settings)
    step = valued.accounts[0]
    assert abs(step.change - step.values - step.rest) < 0.1 * abs(step.values)


def test_packed_documents_have_the_values_of_padded_ones(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"][: 3 + n % 4].tolist()} for n, row in enumerate(texts(4))]

    def padded(given: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = {"input_ids": torch.zeros(len(given), 7).long(), "labels": torch.full((len(given), 7), -100)}
        found["attention_mask"] = torch.zeros(len(given), 7).long()
        for row, one in enumerate(given):
            size = len(one["input_ids"])
            found["input_ids"][row, :size] = found["labels"][row, :size] = torch.tensor(one["input_ids"])
            found["attention_mask"][row, :size] = 1
        return found

    flat = transformers.DataCollatorWithFlattening()
    values = []
    for name, collate in (("flat", flat), ("padded", padded)):
        one = {"gradient_accumulation_steps": 1, "data_collator": collate}
        valued, _ = train(Trainer, model(), tmp_path / name, rows, {}, **one)
        assert_adds_up(valued, 1e-2)
        table = store.open_record(tmp_path / name / "values").table()
        values.append(dict(zip(table["sample_id"].to_pylist(), table["value"].to_pylist(), strict=True)))
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-8)

    def joined(given: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = flat(given)
        return {**found, "attention_mask": torch.ones_like(found["input_ids"])}

    with pytest.raises(fg.InputError, match="see each other"):
        train(Trainer, model(), tmp_path / "joined", rows, {}, data_collator=joined)


def experts(**config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_local_experts": 3, "num_key_value_heads": 1, **config}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def test_experts_in_float64_are_told_what_takes_it() -> None:
    made, batch = experts().double(), {"input_ids": torch.randint(VOCABULARY, (2, 4))}

    def next_token(output: Any, batch: Any) -> Tensor:
        logits = output.logits[:, :-1].transpose(1, 2)
        return F.cross_entropy(logits, batch["input_ids"][:, 1:], reduction="none").mean(1)

    losses, params = fg.module_losses(made, next_token), fg.trainable(made)
    with pytest.raises(fg.InputError, match=r"set_experts_implementation\('batched_mm'\)"):
        fg.check(losses, params, batch)
    made.set_experts_implementation("batched_mm")
    fg.check(losses, params, batch).raise_if_failed()


def test_a_mixture_of_experts_adds_up_in_float32(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    _, wanted = train(transformers.Trainer, experts(), tmp_path / "a", texts(9), **settings)
    valued, found = train(Trainer, experts(), tmp_path / "b", texts(9), {}, **settings)
    torch.testing.assert_close(found.gradients[0], wanted.gradients[0], rtol=1e-4, atol=1e-6)
    assert_adds_up(valued, 3e-2)
    with pytest.raises(fg.InputError, match=r"router_logits|balance of experts"):
        train(Trainer, experts(output_router_logits=True), tmp_path / "c", texts(9), {}, **settings)


def test_a_run_that_is_resumed_has_the_record_of_one_that_was_not(tmp_path: Path) -> None:
    rows = texts(6)
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 1}
    train(Trainer, model(), tmp_path, rows, {}, **settings)
    wanted = store.open_record(tmp_path / "values").table().to_pydict()
    train(Trainer, model(), tmp_path, rows, {}, resume=str(tmp_path / "out/checkpoint-1"), **settings)
    found = store.open_record(tmp_path / "values").table().to_pydict()
    assert (found["step"], found["sample_id"]) == (wanted["step"], wanted["sample_id"])
    assert found["value"] == pytest.approx(wanted["value"], rel=1e-5)
    with pytest.raises(fg.StoreError, match="holds a record already"):
        train(Trainer, model(), tmp_path, rows, {}, max_steps=1)


def test_what_cannot_be_valued_is_told_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 1}
    with pytest.raises(fg.InputError, match="Adafactor is none of"):
        train(Trainer, model(), tmp_path / "a", texts(6), {}, optim="adafactor", **settings)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(fg.InputError, match="use_reentrant"):
        train(Trainer, model(), tmp_path / "b", texts(6), {}, **reentrant, **settings)
    wrong: Any = "runs"
    with pytest.raises(fg.InputError, match="valuation: must be a Valuation"):
        Trainer(model(), valuation=wrong)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    with pytest.raises(fg.InputError, match="several devices in one process"):
        train(Trainer, model(), tmp_path / "c", texts(6), {}, **settings)
