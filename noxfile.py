"""The checks that the test command leaves out: `nox -s tests oldest docs build`, and `nox -s mutants` for patience.

Every session makes its own environment. `-P 3.13` picks another interpreter than the one that runs nox.
"""

import shutil
import tarfile
import zipfile
from pathlib import Path

import nox

nox.options.sessions = ["tests", "docs", "build"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
OLDEST_TORCH = "2.4.0"  # what setup.cfg promises; tests/test_habits.py holds the two together
# The newest friends that still know that torch.
OLDEST_FRIENDS = ("numpy<2", "transformers==4.56.0", "peft==0.17.0", "diffusers==0.35.0")


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types and the whole suite, on the torch that constraints.txt names; arguments go to pytest."""
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
    """The suite on the oldest torch that setup.cfg promises, with friends of its time."""
    session.install(f"torch=={OLDEST_TORCH}", *OLDEST_FRIENDS, "-e", ".[test]")
    session.run("python", "-c", f"import torch; assert torch.__version__.startswith('{OLDEST_TORCH}')")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The site, strictly: a broken link, a page outside the navigation or a missing docstring is an error."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Archive and wheel hold the same package, the wheel works alone, the archive passes its own tests."""
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
    """Change one operator at a time in core.py (or the file given) and see that a test notices. Takes hours."""
    session.install("-c", "constraints.txt", "-e", ".[test]", "mutmut")
    session.run("mutmut", "run", *session.posargs)
    session.run("mutmut", "results")
