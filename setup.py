"""Build the compiled kernel where a C++ compiler is there; an install without one falls back to numpy."""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildKernel(build_ext):
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


setup(
    ext_modules=[
        Extension(
            "pocketrec._kernel",
            ["src/pocketrec/_kernel.cpp", "src/pocketrec/_adam.cpp"],
            depends=[f"src/pocketrec/{name}.cpp" for name in ("_screen", "_tower", "_transform", "_trellis")],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernel},
)
