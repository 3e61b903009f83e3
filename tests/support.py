"""What several test files share: interrupts at every line, and deterministic values."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest
import torch
from torch import multiprocessing, nn

import aurora

T = TypeVar("T")
_PACKAGE = str(Path(aurora.__file__).parent)


class _Interrupt:
    """Raises at the n-th line that runs in a file of the package; never if n is -1."""

    def __init__(self, n: int, error: type[BaseException]) -> None:
        self.n, self.error = n, error
        self.lines: list[tuple[str, int]] = []  # (file, line) of what ran

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) - 1 == self.n:
                raise self.error(f"line {frame.f_lineno} of {frame.f_code.co_filename}")
        return self

    def during(self, action: Callable[[T], object], subject: T) -> bool:
        """Run `action(subject)`; whether it ended by our error."""
        before, grad = sys.gettrace(), torch.is_grad_enabled()
        sys.settrace(self)
        try:
            action(subject)
        except self.error:
            return True
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(grad)  # an interrupt on the way out of no_grad() leaves it off
            if hasattr(torch.compiler, "set_stance") and "torch._dynamo" in sys.modules:
                torch.compiler.set_stance("default")  # likewise, on the way out of "force_eager"
        return False


def interrupted_at_every_line(
    prepare: Callable[[], T],
    action: Callable[[T], object],
    check: Callable[[T, bool], object],
    *,
    error: type[BaseException] = KeyboardInterrupt,
) -> int:
    """Plant an exception at every line of aurora/ that `action` runs, one run for each.

    A line that runs many times is interrupted the first time and the last: before a loop has done
    anything, and where it has done all but its end. Each time `prepare()` makes a fresh subject,
    `action(subject)` is interrupted, and `check(subject, False)` must find it whole, as before or
    as after. An undisturbed run ends with `check(subject, True)`, so that a check cannot pass
    because nothing ever happens.

        def check(model, finished):
            assert describe(model) in ([after] if finished else [before, after])

        count = interrupted_at_every_line(make_model, lambda m: aurora.inject(m, "0"), check)

    Args:
        prepare: Makes what is acted on. Not interrupted.
        action: What is interrupted. It must run the same lines on every fresh subject, apart from
            what is cached for good at the first call.
        check: Asserts; gets the subject, and whether the action went through undisturbed.
        error: What is raised.

    Returns:
        How many interrupts were planted.
    """
    for _ in range(2):  # what is cached at the first call is cached now
        subject = prepare()
        trace = _Interrupt(-1, error)
        assert not trace.during(action, subject)
    check(subject, True)
    assert trace.lines, "the action runs no line of aurora/"
    first, last = {}, {}
    for n, line in enumerate(trace.lines):
        first.setdefault(line, n)
        last[line] = n
    places = sorted({*first.values(), *last.values()})
    for n in places:
        subject = prepare()
        planted = _Interrupt(n, error)
        assert planted.during(action, subject), f"line event {n} was not reached"
        check(subject, False)
    return len(places)


def everything(model: nn.Module) -> list[Any]:
    """All of a model's state that a failing call must leave alone, for comparison by ==.

    Every module's identity, class, attributes, tables and training flag; every tensor's identity,
    values and requires_grad.
    """
    found: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        tables = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        other = {k: repr(v) for k, v in module.__dict__.items() if k not in tables}
        found.append((name, id(module), module.__class__, other))
        found.append([(key, id(m)) for key, m in module._modules.items()])
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                found.append((name, key))
            else:
                values = None if tensor.is_meta else tensor.detach().double().flatten().tolist()
                found.append((name, key, id(tensor), tensor.requires_grad, repr(values)))
    return found


@torch.no_grad()
def disturb(model: nn.Module, scale: float = 0.3, phase: float = 0.0) -> None:
    """Give everything that trains values that are the same with every release of PyTorch."""
    for i, p in enumerate(aurora.parameters(model)):
        steps = torch.arange(2.0 + i, 2 + i + p.numel(), dtype=torch.float64, device=p.device)
        p.copy_(scale * (steps + phase).sin().view(p.shape))


# ---- A small model, trained, saved and refused ----------------------------------------------


def make_model(seed: int = 0, width: int = 12) -> nn.Module:
    """Two layers to adapt, "0" and "2", and a head, "3"."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))


def trained(seed: int = 0, train: str | None = r"3\.", **options: Any) -> nn.Module:
    """The small model with adapters, and values that differ by seed."""
    model = make_model()
    aurora.inject(model, r"^[02]$", train=train, **options)
    disturb(model, scale=0.9, phase=10.0 * seed)
    return model


def refused(model: nn.Module, path: Any, match: str, error: type[Exception] = ValueError) -> None:
    """`load` raises, and the model is as it was."""
    before = everything(model)
    with pytest.raises(error, match=match):
        aurora.load(model, path)
    assert everything(model) == before


def is_at_once(out: torch.Tensor) -> bool:
    """Whether base and adapter made the output in one step, past the view that shapes it."""
    node = out.grad_fn
    while node is not None and "View" in node.name():
        node = node.next_functions[0][0]
    return node is not None and "AtOnce" in node.name()


def on_two(function: Callable[..., None], *args: Any) -> None:
    """Run `function(rank, *args)` in two processes that form a group on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_in_group, (port, function, args), nprocs=2)


def _in_group(rank: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        function(rank, *args)
    finally:
        torch.distributed.destroy_process_group()
    # A usual exit aborts in 2 of 60 runs, whatever the function: a thread of PyTorch's still runs.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
