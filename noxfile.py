# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.5"]
# ///
"""Every check and every task of the workspace, by name: `nox --list`.

Each session has an environment of its own that holds what the lock says and what the package under
test declares, so an undeclared import fails. Plain `nox` runs all checks. `nox --no-venv` runs a
session in the interpreter at hand, with our sources on PYTHONPATH, for a machine that has torch
but neither network nor uv.
"""

import os
import shutil
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.reuse_venv = "yes"
nox.options.tags = ["check"]

ROOT = Path(__file__).parent
PACKAGES = ("kernels", "optim", "model", "dist", "train", "bench")
HAS_GPU = Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists()


def closure(package: str) -> list[str]:
    """The package and its siblings that it needs, transitively."""
    manifest = tomllib.loads((ROOT / f"packages/{package}/pyproject.toml").read_text())
    found = [package]
    for requirement in manifest["project"]["dependencies"]:
        if requirement.startswith("tilewright-"):
            sibling = requirement.removeprefix("tilewright-").split(">")[0]
            found += [name for name in closure(sibling) if name not in found]
    return found


def source_path(packages: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Variables that put our sources before what PYTHONPATH already names."""
    ours = [str(ROOT / f"packages/{name}/src") for name in packages]
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join(ours + others)}


def sync(
    session: nox.Session, package: str | None, *groups: str, extras: tuple[str, ...] = ()
) -> dict[str, str]:
    """Install what `package` (None: all six) declares, groups, extras; return variables to set."""
    if session.venv_backend == "none":
        return source_path(closure(package) if package else PACKAGES)
    which = ["--package", f"tilewright-{package}"] if package else ["--all-packages"]
    which += [f"--extra={extra}" for extra in extras]
    uv_sync(session, *which, *(f"--group={group}" for group in groups))
    return {}


def uv_sync(session: nox.Session, *options: str) -> None:
    location = session.virtualenv.location
    session.run_install(
        "uv",
        "sync",
        "--quiet",
        "--frozen",
        "--no-default-groups",
        f"--python={location}",
        *options,
        env={"UV_PROJECT_ENVIRONMENT": location},
        external=True,
    )


def add_test_session(package: str) -> None:
    @nox.session(name=f"test-{package}", tags=["check", "test"])
    @nox.parametrize("device", ["interpreter", "gpu"], ids=["interpreter", "gpu"])
    def test(session: nox.Session, device: str) -> None:
        if device == "gpu" and not HAS_GPU:
            session.skip("no GPU here; the interpreter form checks the same kernels on the CPU")
        env = sync(session, package, "test")
        if device == "interpreter":
            # Before triton decorates a kernel, so before Python starts.
            env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
            # Tensors of tests are tiny: more threads only wait for each other.
            env |= {"OMP_NUM_THREADS": "1"}
        else:
            # Without it a broken driver would skip every test, and pass.
            env |= {"TILEWRIGHT_REQUIRE_GPU": "1"}
        chosen = "not gpu and not multigpu" if device == "interpreter" else "gpu or multigpu"
        session.run(
            *("python", "-m", "pytest", f"packages/{package}/tests", "-m", chosen),
            *session.posargs,
            env=env,
            # 5: a package none of whose tests need a GPU.
            success_codes=[0, 5] if device == "gpu" else [0],
        )

    test.__doc__ = f"Test packages/{package} with only what it declares installed."


for _package in PACKAGES:
    add_test_session(_package)


def sanitize(session: nox.Session, tool: str) -> None:
    """The kernels' GPU tests of small shapes under one of compute-sanitizer's tools."""
    env = sync(session, "kernels", "test")
    # Each allocation by itself, or an access past one tensor would hit its neighbour in the cache.
    env |= {"TILEWRIGHT_REQUIRE_GPU": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    large = "two_to_the_31 or real_ or vocabularies or of_models or memory_is"
    needs_the_cache_or_a_compiler = "waits or synchronization or replays or compile"
    session.run(
        *("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9"),
        *("python", "-m", "pytest", "packages/kernels/tests", "-m", "gpu and not multigpu"),
        *("-k", f"not ({large} or {needs_the_cache_or_a_compiler})"),
        *session.posargs,
        env=env,
        external=True,
    )


@nox.session
def memcheck(session: nox.Session) -> None:
    """Run the kernels' GPU tests of small shapes under compute-sanitizer, for stray accesses."""
    sanitize(session, "memcheck")


@nox.session
def racecheck(session: nox.Session) -> None:
    """Run the same tests under its racecheck, for threads that race in shared memory."""
    sanitize(session, "racecheck")


@nox.session(tags=["check"])
def workspace(session: nox.Session) -> None:
    """Check what uv does not: versions, ranges, files, collection, and the nets themselves."""
    env = sync(session, None, "test", "lint", "bench")
    session.run("python", "-m", "pytest", "tests", *session.posargs, env=env)


@nox.session(tags=["check"])
def lint(session: nox.Session) -> None:
    """Check format, style, import directions, declared dependencies and the lock."""
    if session.venv_backend != "none":
        uv_sync(session, "--only-group=lint")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports", env=source_path(PACKAGES))
    for package in PACKAGES:
        with session.chdir(f"packages/{package}"):
            session.run("deptry", *(name for name in ("src", "benchmarks") if Path(name).exists()))
    session.run("uv", "lock", "--check", external=True)


@nox.session(tags=["check"])
def types(session: nox.Session) -> None:
    """Check types, in sources and tests."""
    env = sync(session, None, "types", "bench", "test")
    session.run("pyrefly", "check", *session.posargs, env=env)


@nox.session(tags=["check"])
@nox.parametrize("package", PACKAGES, ids=PACKAGES)
def isolated(session: nox.Session, package: str) -> None:
    """Install a package's wheel, with what it declares and no more, and use it outside the tree."""
    if session.venv_backend == "none":
        session.skip("builds and installs wheels: needs an environment of its own, and uv")
    work = Path(session.create_tmp()).resolve() / package
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    names = closure(package)
    for name in names:
        session.run_install(
            *("uv", "build", "--quiet", "--wheel", f"--package=tilewright-{name}"),
            f"--out-dir={work / 'wheels'}",
            external=True,
        )
    wheels = sorted(str(wheel) for wheel in (work / "wheels").glob("*.whl"))

    def install(*groups: str) -> None:
        """Make the environment hold the wheels and the lock's versions of what they require."""
        requirements = work / "requirements.txt"
        session.run_install(
            *("uv", "export", "--quiet", "--frozen", "--no-default-groups"),
            *("--no-emit-workspace", "--no-hashes", f"--package=tilewright-{package}"),
            *(f"--group={group}" for group in groups),
            f"--output-file={requirements}",
            external=True,
        )
        with requirements.open("a") as file:
            file.writelines(f"{wheel}\n" for wheel in wheels)
        session.run_install("uv", "pip", "sync", "--quiet", str(requirements), external=True)

    install()
    env = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    check = ROOT / "tests" / "check_installed.py"
    with session.chdir(work):
        session.run("python", str(check), package, *names, str(ROOT), env=env)
    # Only now the interpreter, which needs the test group's numpy.
    env["TRITON_INTERPRET"] = "1"
    install("test")
    copy = work / "copy"
    shutil.copytree(ROOT / f"packages/{package}/tests", copy / f"packages/{package}/tests")
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    with session.chdir(copy):
        session.run("python", "-m", "pytest", "-m", "smoke and not gpu", "-q", env=env)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks and save the run; `-- compare BASELINE` sets two runs side by side."""
    # Peers run on a GPU only; elsewhere they would be downloaded to be skipped.
    env = sync(session, "bench", "bench", extras=("peers",) if HAS_GPU else ())
    if session.posargs and session.posargs[0] in ("compare", "save", "show", "roofline", "docs"):
        session.run("python", "-m", "tilewright_bench", *session.posargs, env=env)
        return
    session.run(
        *("python", "-m", "pytest", "packages/bench/benchmarks", "--benchmark-only"),
        # Its warnings would become internal errors under filterwarnings = error.
        "-Wdefault",
        *("--benchmark-autosave", "--benchmark-storage=file://.benchmarks"),
        *session.posargs,
        env=env,
    )


@nox.session(tags=["check"])
def docs(session: nox.Session) -> None:
    """Build the documentation; `-- serve` shows it in a browser."""
    env = sync(session, None, "docs")
    if session.posargs:
        session.run("zensical", *session.posargs, env=env)
    else:
        session.run("zensical", "build", "--clean", "--strict", env=env)


if __name__ == "__main__":
    nox.main()
