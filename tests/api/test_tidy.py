"""Rules about the shape of the source: which way imports go, who may touch the disk, and how large things may grow.

They are checked on the text of the sources, so a breach is found before it has consequences.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT, TESTS
from sources import (
    core_files,
    core_name,
    dotted,
    each,
    imports,
    module_name,
    name_of,
    needs_of,
    parse,
    python_files,
)
from support import patience

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70

# Folders of the core from the bottom up: a file may include only headers of folders in lower layers, and of its own.
CORE_LAYERS = (
    {"base"},
    {"os", "memory"},
    {"cuda"},
    {"format"},
    {"jobs", "pickle", "reading"},
    {"staging"},
    {"engine"},
    {"bindings"},
)

# Beside the names in ckpt.__all__; test_layers.py says what is public in them. All other modules are private.
PUBLIC_MODULES = {
    *("ckpt.coordinator", "ckpt.dcp", "ckpt.drain", "ckpt.errors", "ckpt.formats", "ckpt.integrations", "ckpt.metrics"),
    *("ckpt.names", "ckpt.optimizers", "ckpt.options", "ckpt.quantities", "ckpt.state_dicts"),
}
# The one package that changes what is on disk.
STORAGE_FOLDER = "ckpt/storage/"
# Imported only by the module that needs them, at the moment it needs them.
HEAVY_MODULES = ("torch.distributed", "mpi4py", "deepspeed", "lightning", "pytorch_lightning")


LIBRARY = python_files("ckpt", "integrations")
ALL_PYTHON = [ROOT / "setup.py", *LIBRARY, *python_files("bench", "examples", "tests")]
TEST_CPP = [
    path
    for folder in ("native", "fake_cuda", "strict_cuda", "proxy_cuda")
    for path in sorted((ROOT / "tests" / folder).glob("*.[ch]*"))
]
ALL_CPP = [*core_files(".cc", ".h"), *TEST_CPP]


# ---- Python: which way imports go ------------------------------------------------------------------------------------


def public_names() -> set[str]:
    for node in parse(ROOT / "ckpt" / "__init__.py").body:
        if isinstance(node, ast.Assign) and [dotted(target) for target in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    raise AssertionError("ckpt/__init__.py assigns no literal __all__")


def test_public_names_are_public() -> None:
    assert [name for name in public_names() if name.startswith("_") and name != "__version__"] == []


@each(python_files("integrations"))
def test_integrations_use_only_public_names(path: Path) -> None:
    public = public_names()
    allowed = {*public, *(module.removeprefix("ckpt.") for module in PUBLIC_MODULES)}
    breaches = []
    for module, name, line in imports(path):
        inside = module in PUBLIC_MODULES or module.startswith("ckpt.integrations.")
        if module.startswith("ckpt.") and not inside:
            breaches.append(f"line {line}: imports {module}")
        elif module == "ckpt" and name not in {"", *allowed}:
            breaches.append(f"line {line}: {name} is not in ckpt.__all__")
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute) and dotted(node.value) == "ckpt" and node.attr not in allowed:
            breaches.append(f"line {node.lineno}: ckpt.{node.attr} is not in ckpt.__all__")
    assert not breaches


def test_the_core_knows_no_adapter() -> None:
    needs = needs_of("ckpt", "integrations")
    core = [module_name(path) for path in python_files("ckpt")]
    assert [name for name in core if any(need.startswith("ckpt.integrations") for need in needs[name])] == []


@pytest.mark.parametrize("folders", [("ckpt", "integrations"), ("bench",)], ids=" and ".join)
def test_imports_go_one_way(folders: tuple[str, ...]) -> None:
    waiting = needs_of(*folders)
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting, "these modules import each other in a circle, or one that does"


@each(python_files("ckpt"))
def test_no_heavy_import_at_the_top_of_a_module(path: Path) -> None:
    heavy = re.compile("|".join(rf"{re.escape(name)}(\.|$)" for name in (*HEAVY_MODULES, "ckpt.integrations")))
    found = [(f"{module}.{name}", line) for module, name, line in imports(path, inside_functions=False)]
    assert [f"line {line}: {name}" for name, line in found if heavy.match(name)] == []


def test_importing_ckpt_imports_nothing_heavy() -> None:
    script = "import json, sys, torch; before = {*sys.modules}; import ckpt; print(json.dumps([*{*sys.modules} - before]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=patience(120))
    assert done.returncode == 0, done.stderr
    brought = json.loads(done.stdout)
    assert "ckpt" in brought
    heavy = re.compile(
        r"(torch\.distributed|mpi4py|deepspeed|lightning|matplotlib|tqdm|numpy\.testing|ckpt\.integrations)(\.|$)"
    )
    assert [name for name in brought if heavy.match(name)] == []


# ---- Python: what the library never does -----------------------------------------------------------------------------

PROGRAM_CALLS = {"print", "exit", "quit", "sys.exit", "os._exit", "os.abort"}
LOGGING_CALLS = {"logging.basicConfig", "addHandler", "removeHandler", "setLogger", "logging.disable"}
OS_CALLS = {
    *("rename", "renames", "replace", "remove", "unlink", "rmdir", "removedirs", "link", "symlink", "truncate"),
    *("open", "write", "pwrite", "pwritev", "writev", "ftruncate", "fsync", "fdatasync", "posix_fallocate", "sync"),
    *("mkdir", "makedirs", "sendfile", "copy_file_range"),
}
PATH_METHODS = {
    *("rename", "unlink", "rmdir", "mkdir", "touch", "write_text", "write_bytes", "symlink_to", "hardlink_to"),
}
SHUTIL_CALLS = {"rmtree", "move", "copy", "copy2", "copyfile", "copyfileobj", "copytree"}


def calls(path: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            method = f"?.{node.func.attr}" if isinstance(node.func, ast.Attribute) else ""
            yield node, dotted(node.func) or method


def opens_for_writing(call: ast.Call, name: str) -> bool:
    position = {"open": 1, "io.open": 1}.get(name, 0)  # path.open(mode) has no path argument
    modes = [call.args[position]] if len(call.args) > position else []
    modes += [keyword.value for keyword in call.keywords if keyword.arg == "mode"]
    # A mode that is computed may be any mode.
    return any(not isinstance(mode, ast.Constant) or re.search("[wax+]", str(mode.value)) for mode in modes)


def changes_storage(call: ast.Call, name: str) -> bool:
    base, _, last = name.rpartition(".")
    if base == "os":
        return last in OS_CALLS
    if base == "shutil":
        return last in SHUTIL_CALLS
    if last == "open":
        return opens_for_writing(call, name)
    if last == "replace":  # str.replace() and dataclasses.replace() never have exactly one argument
        return bool(base) and len(call.args) == 1 and not call.keywords
    return bool(base) and last in PATH_METHODS


@each(LIBRARY)
def test_only_one_package_changes_storage(path: Path) -> None:
    found = [f"line {call.lineno}: {name}" for call, name in calls(path) if changes_storage(call, name)]
    assert name_of(path).startswith(STORAGE_FOLDER) or not found


PROGRAM = ("ckpt/__main__.py", "ckpt/cli/")  # no part of the library


@each([path for path in LIBRARY if not name_of(path).startswith(PROGRAM)])
def test_the_library_neither_prints_nor_exits_nor_sets_up_logging(path: Path) -> None:
    found = []
    for call, name in calls(path):
        if name in LOGGING_CALLS or name.rpartition(".")[2] in LOGGING_CALLS or name in PROGRAM_CALLS:
            found.append(f"line {call.lineno}: {name}")
    for node in ast.walk(parse(path)):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if raised and dotted(getattr(raised, "func", raised)) in ("SystemExit", "KeyboardInterrupt"):
            found.append(f"line {node.lineno}: raises an exit")
    assert not found


def sample_calls(source: str, directory: Path) -> list[str]:
    path = directory / "sample.py"
    path.write_text(source, encoding="utf-8")
    return [name for call, name in calls(path) if changes_storage(call, name)]


def test_the_storage_check_itself(tmp_path: Path) -> None:
    caught = "os.fsync(f)\nopen(p, 'wb')\nopen(p, mode=m)\np.open('a')\nshutil.rmtree(p)\np.replace(q)\nf().unlink()"
    assert len(sample_calls(caught, tmp_path)) == caught.count("\n") + 1
    passed = "open(p)\nopen(p, 'rb')\np.open()\ntext.replace('a', 'b')\nreplace(options, a=1)\nos.stat(p)\nrename(a)"
    assert sample_calls(passed, tmp_path) == []


PRIVATE_TORCH = {"ckpt/torch_private.py", "integrations/torch/torch_private.py"}
PRIVATE_ATTRIBUTES = {
    *("_cdata", "_version", "_backward_hooks", "_untyped_storage", "_typed_storage", "_pickle_storage_type", "_size"),
    *("_get_default_store", "_metadata", "_modules", "_parameters", "_buffers", "_load_state_dict_pre_hooks"),
    *("_load_from_state_dict", "_optimizer_load_state_dict_pre_hooks", "_weak_ref", "_base", "_is_view"),
}


def private_torch_names(path: Path) -> list[str]:
    found = [f"line {line}: {module}.{name}" for module, name, line in imports(path) if is_private_torch(f"{module}.{name}")]
    for node in ast.walk(parse(path)):
        if not isinstance(node, ast.Attribute) or (isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        if node.attr in PRIVATE_ATTRIBUTES or is_private_torch(dotted(node)):
            found.append(f"line {node.lineno}: {node.attr}")
    return found


def is_private_torch(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "torch" and any(part.startswith("_") and not part.endswith("__") for part in rest)


@each([path for path in LIBRARY if name_of(path) not in PRIVATE_TORCH])
def test_private_names_of_torch_are_in_one_module(path: Path) -> None:
    assert private_torch_names(path) == []


@each(core_files(".cc", ".h"))
def test_the_core_is_told_private_names(path: Path) -> None:
    assert re.findall(r'"_[a-z]\w*"', read_cpp(path)) == []


def test_the_check_for_private_names_itself(tmp_path: Path) -> None:
    path = ROOT / "ckpt" / "torch_private.py"
    assert len(private_torch_names(path)) >= 6
    assert (
        is_private_torch("torch._utils.x")
        and is_private_torch("torch.storage._x")
        and not is_private_torch("torch.__version__")
    )


# ---- versions of torch -----------------------------------------------------------------------------------------------


def test_tested_versions_are_told_alike() -> None:
    table = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d{4}-\d\d-\d\d \| (\d+)\.(\d+)\.(\d+) \| 3\.\d+ \| [\d,]+ \| \d+ \| \d+ \|", table, re.MULTILINE)
    tested = sorted(tuple(map(int, row)) for row in rows)
    named = re.search(r"^# Newest torch tested: (\d+)\.(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert named is not None and tested
    assert tested[-1] >= tuple(map(int, named.groups())) and (2, 15, 0) in tested
    source = (ROOT / "ckpt" / "torch_private.py").read_text(encoding="utf-8")
    newest = f"{tested[-1][0]}.{tested[-1][1]}"
    assert re.search(rf'^TESTED = "2\.6 to {re.escape(newest)}"', source, re.MULTILINE)


# ---- what a process that only copies needs ---------------------------------------------------------------------------

WITHOUT_TORCH = {
    *("drain", "cli", "directory", "metrics", "remote", "storage", "upkeep"),
    *("collector", "errors", "quantities", "safetensors_layout"),
}


WITH_TORCH = ("ckpt/cli/export.py", "ckpt/cli/diff.py")  # commands that read tensors
LIGHT = python_files(*(f"ckpt/{folder}" for folder in ("drain", "cli", "directory", "metrics", "remote", "storage", "upkeep")))


@each([path for path in LIGHT if name_of(path) not in WITH_TORCH])
def test_the_drain_needs_no_torch(path: Path) -> None:
    found = []
    for module, name, line in imports(path):
        first, *rest = f"{module}.{name}".split(".")
        if first == "torch" or (first == "ckpt" and rest[0] not in {*WITHOUT_TORCH, "_native"}):
            found.append(f"line {line}: {module}.{name}")
    assert found == []


# ---- C++ -------------------------------------------------------------------------------------------------------------

# Comments, raw strings, strings and characters, and directives, in the order in which they can hide each other.
CPP_NOISE = re.compile(
    r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"'
    r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'|^[ \t]*\#(?:[^\n\\]|\\.)*",
    re.DOTALL | re.MULTILINE,
)

STORAGE_CALLS = (
    *("open", "openat", "openat2", "creat", "write", "pwrite", "pwrite64", "writev", "pwritev", "pwritev2"),
    *("read", "pread", "preadv", "msync", "sync", "syncfs", "fsync", "fdatasync", "sync_file_range"),
    *("fallocate", "posix_fallocate", "truncate", "ftruncate", "rename", "renameat", "renameat2", "link", "linkat"),
    *("unlink", "unlinkat", "remove", "mkdir", "rmdir", "stat", "fstat", "lstat", "statx", "statfs", "fstatfs"),
    *("io_uring_enter", "io_uring_setup", "copy_file_range", "sendfile"),
)
# Names too common to be recognised without the `::` that marks a call of the global function.
COMMON_NAMES = {"open", "read", "write", "link", "remove", "rename", "stat", "sync", "truncate", "statx"}
GLOBAL_CALL = re.compile(rf"(?<![\w>:])::({'|'.join(STORAGE_CALLS)})\s*\(")
PLAIN_CALL = re.compile(rf"(?<![\w.:>~])({'|'.join(name for name in STORAGE_CALLS if name not in COMMON_NAMES)})\s*\(")
STREAMS = re.compile(r"\b(fopen|fwrite|ofstream|ifstream|fstream|std::filesystem)\b")

WITH_PYTHON = {"bindings", "pickle"}  # folders of the core that talk to the interpreter
# Headers of what the core must not depend on.
FOREIGN_HEADERS = re.compile(r"(torch|ATen|c10|caffe2|cuda|cuda_runtime|nccl|Python)\b")
SCOPE = re.compile(r"\b(namespace|class|struct|union|enum|extern)\b")


def bare(text: str) -> str:
    """C++ text without comments, literals and directives, every line still at its place."""
    return CPP_NOISE.sub(lambda noise: "\n" * noise.group().count("\n"), text)


def read_cpp(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def included(path: Path) -> list[tuple[str, str]]:
    """(kind, name) of each #include; kind is `"` or `<`."""
    return re.findall(r'^[ \t]*#[ \t]*include[ \t]*(["<])([^">]+)[">]', read_cpp(path), re.MULTILINE)


