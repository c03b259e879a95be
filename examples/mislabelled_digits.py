"""Finds mislabelled training images by their In-Run Data Shapley values.

Ten percent of the training labels of scikit-learn's digits are replaced by wrong ones. While a small convolutional
network trains on them, every step adds up what each sample of its batch did to the loss on a clean validation set.
A sample that raised it, on balance, is a suspect. The worst are drawn on a contact sheet.

    python examples/mislabelled_digits.py --out runs/mislabelled_digits.png
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from digits import Digits, load
from funcghost.attribution import in_run

VALIDATION_SIZE = 300
FLIPPED_SHARE = 0.1
BATCH_SIZE = 32
LEARNING_RATE = 0.2
SHEET_ROWS, SHEET_COLUMNS = 4, 10


@dataclass(frozen=True)
class Summary:
    """What the run found; `precision` is taken at k = number of flipped labels."""

    auroc: float
    precision: float
    flipped: int
    validation_accuracy: float
    sheet: Path
    seconds: float


def flip(labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The labels with a share replaced by another digit, drawn evenly, and the mask of those replaced."""
    count = round(FLIPPED_SHARE * len(labels))
    rows = torch.randperm(len(labels), generator=generator)[:count]
    given = labels.clone()
    given[rows] = (labels[rows] + torch.randint(1, 10, (count,), generator=generator)) % 10
    return given, given != labels


def network() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def values_in_run(train: Digits, validation: Digits, epochs: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Trains by SGD; each training sample's values summed over the run, and the accuracy on the validation set."""
    model = network()
    params = {name: weight.detach() for name, weight in model.named_parameters()}

    def losses(params: dict[str, Tensor], batch: Digits) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (batch.images,)), batch.labels, reduction="none")

    step = in_run.first_order(losses)
    values = torch.zeros(len(train.labels))
    for _ in tqdm(range(epochs), desc="epochs", leave=False):
        for rows in torch.randperm(len(train.labels), generator=generator).split(BATCH_SIZE):
            batch = train.take(rows)
            result = step(params, batch, lr=LEARNING_RATE, validation=[validation])
            values[rows] += result.values
            params = {name: weight - LEARNING_RATE * result.grads[name] for name, weight in params.items()}

    predicted = functional_call(model, params, (validation.images,)).argmax(dim=1)
    return values, (predicted == validation.labels).float().mean().item()


def draw_sheet(out: Path, train: Digits, true_labels: Tensor, values: Tensor) -> None:
    """Writes a PNG of the samples of highest value, each with the label it was given and the true one."""
    figure = Figure(figsize=(1.15 * SHEET_COLUMNS, 1.55 * SHEET_ROWS + 0.5), layout="constrained")
    figure.suptitle("Training samples that raised the validation loss most (red: label was flipped)")
    worst = values.argsort(descending=True)[: SHEET_ROWS * SHEET_COLUMNS].tolist()
    for axes, row in zip(figure.subplots(SHEET_ROWS, SHEET_COLUMNS).flat, worst, strict=True):
        given, true = int(train.labels[row]), int(true_labels[row])
        axes.imshow(train.images[row, 0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"given {given}\ntrue {true}", fontsize=9, color="black" if given == true else "crimson")
        axes.set_axis_off()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=100)


def positive(text: str) -> int:
    """An argument that must be a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above zero, found {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked before anything is computed."""
    parser = argparse.ArgumentParser(description="Find mislabelled digits by In-Run Data Shapley values.")
    parser.add_argument("--out", type=Path, default=Path("runs/mislabelled_digits.png"), help="contact sheet to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the contact sheet if it exists")
    parser.add_argument("--epochs", type=positive, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.is_dir():
        parser.error(f"--out {args.out} is a folder; name a PNG file")
    if args.out.exists() and not args.overwrite:
        parser.error(f"--out {args.out} exists; pass --overwrite to replace it, or another path")
    return args


def main(argv: Sequence[str] | None = None) -> Summary:
    """Runs the example; the summary it prints."""
    args = parse(argv)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    clean, validation = load(VALIDATION_SIZE, generator)
    given, flipped = flip(clean.labels, generator)
    train = Digits(clean.images, given)
    values, accuracy = values_in_run(train, validation, args.epochs, generator)
    draw_sheet(args.out, train, clean.labels, values)

    count = int(flipped.sum())
    summary = Summary(
        auroc=float(roc_auc_score(flipped.numpy(), values.numpy())),
        precision=flipped[values.topk(count).indices].float().mean().item(),
        flipped=count,
        validation_accuracy=accuracy,
        sheet=args.out,
        seconds=time.perf_counter() - start,
    )
    print(f"flipped labels      {summary.flipped} of {len(given)}")
    print(f"AUROC               {summary.auroc:.3f}")
    print(f"precision at {summary.flipped:<6} {summary.precision:.3f}")
    print(f"validation accuracy {summary.validation_accuracy:.3f}")
    print(f"contact sheet       {summary.sheet}")
    print(f"seconds             {summary.seconds:.1f}")
    assert summary.auroc >= 0.9, "flipped labels should stand out by their values"
    return summary


if __name__ == "__main__":
    main()
