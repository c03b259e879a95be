"""The training step with `fg.dot` against a plain step, on architectures of Hugging Face as they come.

Every round times both steps, in turn. FLOPs are counted once, by `torch.utils.flop_counter`, which sees no attention on
the CPU; where they come to more than 4/3, the ops that add them are named. Promises stand beside what is measured.
"""

import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.benchmarks.bench_dot import (
    CLOCKS,
    DTYPES,
    Case,
    Route,
    Setting,
    agree,
    hf,
    interleave,
    make_plan,
    next_token_of_mapping,
    planned_routes,
    seconds,
    training_gradient,
)
from tests.benchmarks.common import describe, parser_of, positive, quartiles, table

SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SPECIAL: dict[str, Any] = {"vocab_size": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SAMPLES, LENGTH = 8, 128


@dataclass(frozen=True)
class Promise:
    """The most that a step may take, in plain steps; `flops` leaves a hundredth for what is no product of matrices."""

    flops: float = 4 / 3 * 1.01
    seconds: float = 1.45
    planning: float = 5.0


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture; seconds and ratios by quartiles."""

    architecture: str
    parameters: int
    tapped: int
    carried: int
    rounds: int
    plain: tuple[float, float, float]
    step: tuple[float, float, float]
    ratio: tuple[float, float, float]
    flop_ratio: float
    flops_added: dict[str, float]
    planning: tuple[float, float, float]
    promise: Promise

    def broken(self) -> list[str]:
        """The promises that are not kept."""
        found = {"flops": self.flop_ratio, "seconds": self.ratio[1], "planning": self.planning[1]}
        return [name for name, value in found.items() if value > getattr(self.promise, name)]


def text(name: str, model: Any, setting: Setting) -> Case:
    batch = {"input_ids": setting.tokens(SAMPLES, LENGTH, 1024)}
    return Case.of_model(name, setting.place(model), next_token_of_mapping, batch)


def gpt2(setting: Setting) -> Case:
    config = hf.GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=LENGTH, use_cache=False, **SPECIAL)
    return text("GPT-2", hf.GPT2LMHeadModel(config), setting)


def llama(setting: Setting) -> Case:
    return text(
        "Llama", hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, **SPECIAL, num_key_value_heads=2, use_cache=False)), setting
    )


def bert(setting: Setting) -> Case:
    return text("BERT", hf.BertForMaskedLM(hf.BertConfig(**SIZE, **SPECIAL)), setting)


def mixtral(setting: Setting) -> Case:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    config = hf.MixtralConfig(**(SIZE | {"intermediate_size": 512}), **SPECIAL, **experts, use_cache=False)
    return text("Mixtral", hf.MixtralForCausalLM(config), setting)


def classified(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """The cross-entropy with the first class."""
    return output.logits.log_softmax(1)[:, 0].neg()


def vit(setting: Setting) -> Case:
    model = hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=88, patch_size=8, num_labels=16))
    return Case.of_model("ViT", setting.place(model), classified, {"pixel_values": setting.noise(SAMPLES, 3, 88, 88)})


def convnext(setting: Setting) -> Case:
    sizes = {"hidden_sizes": [64, 128, 256, 512], "depths": [1, 1, 1, 1], "image_size": 96, "num_labels": 16}
    model = hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes))
    return Case.of_model(
        "ConvNeXt", setting.place(model), classified, {"pixel_values": setting.noise(2 * SAMPLES, 3, 96, 96)}
    )


ARCHITECTURES: dict[str, Callable[[Setting], Case]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "convnext": convnext,
    "mixtral": mixtral,
}
PROMISES = dict.fromkeys(ARCHITECTURES, Promise()) | {"mixtral": Promise(seconds=1.6, planning=20.0)}


def flops_by_op(route: Route) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        route()
    return {str(op).removeprefix("aten."): count for op, count in counter.get_flop_counts()["Global"].items()}


def measure(case: Case, promise: Promise, setting: Setting, budget: float, plannings: int) -> Row:
    deadline = time.monotonic() + budget
    training_gradient(case)
    plan = make_plan(case)
    routes = planned_routes(case, plan)
    if not agree(routes["grad_and_reduce(dot)"](), routes["reduce(dot)"]()):
        raise RuntimeError(f"{case.name}: fg.grad_and_reduce and fg.reduce give different scores.")
    del routes["reduce(dot)"]
    plain_flops, step_flops = (flops_by_op(route) for route in routes.values())
    # Planning is divided by the plain steps around it, as the steps are by those of their rounds.
    planning = []
    for _ in range(plannings):
        around = [seconds(routes["plain step"], setting)]
        taken = seconds(lambda: make_plan(case), setting)
        around.append(seconds(routes["plain step"], setting))
        planning.append(taken / (sum(around) / 2))
    times = interleave(routes, setting, deadline)
    plain, step = times["plain step"], times["grad_and_reduce(dot)"]
    return Row(
        architecture=case.name,
        parameters=sum(parameter.numel() for parameter in case.params.values()),
        tapped=sum(site.action == "tap" for site in plan.sites),
        carried=sum(site.action == "carry" for site in plan.sites),
        rounds=len(plain),
        plain=quartiles(plain),
        step=quartiles(step),
        ratio=quartiles([mine / base for mine, base in zip(step, plain, strict=True)]),
        flop_ratio=sum(step_flops.values()) / sum(plain_flops.values()),
        flops_added={op: (n - plain_flops.get(op, 0)) / sum(plain_flops.values()) for op, n in step_flops.items()},
        planning=quartiles(planning),
        promise=promise,
    )


def spread(values: tuple[float, float, float], scale: float = 1.0, digits: int = 2) -> str:
    low, middle, high = (f"{scale * value:.{digits}f}" for value in values)
    return f"{middle} ({low} - {high})"


def show(rows: Sequence[Row]) -> str:
    head = ["", "parameters", "tapped", "carried", "plain ms", "x time", "most", "x FLOPs", "most", "planning", "most"]
    lines = [[*head, "broken"]]
    for row in rows:
        promise = row.promise
        lines.append(
            [
                *(row.architecture, f"{row.parameters:,}", str(row.tapped), str(row.carried)),
                *(spread(row.plain, 1e3, 0), spread(row.ratio), f"{promise.seconds:.2f}"),
                *(f"{row.flop_ratio:.3f}", f"{promise.flops:.3f}", spread(row.planning, digits=1)),
                *(f"{promise.planning:.0f}", ", ".join(row.broken()) or "none"),
            ]
        )
    notes = [
        f"{row.architecture}: adds {', '.join(f'{op} {share:.3f}' for op, share in row.flops_added.items() if share)}"
        for row in rows
        if row.flop_ratio > 4 / 3 + 1e-4
    ]
    return "\n".join(["", table(lines), *notes])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Prints the table, and gives its rows."""
    parser = parser_of("Times exact fg.dot on architectures of Hugging Face.", quick="about a minute: fewer rounds")
    parser.add_argument("--seconds", type=positive(float), help="time per architecture; default 45, with --quick 8")
    parser.add_argument("--cases", nargs="+", choices=[*ARCHITECTURES], default=[*ARCHITECTURES])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process alone; with --threads 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.clock == "cpu" and (args.device.type != "cpu" or args.threads != 1):
        parser.error("--clock cpu adds up the time of all threads, and sees none of a GPU's: use it with --threads 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    hf.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    setting = Setting(args.device, DTYPES["float32"], CLOCKS[args.clock])
    about = describe(setting.device, setting.dtype) | {"clock": args.clock}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    budget, rows = args.seconds or (8.0 if args.quick else 45.0), []
    for name in args.cases:
        torch.manual_seed(args.seed)
        rows.append(measure(ARCHITECTURES[name](setting), PROMISES[name], setting, budget, 3 if args.quick else 7))
    print(show(rows))
    if args.out:
        args.out.write_text(json.dumps({"setting": about, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
