"""A worker in an environment of its own, for aurora-peft, which writes into the installed PEFT.

The environment is made once in the cache folder. It holds aurora-peft and a PEFT of its own, and
finds everything else (torch, transformers) in the environment that made it, so that both sides run
the same torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.lab import steps
from benchmarks.lab.data import cache_folder
from benchmarks.lab.needs import BenchmarkError
from benchmarks.lab.report import use_all_cores
from benchmarks.lab.timing import seconds

PACKAGE = "aurora-peft==0.1.5"


def environment() -> Path:
    """The environment's interpreter; made with pip if absent, BenchmarkError if that fails."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache_folder() / f"{PACKAGE}-python{version}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = folder / "complete"
    if done.exists():
        return python
    venv.create(folder, with_pip=True, clear=True)
    options = ["install", "-q", "--no-deps", "--ignore-installed"]
    command = [str(python), "-m", "pip", *options, PACKAGE, f"peft=={_version('peft')}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["?"])[-1]
        raise BenchmarkError(f"could not install {PACKAGE}: {reason}")
    places = {"base": str(folder), "platbase": str(folder)}
    ours, parent = sysconfig.get_paths(vars=places)["purelib"], sysconfig.get_paths()["purelib"]
    (Path(ours) / "parent.pth").write_text(f"{parent}\n", encoding="utf-8")
    done.touch()
    return python


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        message = f'{package} is missing: pip install "aurora-adapters[benchmarks]"'
        raise BenchmarkError(message) from error


class Rival:
    """Runs steps in the other environment, one at a time: `rival.ask("step", ...)`."""

    def __enter__(self) -> Rival:
        command = [str(environment()), "-m", "benchmarks.lab.rival"]
        root, pipe = Path(__file__).resolve().parents[2], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=root)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, call: str, **arguments: Any) -> Any:
        """The result of one call of `serve`. Raises BenchmarkError if the worker is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([call, arguments]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise BenchmarkError(f"the worker for {PACKAGE} ended; its message is above")
        return json.loads(answer)


def serve() -> None:
    """Answer calls on standard input until it closes.

    `step`, `forward`: seconds of one training step or one inference; `peak`: bytes; `count`.
    """
    answers, sys.stdout = (
        sys.stdout,
        sys.stderr,
    )  # what a package prints must not pass for an answer
    use_all_cores()
    known: dict[str, Any] = {}
    for line in sys.stdin:
        call, arguments = json.loads(line)
        if call == "count":
            result: Any = steps.count(steps.RIVAL, **arguments)
        else:
            make = steps.make_forward if call == "forward" else steps.make_step
            if line not in known:
                known[line] = make(steps.RIVAL, **arguments)
            result = (steps.peak_bytes if call == "peak" else seconds)(known[line])
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve()
