"""What is shipped: the files of wheel and sdist, what an import needs, the README's words."""

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# What is built here: setup.py leaves the CUDA extension out unless it is asked for.
NAMES = ["_sparse_kernels_cpu"]
if os.environ.get("SPARSE_KERNELS_CUDA") == "1":
    NAMES.append("_sparse_kernels_cuda")
EXTENSIONS = [name + sysconfig.get_config_var("EXT_SUFFIX") for name in NAMES]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist and the wheel, built here without isolation.

    The object files of earlier builds of this checkout are used again where nothing changed.
    """
    folder = tmp_path_factory.mktemp("dist")
    os.environ.setdefault("SPARSE_KERNELS_CUDA", "0")
    script = (
        "from setuptools import build_meta; "
        f"build_meta.build_sdist({str(folder)!r}); build_meta.build_wheel({str(folder)!r})"
    )
    built = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="session")
def wheel(distributions) -> Path:
    (path,) = distributions.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory) -> Path:
    """The wheel as it would lie in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_python(code: str, site: Path, cwd: Path) -> str:
    """What `code` prints in a new process whose only copy of the package is the one in `site`."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


ROOTS = [(ROOT, "sparse_kernels"), (ROOT / "python", "sparse_transformer")]


def package_files() -> set[Path]:
    """The Python files of the packages in the checkout."""
    return {path for root, package in ROOTS for path in (root / package).rglob("*.py")}


def package_sources() -> set[str]:
    """Their names where they are installed."""
    return {
        path.relative_to(root).as_posix()
        for path in package_files()
        for root, package in ROOTS
        if path.is_relative_to(root / package)
    }


def shipped_models() -> set[str]:
    """The files of the models that come with the package, where they are installed."""
    folder = ROOT / "python" / "sparse_transformer" / "models"
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(ROOT / "python").as_posix() for path in files}


@pytest.mark.parametrize(
    ("folder", "name", "megabytes"),
    [("python/sparse_transformer/models", "python-small", 10)],
)
def test_models_are_small_and_say_what_they_are(folder, name, megabytes):
    files = [path for path in (ROOT / folder / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= megabytes * 1e6
    assert {path.name for path in files} == {
        "README.md",
        "config.json",
        "meta.json",
        "metrics.jsonl",
        "sample.safetensors",
        "tensors.safetensors",
        "tokenizer.json",
    }


@pytest.mark.slow
def test_wheel_holds_exactly_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {name for name in names if ".dist-info/" in name}
    pages = {
        f"sparse_transformer/{page}.{ending}"
        for page in ("browse/browse", "circuits/viz/page")
        for ending in ("html", "css", "js")
    }
    pages.add("sparse_transformer/circuits/viz/common.js")
    data = pages | shipped_models() | {"sparse_kernels/py.typed"}
    assert names - info == package_sources() | data | {*EXTENSIONS}
    assert {name.split("/", 1)[1] for name in info} == {
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "top_level.txt",
    }


@pytest.mark.slow
def test_sdist_holds_everything_that_a_build_needs(distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.[ch]*")}
    needed = sources | {path.relative_to(ROOT).as_posix() for path in package_files()}
    needed |= {"setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "README.md"}
    needed |= {"tests/conftest.py", "benchmarks/matmul.py", ".ci/run"}
    assert needed <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


@pytest.fixture(scope="session")
def metadata(unpacked) -> importlib.metadata.Distribution:
    (info,) = unpacked.glob("*.dist-info")
    return importlib.metadata.PathDistribution(info)


@pytest.mark.slow
def test_metadata(metadata):
    assert metadata.name == "sparse-kernels"
    assert metadata.metadata["License-Expression"] == "Apache-2.0"
    assert metadata.metadata["Requires-Python"] == ">=3.10"
    runtime = [line for line in metadata.requires or [] if "extra ==" not in line]
    assert {line.split(";")[0] for line in runtime} == {
        "torch>=2.10",
        "numpy",
        "tabulate",
        "tqdm",
        "triton",
        "tyro",
    }


@pytest.mark.slow
def test_constraints_pin_every_dependency(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w-]+==[\w.]+( ; .+)?", pin)] == []
    pinned = {pin.partition("==")[0] for pin in pins}
    assert {re.match(r"[\w-]+", line)[0] for line in metadata.requires} <= pinned


@pytest.mark.slow
@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extension_links_no_torch(unpacked, extension):
    """One build serves every PyTorch, and every CUDA runtime that PyTorch brings."""
    binary = (unpacked / extension).read_bytes()
    assert b"libtorch" not in binary
    assert b"libc10" not in binary
    assert b"libcudart.so" not in binary


@pytest.mark.slow
def test_wheel_works_from_another_folder(unpacked, tmp_path):
    code = """
import torch, sparse_kernels as sk, _sparse_kernels_cpu
layer = sk.SparseLinear(12, 8, fan_in=3)
x = torch.randn(5, 12)
torch.testing.assert_close(layer(x), layer.to_dense()(x))
print(sk.__file__, _sparse_kernels_cpu.__file__, sep="\\n")
"""
    package, extension = run_python(code, unpacked, tmp_path).splitlines()
    assert Path(package) == unpacked / "sparse_kernels" / "__init__.py"
    assert Path(extension) == unpacked / EXTENSIONS[0]


@pytest.mark.slow
def test_import_and_use_without_triton(unpacked, tmp_path):
    code = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
import torch, sparse_kernels as sk
y = sk.SparseLinear(12, 8, fan_in=3)(torch.randn(5, 12))
y.sum().backward()
print(tuple(y.shape), "triton" in sys.modules)
"""
    assert run_python(code, unpacked, tmp_path) == "(5, 8) False"


@pytest.mark.slow
def test_import_loads_nothing_but_torch_and_numpy(unpacked, tmp_path):
    code = """
import sys
import numpy, torch
def packages():
    return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
before = packages()
import sparse_kernels
print(*sorted(packages() - before))
"""
    loaded = run_python(code, unpacked, tmp_path).split()
    assert loaded == [*NAMES, "sparse_kernels"]


@pytest.mark.slow
def test_readme_example_runs(unpacked, tmp_path):
    example, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)  # the other needs a model
    assert len(example.splitlines()) == 10
    run_python(example, unpacked, tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "pip install -c constraints.txt . && python -m benchmarks.matmul",
        "pip install -c constraints.txt '.[test]' && python -m pytest",
    ],
)
def test_readme_has_the_two_commands(command):
    assert f"```bash\n{command}\n```" in README


def test_the_design_page_lists_the_files_that_exist():
    page = (ROOT / "docs/design.md").read_text()
    (tree,) = re.findall(r"## Files\n\n```\n(.*?)```", page, re.DOTALL)
    folder, listed = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith("  ") else (name if name.endswith("/") else "")
        path = f"{folder}{name}" if line.startswith("  ") else name
        assert (ROOT / path).exists(), path
        listed.add(path)
    unlisted = {path for path in package_sources() if path.startswith("sparse_kernels/")} - listed
    assert unlisted == {"sparse_kernels/__init__.py"}
