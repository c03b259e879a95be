"""Value data in a run: what each sample did to the validation loss, while the model trains."""

# %% [markdown]
# # Value data in a run
#
# Every step of training changes the validation loss. This tutorial shares out each change among the samples of the
# batch, adds the shares up over the run, and writes them to disk with a page to look at. It costs one validation
# gradient a step, and a third of a step. (In-Run Data Shapley, [2406.11011](https://arxiv.org/abs/2406.11011).)
#
# We need a model, its loss for each sample, and a validation set: here the digits of scikit-learn, of which a tenth
# have a wrong label.

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcghost as fg
from digits import Digits, load
from funcghost import plots, store
from funcghost.attribution import in_run
from funcghost.training import updates

generator = torch.Generator().manual_seed(0)
torch.manual_seed(0)
clean, validation = load(400, generator)
wrong = torch.rand(len(clean.labels), generator=generator) < 0.1
labels = torch.where(wrong, (clean.labels + torch.randint(1, 10, wrong.shape, generator=generator)) % 10, clean.labels)
train = Digits(clean.images, labels)

model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def criterion(logits: Tensor, batch: Digits) -> Tensor:
    """One loss for each sample, not their mean."""
    return F.cross_entropy(logits, batch.labels, reduction="none")


losses = fg.module_losses(model, criterion, inputs=lambda batch: batch.images)

# %% [markdown]
# The optimizer becomes a pure function, so that its step can be shared out: momentum, weight decay and Adam's
# denominators included. `account` makes the step and the account of it. With `credit="impulse"` a sample is credited
# with all that its gradient will ever move through the optimizer's memory, in the step that it is in. What validation
# loss and gradient were after a step is handed to the next one, which saves taking them twice.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
params = dict(model.named_parameters())
update, state = updates.of(optimizer, params)
account = in_run.along_path(losses, update, credit="impulse")

folder = Path(tempfile.mkdtemp()) / "values"
before, steps = None, []
with store.record(folder, ["value"], {"label": "string"}, origin={"seed": 0, "lr": 3e-3}) as kept:
    for step, rows in enumerate(torch.randperm(len(labels), generator=generator).split(64)):
        batch = train.take(rows)
        out = account(params, batch, state=state, validation=[validation], before=before)
        kept.add(step, rows, {"value": out.values}, {"label": ["wrong" if w else "right" for w in wrong[rows]]})
        steps.append((float(out.values.sum()), float(out.rest), float(out.change)))
        params, state, before = out.params, out.state, out.after

# %% [markdown]
# Values and the rest (what momentum and decay did without the samples) add up to the change that was really made. A
# value below zero lowered the validation loss: that sample helped.

# %%
values, rest, change = (torch.tensor(column) for column in zip(*steps, strict=True))
print(f"change of the loss {change.sum():.3f}: values {values.sum():.3f} and the rest {rest.sum():.3f}")
assert float((values + rest - change).abs().sum() / change.abs().sum()) < 0.05

# %% [markdown]
# Samples with a wrong label raised the loss, on average, and those with a right one lowered it.

# %%
table = store.open_record(folder).table()
found = torch.tensor(table["value"].to_numpy())
is_wrong = torch.tensor([label == "wrong" for label in table["label"].to_pylist()])
print(f"mean value: right labels {found[~is_wrong].mean():.2e}, wrong labels {found[is_wrong].mean():.2e}")
assert found[is_wrong].mean() > found[~is_wrong].mean()

# %% [markdown]
# One page shows it all: `report.html` has the distribution, values over steps and by group, and the samples that
# helped and hurt most, with their images.

# %%
page = folder.parent / "report.html"
plots.report(folder, page, group="label", images=train.images, figures={"Account": plots.account(values, rest, change)})
print(f"{page.name}: {page.stat().st_size // 1024} KiB")
