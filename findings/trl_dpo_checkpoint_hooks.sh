#!/usr/bin/env bash
# TRL's DPOTrainer with gradient checkpointing adds a forward hook to the model's embeddings in every step.
#
# Versions: torch 2.13.0, numpy 2.4.6, transformers 5.23.0, trl 1.16.0; CPU, Python 3.11.
# Guess: a step leaves the model as it was but for its weights: the number of hooks does not change.
# Seen: it turns checkpointing off for the reference and on again, and each time it is turned on there is one more hook
#   that makes the embeddings' output require gradients: after n steps n + 1 of them run in every forward. Checkpointing
#   is on by default.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 transformers==5.23.0 trl==1.16.0
cat > shown.py <<'PYTHON'
import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
known = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c"])}
words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)


def model():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )


class Count(transformers.TrainerCallback):
    def __init__(self):
        self.hooks = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.hooks.append(len(model.get_input_embeddings()._forward_hooks))


count = Count()
trainer = trl.DPOTrainer(
    model(),
    ref_model=model(),
    args=trl.DPOConfig("out", max_steps=4, use_cpu=True, bf16=False, report_to=[], save_strategy="no"),
    train_dataset=Dataset.from_list([{"prompt": "a ", "chosen": "b c", "rejected": "c"}] * 8),
    processing_class=tokenizer,
    callbacks=[count],
)
trainer.train()
print("forward hooks of the embeddings after each step:", count.hooks)
assert count.hooks == [count.hooks[0] + step for step in range(4)], "one more in every step"
PYTHON
venv/bin/python shown.py
