"""What this package uses of torch that torch does not promise to keep. Nothing else in it names any of that.

Each name is looked up here, and tried on something small before it is relied on, because a name may stay and mean something
else. Without it there is a public way, slower or with one safeguard less, and one warning says which: no checkpoint depends on
any of them. docs/compatibility.md lists them.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.storage import TypedStorage, UntypedStorage

from ckpt import _native, fence_hooks

logger = logging.getLogger("ckpt")

TESTED = "2.6 to 2.15"  # versions of torch, see docs/compatibility.md
_MISSING = object()
_warned: set[str] = set()


def find(path: str) -> Any:
    """What torch has under a dotted name, as in "_utils._rebuild_tensor_v2"; None if it has no such thing."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, _MISSING)
        if found is _MISSING:
            return None
    return found


def warn_once(what: str) -> None:
    """Says what is done differently because this torch is not as those that were tested."""
    if what not in _warned:
        _warned.add(what)
        logger.warning("torch %s differs from what was tested (%s): %s", torch.__version__, TESTED, what)


# ---- loading ---------------------------------------------------------------------------------------------------------


class Loader(NamedTuple):
    """The part of torch.load that comes after a file has been opened.

    Attributes:
        load: makes the object, given a reader of records and a map_location.
        only_weights: the module whose Unpickler refuses all but weights.
        noted: gives the sparse tensors that this thread has unpickled and not validated yet.
    """

    load: Callable[..., Any]
    only_weights: Any
    noted: Callable[[], list[torch.Tensor]]

    def __call__(self, reader: Any, location: Any, weights_only: bool, is_filled: bool) -> Any:
        """
        Args:
            is_filled: False: nobody is to look into sparse tensors, which have no contents yet. torch before 2.7 always does,
                later ones if `torch.sparse.check_sparse_tensor_invariants` is on, and from 2.15 for weights_only.
        """
        module = self.only_weights if weights_only else pickle
        # From 2.15: it is to validate all that comes from files that nobody vouches for.
        more: dict[str, Any] = {"encoding": "utf-8"}
        more |= {"weights_only": weights_only} if "weights_only" in inspect.signature(self.load).parameters else {}
        try:
            return self.load(reader, location, module if is_filled else self._without_validation(module), **more)
        except Exception:
            self.noted().clear()  # or the next load would trip over what this one has left there
            raise

    def _without_validation(self, module: Any) -> Any:
        noted = self.noted

        class Unpickler(module.Unpickler):
            def load(self) -> Any:
                before = len(noted())
                try:
                    return super().load()
                finally:
                    del noted()[before:]

        return _Module(Unpickler)


class _Module(NamedTuple):
    """What torch takes for a pickle module."""

    Unpickler: Any


def find_loader() -> Loader | None:
    load, only_weights = find("serialization._load"), find("_weights_only_unpickler")
    noted = find("_utils._get_sparse_tensors_to_validate")  # from 2.15, a list for each thread
    if noted is None and isinstance(kept := find("_utils._sparse_tensors_to_validate"), list):

        def noted() -> list[torch.Tensor]:
            return kept

    if load is None or noted is None or not hasattr(only_weights, "Unpickler"):
        return None
    return Loader(load, only_weights, noted)


# ---- loading into what is there --------------------------------------------------------------------------------------

_MODULE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_MODULE_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")
_OPTIMIZER_HOOKS = (
    *("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks"),
    *("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"),
)


def module_is_plain(module: torch.nn.Module) -> bool:
    """Whether nothing but torch decides what its part of a state dict is, and what becomes of that; not of modules below it.

    False too if that cannot be told.
    """
    given, base = type(module), torch.nn.Module
    methods = [getattr(getattr(given, name, None), "__module__", "") for name in _MODULE_METHODS]
    if vars(module).keys() & {*_MODULE_METHODS} or not all(name.startswith("torch.nn.") for name in methods):
        return False
    gives, takes = given.get_extra_state is not base.get_extra_state, given.set_extra_state is not base.set_extra_state
    return gives == takes and _has_none_of(_MODULE_HOOKS, module)


def optimizer_is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """As of a module."""
    given, base = type(optimizer), torch.optim.Optimizer
    plain = given.state_dict is base.state_dict and given.load_state_dict is base.load_state_dict
    patched = vars(optimizer).keys() & {"state_dict", "load_state_dict"}
    return plain and not patched and _has_none_of(_OPTIMIZER_HOOKS, optimizer)


