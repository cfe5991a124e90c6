"""Builds the C++ and CUDA extensions; everything else about the package is in pyproject.toml.

The kernels are compiled once for each instruction set, so each source file has its own flags, which
setuptools' own compile step cannot do. ``BuildExtension`` writes a ninja file instead: files are
built in parallel, and only those whose sources, headers or flags changed are built again.

The CUDA extension is built where nvcc and the headers and library of its runtime are found; no GPU
is needed for that. ``SPARSE_KERNELS_CUDA=0`` leaves it out, ``=1`` makes it an error if it cannot
be built. The compiler is the nvcc on PATH, else that of ``CUDA_HOME``, else that of
/usr/local/cuda; it takes more flags from ``NVCC_APPEND_FLAGS``.

Environment: ``CXX``, ``CPPFLAGS``, ``CXXFLAGS`` and ``LDFLAGS`` as usual;
``SPARSE_KERNELS_SANITIZE=address,undefined`` builds with those sanitizers (see CONTRIBUTING.md).
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CUDA_EXTENSION = "_sparse_kernels_cuda"

COMMON_FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden"),
    # Multiply and add may fuse and exceptions are not trapped, but no rule of arithmetic is
    # relaxed: NaN, infinity, signed zero and the order of additions stay what the source says.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra"),
]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2"]

# Instruction sets, lowest first: name, flags, and a statement that only compiles (and assembles)
# with them. Each is built from csrc/cpu/isa_<name>.cpp and announced to the dispatch table by
# SK_HAVE_<NAME>. On ARM the compiler refuses all of them, and NEON is the baseline.
INSTRUCTION_SETS = [
    (
        "avx2",
        ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
        "__m256 a = _mm256_loadu_ps(p); _mm256_storeu_ps(p, _mm256_fmadd_ps(a, a, a));",
    ),
    (
        "avx512",
        AVX512_FLAGS,
        "__m512 a = _mm512_loadu_ps(p); _mm512_storeu_ps(p, _mm512_add_ps(a, a));",
    ),
    (
        "avx512bf16",
        [*AVX512_FLAGS, "-mavx512bf16"],
        "__m512 a = _mm512_loadu_ps(p); __m512bh b = _mm512_cvtne2ps_pbh(a, a);"
        " _mm512_storeu_ps(p, _mm512_dpbf16_ps(a, b, b));",
    ),
]


class Compiler:
    """The C++ compiler of this machine, and what it can do."""

    def __init__(self) -> None:
        self.command = self._find()
        self.language_flags = [*_words("CPPFLAGS"), *_words("CXXFLAGS")]
        self.link_flags = _words("LDFLAGS")

    @staticmethod
    def _find() -> list[str]:
        configured = (sysconfig.get_config_var("CXX") or "").split()[:1]
        for candidate in (_words("CXX"), configured, ["c++"], ["g++"], ["clang++"]):
            if candidate and shutil.which(candidate[0]):
                return candidate
            if candidate and candidate == _words("CXX"):
                raise CompileError(f"the C++ compiler named by CXX was not found: {candidate[0]}")
        raise CompileError(
            "sparse-kernels needs a C++17 compiler and found none: install one (Debian and Ubuntu: "
            "apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) or name "
            "it in the environment variable CXX"
        )

    def accepts(self, source: str, flags: list[str], *, link: bool = False) -> bool:
        """Whether ``source`` compiles with ``flags`` and without a warning."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(source)
            command = [*self.command, *self.language_flags, "-std=c++17", "-Werror", *flags]
            command += [*([] if link else ["-c"]), str(path), "-o", str(path.with_suffix(".out"))]
            command += self.link_flags if link else []
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def describe(self) -> str:
        found = subprocess.run(
            [*self.command, "--version"], capture_output=True, text=True, check=False
        )
        return (found.stdout.splitlines() or [" ".join(self.command)])[0]


# What the CUDA kernels are compiled for, where nvcc knows it: code for compute capability 8.0
# (which later 8.x run as well), 9.0 and 10.0, and PTX that the driver compiles for what is newer.
CUDA_TARGETS = [
    ("sm_80", "arch=compute_80,code=sm_80"),
    ("sm_90a", "arch=compute_90a,code=sm_90a"),
    ("sm_90", "arch=compute_90,code=compute_90"),
    ("sm_100", "arch=compute_100,code=sm_100"),
]


