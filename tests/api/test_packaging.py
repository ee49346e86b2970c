"""The package as a user meets it: an sdist, wheels built from it and from a checkout, and an editable install.

Everything is built in copies, without network, from the packages that are already installed, of objects that the checkout
has: those of a development build. Of a release build one file is compiled; with `-m slow` wheels are those of a release.
"""

import email
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from places import ROOT
from support import patience

MISSING = [name for name in ("pip", "setuptools", "pybind11") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"not installed, and needed to build: {', '.join(MISSING)}", allow_module_level=True)
if shutil.which("c++") is None and shutil.which(os.environ.get("CXX", "g++")) is None:
    pytest.skip("no C++ compiler is installed", allow_module_level=True)

SOURCES = ("ckpt", "integrations", "csrc", "tests", "docs", "examples", "bench", ".ci")
FILES = (
    *("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "constraints.txt"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
)
OLDEST_GLIBC = 34  # 2.34; CONTRIBUTING.md, Wheels
COMMAND_TIMEOUT_S = patience(600)

# What a plain machine has: the runtime libraries of C and C++ and the loader.
PLAIN_LIBRARIES = re.compile(
    r"lib(stdc\+\+|c\+\+|c\+\+abi|gcc_s|c|m|pthread|dl|rt)\.so(\.\d+)*|ld-linux.*\.so\.\d+|ld-musl.*|libc\.musl.*"
)

ROUND_TRIP = """
import json, sys
import torch
import ckpt
import ckpt.integrations

path = sys.argv[1]
state = {"weight": torch.arange(100_000, dtype=torch.float32).reshape(100, 1000), "step": 7, "empty": torch.empty(0)}
ckpt.save(state, path).result(timeout=60)
for loaded in (ckpt.load(path), torch.load(path, weights_only=True)):
    assert loaded.keys() == state.keys() and loaded["step"] == 7 and loaded["empty"].shape == (0,)
    assert torch.equal(loaded["weight"], state["weight"])
print(json.dumps({
    "ckpt": ckpt.__file__,
    "integrations": ckpt.integrations.__file__,
    "native": ckpt._native.__file__,
    "native_names": dir(ckpt._native),
    "version": ckpt.__version__,
}))
"""


HOOKS = "csrc/bindings/files.cc"  # binds the fault hooks
# What has been preprocessed stands for what would be compiled, which takes far longer; all other objects are empty, and nothing
# is linked. Notes what it is called with.
COMPILER = """#!{python}
import os, subprocess, sys

arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
if {only!r} in arguments:
    sys.exit(subprocess.call([{real!r}, *["-E" if each == "-c" else each for each in arguments]]))
open(arguments[arguments.index("-o") + 1], "w").close()
"""

TRAINING = """
import hashlib, sys
import torch
import ckpt

torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
optimizer = torch.optim.AdamW(model.parameters())
directory, steps = sys.argv[1], int(sys.argv[2])
with ckpt.Checkpointer(directory, keep=2) as checkpointer:
    found = checkpointer.restore(into={"model": model, "optimizer": optimizer})
    for step in range(found.step + 1 if found else 1, steps + 1):
        batch = torch.randn(8, 256, generator=torch.Generator().manual_seed(step))
        (model(batch) - batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        pending = checkpointer.save(step, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if step % 5 == 0:
            pending.result(60)
            print("durable", step, flush=True)
whole = hashlib.sha256()
for parameter in model.parameters():
    whole.update(parameter.detach().numpy().tobytes())
    whole.update(optimizer.state[parameter]["exp_avg_sq"].numpy().tobytes())
print("resumed from", found.step if found else 0, "and ended in", whole.hexdigest())
"""


class Installed(NamedTuple):
    """What a fresh interpreter reports about an installed package, after a save and a load with it."""

    ckpt: Path
    integrations: Path
    native: Path
    native_names: list[str]
    version: str


class Compiler(NamedTuple):
    """Stands for the real one; see COMPILER."""

    path: Path
    log: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"CC": str(self.path), "CXX": str(self.path)}


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "LAZYCKPT_BUILD")}
    clean |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def copy_tree(to: Path) -> Path:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in FILES:
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, to / name)
    return to


def carry_objects(source: Path, to: Path) -> None:
    """Compiled objects keep their times, so the build in `to` uses those that are newer than its sources."""
    for objects in source.glob("build/native-*"):
        shutil.copytree(objects, to / "build" / objects.name, dirs_exist_ok=True)


def build_wheel(tree: Path, kind: str, to: Path, **environment: str) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", to, tree)
    run(*pip, cwd=tree.parent, **({} if kind == "release" else {"LAZYCKPT_BUILD": kind}), **environment)
    (wheel,) = to.glob("lazyckpt-*.whl")
    return wheel


def install_wheel(wheel: Path, to: Path) -> Path:
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", to, wheel, cwd=to.parent)
    return to


