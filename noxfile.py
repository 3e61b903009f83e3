"""Checks in environments of their own: `nox -s tests oldest newest docs build`, or `mutants`.

`-P 3.13` picks another interpreter than the one that runs nox.
"""

import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

nox.options.sessions = ["tests", "docs", "build"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
OLDEST_TORCH = "2.6.0"  # what setup.cfg promises; tests/test_habits.py holds the two together


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types and the whole suite, with constraints.txt; arguments go to pytest."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("pytest", *session.posargs)


@nox.session
def newest(session: nox.Session) -> None:
    """The suite on the newest torch and friends that the index has."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def oldest(session: nox.Session) -> None:
    """The suite on the oldest torch that setup.cfg promises, with the newest friends."""
    session.install(f"torch=={OLDEST_TORCH}", "-e", ".[test]")
    session.run(
        "python", "-c", f"import torch; assert torch.__version__.startswith('{OLDEST_TORCH}')"
    )
    # This torch has no FSDP2 on a CPU.
    session.run("pytest", "-k", "not fsdp2 and not sharded", *session.posargs)


@nox.session
def oldest_peft(session: nox.Session) -> None:
    """Our tuner on the oldest PEFT that setup.cfg promises, and on one between."""
    session.install("-c", "constraints.txt", "-e", ".[test]")
    for version in ("0.18.0", "0.20.0"):
        session.install(f"peft=={version}")
        session.run("pytest", "tests/integrations/test_peft.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, strictly: a broken link or a docstring that does not parse is an error."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Archive and wheel hold the same package, and the archive passes its own tests."""
    session.install("build", "twine")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", "dist", ".")
    session.run("twine", "check", "--strict", *map(str, (ROOT / "dist").iterdir()))
    wheel, archive = (next((ROOT / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    top, elsewhere = archive.name.removesuffix(".tar.gz"), Path(session.create_tmp()).resolve()
    with zipfile.ZipFile(wheel) as in_wheel, tarfile.open(archive) as in_archive:
        packed = {n: in_wheel.read(n) for n in in_wheel.namelist() if n.startswith("aurora/")}
        for name, content in packed.items():
            member = in_archive.extractfile(f"{top}/{name}")
            if member is None or member.read() != content:
                session.error(f"{name} differs between wheel and archive")
        shutil.rmtree(elsewhere / top, ignore_errors=True)
        in_archive.extractall(elsewhere, filter="data")
    session.install("-c", "constraints.txt", f"{wheel}[test]")
    session.chdir(elsewhere)  # where nothing but the wheel can be imported
    session.run("python", "-c", "import aurora; assert 'site-packages' in aurora.__file__")
    session.chdir(elsewhere / top)
    session.run("pytest", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant one bug after the other and count those that no test notices; takes hours.

    `nox -s mutants -- merging` plants them in aurora/merging.py; without a name, in core.py.
    """
    name = session.posargs[0] if session.posargs else "core"
    tests = ["tests/test_core.py", "tests/test_anl.py", "tests/test_single_file.py"]
    tests = tests if name == "core" else [f"tests/test_{name}.py"]
    session.install("-c", "constraints.txt", "-e", ".[test]", "cosmic-ray")
    copy = (
        Path(session.create_tmp()).resolve() / "copy"
    )  # bugs are written into files: not into yours
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".*venv*", ".nox", ".git", "site", "dist", "build"),
    )
    command = f"python -m pytest -x -q -p no:cacheprovider {' '.join(tests)}"
    config = f"""[cosmic-ray]
module-path = "aurora/{name}.py"
timeout = 300.0
excluded-modules = []
test-command = "{command}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
"""
    (copy / "mutants.toml").write_text(config, encoding="utf-8")
    session.chdir(copy)
    session.env["PYTHONPATH"] = str(copy)
    session.run("cosmic-ray", "init", "--force", "mutants.toml", "mutants.sqlite")
    session.run("cr-filter-operators", "mutants.sqlite", "mutants.toml")  # X | Y in annotations
    session.run("cosmic-ray", "baseline", "mutants.toml")
    session.run("cosmic-ray", "exec", "mutants.toml", "mutants.sqlite")
    session.run("cr-report", "--show-pending", "mutants.sqlite")
