"""Build of the compiled parts of ``torch_ext``. Metadata and tools live in pyproject.toml.

There are three, of the same objects: ``_C``, behind ``torch.ops.torch_ext``; ``libtorch_ext_runtime.so``, the encoder
for programs without torch, with a C interface; and ``_runtime``, which is that interface for Python.

``_C`` uses LibTorch's stable ABI only: one ``cp310-abi3`` wheel per architecture serves every Python from 3.10 and
every torch from 2.10. It is built for the ABI baseline of the architecture; faster kernels are chosen at run time.

Native build, with torch already installed::

    pip install "setuptools>=77" wheel ninja
    pip install --no-build-isolation .

Cross build, for example for aarch64 on x86-64 (needs only ``g++-aarch64-linux-gnu``; torch's headers are the same)::

    _PYTHON_HOST_PLATFORM=linux-aarch64 pip wheel . --no-build-isolation --no-deps -w dist

``CC``, ``CXX``, ``LDSHARED`` and ``LDCXXSHARED`` override the compiler that is derived from the platform.
With ``TORCH_EXT_WERROR=1`` warnings are errors, as in ``.ci/run``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
CSRC = Path("torch_ext") / "csrc"

# The extension whose name and suffix are those of a plain shared library.
RUNTIME = "torch_ext.libtorch_ext_runtime"

# What each shows to the outside; the ops are registered by static constructors, and need to show nothing.
EXPORTS = {RUNTIME: "exports_runtime.map", "torch_ext._runtime": "exports_python.map"}

# The oldest libtorch whose stable ABI the library may use: 2.10.
TORCH_TARGET_VERSION = "0x020a000000000000"

# ELF e_machine of the architectures that a wheel may be built for.
ELF_MACHINE = {"x86_64": 62, "aarch64": 183}

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"torch-ext: building needs setuptools>=77, found {setuptools.__version__}: "
        'run pip install "setuptools>=77" wheel ninja'
    )

# Metadata alone (pip's and uv's resolvers ask for it) does not need torch; only compiling does.
COMPILES = not {"egg_info", "sdist", "dist_info", "clean", "--version", "--help"} & set(sys.argv[1:])

try:
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths
except ModuleNotFoundError as error:
    if COMPILES:
        sys.exit(
            f"torch-ext: cannot build, since {error.name} is not installed in the build environment: install "
            "torch>=2.10, "
            'then run pip install "setuptools>=77" wheel ninja && pip install --no-build-isolation .'
        )
    from setuptools.command.build_ext import build_ext as BuildExtension

    def include_paths() -> list[str]:
        """Stands in for torch's when only metadata is asked for."""
        return []

    library_paths = include_paths


def target_machine() -> str:
    """The architecture that is built for, such as ``aarch64``; ``_PYTHON_HOST_PLATFORM`` decides when it is set."""
    return sysconfig.get_platform().rsplit("-", 1)[-1]


def is_cross() -> bool:
    """Whether the result is for another architecture than this machine's."""
    return sys.platform == "linux" and target_machine() != os.uname().machine


def set_cross_compiler() -> None:
    """Fill in the compiler variables of a cross build that the caller left out."""
    triple = f"{target_machine()}-linux-gnu"
    os.environ.setdefault("CXX", f"{triple}-g++")
    os.environ.setdefault("CC", f"{triple}-gcc")
    os.environ.setdefault("LDSHARED", f"{os.environ['CC']} -shared")
    os.environ.setdefault("LDCXXSHARED", f"{os.environ['CXX']} -shared")
    if shutil.which(shlex.split(os.environ["CXX"])[0]) is None:
        sys.exit(
            f"torch-ext: no compiler {os.environ['CXX']} for {target_machine()}: install "
            f"g++-{triple.replace('_', '-')} or set CXX"
        )


