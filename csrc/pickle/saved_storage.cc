#include "pickle/saved_storage.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "format/file_spec.h"
#include "pickle/attribute.h"

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

void use_torch_names(const std::optional<std::string>& key, bool keys_last, bool one_object, const std::optional<std::string>& version,
                     const std::optional<std::string>& backward_hooks) {
  known = {intern(key), intern(version), intern(backward_hooks), keys_last, one_object};
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

unsigned long long to_address(const py::object& address) {
  const unsigned long long value = PyLong_AsUnsignedLongLong(address.ptr());
  if (PyErr_Occurred() != nullptr) throw py::error_already_set();
  return value;
}

// Tells the version counters of tensors.
class Versions {
 public:
  // -1 where there is none.
  Py_ssize_t of(PyObject* tensor) const {
    if (is_none(tensor) || known.version == nullptr) return -1;
    try {
      return to_size(ask_.of(tensor).ptr());
    } catch (py::error_already_set& error) {  // inference tensors count none, and a subclass may answer as it likes
      if (!error.matches(PyExc_Exception)) throw;
      return -1;
    }
  }

  bool has_changed(PyObject* tensor, Py_ssize_t noted) const {
    const Py_ssize_t version = noted < 0 ? noted : of(tensor);
    return version >= 0 && version != noted;
  }

 private:
  Attribute ask_{known.version};
};

Attribute method(const Name& name) { return Attribute(name.text(), Attribute::Kind::kMethod); }

// Which records are lazy; asked for only if it matters. ckpt/plan/lazy_storages.py says what the answer looks like.
class LazyRecords {
 public:
  LazyRecords(const py::function& ask, const py::function& find_writers, const py::function& is_shared, const py::list& records)
      : ask_(ask), find_writers_(find_writers), is_shared_(is_shared), records_(records) {}

  // If it is, its version counters are noted.
  bool take(SavedStorage& record, bool on_host) {
    if (!asked_) ask();
    if (index_ == nullptr) {
      if (all_) note_counters(record, nullptr);
      return all_;
    }
    const StorageIndex::Owners& owners = index_->owners_of(record.storage);
    PyObject* listed = listed_.empty() ? nullptr : find(listed_, storage_key(record.storage).ptr());
    if (listed == nullptr && owners.first && owners.more.empty() && covers(record, owners.first.ptr(), all_)) {
      if (!all_ && on_host && may_be_shared(record)) return false;
      note_counters(record, nullptr);
      note_counter(record, owners.first.ptr());
      return true;
    }
    return take_listed(record, on_host, listed, owners);
  }

 private:
  void ask() {
    asked_ = true;
    kept_index_ = py::cast(StorageIndex(records_));
    const py::object answer = ask_(kept_index_);
    all_ = answer.ptr() == Py_True;
    if (PyBool_Check(answer.ptr())) return;
    index_ = kept_index_.cast<StorageIndex*>();
    listed_ = answer.cast<py::dict>();
    all_ = find(listed_, Py_None) != nullptr;
  }

  // As take(), in general: the storage may have several owners, or a part of it none, and what is listed may be declared.
  bool take_listed(SavedStorage& record, bool on_host, PyObject* listed, const StorageIndex::Owners& owners) {
    if (listed == nullptr && !owners.first) {
      if (all_) note_counters(record, nullptr);
      return all_;
    }
    if (listed != nullptr && (!PyList_Check(listed) || PyList_GET_SIZE(listed) == 0)) {
      throw py::type_error("the tensors of a storage must be in a list");
    }
    py::list tensors = listed == nullptr ? py::list() : py::list(owned(PySequence_List(listed)));
    if (owners.first) tensors.append(owners.first);
    for (const py::object& tensor : owners.more) tensors.append(tensor);
    const bool declared = all_ || PyList_GET_ITEM(tensors.ptr(), 0) == Py_None;
    py::object writers = tensors;
    const bool has_one = tensors.size() == 1 && PyList_GET_ITEM(tensors.ptr(), 0) != Py_None;
    const bool is_whole = declared ? record.views == nullptr : has_one && covers(record, PyList_GET_ITEM(tensors.ptr(), 0), false);
    if (!is_whole) {
      const auto views = py::reinterpret_borrow<py::object>(record.views == nullptr ? Py_None : record.views);
      writers = find_writers_(tensors, record.low, record.low + record.nbytes, views, declared);
      if (writers.is_none()) return false;  // other parts of the storage may be somebody else's
    }
    if (!declared && on_host && may_be_shared(record)) return false;
    note_counters(record, writers.ptr());
    return true;
  }

  // Whether the record is all of its storage, and what is known of that is of this owner, which covers it, or is declared.
  bool covers(const SavedStorage& record, PyObject* owner, bool declared) const {
    if (record.views != nullptr) return false;
    return declared || owner == record.tensor || to_size(nbytes_.of(owner).ptr()) == record.nbytes;
  }

  // Whether other processes may see it. Of what neither torch has allocated nor knows to be shared, the mappings tell; that
  // takes long, so the storage is told for how long it holds: until it has other memory.
  bool may_be_shared(const SavedStorage& record) {
    const Name& noted_at = names().private_at;
    if (is_true(is_shared_storage_.of(record.storage))) return true;
    if (is_true(is_resizable_.of(record.storage))) return false;
    const py::object address = owned(PyLong_FromUnsignedLongLong(record.address));
    const auto noted = py::reinterpret_steal<py::object>(PyObject_GetAttr(record.storage, noted_at.text()));
    if (!noted) PyErr_Clear();
    if (noted && PyObject_RichCompareBool(noted.ptr(), address.ptr(), Py_EQ) == 1) return false;
    const auto end = record.address + static_cast<unsigned long long>(to_size(names().nbytes.call_on(record.storage).ptr()));
    if (is_true(is_shared_(record.address, end))) return true;
    if (PyObject_SetAttr(record.storage, noted_at.text(), address.ptr()) != 0) PyErr_Clear();
    return false;
  }

  // `writers` may be null, and hold None.
  void note_counters(SavedStorage& record, PyObject* writers) {
    record.version = versions_.of(record.tensor);
    for (PyObject* tensors : {record.others, writers}) {
      if (is_none(tensors)) continue;
      for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) note_counter(record, PyList_GET_ITEM(tensors, i));
    }
  }

  void note_counter(SavedStorage& record, PyObject* tensor) {
    const Py_ssize_t version = tensor == record.tensor ? -1 : versions_.of(tensor);
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
  const Versions versions_;
  const Attribute nbytes_{names().nbytes.text()}, is_shared_storage_ = method(names().is_shared),
                  is_resizable_ = method(names().resizable);
  bool asked_ = false, all_ = false;
  py::object kept_index_;
  const StorageIndex* index_ = nullptr;  // null: the answer was one for all
  py::dict listed_;
};

// Finds the address of each record, and marks as lazy what may leave lazily. Returns (addresses, sizes, the lazy ones).
py::tuple choose_kinds(const py::list& records, const py::function& lazy_storages, const py::function& find_writers,
                       const py::function& is_shared, Py_ssize_t eager_bytes, const std::vector<int>& devices,
                       bool lazy_on_devices, const py::bytearray& kinds) {
  const size_t count = records.size();
  if (PyByteArray_GET_SIZE(kinds.ptr()) != static_cast<Py_ssize_t>(count) || (!devices.empty() && devices.size() != count)) {
    throw py::value_error("kinds and devices must have one entry for each record");
  }
  py::list addresses(count), sizes(count), lazy;
  LazyRecords laziness(lazy_storages, find_writers, is_shared, records);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(records.ptr(), static_cast<Py_ssize_t>(i));
    SavedStorage& record = to_record(object);
    if (record.address == 0) record.address = to_address(names().data_ptr.call_on(record.storage));
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
    PyList_SET_ITEM(sizes.ptr(), static_cast<Py_ssize_t>(i), owned(PyLong_FromSsize_t(record.nbytes)).release().ptr());
  }
  return py::make_tuple(std::move(addresses), std::move(sizes), std::move(lazy));
}

