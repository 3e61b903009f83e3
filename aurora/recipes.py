"""Where training starts, what is penalised and at what pace it goes, where that is not the paper's.

A start from the gradient, for a model with adapters, before training:

    with aurora.start_from_gradient(model):
        for batch in a_few_batches:
            loss(model, batch).backward()

Shapes: T tokens (rows of a layer's input), r rank, q <= r directions with signal, G grid cells,
k spline order. What each recipe brings was measured: docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from aurora import core

if TYPE_CHECKING:
    from typing_extensions import Unpack

# --- The recommended options ----------------------------------------------------------------------


def recommended(rank: int = 2, **options: Unpack[core.Options]) -> core.AuroraConfig:
    """The options we recommend: splines per channel on a wide grid, starting as LoRA.

    Args:
        rank: r, the width of the hidden vector.
        **options: Options of `AuroraConfig` that shall differ.

    Returns:
        A configuration for `aurora.inject`. Train it with `aurora.parameter_groups`.

    Raises:
        ValueError: For a bad option.

    Example:
        aurora.inject(model, r"(query|value)$", aurora.recommended(rank=2))

    Source: docs/benchmarks.md, where it is measured against the paper's setting and LoRA.
    """
    base = core.AuroraConfig(rank, spline="per-channel", grid_range=(-4.0, 4.0), init="identity")
    return dataclasses.replace(base, **options)


# --- The start from the gradient -----------------------------------------------------------------

_Starts = dict[str, list[tuple[nn.Parameter, Tensor]]]  # layer -> (parameter, value)


@contextlib.contextmanager
def start_from_gradient(
    model: nn.Module, *, ridge: float | None = None, chunk: int | None = None
) -> Iterator[Iterable[tuple[str, ...]]]:
    """Let the loss choose where adapters start: run forward and backward on a few batches inside.

    Any loop and any loss will do, padded or not, under autocast, checkpointing, gradient
    accumulation, DDP or FSDP2; no optimizer step is needed. For every adapted layer the block sums
    up, over the tokens x that the loss depends on and the gradients delta of the loss with respect
    to the layer's output there,

        G = sum delta x^T (out, in)    and    C = mean x x^T (in, in),

    and on leaving sets A to the r linear features of x that best predict delta: the leading right
    singular vectors of `G C_l^(-1/2)`, times `C_l^(-1/2)`, with `C_l = C + ridge mean(diag C) I`
    (docs/theory.md). With trained projections each row gets the size `rms(a x)^2 = mean(diag C)/3`
    that a drawn one has on average, and B stays 0. With `projections="fixed"` hidden values are
    whitened, `E z z^T = I` up to the ridge, and the columns of B are the directions of the output
    that belong to them, orthonormal. Either way the model's outputs stay as they are, bit for bit,
    and so do the parameters' gradients. Rows for which the data hold no signal keep their draw.

    Beside a layer this takes `in (in + out)` numbers in float32. Where memory is short, `chunk`
    looks at so many layers at a time, and the loop is run once for each part:

        with aurora.start_from_gradient(model, chunk=16) as parts:
            for _ in parts:
                for batch in a_few_batches: loss(model, batch).backward()

    A token counts unless its delta is 0 throughout, as at padding. Batches should suffice to tell
    directions apart: more tokens than a layer is wide. A new head may learn meanwhile, from an
    optimizer of its own. A compiled model runs uncompiled inside the block. In a process group all
    ranks must take part; their sums are added up.

    Args:
        model: One with adapters that have not been trained; its gradients may be scaled.
        ridge: What is added to C, in units of the mean of its diagonal. The fewer the data and the
            higher the rank, the more of the directions is noise. None means 0.01, and 1 between
            fixed projections, which was better there (docs/benchmarks.md); with less than some
            hundred samples, try 1 elsewhere too.
        chunk: Layers to look at in one pass over the loop; all if None.

    Yields:
        The parts, each the names of its layers; only `chunk` calls for a loop over them.

    Raises:
        ValueError: The model has no adapters; one has been trained already; `ridge` or `chunk` is
            not above 0; no backward pass reached an adapter; NaN or infinity was met; the loop over
            the parts was left early. The model is then as it was.

    Source: reduced-rank regression (Izenman 1975) of delta on x. LoRA-GA (arXiv:2407.05000) and
    LoRA-SB (arXiv:2411.19557) start from G alone.
    """
    found = core.layers(model)
    _check_start(found, ridge, chunk)
    with core.unchanged_on_error(model), _gradients_aside(model), _uncompiled():
        starts: _Starts = {}
        if chunk is None:
            with _looking(found, ridge, starts):
                yield [tuple(found)]
        else:
            parts = _in_parts(found, chunk, ridge, starts)
            try:
                yield parts
            finally:
                parts.close()
        if missing := [name for name in found if name not in starts]:
            raise ValueError(f"chunk= needs a whole `for _ in parts:`; not looked at: {missing[0]}")
        changes = list(itertools.chain.from_iterable(starts.values()))
        _write(model, changes)


def _check_start(
    found: Mapping[str, core.AuroraLinear], ridge: float | None, chunk: int | None
) -> None:
    """Raise ValueError for options that make no sense and for adapters that already compute."""
    if ridge is not None and not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be finite and above 0, got {ridge!r}")
    if chunk is not None and (type(chunk) is not int or chunk < 1):
        raise ValueError(f"chunk must be an int of at least 1, or None, got {chunk!r}")
    _check_untrained(found, "start from the gradient")


def _check_untrained(found: Mapping[str, core.AuroraLinear], what: str) -> None:
    """Raise ValueError for adapters that already compute."""
    for name, layer in found.items():
        zero = layer.anl.parameters() if _fixed(layer) else [layer.B]
        if any(not p.is_meta and bool(_local(p).any()) for p in zero):
            raise ValueError(f"{name} has been trained already: {what} right after inject")


def _fixed(layer: core.AuroraLinear) -> bool:
    """Whether the projections stay as they are set, and only the nonlinear layer trains."""
    return bool(layer.config.projections == "fixed")


def _in_parts(
    found: Mapping[str, core.AuroraLinear], size: int, ridge: float | None, starts: _Starts
) -> Generator[tuple[str, ...], None, None]:
    """Look at so many layers at a time, while the caller runs the loop once for each part."""
    names = list(found)
    for at in range(0, len(names), size):
        part = {name: found[name] for name in names[at : at + size]}
        with _looking(part, ridge, starts):
            yield tuple(part)


@contextlib.contextmanager
def _looking(
    part: Mapping[str, core.AuroraLinear], ridge: float | None, starts: _Starts
) -> Iterator[None]:
    """Collect moments inside the block; on leaving, solve layer by layer and free each one's."""
    moments = {name: _Moments(layer) for name, layer in part.items()}
    try:
        with contextlib.ExitStack() as hooks:
            for name, layer in part.items():
                hook = layer.register_forward_hook(moments[name].watch, with_kwargs=True)
                hooks.callback(hook.remove)
            yield
        _reduce(moments.values())
        unseen = [name for name, moment in moments.items() if not moment.passes]
        if len(unseen) == len(part):
            raise ValueError(
                f"no backward pass reached {unseen[0]}: call loss.backward() in the block"
            )
        if unseen:
            told = f"{unseen[0]} and {len(unseen) - 1} more" if unseen[1:] else unseen[0]
            warnings.warn(f"no backward pass reached {told}: A stays as drawn there", stacklevel=5)
        for name, moment in moments.items():
            starts[name] = moment.solve(name, ridge)
            moment.close()
    finally:
        for moment in moments.values():
            moment.close()