@each(core_files(".cc", ".h"))
def test_core_includes_go_one_way(path: Path) -> None:
    layer_of = {name: height for height, layer in enumerate(CORE_LAYERS) for name in layer}
    folder = core_name(path).rpartition("/")[0]
    assert folder in layer_of, f"give {folder or path.name} its place in CORE_LAYERS"
    own = sorted(header for kind, header in included(path) if kind == '"')
    assert [header for header in own if not (ROOT / "csrc" / header).is_file()] == [], "they begin at csrc/"
    others = [(header, header.rpartition("/")[0]) for header in own]
    assert [header for header, other in others if other != folder and layer_of[other] >= layer_of[folder]] == []


def test_core_files_include_each_other_in_no_circle() -> None:
    waiting: dict[str, set[str]] = {}
    for path in core_files(".cc", ".h"):  # a header and its source are one part
        own = {header.removesuffix(".h") for kind, header in included(path) if kind == '"'}
        waiting.setdefault(core_name(path), set()).update(own - {core_name(path)})
    while ready := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in ready:
            del waiting[name]
    assert not waiting, "these include each other in a circle, or one that does"


@each(core_files(".cc", ".h"))
def test_core_depends_on_no_framework(path: Path) -> None:
    allowed = {"pybind11"} if path.parent.name in WITH_PYTHON else set()
    names = [name for kind, name in included(path) if kind == "<"]  # the others are our own: see above
    foreign = [name for name in names if FOREIGN_HEADERS.match(name)]
    assert foreign + [name for name in names if name.startswith("pybind11") and "pybind11" not in allowed] == []


