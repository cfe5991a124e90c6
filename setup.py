"""Builds the extensions with ninja: each source has its own flags, which setuptools cannot give.

CUDA is built for the GPU that nvidia-smi shows; ``SPARSE_KERNELS_CUDA=1`` builds it for all of
`CUDA_ARCHS` or those of ``SPARSE_KERNELS_CUDA_ARCHS`` ("8.0;9.0a"), ``=0`` never. Other variables:
``CXX``, ``CPPFLAGS``, ``CXXFLAGS``, ``LDFLAGS``, ``CUDA_HOME``, ``SPARSE_KERNELS_SANITIZE``.
"""

import os
import re
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
# No rule of arithmetic is relaxed, except that multiply and add may fuse.
FLAGS = ["-std=c++17", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mbmi2"
# Lowest first: csrc/cpu/isa_<name>.cpp, its flags, and a function that needs them.
INSTRUCTION_SETS = [
    ("avx2", "-mavx2 -mfma -mf16c -mbmi2", "__m256 f(__m256 a)", "256_fmadd_ps(a, a, a)"),
    ("avx512", AVX512, "__m512 f(__m512 a)", "512_add_ps(a, a)"),
    (
        "avx512bf16",
        f"{AVX512} -mavx512bf16",
        "__m512 f(__m512 a, __m512bh b)",
        "512_dpbf16_ps(a, b, b)",
    ),
]
# And a program that needs each.
OPTIONAL_FLAGS = {
    "-fopenmp": "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }",
}
COMPILE_RULE = """rule run
  command = $cmd -MMD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d"""
CUDA_ARCHS = "8.0;9.0a;10.0;9.0+PTX"


def words(variable: str) -> list[str]:
    return shlex.split(os.environ.get(variable, ""))


def quoted(command: list[str]) -> str:
    """For a ninja file."""
    return shlex.join(command).replace("$", "$$")


def output(*command: str) -> str | None:
    """What the command prints; None if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def builds(command: list[str], source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(source)
        return output(*command, f"{folder}/probe.cpp", "-o", f"{folder}/probe") is not None


def find_compiler() -> list[str]:
    configured = (sysconfig.get_config_var("CXX") or "").split()[:1]
    candidates = [words("CXX")] if words("CXX") else [configured, ["c++"], ["g++"], ["clang++"]]
    flags = ["-std=c++17", *words("CPPFLAGS"), *words("CXXFLAGS"), *words("LDFLAGS")]
    for compiler in filter(None, candidates):
        if shutil.which(compiler[0]) and builds([*compiler, *flags], "int main() { return 0; }"):
            return compiler
    tried = shlex.join(words("CXX")) or "c++, g++, clang++"
    raise CompileError(
        f"sparse-kernels needs a C++17 compiler, and {tried} cannot build a program: install one "
        "(apt install g++, dnf install gcc-c++, xcode-select --install) or name it in CXX"
    )


def find_cuda() -> tuple[str, list[str]] | None:
    """nvcc and its -gencode flags; None if CUDA is not built."""
    asked = os.environ.get("SPARSE_KERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise CompileError(f"SPARSE_KERNELS_CUDA must be 0 or 1, got {asked!r}")
    visible = not asked and not words("SPARSE_KERNELS_SANITIZE") and output("nvidia-smi", "-L")
    if asked != "1" and not visible:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    problem = "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder"
    if nvcc:
        source = "#include <cuda_runtime.h>\nint main() { return cudaDeviceSynchronize(); }"
        if builds([nvcc, "-cudart", "static"], source):
            return nvcc, cuda_targets(nvcc, asked == "1")
        problem = f"{nvcc} cannot build a program: install the CUDA toolkit's headers (cudart-dev)"
    if asked == "1":
        raise CompileError(f"SPARSE_KERNELS_CUDA=1, but {problem}")
    print(f"sparse-kernels: a GPU is visible, but {problem}; building only the CPU kernels")
    return None


def cuda_targets(nvcc: str, every: bool) -> list[str]:
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = "" if every else ";".join(sorted(set((output(*query) or "").split())))
    archs = os.environ.get("SPARSE_KERNELS_CUDA_ARCHS") or found.replace("9.0", "9.0a")
    known = (output(nvcc, "--list-gpu-code") or "").split()
    flags = []
    for arch in re.split(r"[;,\s]+", (archs or CUDA_ARCHS).strip("; ")):
        match = re.fullmatch(r"(\d+)\.?(\d)(a?)(\+PTX)?", arch)
        if not match:
            raise CompileError(f'SPARSE_KERNELS_CUDA_ARCHS must be like "8.0;9.0a", got {archs!r}')
        number = match[1] + match[2]
        if f"sm_{number}" in known:  # the list leaves out the architecture-specific variants
            code = "compute" if match[4] else "sm"
            flags += ["-gencode", f"arch=compute_{number}{match[3]},code={code}_{number}{match[3]}"]
        elif archs:
            raise CompileError(f"{nvcc} knows no architecture {arch}: install a newer CUDA toolkit")
    return flags


class BuildExtension(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.cxx, self.cuda = find_compiler(), find_cuda()
        if self.cuda is None:
            chosen = self.distribution.ext_modules or []
            self.extensions = [ext for ext in chosen if not ext.name.endswith("cuda")]

    def accepts(self, flags: list[str], source: str) -> bool:
        user = [*words("CPPFLAGS"), *words("CXXFLAGS"), *words("LDFLAGS")]
        return builds([*self.cxx, "-std=c++17", "-Werror", *user, *flags], source)

    def cpu_flags(self) -> tuple[list[str], dict[str, list[str]]]:
        """Flags of every CPU source and of the link, and those of each instruction set's own."""
        common = list(FLAGS)
        for flag, source in OPTIONAL_FLAGS.items():
            if self.accepts([flag], source):
                common.append(flag)
            else:
                print(f"sparse-kernels: {self.cxx[0]} does not know {flag}: built without it")
        sanitize, sets = os.environ.get("SPARSE_KERNELS_SANITIZE", ""), {}
        for name, switches, head, body in INSTRUCTION_SETS:
            flags = switches.split()
            # The undefined-behaviour sanitizer takes minutes for the wider sets.
            source = f"#include <immintrin.h>\n{head} {{ return _mm{body}; }}\nint main() {{}}"
            if (name == "avx2" or "undefined" not in sanitize) and self.accepts(flags, source):
                sets[f"csrc/cpu/isa_{name}.cpp"] = flags
                common.append(f"-DSK_HAVE_{name.upper()}")
        if sanitize:
            common += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
            common.append(f"-fsanitize={sanitize}")
        return common, sets

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11

        cuda = self.cuda if ext.name.endswith("cuda") else None
        special: dict[str, list[str]] = {}
        if cuda:
            common, link = FLAGS, [cuda[0], "-shared", "-cudart", "static"]
            # The names of the runtime stay inside: PyTorch brings another one.
            link += ["-Xlinker", "--exclude-libs", "-Xlinker", "ALL"]
        else:
            common, special = self.cpu_flags()
            shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
            link = [*self.cxx, *shared.split(), *common, *words("LDFLAGS")]
        headers = (sysconfig.get_path("include"), pybind11.get_include())
        lines, objects, edges = [COMPILE_RULE], [], []
        for source in ext.sources:
            if "isa_" in source and "baseline" not in source and source not in special:
                continue
            command = [*self.cxx, *common, *special.get(source, [])]
            if cuda and source.endswith(".cu"):
                host = words("CXX") if len(words("CXX")) == 1 else []
                command = [cuda[0], *(["-ccbin", *host] if host else []), *cuda[1]]
                command += ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler"]
                command.append("-fPIC,-fvisibility=hidden,-Wall")
            else:
                if "bindings" in source:
                    command += ["-O1", *(f"-isystem{path}" for path in headers)]
                command += [*words("CPPFLAGS"), *words("CXXFLAGS")]
            objects.append(f"{source}.o")
            edges.append(f"build {objects[-1]}: run ../../{source}\n  cmd = {quoted(command)}")
        lines += reversed(edges)  # the longest are the last in the order of the link
        lines += ["rule link", f"  command = {quoted(link)} $in -o $out"]
        lines += [f"build {ext.name}.so: link {' '.join(objects)}", ""]
        tag = f"{ext.name}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / tag
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text("\n".join(lines))
        # An isolated build has it on the PATH only; a Python that was not activated beside itself.
        run = [shutil.which("ninja") or f"{ninja.BIN_DIR}/ninja", "-C", str(folder)]
        run += ["-j", str(self.parallel or os.cpu_count() or 1)]
        target = os.environ.get("MACOSX_DEPLOYMENT_TARGET")
        target = target or str(sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET") or "")
        environment = {**os.environ, **({"MACOSX_DEPLOYMENT_TARGET": target} if target else {})}
        if subprocess.run(run, env=environment, check=False).returncode:
            raise CompileError(f"compiling {ext.name} failed; the compiler's messages are above")
        installed = Path(self.get_ext_fullpath(ext.name))
        installed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / f"{ext.name}.so", installed)


class BuildPython(build_py):
    """Starts from an empty folder: a module that was renamed must not live on in the next wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


def files(*patterns: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for g in patterns for p in sorted(ROOT.glob(f"csrc/{g}"))]


# In the order of the link: of an inline function of the standard library the linker keeps the first
# copy, which must be one that every processor can run. "isa_baseline" comes before the wider ones.
PLAIN = files("bindings.cpp", "cpu/[!i]*.cpp", "cpu/isa_baseline.cpp")
CPU = [*PLAIN, *(f"csrc/cpu/isa_{name}.cpp" for name, *_ in INSTRUCTION_SETS)]
setup(
    ext_modules=[
        Extension("_sparse_kernels_cpu", CPU, depends=files("cpu/*.h")),
        Extension(
            "_sparse_kernels_cuda",
            files("cuda/*.cpp", "cuda/*.cu"),
            depends=files("cuda/*.h", "cuda/*.cuh"),
        ),
    ],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
