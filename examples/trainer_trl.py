"""Values samples of TRL's SFTTrainer, and pairs of its DPOTrainer, on a small model made here.

pip install 'funcghost[trl]' && python examples/trainer_trl.py
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, SFTConfig

from funcghost.integrations.trl import DPOTrainer, SFTTrainer, Valuation

WORDS = [f"w{number}" for number in range(20)]
ARGUMENTS: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
}


def model() -> Any:
    """Two layers."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    heads: dict[str, Any] = {"vocab_size": 3 + len(WORDS), "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **special, **heads))


def tokenizer() -> Any:
    """Words."""
    known = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    made: Any = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special: dict[str, Any] = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def text(count: int) -> str:
    """Random words."""
    return " ".join(WORDS[word] for word in torch.randint(len(WORDS), (count,)).tolist())


def main() -> None:
    """Prints for each step the sum of its values, the rest, and the change of the validation loss."""
    folder = tempfile.mkdtemp()
    texts = Dataset.from_list([{"text": text(6 + n % 3)} for n in range(16)])
    pairs = Dataset.from_list([{"prompt": text(3) + " ", "chosen": text(4), "rejected": text(5)} for _ in range(16)])
    for name, trainer, config, data, more in [
        ("SFT", SFTTrainer, SFTConfig, texts, {}),
        ("DPO", DPOTrainer, DPOConfig, pairs, {"ref_model": model()}),
    ]:
        sets = {"train_dataset": data.select(range(4, 16)), "eval_dataset": data.select(range(4))}
        trained = trainer(
            model(),
            args=config(f"{folder}/{name}", **ARGUMENTS),
            processing_class=tokenizer(),
            valuation=Valuation(f"{folder}/{name}/values", rule="simpson"),
            **sets,
            **more,
        )
        trained.train()
        for step in trained.accounts:
            print(f"{name}: values {step.values:+.6f}  rest {step.rest:+.6f}  change {step.change:+.6f}")


if __name__ == "__main__":
    main()