def try_out(python: object, cwd: Path, **environment: str) -> Installed:
    cwd.mkdir()
    output = run(python, "-c", ROUND_TRIP, cwd / "state.pt", cwd=cwd, **environment)
    found = json.loads(output.splitlines()[-1])
    paths = {key: Path(found.pop(key)).resolve() for key in ("ckpt", "integrations", "native")}
    return Installed(**paths, **found)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packaging").resolve()


@pytest.fixture(scope="module")
def tree(place: Path) -> Path:
    return copy_tree(place / "checkout")


@pytest.fixture(scope="module")
def sdist(tree: Path, place: Path) -> Path:
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", script, place, cwd=tree)
    (archive,) = place.glob("lazyckpt-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path, place: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked")
    (top,) = (place / "unpacked").iterdir()
    return top


@pytest.fixture(scope="module", params=["dev", pytest.param("release", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def wheel_from_sdist(unpacked: Path, kind: str, place: Path) -> Path:
    carry_objects(ROOT, unpacked)
    return build_wheel(unpacked, kind, place / f"wheel-from-sdist-{kind}")


@pytest.fixture(scope="module")
def installed(wheel_from_sdist: Path, kind: str, place: Path) -> Installed:
    site = install_wheel(wheel_from_sdist, place / f"{kind}-site")
    return try_out(sys.executable, place / f"{kind}-run", PYTHONPATH=str(site))


@pytest.fixture(scope="module")
def compiler(place: Path) -> Compiler:
    made = Compiler(place / "compiler", place / "commands")
    real = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    made.path.write_text(COMPILER.format(python=sys.executable, log=str(made.log), only=HOOKS, real=real))
    made.path.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def editable(place: Path) -> Installed:
    tree = copy_tree(place / "editable")
    carry_objects(ROOT, tree)
    environment = place / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    # The environment sees the packages of this one, but none of the finders of this one's editable installs.
    (site,) = environment.glob("lib/python*/site-packages")
    host = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "host.pth").write_text("\n".join(host), encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-build-isolation", "--no-deps", "-e", tree, cwd=place, LAZYCKPT_BUILD="dev")
    return try_out(python, place / "editable-run")


def modules_in_tree() -> set[str]:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ckpt").rglob("*.py")}
    adapters = {path.relative_to(ROOT).as_posix() for path in (ROOT / "integrations").rglob("*.py")}
    return found | {f"ckpt/{name}" for name in adapters}


def test_sdist_holds_what_a_build_and_a_test_run_need(unpacked: Path, tree: Path) -> None:
    def files(top: Path) -> set[str]:
        relative = (path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())
        return {name for name in relative if not re.match(r"(build/|PKG-INFO|setup\.cfg|[^/]*\.egg-info/)", name)}

    assert files(unpacked) == files(tree)


def test_wheel_holds_the_modules_and_nothing_else(wheel_from_sdist: Path) -> None:
    with zipfile.ZipFile(wheel_from_sdist) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licenses = [name for name in wheel.namelist() if name.endswith("/licenses/LICENSE")]
        of_others = [name for name in wheel.namelist() if name.endswith("/third_party/xxhash/LICENSE")]
    assert {name for name in names if name.endswith(".py")} == modules_in_tree()
    others = {name for name in names if not name.endswith((".py", ".pyi", "/py.typed"))}
    assert [bool(re.fullmatch(r"ckpt/_native\.[\w-]+\.so", name)) for name in others] == [True]
    assert "ckpt/py.typed" in names and len(licenses) == 1 and len(of_others) == 1


def test_metadata_says_what_pip_needs_to_know(wheel_from_sdist: Path, installed: Installed) -> None:
    with zipfile.ZipFile(wheel_from_sdist) as wheel:
        (metadata,) = (wheel.read(name) for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        (scripts,) = (wheel.read(name) for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    found = email.message_from_bytes(metadata)
    assert (found["Name"], found["Version"], found["Requires-Python"]) == ("lazyckpt", installed.version, ">=3.10")
    needed = [line for line in found.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [re.split(r"[>= ]", line)[0] for line in needed] == ["torch", "psutil"]
    assert b"ckpt = ckpt.cli.main:main" in scripts


def test_the_changes_of_this_version_are_told(installed: Installed) -> None:
    told = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert told[0] == installed.version


def test_wheel_from_sdist_works(installed: Installed, wheel_from_sdist: Path, kind: str, place: Path) -> None:
    site = place / f"{kind}-site"
    assert installed.ckpt == site / "ckpt" / "__init__.py"
    assert installed.integrations == site / "ckpt" / "integrations" / "__init__.py"
    assert installed.native.parent == site / "ckpt"
    assert wheel_from_sdist.name.startswith(f"lazyckpt-{installed.version}-")


def test_wheel_from_checkout_is_the_same(tree: Path, wheel_from_sdist: Path, place: Path, compiler: Compiler) -> None:
    """All but the native module, which is not built again."""
    wheel = build_wheel(tree, "dev", place / "wheel-from-checkout", **compiler.environment)
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(wheel_from_sdist) as theirs:
        assert sorted(ours.namelist()) == sorted(theirs.namelist())
        for name in ours.namelist():
            if not name.endswith((".so", "/RECORD")):
                assert ours.read(name) == theirs.read(name), name


def test_editable_install_works(editable: Installed, place: Path) -> None:
    tree = place / "editable"
    assert editable.ckpt == tree / "ckpt" / "__init__.py"
    assert editable.integrations == tree / "integrations" / "__init__.py"
    assert editable.native.parent == tree / "ckpt"


def test_fault_hooks_are_in_development_builds_only(installed: Installed, kind: str, editable: Installed) -> None:
    hooks = {"set_fault", "clear_faults", "set_crash_point", "override_io_limits"}
    assert hooks <= set(editable.native_names)
    assert hooks <= set(installed.native_names) if kind == "dev" else hooks.isdisjoint(installed.native_names)


def test_a_release_build_compiles_without_fault_hooks(editable: Installed, place: Path, compiler: Compiler) -> None:
    """The file that binds them; of the others it is seen with what they would be compiled."""
    tree = copy_tree(place / "release-flags")
    compiler.log.unlink(missing_ok=True)
    to = ("--build-lib", place / "no-module")
    run(sys.executable, "setup.py", "build_ext", *to, cwd=tree, **compiler.environment)
    commands = [line.split() for line in compiler.log.read_text().splitlines()]
    compiled = {command[command.index("-c") + 1]: command for command in commands if "-c" in command}
    assert compiled.keys() == {path.relative_to(tree).as_posix() for path in (tree / "csrc").rglob("*.cc")}
    for command in compiled.values():
        assert {"-O2", "-DNDEBUG", "-fvisibility-inlines-hidden"} <= set(command) and "-UNDEBUG" not in command
        assert not any("FAULT_HOOKS" in argument for argument in command)
    (made,) = tree.glob(f"build/native-release-*/{HOOKS}".removesuffix(".cc") + ".o")
    assert b"set_fault" in editable.native.read_bytes() and b'"set_fault"' in (tree / HOOKS).read_bytes()
    assert b"pybind11" in made.read_bytes() and b"set_fault" not in made.read_bytes()


def test_native_module_needs_only_what_a_plain_machine_has(installed: Installed, editable: Installed) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed (package binutils)")
    for native in (installed.native, editable.native):
        output = run("readelf", "--wide", "--dynamic", native, cwd=native.parent)
        needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output)
        assert needed, output
        assert [name for name in needed if not PLAIN_LIBRARIES.fullmatch(name)] == []
        asked_for = {path for paths in re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", output) for path in paths.split(":")}
        assert asked_for <= set(paths_that_python_links_with())


@pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="auditwheel is not installed")
def test_machines_as_old_as_the_guide_says_can_load_it(wheel_from_sdist: Path) -> None:
    """Built here."""
    if int(platform.libc_ver()[1].split(".")[1]) > 36:
        pytest.skip("the C library of this machine is newer than that of Debian 12, and asks for more")
    output = run(sys.executable, "-m", "auditwheel", "show", wheel_from_sdist, cwd=wheel_from_sdist.parent)
    found = re.search(r'consistent with\s+the\s+following\s+platform\s+tag:\s+"manylinux_2_(\d+)_', output)
    assert found is not None, output
    assert int(found[1]) <= OLDEST_GLIBC, output


@pytest.mark.slow
def test_killed_and_resumed_where_there_is_no_compiler(installed: Installed, kind: str, place: Path) -> None:
    paths = {"PYTHONPATH": str(place / f"{kind}-site"), "PATH": str(place / "nothing")}
    straight = run(sys.executable, "-c", TRAINING, place / f"{kind}-straight", "60", cwd=place, **paths).splitlines()[-1]
    command = [sys.executable, "-c", TRAINING, str(place / f"{kind}-killed"), "60"]
    with subprocess.Popen(command, cwd=place, env=os.environ | paths, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "durable 5\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL
    resumed = run(*command, cwd=place, **paths).splitlines()[-1]
    assert re.match(r"resumed from ([5-9]|[1-5]\d) and", resumed), resumed
    assert resumed.split()[-1] == straight.split()[-1] and "resumed from 0" in straight


def paths_that_python_links_with() -> list[str]:
    """Where a Python that was built with a shared library of its own, far from the usual places, lets modules look for it."""
    return re.findall(
        r"-rpath[=,]([^\s,]+)", " ".join(str(sysconfig.get_config_var(name)) for name in ("LDSHARED", "LDCXXSHARED"))
    )


def test_native_module_exports_only_its_entry(installed: Installed) -> None:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed (package binutils)")
    output = run("nm", "-D", "--defined-only", installed.native, cwd=installed.native.parent)
    # The weak ones are instances of the standard library's templates, which every C++ library exports.
    strong = [line.split()[-1] for line in output.splitlines() if line.split()[-2] in "TDBR"]
    assert [name for name in strong if name not in ("_init", "_fini")] == ["PyInit__native"]