def test_the_stress_program_takes_all_but_what_needs_python() -> None:
    left_out = re.search(r"^STRESS_SOURCES\s*:=\s*\$\(filter-out ([^,]*),", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert left_out is not None
    assert set(left_out[1].split()) == {f"csrc/{folder}/%" for folder in WITH_PYTHON}


@each([path for path in core_files(".cc", ".h") if core_name(path) not in ("os/file", "os/clone")])
def test_only_two_files_do_storage_system_calls(path: Path) -> None:
    text = bare(read_cpp(path))
    found = GLOBAL_CALL.findall(text) + STREAMS.findall(text)
    # In a header a bare name followed by `(` is a declaration.
    assert found + (PLAIN_CALL.findall(text) if path.suffix == ".cc" else []) == []


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """(first line, number of lines) of each function body that stands in a namespace or a class.

    It counts braces: what opens a namespace or a type is entered, any other brace is skipped as a whole, and is a
    function if a parenthesis stands before it.
    """
    text = bare(text)
    start = 0  # of the declaration that is being read
    body_depth = 0
    body_start = 0
    for brace in re.finditer("[{};]", text):
        mark, place = brace.group(), brace.start()
        if body_depth:
            body_depth += {"{": 1, "}": -1, ";": 0}[mark]
            if body_depth or re.match(r"\s*[,{]", text[place + 1 :]):  # the latter: a{1}, in a list of initializers
                continue
            header = text[body_start:place].lstrip()
            if "(" in header[: header.index("{")]:
                yield header.splitlines()[0], header.count("\n") + 1
        elif mark == "{":
            header = text[start:place]
            if "(" in header or not SCOPE.search(header):
                body_depth, body_start = 1, start
                continue
        start = place + 1
    assert body_depth == 0, "braces do not balance"


@each(ALL_CPP)
def test_cpp_functions_are_small(path: Path) -> None:
    assert [found for found in cpp_functions(read_cpp(path)) if found[1] > MAX_FUNCTION_LINES] == []


def test_the_cpp_checks_themselves() -> None:
    text = """
    #define OPEN(x) \\
        {
    namespace a { // } "
    struct B final : C { int x = 0; void f() const { if (x) { g('}'); } } };
    const char* const TABLE[] = { "}", R"(})" };
    template <typename T>
    auto h(T t) -> decltype(t()) {
        return [&] { return ::fsync(t); }() + 1'000'000; /* { */
    }
    B::B(int x) : a{x}, b(x), c{x} {
        f();
    }
    }  // namespace a
    """
    assert [(line.split("(")[0].strip(), size) for line, size in cpp_functions(text)] == [
        ("void f", 1),
        ("template <typename T>", 4),
        ("B::B", 3),
    ]
    assert GLOBAL_CALL.findall(bare(text)) == ["fsync"]
    assert GLOBAL_CALL.findall("File::open(x); ::open(x); return ::write(y);") == ["open", "write"]
    assert PLAIN_CALL.findall("file.fsync(x); a->fsync(x); File::fsync(x); fsync(x)") == ["fsync"]


# ---- where tests lie -------------------------------------------------------------------------------------------------

# All other folders bear the name of the package of ckpt/ that their tests look at.
TEST_FOLDERS = {"api", "benchmarks", "crash", "devices", "dist", "fault", "integrations"}


def test_tests_lie_in_folders() -> None:
    tests = [path for path in python_files("tests") if path.name.startswith("test_")]
    assert [name_of(path) for path in tests if path.parent.parent != TESTS] == []


def test_folders_of_tests_are_named_after_packages() -> None:
    packages = {path.parent.name for path in (ROOT / "ckpt").glob("*/__init__.py")}
    folders = {path.relative_to(TESTS).parts[0] for path in python_files("tests") if path.parent != TESTS}
    assert folders >= TEST_FOLDERS and folders - TEST_FOLDERS - packages == set()


def test_modules_of_tests_differ_in_name() -> None:
    """They import each other without their folders: see places.py."""
    names = Counter(path.name for path in python_files("tests"))
    assert [name for name, count in names.items() if count > 1] == []


# ---- size ------------------------------------------------------------------------------------------------------------


@each(ALL_PYTHON + ALL_CPP)
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@each(ALL_PYTHON)
def test_python_functions_are_small(path: Path) -> None:
    sizes = {
        f"line {node.lineno}: {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: size for name, size in sizes.items() if size > MAX_FUNCTION_LINES} == {}