class _Moments:
    """Sums over one layer's tokens, filled on the way back: G (out, in), C (in, in), count."""

    def __init__(self, layer: core.AuroraLinear) -> None:
        self.layer, self.open, self.passes = layer, True, 0
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None

    def watch(
        self, _: nn.Module, args: Any, named: Mapping[str, Any], out: Tensor
    ) -> Tensor | None:
        """Forward hook: let the output pass through `_Look`."""
        if (
            not out.requires_grad
        ):  # nothing will come back: evaluation, or a checkpoint's first pass
            return None
        x = args[0] if args else next(iter(named.values()))
        looked: Tensor = _Look.apply(out, x, self)  # type: ignore[no-untyped-call]
        return looked

    def allocate(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, 0 before the first token."""
        if self.sums is None:
            n_out, n_in, like = self.layer.out_features, self.layer.in_features, self.layer.A
            make: Any = {"dtype": core.wide_dtype(like), "device": like.device}
            G, C = torch.zeros(n_out, n_in, **make), torch.zeros(n_in, n_in, **make)
            self.sums = G, C, torch.zeros((), dtype=torch.int64, device=like.device)
        return self.sums

    @torch.no_grad()
    def add(self, x: Tensor, delta: Tensor) -> None:
        """Count the tokens x (..., in) with gradients delta (..., out)."""
        if not self.open:
            return
        G, C, count = self.allocate()
        self.passes += 1
        with core.full_precision(x):
            delta = delta.reshape(-1, len(G)).to(G)  # (T, out)
            idle = (delta == 0).all(1)  # (T,); masked, not dropped, as a GPU would have to wait
            x = x.reshape(-1, len(C)).to(G).masked_fill(idle.unsqueeze(1), 0)  # (T, in)
            G.addmm_(delta.t(), x)
            C.addmm_(x.t(), x)
            count += (~idle).sum()

    def close(self) -> None:
        """Free the sums; a graph that the caller keeps may still know this object."""
        self.open, self.sums = False, None

    @torch.no_grad()
    def solve(self, name: str, ridge: float | None) -> list[tuple[nn.Parameter, Tensor]]:
        """The layer's start, as (parameter, value). Raises ValueError if NaN or infinity was met.

        Rows without signal keep their draw; between fixed projections they are made uncorrelated
        with the others, and as large.
        """
        if ridge is None:
            ridge = 1.0 if _fixed(self.layer) else 1e-2
        G, C, count = self.allocate()
        if not bool(G.isfinite().all() & C.isfinite().all()):
            cure = "if the loss is scaled, scale it less"
            raise ValueError(f"NaN or infinity in the input or gradient of {name}; {cure}")
        C /= count.clamp(min=1).to(C)
        narrow = max(self.layer.in_features, self.layer.out_features) <= _CHEAP
        wide = torch.float64 if narrow and C.device.type != "mps" else C.dtype
        G, C = G.to(wide), C.to(wide)
        mean = C.diagonal().mean()
        C.diagonal().add_(ridge * mean)  # C_l from here on; C itself is not kept beside it
        with core.full_precision(C):  # the block may be left under autocast
            A, U = _regress(G, C, self.layer.config.rank)
            size = 1.0 if _fixed(self.layer) else mean / 3
            A = _rescaled(A, C, ridge * mean, size)
            rest = _whole(self.layer.A).to(A)[len(A) :]  # (r - q, in)
            if not _fixed(self.layer):
                return [(self.layer.A, torch.cat([A, rest]))]
            rest = _rescaled(rest - (rest @ C) @ A.t() @ A, C, 0.0, size)
            B = _completed(U, _whole(self.layer.B).to(U))
            return [(self.layer.A, torch.cat([A, rest])), (self.layer.B, B)]


class _Look(torch.autograd.Function):
    """The identity; on the way back it shows a layer's input and the gradient of its output.

    The input is saved as autograd saves, so that checkpointing drops and recomputes it, and a token
    that is computed twice comes back once.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, moments: _Moments) -> Tensor:
        ctx.moments = moments
        ctx.save_for_backward(x)
        return out.clone()  # a view could not be changed in place by what follows

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None, None]:
        ctx.moments.add(ctx.saved_tensors[0], delta)
        return delta, None, None


