"""Builds the extensions with ninja: each source has its own flags, which setuptools cannot give.

CUDA is built for the GPUs that nvidia-smi shows, with ``SPARSE_KERNELS_CUDA=1`` for `CUDA_ARCHS` or
``SPARSE_KERNELS_CUDA_ARCHS``. Also read: ``CUDA_HOME CXX CPPFLAGS CXXFLAGS LDFLAGS``.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Arithmetic as written, except that multiply and add may fuse; of -O3 what the kernels gain from.
FLAGS = ["-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
FLAGS += ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fpeel-loops", "-fvect-cost-model=dynamic"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi2"]
HEADERS = ["-isystem" + sysconfig.get_path("include"), "-isystem" + pybind11.get_include()]
SETS = {  # lowest first: the flags of csrc/cpu/isa_<name>.cpp
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
CUDA_ARCHS = "8.0;9.0a;10.0;9.0+PTX"


def words(*variables: str) -> list[str]:
    return [word for name in variables for word in shlex.split(os.environ.get(name, ""))]


def output(*command: str) -> str:
    """What the command prints; nothing if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def macros(cxx: list[str], *flags: str) -> str:
    """What the compiler defines under these flags; nothing if it refuses them."""
    user = words("CPPFLAGS", "CXXFLAGS")
    return output(*cxx, "-std=c++17", *flags, *user, "-dM", "-E", "-xc++", os.devnull)


def find_cuda() -> tuple[str, list[str]] | None:
    """nvcc and its -gencode flags; None if CUDA is not built."""
    asked = os.environ.get("SPARSE_KERNELS_CUDA", "")
    if asked not in ("", "0", "1"):
        raise CompileError(f"SPARSE_KERNELS_CUDA must be 0 or 1, got {asked!r}")
    if asked == "0" or not (asked or output("nvidia-smi", "-L")):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    problem = "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder"
    if nvcc:
        if output(nvcc, "-E", "-x", "cu", os.devnull):  # it includes the runtime's header
            return nvcc, cuda_targets(nvcc, asked == "1")
        problem = f"{nvcc} cannot compile: install the CUDA toolkit's headers (cudart-dev)"
    if asked:
        raise CompileError(f"SPARSE_KERNELS_CUDA=1, but {problem}")
    print(f"sparse-kernels: a GPU is visible, but {problem}; building only the CPU kernels")
    return None


def cuda_targets(nvcc: str, every: bool) -> list[str]:
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    visible = "" if every else ";".join(sorted(set(output(*query).split())))
    asked = os.environ.get("SPARSE_KERNELS_CUDA_ARCHS") or visible.replace("9.0", "9.0a")
    known, flags = output(nvcc, "--list-gpu-code"), []
    for arch in (asked or CUDA_ARCHS).split(";"):
        match = re.fullmatch(r"(\d+)\.?(\d)(a?)(\+PTX)?", arch)
        if not match:
            raise CompileError(f'SPARSE_KERNELS_CUDA_ARCHS must be like "8.0;9.0a", got {asked!r}')
        number, code = match[1] + match[2], "compute" if match[4] else "sm"
        if asked or f"sm_{number}" in known:  # an old nvcc lacks the newest of the default
            flags.append(f"-gencode=arch=compute_{number}{match[3]},code={code}_{number}{match[3]}")
    return flags


def cpu_commands(cxx: list[str], sources: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The command of each source, and that of the link."""
    if not macros(cxx):
        raise CompileError(
            f"sparse-kernels needs a C++17 compiler, and {shlex.join(cxx)} is none: install one "
            "(apt install g++, dnf install gcc-c++, xcode-select --install) or name it in CXX"
        )
    # A compiler for other processors refuses the flags of these.
    sets = [name for name in SETS if f"__{name.upper()}" in macros(cxx, *SETS[name])]
    command = cxx + FLAGS + [f"-DSK_HAVE_{name.upper()}" for name in sets]
    if macros(cxx, "-fopenmp", "-include", "omp.h"):
        command.append("-fopenmp")
    else:
        print(f"sparse-kernels: {shlex.join(cxx)} has no OpenMP: the kernels use one thread")
    # The linker keeps the first copy of an inline function: the plainest set comes first.
    plain = [source for source in sources if "isa_" not in source or "baseline" in source]
    commands = dict.fromkeys(plain, command)
    commands.update({f"csrc/cpu/isa_{name}.cpp": command + SETS[name] for name in sets})
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    return commands, [*command, *shared.split(), *words("LDFLAGS")]


def cuda_commands(cxx: list[str], sources: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    nvcc, targets = CUDA  # type: ignore[misc]
    host = [word for word in words("CXX") if not word.startswith("-")][-1:]  # "ccache g++ -m64"
    device = [nvcc, *(f"-ccbin={name}" for name in host), *targets, *FLAGS[:3]]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
    # The names of the runtime stay inside: PyTorch brings another one.
    link = [nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs", "-Xlinker=ALL"]
    return {name: device if name.endswith("u") else cxx + FLAGS for name in sources}, link


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        find_commands = cuda_commands if ext.name.endswith("cuda") else cpu_commands
        commands, link = find_commands(words("CXX") or ["c++"], ext.sources)
        kept = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"  # -e keeps nothing
        folder = f"{kept if self.editable_mode else self.build_temp}/{ext.name}"
        library = os.path.abspath(self.get_ext_fullpath(ext.name))
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/build.ninja", "w") as file:
            graph = ninja.Writer(file)
            graph.rule("compile", "$cmd -MMD -MF $out.d -c $in -o $out", None, "$out.d", deps="gcc")
            graph.rule("link", f"{ninja.escape(shlex.join(link))} $in -o $out")
            for source, command in reversed(commands.items()):  # the longest first
                extra = [] if source.endswith(".cu") else words("CPPFLAGS", "CXXFLAGS")
                extra += HEADERS if "bindings" in source else []
                cmd = {"cmd": ninja.escape(shlex.join(command + extra))}
                graph.build(f"{source}.o", "compile", os.path.abspath(source), variables=cmd)
            graph.build(library, "link", [f"{source}.o" for source in commands])
        # An isolated build has ninja on the PATH only, any other beside Python.
        if subprocess.call([shutil.which("ninja") or f"{ninja.BIN_DIR}/ninja", "-C", folder]):
            raise CompileError(f"compiling {ext.name} failed; the compiler's messages are above")


CUDA = find_cuda()
EXTENSIONS = [Extension("_sparse_kernels_cpu", sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")))]
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
EXTENSIONS += [Extension("_sparse_kernels_cuda", CUDA_SOURCES)] if CUDA else []
for stale in glob("build/lib*"):
    shutil.rmtree(stale)  # a module that was renamed must not live on in the next wheel
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExtension})
