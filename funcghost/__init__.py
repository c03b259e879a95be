"""Exact per-sample gradient inner products from one backward pass, as pure functions.

You write `losses(params, batch)`, which gives one loss per sample, and get functions back:

    >>> import torch, funcghost as fg
    >>> model = torch.nn.Linear(2, 1)
    >>> losses = fg.module_losses(model, lambda output, batch: output.square().sum(1))
    >>> params, batch = fg.trainable(model), torch.randn(4, 2)
    >>> step = fg.grad_and_reduce(losses)
    >>> out = step(params, batch, {"norm": fg.squared_norm(), "similar": fg.gram()})
    >>> out.grads["weight"].shape, out.reduced["norm"].shape, out.reduced["similar"].shape
    (torch.Size([1, 2]), torch.Size([4]), torch.Size([4, 4]))

`help(fg.dot)` and so on give equation, shapes, cost, errors, an example and the source.

Losses
    module_losses           of a module and a criterion
    per_example             of a batch, from the loss of one example
    trainable               the parameters of a module that are not frozen
    functional              linear_cross_entropy: a head without its logits
    checkpoint_context      for torch.utils.checkpoint

Transforms of losses
    grad_and_reduce         training gradient, losses and reduced values (a Step)
    reduce                  reduced values alone
    pairs                   every sample's gradient in factored form (Pairs)
    plan                    what is done at each use of a parameter (a Plan)
    check                   all of it against a backward per sample (a Report)
    Options                 when to verify, memory, routes, precision
    register_rule           states that an op is linear in some arguments

Reducers, for a step or over pairs
    dot                     [b], inner products with a direction; [b, k] with several
    squared_norm, gram      [b], [b, b], norms and inner products of gradients
    cross                   [b - v, v], training against validation samples
    project                 [b, dim], random projections
    per_param               a result for each parameter
    per_token, per_segment  [b, t], [b, s], terms by position, by packed document
    Directional, Additive   to derive one's own Reducer from

Directions
    stack                   several directions as one
    compress, track         of low rank (LowRank), once and from step to step
    Kronecker               a metric for norms and products

Over pairs
    apply                   a reducer
    cross_dots, cosine      products of two sets of samples
    combine                 sum of weighted gradients
    materialize             the gradients themselves

Errors, all of them GhostError
    InputError, UnsupportedOpError, ConservationError, SampleAxisError, MemoryBudgetError, PlanError, CheckError,
    RankError, ReplayError, StoreError, VersionError

Packages on top, each with a docstring that says where to start
    attribution             in-run values, TracIn, EK-FAC influence, TRAK, LESS, unrolled, pruning
    training                clipping, weighting, selection, geometry of a batch, optimizers as functions
    corpus, store           a data set scored onto disk; values of a run (extra `store`)
    distributed             many processes
    evaluation              retraining, LDS, detection, recall
    plots                   figures, and a page of a store (extra `plots`)
    testing                 the laws, for your own models, reducers and rules (extra `testing`)
"""

# Names are imported as themselves, and there is no __all__: with one, `help(funcghost)` prints the documentation of
# every name in full, some two thousand lines. `from funcghost import *` is not for use.
from funcghost import functional as functional
from funcghost._version import __version__ as __version__
from funcghost.algebra.compression import compress as compress
from funcghost.algebra.directions import (
    LowRank as LowRank,
)
from funcghost.algebra.directions import (
    stack as stack,
)
from funcghost.algebra.metric import Kronecker as Kronecker
from funcghost.algebra.pair_algebra import (
    combine as combine,
)
from funcghost.algebra.pair_algebra import (
    cosine as cosine,
)
from funcghost.algebra.pair_algebra import (
    cross_dots as cross_dots,
)
from funcghost.algebra.pair_algebra import (
    materialize as materialize,
)
from funcghost.algebra.pairs import Pairs as Pairs
from funcghost.algebra.tracking import track as track
from funcghost.checking.checker import check as check
from funcghost.checking.report import Report as Report
from funcghost.engine.checkpoints import checkpoint_context as checkpoint_context
from funcghost.engine.plans import Plan as Plan
from funcghost.errors import (
    CheckError as CheckError,
)
from funcghost.errors import (
    ConservationError as ConservationError,
)
from funcghost.errors import (
    GhostError as GhostError,
)
from funcghost.errors import (
    InputError as InputError,
)
from funcghost.errors import (
    MemoryBudgetError as MemoryBudgetError,
)
from funcghost.errors import (
    PlanError as PlanError,
)
from funcghost.errors import (
    RankError as RankError,
)
from funcghost.errors import (
    ReplayError as ReplayError,
)
from funcghost.errors import (
    SampleAxisError as SampleAxisError,
)
from funcghost.errors import (
    StoreError as StoreError,
)
from funcghost.errors import (
    UnsupportedOpError as UnsupportedOpError,
)
from funcghost.errors import (
    VersionError as VersionError,
)
from funcghost.losses.examples import per_example as per_example
from funcghost.losses.modules import (
    module_losses as module_losses,
)
from funcghost.losses.modules import (
    trainable as trainable,
)
from funcghost.ops.rules import register_rule as register_rule
from funcghost.options import Options as Options
from funcghost.reducers.bases import (
    Additive as Additive,
)
from funcghost.reducers.bases import (
    Directional as Directional,
)
from funcghost.reducers.bases import (
    Reducer as Reducer,
)
from funcghost.reducers.by_parameter import per_param as per_param
from funcghost.reducers.dots import dot as dot
from funcghost.reducers.positions import (
    per_segment as per_segment,
)
from funcghost.reducers.positions import (
    per_token as per_token,
)
from funcghost.reducers.projections import project as project
from funcghost.reducers.quadratic import (
    cross as cross,
)
from funcghost.reducers.quadratic import (
    gram as gram,
)
from funcghost.reducers.quadratic import (
    squared_norm as squared_norm,
)
from funcghost.transforms.halves import (
    apply as apply,
)
from funcghost.transforms.halves import (
    plan as plan,
)
from funcghost.transforms.steps import Step as Step
from funcghost.transforms.steps import (
    grad_and_reduce as grad_and_reduce,
)
from funcghost.transforms.steps import (
    pairs as pairs,
)
from funcghost.transforms.steps import (
    reduce as reduce,
)
