"""The packages of ckpt/: which may import which, and what of them is public."""

import importlib
from pathlib import Path

from places import ROOT
from sources import each, imports, python_files
from test_tidy import PUBLIC_MODULES

# Packages and modules of ckpt/ from the bottom up: each may import only from lower layers, and from itself.
PACKAGE_LAYERS = (
    {"fence_hooks"},
    {"collector", "devices", "errors", "optimizers", "quantities", "safetensors_layout", "torch_private"},
    {"device_check", "fence", "options", "safetensors_header", "state_dicts", "storage"},
    {"device_modes", "metrics"},
    {"coordinator", "directory", "plan"},
    {"remote"},
    {"drain", "loading"},
    {"sharded"},
    {"formats", "restore"},
    {"saving"},
    {"commit"},
    {"session", "tiers"},
    {"bundles", "checkpointer", "dcp_checkpointer"},
    {"dcp", "names"},
    {"upkeep"},
    {"conversion"},
    {"cli"},
    {"__main__"},
)

ERRORS = {
    *("CancelledError", "CaptureError", "CheckpointError", "ClosedError", "CorruptError", "DeadlineError"),
    *("DeviceError", "FailedSavesError", "ForkedError", "InUseError", "MismatchError", "NotACheckpointError"),
    *("PeerError", "SkippedError", "StorageError", "SupersededError", "UnsupportedError"),
}

# What users and adapters may rely on. A name that goes from here breaks their programs; one that comes must be kept.
PUBLIC_NAMES = {
    "ckpt": {
        *ERRORS,
        *("BundleCheckpointer", "Checkpointer", "Options", "PendingSave", "SaveStats", "Tier"),
        *("check_devices", "fence", "load", "load_into", "save"),
    },
    "ckpt.coordinator": {"Coordinator", "make_coordinator"},
    "ckpt.dcp": {
        *("DcpCheckpointer", "ItemFiles", "ItemWriter", "StagedTensors", "VerifiedFile"),
        *("is_named_part", "publish_metadata", "read_metadata"),
    },
    "ckpt.drain": {"DrainStatus", "status"},
    "ckpt.errors": ERRORS,
    "ckpt.formats": set(),
    "ckpt.metrics": {
        *("MetricsSink", "SaveRecord", "callback", "figures", "name_run", "opentelemetry", "prometheus", "textfile"),
    },
    "ckpt.names": {
        *(
            "carry_over",
            "hidden_directory",
            "make_directory",
            "name_directory",
            "remove",
            "remove_abandoned",
            "replace_link",
            "retire",
        ),
    },
    "ckpt.optimizers": {"load_state"},
    "ckpt.options": {"Options"},
    "ckpt.quantities": {"parse_duration", "parse_size"},
    "ckpt.state_dicts": {"is_plain"},
}


@each([path for path in python_files("ckpt") if path != ROOT / "ckpt" / "__init__.py"])
def test_packages_import_from_lower_layers(path: Path) -> None:
    layer_of = {name: height for height, layer in enumerate(PACKAGE_LAYERS) for name in layer}
    own = path.relative_to(ROOT / "ckpt").with_suffix("").parts[0]
    assert own in layer_of, f"give {own} its place in PACKAGE_LAYERS"
    found = [(f"{module}.{name}".split(".")[1], line) for module, name, line in imports(path) if module.split(".")[0] == "ckpt"]
    others = [(name, line) for name, line in found if name not in (own, "_native")]
    assert [f"line {line}: {name}" for name, line in others if layer_of.get(name, len(layer_of)) >= layer_of[own]] == []


def test_no_module_of_a_package_is_marked_as_private() -> None:
    """An underscore would say that the others are public. What is public is listed above."""
    modules = [path for path in python_files("ckpt") if path.name not in ("__init__.py", "__main__.py")]
    assert [path.name for path in modules if path.name.startswith("_")] == []


def test_what_is_public_is_known() -> None:
    found = {}
    for name in PUBLIC_NAMES:
        module = importlib.import_module(name)
        own = {key for key, value in vars(module).items() if getattr(value, "__module__", "") == name}
        found[name] = {*getattr(module, "__all__", [key for key in own if not key.startswith("_")])}
    assert found == PUBLIC_NAMES and PUBLIC_NAMES.keys() == {"ckpt", *PUBLIC_MODULES} - {"ckpt.integrations"}


def test_packages_import_nothing_by_themselves() -> None:
    """So that one module of a package costs no other. But for those that are public, whose names they gather."""
    packages = [
        path
        for path in (ROOT / "ckpt").glob("*/__init__.py")
        if path.parent.name not in ("coordinator", "drain", "integrations", "metrics")
    ]
    assert packages and [path.parent.name for path in packages if list(imports(path))] == []
