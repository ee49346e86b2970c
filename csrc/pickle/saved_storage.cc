#include "pickle/saved_storage.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "format/file_spec.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

struct Names {
  Name data_ptr{"data_ptr"}, nbytes{"nbytes"}, cpu{"cpu"}, is_shared{"is_shared"}, resizable{"resizable"},
      private_at{"lazyckpt_private_at"};
};

const Names& names() {
  static const Names& kept = *std::make_unique<Names>().release();
  return kept;
}

TorchNames known;  // its names are interned, and kept as long as the process

PyObject* intern(const std::optional<std::string>& name) {
  if (!name) return nullptr;
  return owned(PyUnicode_InternFromString(name->c_str())).release().ptr();
}

void use_torch_names(const std::optional<std::string>& key, bool keys_last, const std::optional<std::string>& version,
                     const std::optional<std::string>& backward_hooks) {
  known = {intern(key), intern(version), intern(backward_hooks), keys_last};
}

// ---- The type ----------------------------------------------------------------------------------------------------

PyTypeObject* record_type = nullptr;  // as long as the process

PyObject* held(PyObject* object) {
  if (object == Py_None) return nullptr;
  Py_XINCREF(object);
  return object;
}

PyObject* make(PyObject* storage, PyObject* key, PyObject* dtype, PyObject* tensor, Py_ssize_t nbytes, PyObject* type,
               Py_ssize_t numel) {
  PyObject* object = PyType_GenericAlloc(record_type, 0);
  if (object == nullptr) return nullptr;
  auto& record = *reinterpret_cast<SavedStorage*>(object);
  record.storage = held(storage);
  record.key = held(key);
  record.location = held(names().cpu.text());
  record.dtype = held(dtype);
  record.tensor = held(tensor);
  record.type = held(type);
  record.nbytes = nbytes;
  record.numel = numel;
  record.version = -1;
  record.whole = record.type != nullptr;
  return object;
}

// SavedStorage(storage, key, dtype, tensor, nbytes, type=None, numel=0)
PyObject* record_new(PyTypeObject*, PyObject* args, PyObject*) {
  PyObject *storage = nullptr, *key = nullptr, *dtype = nullptr, *tensor = nullptr, *type = nullptr;
  Py_ssize_t nbytes = 0, numel = 0;
  if (PyArg_ParseTuple(args, "OOOOn|On", &storage, &key, &dtype, &tensor, &nbytes, &type, &numel) == 0) return nullptr;
  return make(storage, key, dtype, tensor, nbytes, type, numel);
}

void record_dealloc(PyObject* self) {
  auto& record = *reinterpret_cast<SavedStorage*>(self);
  for (PyObject* each : {record.storage, record.key, record.location, record.dtype, record.tensor, record.type, record.others,
                         record.views, record.counted}) {
    Py_XDECREF(each);
  }
  PyTypeObject* type = Py_TYPE(self);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMemberDef saved_storage_members[] = {
    {"storage", T_OBJECT, offsetof(SavedStorage, storage), 0, nullptr},
    {"key", T_OBJECT, offsetof(SavedStorage, key), READONLY, nullptr},
    {"location", T_OBJECT, offsetof(SavedStorage, location), 0, nullptr},
    {"dtype", T_OBJECT, offsetof(SavedStorage, dtype), READONLY, nullptr},
    {"tensor", T_OBJECT, offsetof(SavedStorage, tensor), 0, nullptr},
    {"others", T_OBJECT, offsetof(SavedStorage, others), 0, nullptr},
    {"type", T_OBJECT, offsetof(SavedStorage, type), 0, nullptr},
    {"views", T_OBJECT, offsetof(SavedStorage, views), 0, nullptr},
    {"address", T_ULONGLONG, offsetof(SavedStorage, address), 0, nullptr},
    {"low", T_PYSSIZET, offsetof(SavedStorage, low), 0, nullptr},
    {"nbytes", T_PYSSIZET, offsetof(SavedStorage, nbytes), 0, nullptr},
    {"numel", T_PYSSIZET, offsetof(SavedStorage, numel), 0, nullptr},
    {"whole", T_BOOL, offsetof(SavedStorage, whole), 0, nullptr},
    {"typed", T_BOOL, offsetof(SavedStorage, typed), 0, nullptr},
    {nullptr, 0, 0, 0, nullptr},
};

PyType_Slot saved_storage_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(record_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(record_dealloc)},
    {Py_tp_members, saved_storage_members},
    {0, nullptr},
};