// The numbers of those that are not in the memory of the host.
py::list find_elsewhere(const py::list& records) {
  py::list found;
  PyObject* const cpu = names().cpu.text();
  for (size_t i = 0; i < records.size(); ++i) {
    PyObject* location = to_record(PyList_GET_ITEM(records.ptr(), static_cast<Py_ssize_t>(i))).location;
    if (location != cpu && (location == nullptr || PyObject_RichCompareBool(location, cpu, Py_EQ) != 1)) found.append(i);
  }
  return found;
}

bool are_whole(const py::list& records) {
  const auto is_whole = [](const py::handle& each) { return to_record(each.ptr()).whole != 0; };
  return std::all_of(records.begin(), records.end(), is_whole);
}

// The tensor whose counter has moved, borrowed; null if none has.
PyObject* find_counted(const SavedStorage& record, const Versions& versions) {
  if (versions.has_changed(record.tensor, record.version)) return record.tensor;
  for (Py_ssize_t i = 0; record.counted != nullptr && i < PyList_GET_SIZE(record.counted); i += 2) {
    PyObject* tensor = PyList_GET_ITEM(record.counted, i);
    if (versions.has_changed(tensor, to_size(PyList_GET_ITEM(record.counted, i + 1)))) return tensor;
  }
  return nullptr;
}