def _has_none_of(hooks: tuple[str, ...], owner: object) -> bool:
    """False if one is not known to this torch."""
    return not any(getattr(owner, name, True) for name in hooks)


def copy_versions(state: object, copy: Any) -> None:
    """Gives a part of a module's state what the whole says of the versions of modules."""
    if (versions := getattr(state, "_metadata", None)) is not None:
        copy._metadata = versions


# ---- saving ----------------------------------------------------------------------------------------------------------


class Rebuilding(NamedTuple):
    """The functions that make tensors, which pickles name."""

    tensor: Any
    tensor_of_dtype: Any
    parameter: Any


@functools.cache
def rebuilding() -> Rebuilding | None:
    found = [find(f"_utils.{name}") for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")]
    return Rebuilding(*found) if all(map(_has_name, found)) else None


def _has_name(found: Any) -> bool:
    """Whether pickles can name it, as they can nothing that has been wrapped or made inside a function."""
    try:
        named = pickle.dumps(found, protocol=2)
        return named.startswith(b"\x80\x02c") and pickle.loads(named) is found
    except Exception:
        return False


def has_hooks(tensor: torch.Tensor) -> bool:
    """Of the kind that torch.save warns about.

    Raises:
        AttributeError: this torch does not tell.
    """
    return bool(tensor._backward_hooks)


def parts_of(storage: TypedStorage) -> tuple[UntypedStorage, str, int]:
    """Its memory, the name of the class that stands for it in pickles, and its number of elements."""
    try:
        return storage._untyped_storage, storage._pickle_storage_type(), storage._size()
    except (AttributeError, TypeError):
        warn_once("storages of one dtype are taken apart by their public methods")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of TypedStorage is deprecated
        untyped, dtype = storage.untyped(), storage.dtype
    return untyped, STORAGE_CLASSES[dtype], untyped.nbytes() // dtype.itemsize


# As the file format has it, which is why these names will not change. Other dtypes are written as bytes, with their dtype.
STORAGE_CLASSES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.complex128: "ComplexDoubleStorage",
    torch.complex64: "ComplexFloatStorage",
    torch.qint8: "QInt8Storage",
    torch.qint32: "QInt32Storage",
    torch.quint8: "QUInt8Storage",
    torch.quint4x2: "QUInt4x2Storage",
    torch.quint2x4: "QUInt2x4Storage",
}
_NEWER = (
    *("float8_e5m2", "float8_e4m3fn", "float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "complex32", "bcomplex32", "uint16", "uint32", "uint64"),
)
NEWER_DTYPES = [getattr(torch, name) for name in _NEWER if hasattr(torch, name)]


# ---- identity and change ---------------------------------------------------------------------------------------------


@functools.cache
def _has_addresses() -> bool:
    """Whether `_cdata` tells which storages are one and the same."""
    first, other = torch.zeros(4, device="cpu"), torch.zeros(4, device="cpu")
    try:
        key, again, another = (each.untyped_storage()._cdata for each in (first, first[1:], other))
        return type(key) is int and key == again != another
    except Exception:
        return False


@functools.cache
def _has_versions() -> bool:
    """Whether `_version` tells that a tensor has been written to, by whichever view."""
    tensor = torch.zeros(4, device="cpu")
    try:
        before = tensor._version
        tensor.detach()[1:].add_(1)
        return type(before) is int and tensor._version > before
    except Exception:
        return False


@functools.cache
def _storages_last() -> bool:
    """Whether a storage is the same Python object whenever it is asked for, also if nobody has kept that."""
    tensor = torch.zeros(4, device="cpu")
    try:
        tensor.untyped_storage().kept = True  # type: ignore[attr-defined]
        return hasattr(tensor[1:].untyped_storage(), "kept")
    except Exception:
        return False


def key_of(storage: UntypedStorage) -> int:
    """The same for two objects that stand for one storage, as long as that exists."""
    return int(storage._cdata) if _has_addresses() else id(storage)


def weak_storage(storage: UntypedStorage) -> Any:
    """With expired(): whether it is gone. As long as this is kept no other one gets its key. None: nobody can tell."""
    made = find("multiprocessing.reductions.StorageWeakRef")
    return made(storage) if made is not None and _has_addresses() and _has_versions() else None


def inform_core() -> None:
    """Names for the core, which looks them up for each tensor."""
    addresses, versions, last = _has_addresses(), _has_versions(), _storages_last()
    if not addresses:
        less = "" if last else ", and all is copied inside save(), because optimizers cannot be asked what they own"
        warn_once(f"storages are told apart by the objects that stand for them{less}")
    if not versions:
        warn_once("version counters do not show changes behind a fence that was missed")
    _native.use_torch_names(
        storage_key="_cdata" if addresses else None,
        keys_last=addresses or last,
        one_object=last,
        version="_version" if versions else None,
        backward_hooks="_backward_hooks",
    )


inform_core()


# ---- what a tensor is, without its methods ----------------------------------------------------------------------------

# Functions of torch's libraries: those of its stable C interface, and C++ ones by the names that a compiler gives them.
_SYMBOLS = {
    **{each: f"aoti_torch_get_{each}" for each in ("layout", "dtype", "storage_offset", "storage_size")},
    "is_neg": "_ZN2at6native6is_negERKNS_6TensorE",
    "is_conj": "_ZN2at6native7is_conjERKNS_6TensorE",
    "requires_grad": "_ZNK3c1010TensorImpl13requires_gradEv",
}
_LIBRARIES = ("libtorch_cpu.so", "libc10.so")
# Of a tensor, whose answers these are.
_ASKED = ("layout", "dtype", "storage_offset", "is_neg", "is_conj", "is_nested", "requires_grad", "_backward_hooks")


class DirectCalls(NamedTuple):
    """What the core is to try before it relies on any of it, see csrc/pickle/torch_calls.h.

    Attributes:
        asked: libraries, symbols, tensors with what their methods say of them, and these methods by class and name.
        refused: tensors of which nothing but methods tells that their memory is not all that they are.
        of_dtypes: a tensor of each dtype.
    """

    asked: tuple[Any, ...]
    refused: list[torch.Tensor]
    of_dtypes: dict[torch.dtype, torch.Tensor]


def direct_calls(dtypes: Iterable[torch.dtype]) -> DirectCalls | None:
    """None if this torch is not as it would have to be: then tensors are asked by their methods, which takes twice as long."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sparse and nested tensors are new
            return _try_direct_calls(dtypes)
    except Exception:
        return None


def _try_direct_calls(dtypes: Iterable[torch.dtype]) -> DirectCalls:
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    libraries = [os.path.join(folder, name) for name in _LIBRARIES]
    plain, learns = torch.zeros(3, device="cpu"), torch.zeros(3, device="cpu", requires_grad=True)
    hooked = torch.zeros(3, device="cpu", requires_grad=True)
    hooked.register_hook(lambda gradient: gradient)
    complex_one = torch.zeros(4, dtype=torch.complex64, device="cpu")
    kept = torch.nn.Parameter(plain)
    kept.grad = torch.ones_like(plain)  # whose Python object torch alone keeps
    sparse, nested = torch.eye(2, device="cpu").to_sparse(), torch.nested.nested_tensor([plain, plain[1:]])
    probes = [plain, plain[1:], learns, learns * 2, learns.detach(), kept, kept.grad, sparse, torch.empty((0, 3), device="cpu")]
    probes += [complex_one, complex_one[1:].conj(), complex_one.conj().imag, complex_one.real]
    of_dtypes = {dtype: torch.empty(1, dtype=dtype, device="cpu") for dtype in dtypes}
    if not nested.is_nested or any(tensor.is_nested or tensor.dtype is not dtype for dtype, tensor in of_dtypes.items()):
        raise TypeError("somebody answers in the place of torch")
    answers = [_answers_of(tensor) for tensor in [*probes, *of_dtypes.values()]]
    methods = [(kind, name) for kind in (torch.Tensor, torch.nn.Parameter) for name in _ASKED] + [(UntypedStorage, "nbytes")]
    asked = (libraries, _SYMBOLS, plain, plain._cdata, hooked, hooked._backward_hooks, answers, methods)
    return DirectCalls(asked, [sparse, torch.eye(2, device="cpu").to_sparse_csr(), nested], of_dtypes)


def _answers_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    strided = tensor.layout is torch.strided
    place = (tensor.storage_offset(), tensor.untyped_storage().nbytes()) if strided else (0, 0)
    return (tensor, tensor._cdata, strided, *place, tensor.is_neg(), tensor.is_conj(), tensor.requires_grad)


# ---- ranks -----------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """The key-value store of torch's default process group; None if it has none, or this torch does not tell."""
    import torch.distributed.distributed_c10d  # noqa: F401

    get = find("distributed.distributed_c10d._get_default_store")
    try:
        return get() if get is not None else None
    except TypeError:  # it wants something
        return None


# ---- sharded tensors -------------------------------------------------------------------------------------------------


_LOCAL, _SPEC = "_local_tensor", "_spec"  # slots of DTensor


def wrappers() -> tuple[type, Callable[[Any], torch.Tensor]] | None:
    """The class of tensors that are parts of a whole, and what gives the part that lies here: itself, where no gradients are
    recorded. None as long as nobody can have made one.
    """
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    if kind is None:
        return None
    return kind, (operator.attrgetter(_LOCAL) if hasattr(kind, _LOCAL) else kind.to_local)


def wrapper_names() -> tuple[type, str, str] | None:
    """The class of tensors that are parts of a whole, and the names of its attributes: of the part that lies here, and of where
    that belongs. None as long as nobody can have made one, and if this torch has other names.
    """
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return (kind, _LOCAL, _SPEC) if kind is not None and hasattr(kind, _LOCAL) and hasattr(kind, _SPEC) else None


_spec_parts = operator.attrgetter("mesh", "placements", "tensor_meta")


def spec_parts(spec: Any) -> tuple[Any, Any, Any] | None:
    """Of what a DTensor says of its place: its mesh, its placements, and what has the shape of the whole. None if this torch
    has other names for them, and if that is not all that it says.
    """
    try:
        found: tuple[Any, Any, Any] = _spec_parts(spec)
    except AttributeError:
        return None
    return found if hasattr(found[2], "shape") and _is_cut_in_order(spec) else None


def is_cut_in_order(tensor: Any) -> bool:
    """Whether each dimension of a DTensor that is sharded over several dimensions of the mesh is cut over the first of them
    first, as its placements say. Newer torch can keep another order beside them, though nothing that is public makes one.
    """
    return _is_cut_in_order(getattr(tensor, _SPEC, None))


def _is_cut_in_order(spec: Any) -> bool:
    if spec is None or len(spec.placements) < 2:
        return True
    for entry in getattr(spec, "shard_order", None) or ():
        dims = getattr(entry, "mesh_dims", ())
        if len(dims) > 1 and list(dims) != sorted(dims):
            return False
    return True


def root_mesh(mesh: Any) -> Any:
    """The device mesh of which `mesh` is a part, or itself. One that does not tell is taken for a whole one."""
    get = getattr(mesh, "_get_root_mesh", None)
    if get is not None:
        return get()
    get = getattr(find("distributed.device_mesh._mesh_resources"), "get_root_mesh", None)  # of older torch
    return mesh if get is None else get(mesh)


def flatten_state_dict(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """As torch.distributed.checkpoint names what lies in a nested state dict: by flat keys, and each key's path.

    Raises:
        ValueError: two paths have one key.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner

    flatten = find("distributed.checkpoint._nested_dict.flatten_state_dict")
    if flatten is not None:
        flat, paths = flatten(state)
        return flat, paths
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    return planner.state_dict, planner.mappings


class DcpNames(NamedTuple):
    """What is in the `.metadata` of torch.distributed.checkpoint, and is not public.

    Attributes:
        storage_info: the class that says where an item lies.
        version: of the format; None where this torch writes none.
    """

    storage_info: Any
    version: str | None


@functools.cache
def dcp_names() -> DcpNames:
    """
    Raises:
        RuntimeError: this torch does not have them: a checkpoint that it could read cannot be written.
    """
    import torch.distributed.checkpoint.filesystem

    info = find("distributed.checkpoint.filesystem._StorageInfo")
    if not _has_name(info):
        raise RuntimeError(
            f"torch {torch.__version__} keeps the places of a checkpoint's items in another way than those that were tested "
            f"({TESTED}); sharded= cannot be saved"
        )
    return DcpNames(info, find("distributed.checkpoint.filesystem.CURRENT_DCP_VERSION"))


# ---- hooks -----------------------------------------------------------------------------------------------------------


def hide_from_compiler(hook: Callable[..., Any]) -> None:
    """Lets torch.compile call it and not look inside, as compiler.disable() does, which imports the compiler. Else it warns."""
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]


fence_hooks.loaded(__name__)
