"""Checks in environments of their own: `nox -s tests oldest newest docs build`, or `mutants`.

`-P 3.13` picks another interpreter than the one that runs nox.
"""

import contextlib
import random
import shutil
import sqlite3
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
    # This torch has no FSDP2 on a CPU, its compiler cannot read the newest transformers, and it has
    # no batching rule for one of our operations under two `vmap`s, which is slow, but right.
    beyond = ("fsdp2", "sharded", "test_one_graph", "test_an_export_is_saved")
    left_out = " and ".join(f"not {name}" for name in beyond)
    slow = "ignore:There is a performance drop"
    session.run("pytest", "-k", left_out, "-W", slow, *session.posargs)


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


# Where bugs are planted: the files, and the tests that must notice.
MUTANTS = {
    "core": (["core"], ["test_core", "test_anl", "test_parameters", "test_check"]),
    "checkpoint": (
        ["checkpoint", "_file", "_header", "_source"],
        ["test_checkpoint", "test_files"],
    ),
    "adapters": (["adapters", "_shelf"], ["test_adapters"]),
    "merging": (["merging", "_fit"], ["test_merging"]),
}


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant one bug after the other and list those that no test notices; hours, or a sample.

    `nox -s mutants -- merging 50` plants 50, drawn at random with a fixed seed, in merging.py and
    what belongs to it; without a number all of them, without a name in core.py.
    """
    name, count, *_ = [*session.posargs, *["core", None][len(session.posargs) :]]
    files, tests = MUTANTS[name]
    session.install("-c", "constraints.txt", "-e", ".[test]", "cosmic-ray==8.7.0")
    # Bugs are written into files: not into yours.
    copy = Path(session.create_tmp()).resolve() / f"mutants-{name}"
    left_out = shutil.ignore_patterns("*venv*", ".nox", ".git", "site", "dist", "build")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT, copy, ignore=left_out)
    paths = " ".join(f"tests/{test}.py" for test in tests)
    config = f"""[cosmic-ray]
module-path = {[f"aurora/{file}.py" for file in files]}
timeout = 600.0
excluded-modules = []
test-command = "python -m pytest -x -q -p no:cacheprovider {paths}"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
exclude-operators = ["core/ReplaceBinaryOperator_BitOr_.*"]
"""
    (copy / "mutants.toml").write_text(config, encoding="utf-8")
    session.chdir(copy)
    session.env.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1")
    session.run("cosmic-ray", "init", "--force", "mutants.toml", "mutants.sqlite")
    session.run("cr-filter-operators", "mutants.sqlite", "mutants.toml")  # X | Y in annotations
    _keep_sample(copy / "mutants.sqlite", None if count is None else int(count))
    session.run("cosmic-ray", "baseline", "mutants.toml")
    session.run("cosmic-ray", "exec", "mutants.toml", "mutants.sqlite")
    session.run("cr-report", "--surviving-only", "--show-diff", "mutants.sqlite")


def _keep_sample(path: Path, count: int | None) -> None:
    """Leave only some of the planned mutants, the same at every run, and none that are filtered."""
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        rows = database.execute(
            "SELECT job_id FROM mutation_specs WHERE job_id NOT IN "
            "(SELECT job_id FROM work_results) ORDER BY module_path, operator_name, occurrence"
        ).fetchall()
        chosen = rows if count is None else random.Random(0).sample(rows, min(count, len(rows)))
        for row in set(database.execute("SELECT job_id FROM work_items")) - set(chosen):
            for table in ("work_results", "mutation_specs", "work_items"):
                database.execute(f"DELETE FROM {table} WHERE job_id = ?", row)