// (whose counter has moved, whether memory was taken away): for the first record that something has happened to.
py::tuple find_changed(const py::list& records) {
  const Versions versions;
  const Attribute data_ptr = method(names().data_ptr), nbytes_of = method(names().nbytes);
  for (const py::handle each : records) {
    if (PyObject* tensor = find_counted(to_record(each.ptr()), versions)) {
      return py::make_tuple(py::reinterpret_borrow<py::object>(tensor), false);
    }
  }
  for (const py::handle each : records) {
    const SavedStorage& record = to_record(each.ptr());
    const bool there = to_address(data_ptr.of(record.storage)) == record.address;
    const Py_ssize_t nbytes = to_size(nbytes_of.of(record.storage).ptr());
    if (!there || nbytes < record.low + record.nbytes) return py::make_tuple(py::none(), true);
  }
  return py::make_tuple(py::none(), false);
}

}  // namespace

const TorchNames& torch_names() { return known; }

size_t StorageIndex::slots_for(size_t count) {
  size_t slots = 64;
  while (slots < 4 * count) slots *= 2;
  return slots;
}

StorageIndex::StorageIndex(const py::list& records) : by_tensor_(slots_for(records.size())), by_storage_(slots_for(records.size())) {
  places_.reserve(records.size());
  for (const py::handle each : records) {
    const SavedStorage& record = to_record(each.ptr());
    int64_t place = by_storage_.find(record.storage);
    if (place < 0) {
      place = static_cast<int64_t>(places_.size());
      by_storage_.set(record.storage, static_cast<uint32_t>(place));
      places_.push_back({record.storage, {}});
    }
    if (!is_none(record.tensor)) by_tensor_.set(record.tensor, static_cast<uint32_t>(place));
  }
}

py::object StorageIndex::find(PyObject* tensor) const {
  const int64_t place = by_tensor_.find(tensor);
  return place < 0 ? py::object() : py::reinterpret_borrow<py::object>(places_[static_cast<size_t>(place)].storage);
}

void StorageIndex::note_owner(PyObject* storage, PyObject* tensor) {
  const int64_t place = by_storage_.find(storage);
  if (place < 0) return;
  Owners& owners = places_[static_cast<size_t>(place)].owners;
  auto held = py::reinterpret_borrow<py::object>(tensor);
  if (!owners.first) {
    owners.first = std::move(held);
  } else {
    owners.more.push_back(std::move(held));
  }
}

const StorageIndex::Owners& StorageIndex::owners_of(PyObject* storage) const {
  static const Owners& none = *std::make_unique<Owners>().release();
  const int64_t place = by_storage_.find(storage);
  return place < 0 ? none : places_[static_cast<size_t>(place)].owners;
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
  py::class_<StorageIndex>(module, "StorageIndex").def_property_readonly_static("takes_owners", [](const py::object&) {
    return StorageIndex::takes_owners();
  });
  module.def("use_torch_names", &use_torch_names, py::kw_only(), py::arg("storage_key"), py::arg("keys_last"),
             py::arg("one_object"), py::arg("version"), py::arg("backward_hooks"));
  module.def("choose_kinds", &choose_kinds, py::arg("records"), py::arg("lazy_storages"), py::arg("find_writers"),
             py::arg("is_shared"), py::arg("eager_bytes"), py::arg("devices"),
             py::arg("lazy_on_devices"), py::arg("kinds"));
  module.def("find_elsewhere", &find_elsewhere, py::arg("records"));
  module.def("are_whole", &are_whole, py::arg("records"));
  module.def("find_changed", &find_changed, py::arg("records"));
}

}  // namespace lazyckpt