PyType_Spec saved_storage_spec = {"ckpt._native.SavedStorage", sizeof(SavedStorage), 0, Py_TPFLAGS_DEFAULT, saved_storage_slots};

bool is_none(PyObject* object) { return object == nullptr || object == Py_None; }

SavedStorage& to_record(PyObject* object) {
  if (!is_record(Py_TYPE(object))) throw py::type_error("these must be Records");
  return *reinterpret_cast<SavedStorage*>(object);
}

// Py_BuildValue() reads a format, which takes longer than all the rest.
template <typename... Objects>
py::object make_list(Objects... objects) {
  py::object list = owned(PyList_New(sizeof...(objects)));
  Py_ssize_t at = 0;
  for (PyObject* each : {objects...}) {
    Py_INCREF(each);
    PyList_SET_ITEM(list.ptr(), at++, each);
  }
  return list;
}

// ---- Placing -----------------------------------------------------------------------------------------------------

unsigned long long address_of(PyObject* storage) {
  const py::object address = names().data_ptr.call_on(storage);
  const unsigned long long value = PyLong_AsUnsignedLongLong(address.ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// The version counter; -1 where there is none.
Py_ssize_t version_of(PyObject* tensor) {
  if (is_none(tensor) || known.version == nullptr) return -1;
  const py::object version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, known.version));
  if (version) return to_size(version.ptr());
  if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw py::error_already_set();
  PyErr_Clear();  // inference tensors count none, and a subclass may answer as it likes
  return -1;
}

bool has_changed(PyObject* tensor, Py_ssize_t noted) {
  const Py_ssize_t version = noted < 0 ? noted : version_of(tensor);
  return version >= 0 && version != noted;
}

// Which records are lazy; asked for only if it matters. ckpt/plan/lazy_storages.py says what the answer looks like.
class LazyRecords {
 public:
  LazyRecords(const py::function& ask, const py::function& find_writers, const py::function& is_shared, const py::list& records)
      : ask_(ask), find_writers_(find_writers), is_shared_(is_shared), records_(records) {}

  // If it is, its version counters are noted.
  bool take(SavedStorage& record, bool on_host) {
    if (!asked_) ask();
    PyObject* known = owners_ ? find(owners_, storage_key(record.storage).ptr()) : nullptr;
    if (known == nullptr) {
      if (all_) note_counters(record, nullptr);
      return all_;
    }
    if (!PyList_Check(known) || PyList_GET_SIZE(known) == 0) throw py::type_error("the tensors of a storage must be in a list");
    const bool declared = all_ || PyList_GET_ITEM(known, 0) == Py_None;
    py::object writers = py::reinterpret_borrow<py::object>(known);
    if (!is_whole(record, known, declared)) {
      const auto views = py::reinterpret_borrow<py::object>(record.views == nullptr ? Py_None : record.views);
      writers = find_writers_(writers, record.low, record.low + record.nbytes, views, declared);
      if (writers.is_none()) return false;  // other parts of the storage may be somebody else's
    }
    if (!declared && on_host && may_be_shared(record)) return false;
    note_counters(record, writers.ptr());
    return true;
  }

 private:
  void ask() {
    asked_ = true;
    const py::object answer = ask_(StorageIndex(records_));
    all_ = answer.ptr() == Py_True;
    if (PyBool_Check(answer.ptr())) return;
    owners_ = answer.cast<py::dict>();
    all_ = find(owners_, Py_None) != nullptr;
  }

