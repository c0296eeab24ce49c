"""What uv does not check, and a proof that each net catches the fault that it is there for."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("bench", "dist", "kernels", "model", "optim", "train")
CODE = ("src", "benchmarks")
"""Folders of a package that import what it declares."""


def manifest(package: str, root: Path = ROOT) -> dict:
    return tomllib.loads((root / f"packages/{package}/pyproject.toml").read_text())


def sibling_requirements(package: str, root: Path = ROOT) -> list[Requirement]:
    declared = [Requirement(r) for r in manifest(package, root)["project"]["dependencies"]]
    return [r for r in declared if r.name.startswith("tilewright-")]


def ranges_that_exclude(root: Path) -> list[str]:
    """Sibling requirements that a workspace install ignores and a release would trip over."""
    return [
        f"{package}: {requirement} excludes {version}"
        for package in PACKAGES
        for requirement in sibling_requirements(package, root)
        if (
            version := manifest(requirement.name.removeprefix("tilewright-"), root)["project"][
                "version"
            ]
        )
        not in requirement.specifier
    ]


def uncollected(root: Path) -> list[str]:
    """Test files that `pytest`, started at the root, does not collect."""
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert listing.returncode == 0, listing.stdout + listing.stderr
    collected = {line.split("::")[0] for line in listing.stdout.splitlines() if "::" in line}
    on_disk = {
        str(path.relative_to(root))
        for tests in (root / "tests", *root.glob("packages/*/tests"))
        for path in tests.rglob("test_*.py")
    }
    return sorted(on_disk - collected)


def test_members_are_the_six_packages():
    assert sorted(p.parent.name for p in ROOT.glob("packages/*/pyproject.toml")) == list(PACKAGES)
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert root["project"]["dependencies"] == [f"tilewright-{p}" for p in PACKAGES]
    assert root["tool"]["uv"]["package"] is False
    assert set(root["tool"]["uv"]["sources"]) == {f"tilewright-{p}" for p in PACKAGES}
    assert root["tool"]["importlinter"]["root_packages"] == [f"tilewright_{p}" for p in PACKAGES]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_is_complete(package):
    folder = ROOT / "packages" / package
    data = manifest(package)
    for path in ("README.md", "LICENSE", f"src/tilewright_{package}/py.typed"):
        assert (folder / path).exists(), path
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert list((folder / "tests").glob("test_*.py")), "no tests"
    assert data["project"]["name"] == f"tilewright-{package}"
    assert data["project"]["license"] == "Apache-2.0"
    assert data["build-system"]["build-backend"] == "uv_build"
    assert data["tool"]["deptry"]["known_first_party"] == [f"tilewright_{package}"]
    for path in (folder / "tests").rglob("__init__.py"):
        pytest.fail(f"{path}: tests are no package (importlib mode)")


def test_one_version_for_all():
    versions = {p: manifest(p)["project"]["version"] for p in PACKAGES}
    assert len(set(versions.values())) == 1, versions
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {versions['kernels']}" in changelog


def test_python_and_shared_requirements_agree():
    assert len({manifest(p)["project"]["requires-python"] for p in PACKAGES}) == 1
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for text in manifest(package)["project"]["dependencies"]:
            requirement = Requirement(text)
            found.setdefault(requirement.name, set()).add(str(requirement))
    assert {name: spec for name, spec in found.items() if len(spec) > 1} == {}


def test_triton_is_declared_where_it_is_imported():
    pattern = re.compile(r"^\s*(?:import|from) triton\b", re.MULTILINE)
    for package in PACKAGES:
        sources = (ROOT / f"packages/{package}/src").rglob("*.py")
        if any(pattern.search(path.read_text()) for path in sources):
            markers = [
                str(requirement.marker)
                for text in manifest(package)["project"]["dependencies"]
                if (requirement := Requirement(text)).name == "triton"
            ]
            assert markers == ['sys_platform == "linux"'], f"{package}: {markers}"


def test_sibling_ranges_admit_the_siblings():
    assert ranges_that_exclude(ROOT) == []


def test_a_range_that_excludes_a_sibling_is_caught(tmp_path):
    for package in PACKAGES:
        target = tmp_path / "packages" / package
        target.mkdir(parents=True)
        shutil.copy(ROOT / f"packages/{package}/pyproject.toml", target)
    path = tmp_path / "packages/optim/pyproject.toml"
    path.write_text(
        re.sub(r"tilewright-kernels>=[^\"]*", "tilewright-kernels>=9", path.read_text())
    )
    (problem,) = ranges_that_exclude(tmp_path)
    assert problem.startswith("optim: tilewright-kernels>=9 excludes")


def test_the_lock_holds_the_measured_versions():
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    locked = {p["name"]: Version(p["version"]) for p in lock["package"]}
    assert (locked["torch"], locked["triton"]) == (Version("2.11.0"), Version("3.6.0"))
    numpys = [Version(p["version"]) for p in lock["package"] if p["name"] == "numpy"]
    assert all(v < Version("2.4") for v in numpys), numpys


def test_all_test_files_are_collected():
    assert uncollected(ROOT) == []


def test_a_test_file_that_is_not_collected_is_caught(tmp_path):
    # pytest's own default skips any folder called dist: what the root's norecursedirs is for.
    for package in ("dist", "kernels"):
        tests = tmp_path / "packages" / package / "tests"
        tests.mkdir(parents=True)
        (tests / f"test_{package}.py").write_text("def test_nothing():\n    pass\n")
    config = "[tool.pytest.ini_options]\ntestpaths = ['packages']\n"
    (tmp_path / "pyproject.toml").write_text(config)
    assert uncollected(tmp_path) == ["packages/dist/tests/test_dist.py"]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    config += f"norecursedirs = {ours['norecursedirs']}\n"
    (tmp_path / "pyproject.toml").write_text(config)
    assert uncollected(tmp_path) == []


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources and manifests, to plant faults in."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        folder = ROOT / "packages" / package
        target = tmp_path / "packages" / package
        for name in CODE:
            if (folder / name).exists():
                shutil.copytree(folder / name, target / name)
        shutil.copy(folder / "pyproject.toml", target)
    return tmp_path


def lint_imports(root: Path) -> subprocess.CompletedProcess:
    sources = [str(root / f"packages/{p}/src") for p in PACKAGES]
    code = (
        f"import sys; sys.path[:0] = {sources!r}; "
        "from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def deptry(root: Path, package: str) -> subprocess.CompletedProcess:
    folder = root / "packages" / package
    command = [sys.executable, "-m", "deptry", *(c for c in CODE if (folder / c).exists())]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_clean_tree_passes_the_nets(copy):
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout
    for package in PACKAGES:
        done = deptry(copy, package)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("package", "statement"),
    [
        ("kernels", "import tilewright_model"),
        ("kernels", "def f():\n    from tilewright_train import cli\n    return cli"),
        ("kernels", "import rich"),
        ("dist", "import tilewright_kernels"),
        ("model", "import tilewright_optim"),
    ],
)
def test_an_undeclared_import_is_caught_twice(copy, package, statement):
    planted = copy / f"packages/{package}/src/tilewright_{package}/planted.py"
    planted.write_text(f'"""Planted."""\n\n{statement}\n')
    done = lint_imports(copy)
    assert done.returncode != 0
    assert "planted" in done.stdout
    done = deptry(copy, package)
    assert done.returncode != 0
    assert "planted.py" in done.stderr


def test_continuous_integration_runs_the_readmes_command():
    (command,) = re.findall(
        r"<!-- the checks -->\n+```sh\n(.*?)\n```", (ROOT / "README.md").read_text(), re.S
    )
    lines = (ROOT / ".ci/run").read_text().splitlines()
    run = [line for line in lines if line and not line.startswith(("#", "set "))]
    assert " && ".join(run) == command


def test_nothing_names_a_machine():
    # Texts speak of the project alone; paths of a home or work folder are somebody's machine.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("needs a git checkout to list the project's files")
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home/\w+|Users/\w+)/")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.name != Path(__file__).name:
            match = pattern.search(path.read_text(errors="replace"))
            assert match is None, f"{name}: {match and match.group()}"
