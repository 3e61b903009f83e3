"""A worker in an environment of its own, for aurora-peft: that package writes into the installed PEFT when it is used.

The environment is made once in the cache folder. It holds aurora-peft and a PEFT of its own, and finds everything else
(torch, transformers) in the environment that made it, so that both sides run the same torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common import BenchmarkError
from benchmarks.data import cache_folder

PACKAGE = "aurora-peft==0.1.5"


def environment() -> Path:
    """The environment's interpreter; made with pip if absent. Raises BenchmarkError if that fails."""
    folder = cache_folder() / f"{PACKAGE}-python{sys.version_info.major}.{sys.version_info.minor}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    done = folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        peft = f"peft=={_version('peft')}"
        command = [python, "-m", "pip", "install", "-q", "--no-deps", "--ignore-installed", PACKAGE, peft]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise BenchmarkError(f"could not install {PACKAGE}: {(run.stderr.strip().splitlines() or ['?'])[-1]}")
        ours = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
        (Path(ours) / "parent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
        done.touch()
    return python


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError as error:
        raise BenchmarkError(f'{package} is missing: pip install "aurora-adapters[benchmarks]"') from error


class Rival:
    """Runs steps of `benchmarks.throughput` in the other environment, one at a time: `rival.ask("step", ...)`."""

    def __enter__(self) -> Rival:
        command = [environment(), "-m", "benchmarks.rival"]
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
    """Answer calls on standard input until it closes: `step` (seconds of one training step), `count`."""
    from benchmarks import common, throughput

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a package prints must not pass for an answer
    common.use_all_cores()
    steps: dict[str, Any] = {}
    for line in sys.stdin:
        call, arguments = json.loads(line)
        if call == "step":
            key = json.dumps(arguments)
            if key not in steps:
                steps[key] = throughput.make_step("aurora-peft", **arguments)
            result: Any = throughput.seconds(steps[key])
        else:
            result = throughput.count("aurora-peft", **arguments)
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    serve()
