"""Build the compiled library where a C++ compiler is there; an install without one falls back to numpy."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Compiles a plain shared library (called through ctypes): no Python symbol to export, flags by compiler."""

    def build_extension(self, ext: Extension) -> None:
        """Add the compiler's own flags."""
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/O2", "/std:c++17"]
        else:
            ext.extra_compile_args = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno", "-pthread"]
            ext.extra_link_args = ["-pthread"]
        super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Functions carry their own export attribute."""
        return []


SOURCES = Path("src/pocketrec/native/src")

setup(
    ext_modules=[
        Extension(
            "pocketrec.native._library",
            [str(SOURCES / name) for name in ("exports.cpp", "adam.cpp")],
            depends=sorted(str(path) for kind in ("*.h", "*.inl") for path in SOURCES.glob(kind)),
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
)
