"""What `bench_attribution.py` holds funcghost to: the models, and each other library as its documentation says.

A library is imported when it is measured; one that is missing is a row that says so.
"""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

Params = dict[str, Tensor]


class Perceptron(nn.Module):
    """Linear layers without biases: kronfluence takes a bias for a column of the weight, funcghost for a parameter."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Decoder(nn.Module):
    """A small GPT whose linear layers have no biases and whose head is not tied; these are attributed, no others."""

    def __init__(self, vocabulary: int = 128, length: int = 32, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth + 1))
        self.inputs = nn.ModuleList(nn.Linear(width, 3 * width, bias=False) for _ in range(depth))
        self.outputs = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))
        self.expand = nn.ModuleList(nn.Linear(width, 4 * width, bias=False) for _ in range(depth))
        self.contract = nn.ModuleList(nn.Linear(4 * width, width, bias=False) for _ in range(depth))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]).expand(x.shape))
        for k, (into, out, up, down) in enumerate(
            zip(self.inputs, self.outputs, self.expand, self.contract, strict=True)
        ):
            q, key, v = into(self.norms[2 * k](h)).unflatten(-1, (3, 4, -1)).movedim(-3, 0).transpose(2, 3)
            h = h + out(F.scaled_dot_product_attention(q, key, v, is_causal=True).transpose(1, 2).flatten(2))
            h = h + down(F.gelu(up(self.norms[2 * k + 1](h))))
        return self.head(self.norms[-1](h))


class Problem:
    """A model, its losses over the weights of its linear layers, training samples and queries."""

    def __init__(
        self, name: str, model: nn.Module, train: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]
    ) -> None:
        self.name, self.model, self.train, self.queries = name, model, train, queries
        layers = {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}
        whole = {n: p.detach() for n, p in model.named_parameters()}
        self.params = {n: p for n, p in whole.items() if n.rpartition(".")[0] in layers}
        self.others = {n: p for n, p in whole.items() if n not in self.params}

    def outputs(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional_call(self.model, self.others | params, (batch[0],))

    def losses(self, params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
        return criterion(self.outputs(params, batch), batch)

    def batches(self, size: int, queries: bool = False) -> list[tuple[Tensor, Tensor]]:
        x, y = self.queries if queries else self.train
        return list(zip(x.split(size), y.split(size), strict=True))


def criterion(out: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, summed over positions, [b]."""
    terms = F.cross_entropy(out.flatten(0, -2), batch[1].flatten(), reduction="none")
    return terms.view(len(out), -1).sum(1)