def _reduce(moments: Iterable[_Moments]) -> None:
    """Add up the sums of all ranks, so that all start at the same A."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for moment in moments:
        passes = torch.tensor(moment.passes, device=moment.layer.A.device)
        for total in (*moment.allocate(), passes):
            torch.distributed.all_reduce(total)
        moment.passes = int(passes)


# --- Its linear algebra --------------------------------------------------------------------------

_CHEAP = 1536  # widths up to which float64 and all eigenvectors cost next to nothing


def _regress(G: Tensor, C_l: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A (q, in), U (out, q)): at most `rank` directions with signal, strongest first.

    With `L L^T = C_l`, M = L^-1 G^T has `M^T M = G C_l^-1 G^T`, whose eigenvectors are U, and A is
    `U^T G C_l^-1` up to the scale of its rows.
    """
    if not (bool(C_l.any()) and bool(G.any())):
        return G.new_zeros(0, C_l.shape[0]), G.new_zeros(G.shape[0], 0)
    L, failed = torch.linalg.cholesky_ex(C_l)
    if failed:  # float32 was not enough
        L = torch.linalg.cholesky(C_l.double()).to(C_l)
    M = torch.linalg.solve_triangular(L, G.t() / G.abs().max(), upper=False)  # (in, out)
    strength, U = _leading(M, min(rank, *G.shape))
    noise = max(1e-5, 1e2 * torch.finfo(M.dtype).eps * max(1.0, len(M) ** 0.5))
    U = U[:, strength > noise * strength[0]]
    A = torch.linalg.solve_triangular(L.t(), M @ U, upper=True).t()  # (q, in)
    # An eigenvector's sign is anyone's: let the largest entry of every row of A be positive.
    sign = A.gather(1, A.abs().argmax(1, keepdim=True)).sign()  # (q, 1)
    return A * sign, U * sign.t()


