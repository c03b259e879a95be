"""Random small programs: models put together from the ways in which parameters meet ops in the wild."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Params = dict[str, Tensor]
Apply = Callable[[Params, Tensor], Tensor]

LAYOUTS = ("sample first", "sequence first", "sample-major rows", "token-major rows")


@dataclass
class Shape:
    batch: int
    length: int
    width: int
    layout: str

    def enter(self, x: Tensor) -> Tensor:
        """From [b, t, d] to the layout of the program."""
        if self.layout in ("sequence first", "token-major rows"):
            x = x.transpose(0, 1)
        return x.reshape(-1, x.shape[-1]) if "rows" in self.layout else x

    def leave(self, h: Tensor, x: Tensor) -> Tensor:
        """Back to [b, ...], one row per sample."""
        b, t = x.shape[:2]
        if "rows" in self.layout:
            h = h.unflatten(0, (b, t) if self.layout == "sample-major rows" else (t, b))
        if self.layout in ("sequence first", "token-major rows"):
            h = h.transpose(0, 1)
        return h

    def sample_axis_mean(self, h: Tensor, x: Tensor) -> Tensor:
        """The mean over the samples, broadcast back: mixes them."""
        y = self.leave(h, x)
        return self.enter((y.mean(0, keepdim=True) + torch.zeros_like(y)) if len(y) else y)


@dataclass
class Program:
    """A loss made of blocks; `features` names what is in it."""

    shape: Shape
    params: Params
    blocks: list[Callable[[Params, Tensor, Tensor], Tensor]]
    features: set[str] = field(default_factory=set)

    @property
    def mixes(self) -> bool:
        return bool(self.features & {"mix", "batch_norm"})

    def losses(self, params: Params, batch: dict[str, Tensor]) -> Tensor:
        x = batch["x"]
        h = self.shape.enter(x)
        for block in self.blocks:
            h = block(params, h, x)
        return self.shape.leave(h, x).flatten(1).sin().sum(1)

    def batch(self, size: int | None = None, length: int | None = None, seed: int = 0) -> dict[str, Tensor]:
        s = self.shape
        generator = torch.Generator().manual_seed(seed)
        shape = (s.batch if size is None else size, s.length if length is None else length, s.width)
        return {"x": torch.randn(shape, generator=generator, dtype=torch.float64)}

    def direction(self, seed: int = 1) -> Params:
        generator = torch.Generator().manual_seed(seed)
        return {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in self.params.items()}


def _flat(h: Tensor) -> Tensor:
    return h.reshape(-1, h.shape[-1])


def _inplace(w: Tensor, b: Tensor, h: Tensor) -> Tensor:
    y = h @ w
    y.add_(b)
    return y.tanh_()


def _into_zeros(b: Tensor, h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y[..., 0] = h[..., 0] * b[0]
    y[...] = y + b
    return y


def _gathered(w: Tensor, h: Tensor) -> Tensor:
    rows = _flat(h)
    order = torch.arange(len(rows)).flip(0)
    moved = F.linear(rows[order], w)
    return torch.zeros_like(rows).index_add(0, order, moved).view(h.shape)


def _scattered(w: Tensor, h: Tensor) -> Tensor:
    """A mixture of two experts: rows are gathered for each, and added back in place."""
    rows = _flat(h)
    out = torch.zeros_like(rows)
    for expert, chosen in enumerate((rows.sum(1) > 0, rows.sum(1) <= 0)):
        index = chosen.nonzero().squeeze(1)
        out.index_add_(0, index, torch.tanh(rows[index] @ w[expert]))
    return out.view(h.shape)


def _no_grad(w: Tensor, h: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(h @ w)
    return gate * (h @ w) + h @ w.detach()


def _partly_frozen(w: Tensor, h: Tensor) -> Tensor:
    mask = torch.ones(w.shape[-1], dtype=w.dtype)
    mask[0] = 0.0
    return h @ (w * mask)


def _weight_norm(v: Tensor, g: Tensor, h: Tensor) -> Tensor:
    return F.linear(h, g.unsqueeze(1) * v / v.norm(dim=1, keepdim=True))


def _attention(w: Tensor, h: Tensor, shape: Shape, x: Tensor) -> Tensor:
    q, k, v = shape.leave(h @ w, x).chunk(3, -1)
    return shape.enter(F.scaled_dot_product_attention(q, k, v))


def _batch_norm(g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    rows = _flat(h)
    if len(rows) < 2:
        return h * g + b
    mean, variance = torch.zeros(rows.shape[1], dtype=h.dtype), torch.ones(rows.shape[1], dtype=h.dtype)
    return F.batch_norm(rows, mean, variance, g, b, training=True, eps=0.1).view(h.shape)


W, B1, B2 = ("d", "d"), ("d",), ("d",)
BLOCKS: dict[str, tuple[tuple[tuple[str | int, ...], ...], Callable[..., Tensor]]] = {
    "linear": ((W, B1), lambda w, b, h: F.linear(h, w, b).tanh()),
    "matmul": ((W,), lambda w, h: torch.matmul(h, w)),
    "addmm": ((W, B1), lambda w, b, h: torch.addmm(b, _flat(h), w).view(h.shape)),
    "einsum": ((W,), lambda w, h: torch.einsum("...d,pd->...p", h, w)),
    "norm": ((B1, B2), lambda g, b, h: F.layer_norm(h, (h.shape[-1],), g, b, 0.1) + 0.5 * h),
    "rms": ((B1,), lambda g, h: F.rms_norm(h, (h.shape[-1],), g, 0.1) + 0.5 * h),
    "scale": ((B1,), lambda s, h: s * h),
    "shift": ((B1,), lambda b, h: b - h),
    "scalar": (((),), lambda s, h: h * s),
    "no rule": ((B1, B2), lambda a, b, h: torch.addcmul(h, torch.sin(h), a) / (1 + b.square())),
    "prelu": (((1,),), lambda a, h: F.prelu(h, a)),
    "transposed": ((W,), lambda w, h: h @ w.T),
    "cat": (((1, "d"), W), lambda a, b, h: h @ torch.cat([a, b])[1:].t().contiguous()),
    "merged": ((W, ("d", 1), (1, "d")), lambda w, b, a, h: F.linear(h, w + b @ a)),
    "weight norm": ((W, B1), _weight_norm),
    "in place": ((W, B1), _inplace),
    "into zeros": ((B1,), _into_zeros),
    "gathered": ((W,), _gathered),
    "experts": (((2, "d", "d"),), _scattered),
    "no grad": ((W,), _no_grad),
    "partly frozen": ((W,), _partly_frozen),
    "reused": ((W,), lambda w, h: torch.tanh(h @ w) @ w),
    "decay": ((W,), lambda w, h: h @ w + 0.1 * w.square().sum()),
    "gated": ((("d", "2d"),), lambda w, h: (lambda a, b: a * torch.sigmoid(b))(*(h @ w).chunk(2, -1))),
    "batch_norm": ((B1, B2), _batch_norm),
}
SHAPED = ("mix", "attention", "tied")


@st.composite
def programs(draw: st.DrawFn, empty: bool = True, blocks: tuple[str, ...] = (*BLOCKS, *SHAPED)) -> Program:
    """Programs of one to four blocks; with `empty`, batches without samples as well."""
    shape = Shape(
        batch=draw(st.integers(0 if empty else 1, 4)),
        length=draw(st.integers(1, 4)),
        width=draw(st.integers(1, 4)),
        layout=draw(st.sampled_from(LAYOUTS)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    program = Program(shape, {}, [], {shape.layout})
    names = draw(st.lists(st.sampled_from(blocks), min_size=1, max_size=4))
    for name in names:
        _add(program, name, generator)
    program.features |= {
        *({"t = b"} if shape.batch == shape.length > 1 else ()),
        *({"t = 1"} if shape.length == 1 else ()),
        *({"d = 1"} if shape.width == 1 else ()),
        *({f"b = {shape.batch}"} if shape.batch < 2 else ()),
    }
    return program


def _add(program: Program, name: str, generator: torch.Generator) -> None:
    def parameter(*sizes: str | int) -> str:
        width = program.shape.width
        named = {"d": width, "2d": 2 * width, "3d": 3 * width}
        dims = [named[s] if isinstance(s, str) else s for s in sizes]
        key = f"{len(program.params)}.{name}"
        program.params[key] = torch.randn(dims, generator=generator, dtype=torch.float64) * 0.7
        return key

    shape = program.shape
    program.features.add(name)
    if name == "tied":
        square = [k for k, p in program.params.items() if p.shape == (shape.width, shape.width)]
        key = square[0] if square else parameter("d", "d")
        program.blocks.append(lambda p, h, x: torch.tanh(h) @ p[key].T)
    elif name == "mix":
        key = parameter("d")
        program.blocks.append(lambda p, h, x: h - p[key] * shape.sample_axis_mean(h, x))
    elif name == "attention":
        key = parameter("d", "3d")
        program.blocks.append(lambda p, h, x: _attention(p[key], h, shape, x))
    else:
        sizes, apply = BLOCKS[name]
        keys = [parameter(*size) for size in sizes]
        program.blocks.append(lambda p, h, x: apply(*(p[k] for k in keys), h))


FEATURES = {*BLOCKS, *SHAPED, *LAYOUTS, "t = b", "t = 1", "d = 1", "b = 0", "b = 1"}