def link_stub(directory: Path) -> None:
    """Write an empty ``libtorch_cpu.so`` of the target's architecture.

    The linker needs it for the name only (DT_NEEDED): symbols are bound when torch loads the library.

    Args:
        directory: where the stub goes; made if it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        *shlex.split(os.environ["CXX"]),
        *("-shared", "-nostdlib", "-fPIC", "-x", "c", os.devnull),
        *("-Wl,-soname,libtorch_cpu.so", "-o", str(directory / "libtorch_cpu.so")),
    ]
    subprocess.run(command, check=True)


def check_library(path: Path, needs_torch: bool) -> None:
    """Stop unless the library is for the target's architecture, and names libtorch_cpu.so as needed or does not.

    Without that, ``torch.ops.load_library`` would fail later with a misleading "undefined symbol".

    Args:
        path: the library that was just linked.
        needs_torch: whether it holds ops.
    """
    image = path.read_bytes()
    (machine,) = struct.unpack_from("<H", image, 18)
    if machine != ELF_MACHINE.get(target_machine(), machine):
        sys.exit(
            f"torch-ext: {path} is for ELF machine {machine}, expected {target_machine()}: is CXX the right compiler?"
        )
    if (b"\0libtorch_cpu.so\0" in image) != needs_torch:
        does = "does not name" if needs_torch else "names"
        sys.exit(f"torch-ext: {path} {does} libtorch_cpu.so as needed: check LDCXXSHARED and LDFLAGS")


class BuildLibrary(BuildExtension):
    """torch's own build (ninja when it is installed), plus cross builds and a check of the result."""

    def finalize_options(self) -> None:
        """Keep the objects of each architecture apart, and those of an editable installation for the builds to come."""
        super().finalize_options()
        if self.editable_mode:  # setuptools would compile in a temporary folder
            self.build_temp = os.path.join("build", f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        if self.build_temp and target_machine() not in self.build_temp:
            self.build_temp += f"-{target_machine()}"

    def build_extensions(self) -> None:
        """Choose where libtorch_cpu.so is linked from, build, and check."""
        if is_cross():
            stub = ROOT / self.build_temp / "stub"
            link_stub(stub)
            libraries = [str(stub)]
            # The flags that this machine's Python was built with may name its CPU.
            for name in ("compiler_so", "compiler_so_cxx", "linker_so", "linker_so_cxx"):
                command = getattr(self.compiler, name, None)
                if isinstance(command, list):
                    command[:] = [
                        arg for arg in command if not arg.startswith(("-march=", "-mtune=", "-mcpu=", "-m64"))
                    ]
        else:
            libraries = library_paths()
        for extension in self.extensions:
            # After the objects; --no-as-needed, since nothing but DT_NEEDED is wanted from it.
            needed = [*(f"-L{directory}" for directory in libraries)]
            needed += ["-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed"]
            if extension.name == RUNTIME:
                needed = ["-pthread", "-Wl,-soname,libtorch_ext_runtime.so", "-Wl,-z,defs"]
            elif extension.name == "torch_ext._runtime":
                runtime = Path(self.get_ext_fullpath(RUNTIME)).resolve()
                needed = [f"-L{runtime.parent}", "-ltorch_ext_runtime", "-Wl,-rpath,$ORIGIN"]
            exports = EXPORTS.get(extension.name, "exports.map")
            extension.extra_link_args = [
                *needed,
                *("-Wl,--gc-sections", f"-Wl,--version-script={ROOT / CSRC / 'compat' / exports}"),
            ]
            # ninja sees changed sources, but setuptools would keep an old library if a source was removed.
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        super().build_extensions()
        for extension in self.extensions:
            if sys.platform == "linux":
                check_library(Path(self.get_ext_fullpath(extension.name)), needs_torch=extension.name == "torch_ext._C")

    def build_extension(self, extension: setuptools.Extension) -> None:
        """Give the runtime the objects that the ops were made of just before."""
        if extension.name == RUNTIME:
            extension.extra_objects = self.compiler.object_filenames(sources("core"), output_dir=self.build_temp)
        super().build_extension(extension)

    def get_ext_filename(self, name: str) -> str:
        """Name the runtime as programs link it."""
        if name in (RUNTIME, RUNTIME.rpartition(".")[2]):
            return str(Path(*name.split("."))) + ".so"
        return str(super().get_ext_filename(name))


class Build(build):
    """A build that starts from an empty ``build/lib*``, so that no removed file and no other architecture's gets in."""

    def run(self) -> None:
        """Clear, then build."""
        shutil.rmtree(ROOT / self.build_lib, ignore_errors=True)
        super().run()


def sources(part: str) -> list[str]:
    """The C++ files of a part; those of other architectures guard themselves by macros.

    Args:
        part: ``core``, which knows nothing of torch or Python, ``ops``, ``runtime`` or ``python``.
    """
    os.chdir(ROOT)
    found: dict[str, list[str]] = {"core": [], "ops": [], "runtime": [], "python": []}
    for path in sorted(CSRC.rglob("*.cpp")):
        folder = path.relative_to(CSRC).parts[0]
        found[{"registration.cpp": "ops"}.get(folder, folder if folder in found else "core")].append(str(path))
    if not all(found.values()) and COMPILES:
        sys.exit(f"torch-ext: no C++ sources under {CSRC}: is this a complete checkout?")
    return found[part]


def extension(name: str, files: list[str], include: list[str]) -> setuptools.Extension:
    """One compiled part of the package; all are compiled with the same flags."""
    return setuptools.Extension(
        name,
        sources=files,
        # compat/ comes first: its sys/single_threaded.h lowers the glibc that the library needs.
        include_dirs=[str(ROOT / CSRC / "compat"), str(ROOT / CSRC), *include],
        extra_compile_args={
            "cxx": [
                *("-O3", "-std=c++20", "-ffp-contract=fast", "-g0", "-fvisibility=hidden"),
                *("-fvisibility-inlines-hidden", "-ffunction-sections", "-fdata-sections"),
                *("-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"),
                f"-ffile-prefix-map={ROOT}/=",  # Messages name files relative to the checkout.
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
                *(["-Werror"] if os.environ.get("TORCH_EXT_WERROR") == "1" else []),
            ]
        },
        py_limited_api=True,
        language="c++",
    )


if is_cross() and COMPILES:
    set_cross_compiler()

setuptools.setup(
    # An allow-list: nothing else is ever installed into site-packages.
    packages=["torch_ext", "torch_ext.encoder", "torch_ext.encoder.huggingface"],
    package_data={"torch_ext": ["py.typed", "_runtime.pyi", "include/*.h"]},
    include_package_data=False,
    ext_modules=[
        extension("torch_ext._C", sources("core") + sources("ops"), include_paths()),
        extension(RUNTIME, sources("runtime"), []),
        extension("torch_ext._runtime", sources("python"), []),
    ],
    cmdclass={"build": Build, "build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    zip_safe=False,
)