class CudaCompiler:
    """nvcc, and what it can do."""

    def __init__(self, nvcc: str) -> None:
        self.nvcc = nvcc
        host = _words("CXX")
        self.command = [nvcc, *(["-ccbin", host[0]] if len(host) == 1 else [])]

    @staticmethod
    def find() -> CudaCompiler | None:
        """The compiler; None, and a line that says why, if the extension is not to be built."""
        wanted = os.environ.get("SPARSE_KERNELS_CUDA", "")
        if wanted not in ("", "0", "1"):
            raise CompileError(f"SPARSE_KERNELS_CUDA must be 0 or 1, got {wanted!r}")
        if wanted == "0":
            return None
        if not wanted and _words("SPARSE_KERNELS_SANITIZE"):
            print("sparse-kernels: building with sanitizers: without the CUDA kernels")
            return None
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home, "bin")))
        problem = "nvcc was not found"
        if nvcc:
            compiler = CudaCompiler(nvcc)
            if compiler._works():
                return compiler
            problem = f"{nvcc} cannot build a program with the CUDA runtime"
        if wanted == "1":
            raise CompileError(f"SPARSE_KERNELS_CUDA=1, but {problem}")
        print(f"sparse-kernels: {problem}: without the CUDA kernels")
        return None

    def _works(self) -> bool:
        """Whether headers and static library of the runtime are there."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(
                "#include <cuda_runtime.h>\n"
                "int main() { int n; return cudaGetDeviceCount(&n) != cudaSuccess; }"
            )
            command = [*self.command, "-cudart", "static", str(path), "-o", str(path) + ".out"]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def targets(self) -> list[str]:
        """The flags of `CUDA_TARGETS`, as far as this nvcc knows them."""
        known = subprocess.run(
            [self.nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False
        ).stdout.split()
        # The list leaves out the architecture-specific variants.
        return [flag for name, flag in CUDA_TARGETS if name.rstrip("a") in known]


def _words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def _compile_jobs(compiler: Compiler) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """``(source, flags)`` of each file in link order, and the flags of the link."""
    import pybind11

    common, link = list(COMMON_FLAGS), []
    if not compiler.accepts("int main() { return 0; }", ["-std=c++17"], link=True):
        raise CompileError(
            f"{shlex.join(compiler.command)} cannot build a C++17 program ({compiler.describe()})"
        )

    openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
    if compiler.accepts(openmp, ["-fopenmp"], link=True):
        common.append("-fopenmp")
        link.append("-fopenmp")
    else:
        print("sparse-kernels: the compiler has no OpenMP: the CPU kernels will use one thread")

    instruction_sets = []
    for name, flags, statement in INSTRUCTION_SETS:
        if compiler.accepts(
            f"#include <immintrin.h>\nvoid probe(float* p) {{ {statement} }}", flags
        ):
            instruction_sets.append((name, flags))
            common.append(f"-DSK_HAVE_{name.upper()}")
        elif platform.machine().lower() in ("x86_64", "amd64"):
            print(f"sparse-kernels: the compiler does not know {name}: built without its kernels")

    sanitizers = os.environ.get("SPARSE_KERNELS_SANITIZE", "")
    if "undefined" in sanitizers:
        # The wider instruction sets take minutes with this one.
        instruction_sets = [(name, flags) for name, flags in instruction_sets if name == "avx2"]
        common = [flag for flag in common if not flag.startswith("-DSK_HAVE_AVX512")]
    if sanitizers:
        common += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
        common.append(f"-fsanitize={sanitizers}")
        link.append(f"-fsanitize={sanitizers}")

    includes = [
        f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())
    ]
    portable = sorted(
        path.name for path in (ROOT / "csrc/cpu").glob("*.cpp") if not path.name.startswith("isa_")
    )
    # The order matters: of an inline function of the standard library that several files emit, the
    # linker keeps the first, which must be one that the processor of every caller can run.
    jobs = [("csrc/bindings.cpp", [*common, *includes])]
    jobs += [(f"csrc/cpu/{name}", common) for name in (*portable, "isa_baseline.cpp")]
    jobs += [(f"csrc/cpu/isa_{name}.cpp", [*common, *flags]) for name, flags in instruction_sets]
    return jobs, link


def _cuda_jobs(cuda: CudaCompiler) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """``(source, flags)`` of each file of the CUDA extension, and the flags of the link."""
    import pybind11

    includes = [
        f"-isystem{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())
    ]
    kernels = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    for target in cuda.targets():
        kernels += ["-gencode", target]
    jobs = [("csrc/cuda/bindings_cuda.cpp", [*COMMON_FLAGS, *includes])]
    jobs += [
        (f"csrc/cuda/{path.name}", kernels) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))
    ]
    # The runtime is linked statically and its names stay inside: PyTorch brings another one.
    return jobs, ["-cudart", "static", "-Xlinker", "--exclude-libs", "-Xlinker", "ALL"]


def _ninja_file(
    compiler: Compiler,
    cuda: CudaCompiler | None,
    jobs: list[tuple[str, list[str]]],
    link: list[str],
    target: str,
) -> str:
    """The text of a build.ninja for a folder two levels below ``ROOT``.

    With ``cuda`` its compiler takes the ``.cu`` files, and links.
    """

    def command(words: list[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    shared = (
        ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    )
    lines = [
        f"cxx = {command(compiler.command)}",
        "rule compile",
        "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = $cxx {command(shared)} $in -o $out {command([*link, *compiler.link_flags])}",
    ]
    if cuda is not None:
        lines[-1] = f"  command = {command(cuda.command)} -shared $in -o $out {command(link)}"
        lines += [
            "rule compile_cuda",
            f"  command = {command(cuda.command)} $flags -MMD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
        ]
    objects = []
    for source, flags in jobs:
        kernels = source.endswith(".cu")
        objects.append(f"{source}.o" if kernels else Path(source).with_suffix(".o").as_posix())
        lines.append(
            f"build {objects[-1]}: {'compile_cuda' if kernels else 'compile'} ../../{source}"
        )
        lines.append(
            f"  flags = {command(flags if kernels else [*flags, *compiler.language_flags])}"
        )
    lines.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    """Compiles the extensions with ninja; the objects stay in ``build/`` for the next time."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda = CudaCompiler.find()
        if self.cuda is None:
            chosen = self.distribution.ext_modules or []
            self.extensions = [ext for ext in chosen if ext.name != CUDA_EXTENSION]

    def build_extension(self, ext: Extension) -> None:
        import ninja

        if sys.platform == "win32":
            raise CompileError(
                "sparse-kernels does not build on Windows yet: use WSL, Linux or macOS"
            )
        compiler = Compiler()
        print(f"sparse-kernels: compiling with {compiler.describe()}")
        cuda = self.cuda if ext.name == CUDA_EXTENSION else None
        jobs, link = _compile_jobs(compiler) if cuda is None else _cuda_jobs(cuda)

        target = f"{ext.name}.so"
        tags = f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / (tags if cuda is None else f"cuda-{tags}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_ninja_file(compiler, cuda, jobs, link, target))

        environment = dict(os.environ)
        oldest_macos = sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET")
        if oldest_macos:
            environment.setdefault("MACOSX_DEPLOYMENT_TARGET", str(oldest_macos))
        command = [str(Path(ninja.BIN_DIR, "ninja")), "-C", str(folder)]
        command += ["-j", str(self.parallel or os.cpu_count() or 1)]
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            raise CompileError(f"compiling {ext.name} failed; the compiler's messages are above")

        installed = Path(self.get_ext_fullpath(ext.name))
        installed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target, installed)


class BuildPython(build_py):
    """Starts from an empty folder: a module that was renamed must not live on in the next wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def _files(*patterns: str) -> list[str]:
    paths = [path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


setup(
    ext_modules=[
        Extension(
            "_sparse_kernels_cpu", sources=_files("*.cpp", "cpu/*.cpp"), depends=_files("cpu/*.h")
        ),
        Extension(
            CUDA_EXTENSION,
            sources=_files("cuda/*.cpp", "cuda/*.cu"),
            depends=_files("cuda/*.h", "cuda/*.cuh"),
        ),
    ],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