def _leading(M: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(singular values (count,), right singular vectors (n, count)) of M (m, n), largest first."""
    if min(M.shape) <= _CHEAP:
        tall = M.shape[0] >= M.shape[1]
        values, vectors = torch.linalg.eigh(M.t() @ M if tall else M @ M.t())  # rising
        strength = values.flip(0)[:count].clamp(min=0).sqrt()
        vectors = vectors.flip(1)[:, :count]
        V = vectors if tall else M.t() @ vectors / strength.clamp(min=torch.finfo(M.dtype).tiny)
        return strength, V
    # Subspace iteration from a fixed draw, with room beside what is wanted.
    width = min(2 * count + 16, *M.shape)
    draw = torch.randn(M.shape[1], width, generator=torch.Generator().manual_seed(0))
    Q = torch.linalg.qr(draw.to(M))[0]  # (n, width)
    for _ in range(20):
        Q = torch.linalg.qr(M.t() @ (M @ Q))[0]
    _, strength, Vh = torch.linalg.svd(M @ Q, full_matrices=False)
    return strength[:count], Q @ Vh[:count].t()


def _rescaled(A: Tensor, C_l: Tensor, ridge: Tensor | float, size: Tensor | float) -> Tensor:
    """Rows (q, in) scaled to E z_j^2 = `size` under C = C_l - ridge I; rows without any stay."""
    now = ((A @ C_l) * A).sum(1, keepdim=True) - ridge * A.square().sum(1, keepdim=True)  # (q, 1)
    return torch.where(now > 0, A * (size / now).sqrt(), A)


def _completed(U: Tensor, B: Tensor) -> Tensor:
    """B (out, r) with its first columns replaced by U (out, q), the others orthonormal to them."""
    q = U.shape[1]
    Q = torch.linalg.qr(torch.cat([U, B[:, : B.shape[1] - q]], 1))[0]  # (out, min(out, r))
    return torch.cat([U, Q[:, q:], B[:, Q.shape[1] :]], 1)


def _local(p: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is."""
    return p.to_local() if hasattr(p, "to_local") else p


def _whole(p: Tensor) -> Tensor:
    """All of a tensor, also of a sharded one."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p.detach()


@torch.no_grad()
def _write(model: nn.Module, changes: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Give parameters of the model their values, all or none."""
    with core.unchanged_on_error(model, [p for p, _ in changes]):
        for p, value in changes:
            p.copy_(_placed(value, p))


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """The value in the dtype and sharding of `like`. In a process group rank 0 decides."""
    value = value.to(device=like.device, dtype=like.dtype).contiguous()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(value, src=0)
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value, like.device_mesh, like.placements)


