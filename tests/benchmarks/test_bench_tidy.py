"""Rules about the shape of the benchmarks: which way their imports go. Beside test_tidy.py, which has those for all sources."""

import ast
from pathlib import Path

from sources import dotted, each, needs_of, parse, python_files

# Packages and programs from the bottom up: a package may import only itself, and lower layers.
LAYERS = (
    {"measure"},
    {"rivals"},
    {"workloads"},
    {"gpu", "deepspeed_engines", "frameworks", "object_store", "scaling", "sharded", "simulation", "tiers"},
    {"gpu_report"},
    {"plot", "run"},
)


def test_packages_import_only_what_they_stand_on() -> None:
    height_of = {name: height for height, layer in enumerate(LAYERS) for name in layer}
    breaches = []
    for module, needs in needs_of("bench").items():
        for need in (name for name in needs if "." in name):
            own, other = module.split(".")[1], need.split(".")[1]
            if own != other and height_of[other] >= height_of[own]:
                breaches.append(f"{module} imports {need}")
    assert breaches == []


@each(python_files("bench", "examples"))
def test_no_program_changes_where_modules_are_found(path: Path) -> None:
    assert [node.lineno for node in ast.walk(parse(path)) if dotted(node) == "sys.path"] == []
