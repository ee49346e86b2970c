"""Compiles the native core. Everything else about the package is in pyproject.toml.

The environment variable LAZYCKPT_BUILD selects the kind of build:

    release   (the default) optimised, no assertions, no fault hooks: what a wheel holds
    dev       assertions and fault hooks are compiled in, every warning is an error: what the tests run on

The objects of each kind are kept apart under build/, and one is compiled again only if its source, a header or this
file is newer. LAZYCKPT_BUILD_JOBS limits the number of compilers that run at once (default: one per core).
"""

import os
import sys
import sysconfig
from glob import glob

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

SOURCES = sorted(glob("csrc/**/*.cc", recursive=True))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))

XXHASH = ["-isystem", "csrc/third_party/xxhash"]  # not ours to mend

COMPILE_FLAGS = {
    "release": ["-O2", "-DNDEBUG", "-fvisibility-inlines-hidden"],
    "dev": [
        *("-O2", "-g", "-UNDEBUG", "-fvisibility-inlines-hidden", "-DLAZYCKPT_FAULT_HOOKS=1"),
        *("-Wall", "-Wextra", "-Werror"),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),  # not ours to mend
    ],
}

KIND = os.environ.get("LAZYCKPT_BUILD") or "release"
if KIND not in COMPILE_FLAGS:
    raise SystemExit(f"LAZYCKPT_BUILD is {KIND!r}; it must be one of: {', '.join(COMPILE_FLAGS)}")


def is_stale(object_path: str, source_path: str) -> bool:
    built = os.path.getmtime(object_path)
    return any(os.path.getmtime(path) >= built for path in (source_path, "setup.py", *HEADERS))


class BuildNative(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = f"build/native-{KIND}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.force = True  # always link: a module left by the other kind of build may look new enough


native = Pybind11Extension(
    "ckpt._native",
    SOURCES,
    depends=HEADERS,
    include_dirs=["csrc"],
    cxx_std=17,
    extra_compile_args=["-pthread", *XXHASH, *COMPILE_FLAGS[KIND]],
    extra_link_args=["-pthread", "-ldl"],  # dlopen: a library of its own before glibc 2.34
)

with ParallelCompile("LAZYCKPT_BUILD_JOBS", needs_recompile=is_stale):
    setup(ext_modules=[native], cmdclass={"build_ext": BuildNative})