@contextlib.contextmanager
def _gradients_aside(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter has a gradient; afterwards each has the one it had."""
    before = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.grad = None
        yield
    finally:
        for p, grad in before:
            p.grad = grad


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled code knows nothing of hooks that came later; inside, models run as written."""
    stance: Callable[..., Any] | None = getattr(torch.compiler, "set_stance", None)
    if stance is None or "torch._dynamo" not in sys.modules:  # whose import takes seconds
        yield
    else:
        with stance("force_eager"):
            yield


# --- Other starts, penalties and rates -----------------------------------------------------------


def roughness(model: nn.Module) -> Tensor:
    """How much the splines bend: a differentiable scalar to add to the loss, 0 for straight lines.

    For every adapted layer the mean, over its r channels and G + k - 2 places, of the squared
    second difference of the spline weights, `(w[j, g] - 2 w[j, g + 1] + w[j, g + 2])^2`, summed
    over the layers. It is the discrete form of the integral of the squared second derivative: with
    knot spacing h, `S_j'' = sum_g (second difference g) / h^2 B_g` with B-splines of two orders
    less (docs/theory.md). Times 0.01 is a good weight for small data.

    Args:
        model: One with adapters that have splines.

    Returns:
        A scalar in the dtype of the spline weights, float32 at least, on the device of the first.

    Raises:
        ValueError: The model has no adapters, or none with splines.

    Source: P-splines, Eilers and Marx 1996.

    Example:
        loss = loss_of(model, batch) + 0.01 * aurora.roughness(model)
    """
    found = [layer.anl.spline_weight for layer in core.layers(model).values()]
    weights = [w.to(core.wide_dtype(w)) for w in found if w is not None]
    if not weights:
        raise ValueError("no adapter has splines (learnable=False), so that none can be rough")
    bends = [w.diff(n=2, dim=1).square() for w in weights]
    return sum(
        (b.mean().to(weights[0].device) for b in bends if b.numel()), weights[0].new_zeros(())
    )


def lasso(model: nn.Module) -> Tensor:
    """How many inputs and channels the adapters use: a differentiable scalar to add to the loss.

    For every adapted layer the sum of |a| over A, plus the sum of the norms of B's columns. It lets
    go of channels that are not needed, and turns the axes of splines per channel towards single
    inputs, so that a generous rank costs little. It is meant for standardised inputs; 1e-3 is a
    good first weight where labels hold little noise, beside 3e-4 to 3e-3 for `roughness`.

    Args:
        model: One with adapters.

    Returns:
        A scalar, float32 at least, on the device of the first layer.

    Raises:
        ValueError: The model has no adapters.

    Source: Tibshirani 1996; for columns the group lasso, Yuan and Lin 2006. Measured:
    docs/benchmarks.md, "Where the curve pays".

    Example:
        loss = loss_of(model, batch) + 1e-3 * aurora.lasso(model)
    """
    sizes = []
    for layer in core.layers(model).values():
        A, B = (p.to(core.wide_dtype(p)) for p in (layer.A, layer.B))
        sizes.append(A.abs().sum() + torch.linalg.vector_norm(B, dim=0).sum())
    return torch.stack([size.to(sizes[0].device) for size in sizes]).sum()


@torch.no_grad()
def rotate(model: nn.Module, seed: int) -> None:
    """Start elsewhere: rotate the rows of every A among themselves.

    What the rows span, and the outputs, stay. Splines per channel bend along single rows, and from
    one start training may end at axes that are not the world's: train several, from this and other
    seeds, and keep the one that held-out examples like best.

    Args:
        model: One with adapters that have not been trained.
        seed: Of the rotations, an int.

    Raises:
        ValueError: The model has no adapters, or one has been trained already; `seed` is no int.

    Source: ours, measured in docs/benchmarks.md, "Where the curve pays".

    Example:
        aurora.inject(model, "^0$", 4, aurora.recommended(rank=4))
        aurora.rotate(model, seed=1)
    """
    found = core.layers(model)
    if type(seed) is not int:
        raise ValueError(f"seed must be an int, got {seed!r}")
    _check_untrained(found, "rotate")
    draw, changes = torch.Generator().manual_seed(seed), []
    for layer in found.values():
        A = _whole(layer.A)
        turn = torch.linalg.qr(torch.randn(len(A), len(A), generator=draw))[0]  # (r, r)
        wide = A.to(core.wide_dtype(A))
        changes.append((layer.A, turn.to(wide) @ wide))
    _write(model, changes)


@torch.no_grad()
def start_as_identity(model: nn.Module) -> None:
    """Let every adapter start as LoRA: sigma(z) = z inside the grid.

    Call it after `inject`, before training. H becomes 0 and spline weight g of every channel its
    place `low + (g - (k - 1) / 2) h`, less what F then is (0, or 1/2 with "sigmoid"), for which
    sigma is the identity on the grid range (docs/theory.md, section 6). The output stays the
    base's, bit for bit, as B is 0.

    Args:
        model: One with adapters that have splines per channel and have not been trained.

    Raises:
        ValueError: The model has no adapters, or a layer has no splines per channel or has been
            trained already (its B is not 0). The model is then as it was.
    """
    found = core.layers(model)
    for name, layer in found.items():
        if layer.config.spline != "per-channel" or not layer.config.learnable:
            cure = 'inject with spline="per-channel", learnable=True'
            raise ValueError(f"{name} has no spline per channel: {cure}")
        if not layer.B.is_meta and layer.B.any():
            cure = "layer.reset_parameters() would start afresh"
            raise ValueError(f"{name} has been trained already; {cure}")
    own = itertools.chain.from_iterable(layer.anl.parameters() for layer in found.values())
    with core.unchanged_on_error(model, own):
        for layer in found.values():
            layer.anl.start_as_identity()


def parameter_groups(
    model: nn.Module, lr: float | None = None, factor: float = 10.0
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer: the nonlinear layers at a rate and decay of their own.

    H and the spline weights train at `factor * lr` without weight decay, which would pull them away
    from the identity; all else that trains does so at `lr`. Between fixed projections, where they
    are the whole adapter, they train at `lr`. Together the groups hold every parameter of
    `aurora.parameters(model)` once.

    Args:
        model: One with adapters.
        lr: The learning rate of A, B and whatever `train=` kept, as one would choose it for LoRA.
            None means `8e-3 / sqrt(rank)`, or `0.1 / rank` with fixed projections, the least over
            the layers. Over 150 steps that was within a factor of 1.6 of the best rate for LoRA and
            the recommended setting of ranks 1 to 16, and for fixed projections of ranks 8 to 64
            (docs/benchmarks.md). Longer runs want less, the paper's setting up to twice as much.
        factor: At 1, H and the spline weights, which are not as small as the entries of A and B,
            hardly move in a short fine-tuning.

    Returns:
        Dictionaries with "params" and "lr", for the nonlinear layers also "weight_decay".

    Raises:
        ValueError: The model has no adapters, or `lr` or `factor` is not finite and above 0.
    """
    found = core.layers(model).values()
    if lr is None:
        lr = min(_rate(layer) for layer in found)
    for name, value in (("lr", lr), ("factor", factor)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    rates: dict[nn.Parameter, float] = {}
    for layer in found:
        rates |= dict.fromkeys(layer.anl.parameters(), lr if _fixed(layer) else factor * lr)
    others = [p for p in core.parameters(model) if p not in rates]
    groups: list[dict[str, Any]] = [{"params": others, "lr": lr}] if others else []
    for rate in dict.fromkeys(rates.values()):
        nonlinear = [p for p in rates if rates[p] == rate]
        groups.append({"params": nonlinear, "lr": rate, "weight_decay": 0.0})
    return groups


def _rate(layer: core.AuroraLinear) -> float:
    rank = layer.config.rank
    return 0.1 / rank if _fixed(layer) else 8e-3 / math.sqrt(rank)
