#!/usr/bin/env bash
# Lightning's strategy "ddp" shuffles a training loader that was made with shuffle=False, without a word.
#
# Versions: lightning 2.6.6, torch 2.13.0, numpy 2.4.6; CPU, gloo, two processes, Python 3.11.
# Guess: each process has every second sample in the order of the data set, as one process has all of them in order.
# Seen: the sampler that Lightning puts in place of the loader's own shuffles in training, whatever the loader does: it is
#   left alone with use_distributed_sampler=False only. A curriculum, or samples that are told by their place in the
#   loader, are others on two devices than on one.
# Needs nothing but Python and a package index. Ends with 0 as long as this is what happens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check lightning==2.6.6 torch==2.13.0 numpy==2.4.6
cat > shown.py <<'PYTHON'
import warnings

import lightning
import torch
from torch.utils.data import DataLoader


class Seeing(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen += batch.tolist()
        return self.weight * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


warnings.filterwarnings("error", ".*shuffl")  # there is none
module = Seeing()
quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, **quiet)
trainer.fit(module, DataLoader(range(16), batch_size=2, shuffle=False))
print("lightning", lightning.__version__, "rank", trainer.global_rank, "saw", module.seen, flush=True)
assert module.seen != list(range(trainer.global_rank, 16, 2)), "in the order of the loader"
assert module.seen != sorted(module.seen), "in order"
PYTHON
timeout 200 venv/bin/python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node 2 shown.py
