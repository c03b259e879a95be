"""Exact scores of a shortlist."""

from collections.abc import Callable
from typing import Any

import numpy as np

from funcghost.corpus.asking import Hits
from funcghost.corpus.feeding import Cutting, Samples, source_of
from funcghost.errors import InputError
from funcghost.options import Options
from funcghost.problem import Losses
from funcghost.reducers.bases import Reducer
from funcghost.transforms.steps import reduce
from funcghost.trees import Tree


def rescore(
    losses: Losses,
    params: Tree,
    data: Any,
    reducer: Reducer,
    shortlist: Hits,
    *,
    batch_size: int = 16,
    collate: Callable[..., Tree] | None = None,
    length: Callable[[Any], int] | None = None,
    options: Options | None = None,
) -> Hits:
    """The samples of a shortlist by a reducer's own values, largest first: a sketch proposes, exact scores decide.

    `shortlist` is what `Corpus.nearest` or `Corpus.top` gave; the data are those that were scored, with positions. The
    result has the ids and positions of the shortlist in their new order, and as values what the reducer gives, [b].
    Other arguments as in `corpus.score`.

    Raises:
        InputError: the reducer does not give a number for each sample, the data have no positions, or the shortlist is
            of several queries.

    Example:
        >>> import tempfile, torch, funcghost as fg
        >>> from funcghost import corpus
        >>> data = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.0])]
        >>> def losses(params, x):
        ...     return x @ params["w"]
        >>> params, out = {"w": torch.zeros(2)}, tempfile.mkdtemp()
        >>> kept = corpus.score(losses, params, data, {"sketch": fg.project(16)}, out).corpus
        >>> near = kept.nearest(kept.vector(1), 2)
        >>> corpus.rescore(losses, params, data, fg.dot({"w": data[1]}), near).values.tolist()
        [25.0, 11.0]
    """
    if shortlist.positions.ndim != 1:
        raise InputError("shortlist: must be of one query: take a row of each of its arrays.")
    source = source_of(data, Cutting(batch_size, max(1, len(shortlist.positions)), collate, None, length))
    if not isinstance(source, Samples):
        raise InputError("data: must be a data set with positions, of which the shortlist can be taken.")
    positions = [int(position) for position in shortlist.positions]
    if positions and max(positions) >= (source.total or 0):
        raise InputError(
            f"data: have {source.total} samples, fewer than the position {max(positions)} of the shortlist."
        )
    value = reduce(losses, options=options)
    exact = np.full(len(positions), np.nan)
    for loaded in source.cutting.batches(lambda rows: source.take([positions[row] for row in rows]), len(positions)):
        found = value(params, loaded.batch, reducer)
        if getattr(found, "shape", None) != (len(loaded.rows),):
            raise InputError(
                f"reducer: must give a number for each sample, [b], found {getattr(found, 'shape', found)}."
            )
        exact[loaded.rows] = found.detach().cpu().double().numpy()
    order = np.argsort(-exact, kind="stable")
    return Hits(shortlist.ids[order], shortlist.positions[order], exact[order])