  // Whether all that is known of the storage reaches into the record, and, if it was not declared, covers it.
  static bool is_whole(const SavedStorage& record, PyObject* known, bool declared) {
    if (record.views != nullptr) return false;
    if (declared) return true;
    PyObject* owner = PyList_GET_ITEM(known, 0);
    return PyList_GET_SIZE(known) == 1 && (owner == record.tensor || to_size(names().nbytes.of(owner).ptr()) == record.nbytes);
  }

  // Whether other processes may see it. Of what neither torch has allocated nor knows to be shared, the mappings tell; that
  // takes long, so the storage is told for how long it holds: until it has other memory.
  bool may_be_shared(const SavedStorage& record) {
    const Names& name = names();
    if (is_true(name.is_shared.call_on(record.storage))) return true;
    if (is_true(name.resizable.call_on(record.storage))) return false;
    const py::object address = owned(PyLong_FromUnsignedLongLong(record.address));
    const auto noted = py::reinterpret_steal<py::object>(PyObject_GetAttr(record.storage, name.private_at.text()));
    if (!noted) PyErr_Clear();
    if (noted && PyObject_RichCompareBool(noted.ptr(), address.ptr(), Py_EQ) == 1) return false;
    const auto end = record.address + static_cast<unsigned long long>(to_size(name.nbytes.call_on(record.storage).ptr()));
    if (is_true(is_shared_(record.address, end))) return true;
    if (PyObject_SetAttr(record.storage, name.private_at.text(), address.ptr()) != 0) PyErr_Clear();
    return false;
  }

  // `writers` may be null, and hold None.
  static void note_counters(SavedStorage& record, PyObject* writers) {
    record.version = version_of(record.tensor);
    for (PyObject* tensors : {record.others, writers}) {
      if (is_none(tensors)) continue;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) note_counter(record, PyList_GET_ITEM(tensors, i));
    }
  }

  static void note_counter(SavedStorage& record, PyObject* tensor) {
    const Py_ssize_t version = tensor == record.tensor ? -1 : version_of(tensor);
    if (version < 0) return;
    const py::object number = owned(PyLong_FromSsize_t(version));
    if (record.counted == nullptr) {
      record.counted = make_list(tensor, number.ptr()).release().ptr();
      return;
    }
    for (PyObject* each : {tensor, number.ptr()}) {
      if (PyList_Append(record.counted, each) != 0) throw py::error_already_set();
    }
  }

  const py::function &ask_, &find_writers_, &is_shared_;
  const py::list& records_;
  bool asked_ = false, all_ = false;
  py::dict owners_;
};

// Finds the address of each record, and marks as lazy what may leave lazily. Returns (addresses, the lazy ones).
py::tuple choose_kinds(const py::list& records, const py::function& lazy_storages, const py::function& find_writers,
                       const py::function& is_shared, Py_ssize_t eager_bytes, const std::vector<int>& devices,
                       bool lazy_on_devices, const py::bytearray& kinds) {
  const size_t count = records.size();
  if (PyByteArray_GET_SIZE(kinds.ptr()) != static_cast<Py_ssize_t>(count) || (!devices.empty() && devices.size() != count)) {
    throw py::value_error("kinds and devices must have one entry for each record");
  }
  py::list addresses(count), lazy;
  LazyRecords laziness(lazy_storages, find_writers, is_shared, records);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(records.ptr(), static_cast<Py_ssize_t>(i));
    SavedStorage& record = to_record(object);
    if (record.address == 0) record.address = address_of(record.storage);
    // A small one on the host is cheaper copied than padded; on a device each copy costs the caller a call of the driver.
    const bool on_host = devices.empty() || devices[i] < 0;
    char& kind = PyByteArray_AS_STRING(kinds.ptr())[i];
    const bool may_be_lazy = on_host ? record.nbytes > eager_bytes : lazy_on_devices;
    if (may_be_lazy && kind == static_cast<char>(Source::kCopy) && laziness.take(record, on_host)) {
      kind = static_cast<char>(Source::kLazy);
      lazy.append(py::handle(object));
    }
    const unsigned long long begin = record.nbytes > 0 ? record.address + static_cast<unsigned long long>(record.low) : 0;
    PyList_SET_ITEM(addresses.ptr(), static_cast<Py_ssize_t>(i), owned(PyLong_FromUnsignedLongLong(begin)).release().ptr());
  }
  return py::make_tuple(std::move(addresses), std::move(lazy));
}

