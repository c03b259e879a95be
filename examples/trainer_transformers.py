"""Values samples in transformers' Trainer: the trainer is funcghost's, with a `valuation`; all else is as it was.

pip install 'funcghost[transformers]' && python examples/trainer_transformers.py
torchrun --nproc-per-node 2 examples/trainer_transformers.py
"""

import tempfile
from typing import Any

import torch
import transformers

from funcghost import store
from funcghost.integrations.transformers import Trainer, Valuation


def main() -> list[Any]:
    """Trains for an epoch, and prints the samples that helped most; gives the account of each step."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    model: Any = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    )
    texts = [{"input_ids": row, "labels": row} for row in torch.randint(20, (40, 8))]
    folder = tempfile.mkdtemp()
    args = transformers.TrainingArguments(
        folder, num_train_epochs=1, gradient_accumulation_steps=2, use_cpu=True, save_strategy="no", report_to=[]
    )
    trainer = Trainer(
        model, args, train_dataset=texts[:32], eval_dataset=texts[32:], valuation=Valuation(f"{folder}/values")
    )
    trainer.train()
    if trainer.is_world_process_zero():
        table = store.open_record(f"{folder}/values").table()
        print(table.sort_by("value").slice(0, 3).to_pylist())
    return trainer.accounts


if __name__ == "__main__":
    for step in main():
        print(step)