def problems() -> list[Problem]:
    """The digits' perceptron, the decoder on tokens drawn from a table of transitions, and a linear classifier.

    The last one's Hessian is positive definite at any damping: there conjugate gradients have work to do.
    """
    torch.manual_seed(0)
    x, labels = torch.randn(660, 64), torch.randint(0, 10, (660,))
    x = x + 2 * torch.randn(10, 64)[labels]
    dense = Problem("mlp", Perceptron(64, 128, 128, 10), (x[:600], labels[:600]), (x[600:], labels[600:]))
    table = torch.randn(128, 128).mul(3).softmax(1)
    rows = [torch.randint(0, 128, (72, 1))]
    for _ in range(32):
        rows.append(torch.multinomial(table[rows[-1][:, 0]], 1))
    tokens = torch.cat(rows, 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    gpt = Problem("gpt", Decoder(), (inputs[:64], targets[:64]), (inputs[64:], targets[64:]))
    linear = Problem("linear", Perceptron(64, 10), dense.train, dense.queries)
    found = [dense, gpt, linear]
    for problem in found:
        _train(problem)
    return found


def _train(problem: Problem) -> None:
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    for _ in range(3):
        for batch in problem.batches(32):
            optimizer.zero_grad()
            (criterion(problem.model(batch[0]), batch).mean() / batch[1][0].numel()).backward()
            optimizer.step()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries print and warn."""
    logging.disable(logging.WARNING)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def kronfluence(problem: Problem, batch: int) -> Callable[[], Tensor]:
    """EK-FAC, empirical Fisher, a tenth of the mean eigenvalue: factors and all scores, [q, n]."""
    analyzer_module = import_module("kronfluence.analyzer")
    base: Any = import_module("kronfluence.task").Task
    arguments = import_module("kronfluence.arguments")

    class Task(base):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return criterion(model(batch[0]), batch).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return criterion(model(batch[0]), batch).sum()

    task, scratch, calls = Task(), tempfile.mkdtemp(), iter(range(1000))
    prepared = analyzer_module.prepare_model(copy.deepcopy(problem.model), task)

    def run() -> Tensor:
        name = f"run{next(calls)}"
        analyzer = analyzer_module.Analyzer(
            analysis_name=name, model=prepared, task=task, cpu=True, output_dir=scratch, disable_tqdm=True
        )
        train, queries = TensorDataset(*problem.train), TensorDataset(*problem.queries)
        analyzer.fit_all_factors(
            factors_name="f",
            dataset=train,
            per_device_batch_size=batch,
            factor_args=arguments.FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        analyzer.compute_pairwise_scores(
            scores_name="s",
            factors_name="f",
            query_dataset=queries,
            train_dataset=train,
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=batch,
            score_args=arguments.ScoreArguments(damping_factor=None),
        )
        return analyzer.load_pairwise_scores("s")["all_modules"]

    return run


def dattri(problem: Problem, damping: float, steps: int) -> Callable[[Tensor], Tensor]:
    """Conjugate gradients on the Hessian of the mean loss: from directions [k, P] to solutions [k, P]."""
    ihvp_cg = import_module("dattri.func.hessian").ihvp_cg
    names, shapes = list(problem.params), [leaf.shape for leaf in problem.params.values()]

    def total(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        params = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return problem.losses(params, problem.train).mean()

    solve = ihvp_cg(total, max_iter=steps, tol=0.0, regularization=damping)
    flat = torch.cat([leaf.flatten() for leaf in problem.params.values()])
    return lambda v: solve((flat,), v).detach()


def captum(problem: Problem, batch: int) -> Callable[[], Tensor]:
    """TracIn at one checkpoint, [q, n]."""
    core = import_module("captum.influence")
    file = Path(tempfile.mkdtemp()) / "checkpoint.pt"
    torch.save(problem.model.state_dict(), file)

    def load(model: Any, path: str) -> float:
        model.load_state_dict(torch.load(path, weights_only=True))
        return 1.0

    tracin = core.TracInCP(
        copy.deepcopy(problem.model),
        TensorDataset(*problem.train),
        [str(file)],
        load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=batch,
        sample_wise_grads_per_batch=True,
    )
    return lambda: tracin.influence(problem.queries)


def curvlinops(problem: Problem, batch: int) -> Callable[[Tensor], Tensor]:
    """The Gauss-Newton matrix of the mean loss times [P, k]."""
    operators = import_module("curvlinops")
    model = copy.deepcopy(problem.model)
    params = [p for n, p in model.named_parameters() if n in problem.params]
    loader = DataLoader(TensorDataset(*problem.train), batch_size=batch)
    matrix = operators.GGNLinearOperator(model, nn.CrossEntropyLoss(), params, list(loader), check_deterministic=False)
    return lambda v: matrix @ v


def trak(problem: Problem, batch: int, dim: int) -> Callable[[], Tensor]:
    """TRAK of one model, [n, q]."""
    module, projectors = import_module("trak"), import_module("trak.projectors")
    outputs = import_module("trak.modelout_functions")

    def run() -> Tensor:
        model = copy.deepcopy(problem.model).eval()
        size = sum(p.numel() for p in model.parameters())
        projector = projectors.BasicProjector(
            size, dim, 0, projectors.ProjectionType.rademacher, "cpu", block_size=min(100, dim)
        )
        with tempfile.TemporaryDirectory() as folder:
            traker = module.TRAKer(
                model,
                outputs.ImageClassificationModelOutput(),
                len(problem.train[0]),
                folder,
                True,
                "cpu",
                projector=projector,
                proj_dim=dim,
                use_half_precision=False,
                lambda_reg=1e-3,
            )
            traker.load_checkpoint(model.state_dict(), model_id=0)
            for own in problem.batches(batch):
                traker.featurize(batch=own, num_samples=len(own[0]))
            traker.finalize_features()
            traker.start_scoring_checkpoint("q", model.state_dict(), 0, len(problem.queries[0]))
            traker.score(batch=problem.queries, num_samples=len(problem.queries[0]))
            return torch.as_tensor(traker.finalize_scores("q")[:])

    return run