// The tensor whose counter has moved, borrowed; null if none has.
PyObject* find_counted(const SavedStorage& record) {
  if (has_changed(record.tensor, record.version)) return record.tensor;
  for (Py_ssize_t i = 0; record.counted != nullptr && i < PyList_GET_SIZE(record.counted); i += 2) {
    PyObject* tensor = PyList_GET_ITEM(record.counted, i);
    if (has_changed(tensor, to_size(PyList_GET_ITEM(record.counted, i + 1)))) return tensor;
  }
  return nullptr;
}

// (whose counter has moved, whether memory was taken away): for the first record that something has happened to.
py::tuple find_changed(const py::list& records) {
  for (const py::handle each : records) {
    if (PyObject* tensor = find_counted(to_record(each.ptr()))) {
      return py::make_tuple(py::reinterpret_borrow<py::object>(tensor), false);
    }
  }
  for (const py::handle each : records) {
    const SavedStorage& record = to_record(each.ptr());
    const bool there = address_of(record.storage) == record.address;
    const Py_ssize_t nbytes = to_size(names().nbytes.call_on(record.storage).ptr());
    if (!there || nbytes < record.low + record.nbytes) return py::make_tuple(py::none(), true);
  }
  return py::make_tuple(py::none(), false);
}

}  // namespace

const TorchNames& torch_names() { return known; }

StorageIndex::StorageIndex(const py::list& records) {
  storages_.reserve(records.size());
  for (const py::handle each : records) {
    const SavedStorage& record = to_record(each.ptr());
    if (!is_none(record.tensor)) storages_.emplace(record.tensor, record.storage);
  }
}

py::object StorageIndex::find(PyObject* tensor) const {
  const auto found = storages_.find(tensor);
  return found == storages_.end() ? py::object() : py::reinterpret_borrow<py::object>(found->second);
}

py::object storage_key(PyObject* storage) {
  return owned(known.storage_key == nullptr ? PyLong_FromVoidPtr(storage) : PyObject_GetAttr(storage, known.storage_key));
}

bool is_record(PyTypeObject* type) { return type == record_type; }

py::object make_record(PyObject* storage, PyObject* key, PyObject* dtype, PyObject* tensor, Py_ssize_t nbytes, PyObject* type,
                       Py_ssize_t numel) {
  return owned(make(storage, key, dtype, tensor, nbytes, type, numel));
}

void bind_records(py::module_& module) {
  py::object type = owned(PyType_FromSpec(&saved_storage_spec));
  module.attr("SavedStorage") = type;
  record_type = reinterpret_cast<PyTypeObject*>(type.release().ptr());
  py::class_<StorageIndex>(module, "StorageIndex");
  module.def("use_torch_names", &use_torch_names, py::kw_only(), py::arg("storage_key"), py::arg("keys_last"),
             py::arg("version"), py::arg("backward_hooks"));
  module.def("choose_kinds", &choose_kinds, py::arg("records"), py::arg("lazy_storages"), py::arg("find_writers"),
             py::arg("is_shared"), py::arg("eager_bytes"), py::arg("devices"),
             py::arg("lazy_on_devices"), py::arg("kinds"));
  module.def("find_changed", &find_changed, py::arg("records"));
}

}  // namespace lazyckpt
