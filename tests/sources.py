"""What the rules about sources look at: the files, their syntax trees, and who imports whom."""

import ast
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def core_files(*suffixes: str) -> list[Path]:
    """Without what others have written."""
    own = (path for path in (ROOT / "csrc").rglob("*") if "third_party" not in path.parts)
    return sorted(path for path in own if path.suffix in suffixes)


def core_name(path: Path) -> str:
    """As in an #include, without the suffix."""
    return path.relative_to(ROOT / "csrc").with_suffix("").as_posix()


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return parse_text(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def parse_text(text: str, file: str) -> ast.Module:
    """The tree of the text of a file.

    CPython before 3.13 counts the depth of a tree under construction once for all threads (gh-106905): where another
    thread or a finalizer parses at the same moment, as printing a traceback does, it raises SystemError for good source.
    """
    for _ in range(10):
        with contextlib.suppress(SystemError):
            return ast.parse(text, filename=file)
    raise AssertionError(f"{file} was not parsed in ten attempts")


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def dotted(node: ast.AST) -> str:
    """The dotted name that an expression spells, or "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "integrations":
        parts = ("ckpt", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def only_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST, inside_functions: bool) -> Iterator[ast.AST]:
    """Every node that runs: what only a type checker reads is left out, the bodies of functions if asked to."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt) and only_for_type_checkers(child):
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            continue
        yield child
        yield from statements(child, inside_functions)


def imports(path: Path, inside_functions: bool = True) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) for each import; the name is "" for `import module`."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in statements(parse(path), inside_functions):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield module, alias.name, node.lineno


def own_imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that `path` imports."""
    found = set()
    for module, name, _ in imports(path):
        if (module, name) == ("ckpt", "_native"):
            continue  # the compiled core: the bottom of everything
        target = f"{module}.{name}" if f"{module}.{name}" in modules else module
        if target in modules:
            found.add(target)
    return found - {module_name(path)}


def needs_of(*folders: str) -> dict[str, set[str]]:
    """Each module of some folders, and those of them that it imports."""
    modules = {module_name(path): path for path in python_files(*folders)}
    return {name: own_imports(path, set(modules)) for name, path in modules.items()}
