"""What is shipped, and that the folder `kernels` stands in nobody's way."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {"kvq_cli", "kvq_core", "kvq_kernels"}


def at_root(code: str, *path: Path) -> str:
    """Run code in a fresh interpreter with the root first in its path; returns what it prints."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path, ROOT / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    found = at_root("import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)")
    assert found == "None" or not Path(found).is_relative_to(ROOT)


def test_kernels_does_not_shadow_a_package_of_that_name(tmp_path: Path) -> None:
    """Hugging Face's `kernels`, wherever it comes in the path, is what `import kernels` finds."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("CUDAProperties = 1\n")
    code = "import kernels, kvq_kernels; from kernels import CUDAProperties; print(kernels.__file__)"
    assert at_root(code, tmp_path) == str(package / "__init__.py")


def test_transformers_is_not_misled() -> None:
    code = "from transformers.utils import is_kernels_available as a; print(a())"
    regular = importlib.util.find_spec("kernels")
    if regular is None or regular.origin is None:
        assert at_root(code) == "False"


def test_no_conftest_and_no_packages_among_the_tests() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from the files that git knows, plus new ones it does not ignore."""
    source = tmp_path_factory.mktemp("source")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("kvq_toolkit-*.whl")
    return zipfile.ZipFile(built).namelist()


def test_wheel_ships_three_packages_and_nothing_else(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == SHIPPED


def test_wheel_ships_every_module_and_the_sample(wheel: list[str]) -> None:
    for package, folder in (("kvq_cli", ROOT), ("kvq_core", ROOT), ("kvq_kernels", ROOT / "kernels")):
        for file in (folder / package).rglob("*.py"):
            assert str(file.relative_to(folder)) in wheel
    data = [name for name in wheel if not name.endswith(".py") and ".dist-info/" not in name]
    assert "kvq_core/py.typed" in data
    assert any(name.startswith("kvq_core/bench/data/") and name.endswith(".json") for name in data)
    assert {"kvq_core/bench/assets/report.css", "kvq_core/bench/assets/report.js"} <= set(data)
    assert "kvq_core/quality/task_files/lambada.yaml" in data
    folders = ("kvq_core/bench/data/", "kvq_core/bench/assets/", "kvq_core/quality/task_files/")
    assert all(name.startswith(folders) or name.endswith("py.typed") for name in data)
