#include "pickle/owned_storages.h"

#include <memory>
#include <stdexcept>

#include "pickle/address_map.h"
#include "pickle/attribute.h"
#include "pickle/objects.h"
#include "pickle/saved_storage.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

struct Names {
  Name untyped_storage{"untyped_storage"}, requires_grad{"requires_grad"};
};

const Names& names() {
  static const Names& kept = *std::make_unique<Names>().release();
  return kept;
}

py::object make_list(PyObject* first, PyObject* second = nullptr) {
  py::object list = owned(PyList_New(second == nullptr ? 1 : 2));
  Py_INCREF(first);
  PyList_SET_ITEM(list.ptr(), 0, first);
  if (second != nullptr) {
    Py_INCREF(second);
    PyList_SET_ITEM(list.ptr(), 1, second);
  }
  return list;
}

// A tensor that has no memory but that of another one: (its class, what gives the other); or None.
class Wrappers {
 public:
  explicit Wrappers(const py::object& given) {
    if (given.is_none()) return;
    const auto pair = given.cast<py::tuple>();
    if (pair.size() != 2 || !PyType_Check(PyTuple_GET_ITEM(pair.ptr(), 0))) throw py::type_error("wrappers are a class and a function");
    type_ = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(pair.ptr(), 0));
    local_ = py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(pair.ptr(), 1));
  }

  // What it wraps; null if it is no wrapper.
  py::object unwrap(PyObject* tensor) const {
    if (type_ == nullptr || PyObject_TypeCheck(tensor, type_) == 0) return {};
    return owned(PyObject_CallOneArg(local_.ptr(), tensor));
  }

 private:
  PyTypeObject* type_ = nullptr;  // as long as its module
  py::object local_;
};

// Python may have run while a dict was walked; then something of it may have been passed over, which must not leave lazily for that.
void refuse_other_size(PyObject* dict, Py_ssize_t size) {
  if (PyDict_GET_SIZE(dict) != size) throw std::runtime_error("a dictionary of the optimizer's state changed while it was saved");
}

// Adds the storages of all tensors in dicts, lists and tuples, however deep. For objects of other kinds it asks `values`.
class StorageFinder {
 public:
  // `declared`: all of the storages is lazy, which None before the tensors says. `in_index`: what is found is noted there.
  StorageFinder(const py::dict& found, StorageIndex* index, bool in_index, const py::object& tensor_type, const py::function& values,
                const py::object& wrappers, bool declared)
      : found_(found), index_(index), in_index_(in_index && index != nullptr && StorageIndex::takes_owners()),
        tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())), values_(values), wrappers_(wrappers),
        declared_(declared) {}

  void add(PyObject* value) {
    if (PyObject_TypeCheck(value, tensor_type_) != 0) {
      const py::object local = wrappers_.unwrap(value);
      return add_tensor(local ? local.ptr() : value);
    }
    if (value == Py_None || PyFloat_CheckExact(value) || PyLong_Check(value) || PyUnicode_CheckExact(value)) return;
    if (Py_EnterRecursiveCall(" while looking through an optimizer") != 0) throw py::error_already_set();
    try {
      add_items(value);
    } catch (...) {
      Py_LeaveRecursiveCall();
      throw;
    }
    Py_LeaveRecursiveCall();
  }

 private:
  void add_items(PyObject* value) {
    if (PyDict_CheckExact(value)) {
      PyObject *key = nullptr, *item = nullptr;
      const Py_ssize_t size = PyDict_GET_SIZE(value);
      for (Py_ssize_t at = 0; PyDict_Next(value, &at, &key, &item) != 0;) {
        add(py::reinterpret_borrow<py::object>(item).ptr());
        refuse_other_size(value, size);
      }
      return;
    }
    const bool is_sequence = PyList_Check(value) || PyTuple_Check(value);
    const py::object items = is_sequence ? owned(PySequence_List(value)) : values_(py::handle(value));
    for (const py::handle item : items) add(item.ptr());
  }

  void add_tensor(PyObject* tensor) {
    try {
      py::object storage = index_ == nullptr ? py::object() : index_->find(tensor);
      if (!storage) storage = storage_of_.of(tensor);
      if (in_index_) return index_->note_owner(storage.ptr(), tensor);
      note(storage_key(storage.ptr()), tensor);
    } catch (const py::error_already_set& error) {  // sparse and the like have no storage of their own
      if (!error.matches(PyExc_RuntimeError)) throw;
    }
  }

  void note(const py::object& cdata, PyObject* tensor) {
    PyObject* tensors = find(found_, cdata.ptr());
    if (tensors == nullptr) {
      const py::object first = declared_ ? make_list(Py_None, tensor) : make_list(tensor);
      if (PyDict_SetItem(found_.ptr(), cdata.ptr(), first.ptr()) != 0) throw py::error_already_set();
      return;
    }
    const bool marks = declared_ && PyList_GET_ITEM(tensors, 0) != Py_None;
    if ((marks && PyList_Insert(tensors, 0, Py_None) != 0) || PyList_Append(tensors, tensor) != 0) {
      throw py::error_already_set();
    }
  }

  const py::dict& found_;
  StorageIndex* index_;
  const bool in_index_;
  const Attribute storage_of_{names().untyped_storage.text(), Attribute::Kind::kMethod};
  PyTypeObject* tensor_type_;
  const py::function& values_;
  const Wrappers wrappers_;
  const bool declared_;
};

// What a step of an optimizer writes to: parameters that learn, and their state. One that needs no gradient (a target network, a
// momentum encoder) is written by whoever keeps it, at any time. So may one be that has no state where others have.
class OwnedByOptimizer {
 public:
  OwnedByOptimizer(StorageFinder& finder, const py::dict& state, PyTypeObject* tensor_type)
      : finder_(finder), state_(state), tensor_type_(tensor_type) {
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value) != 0;) stateful_.set(key, 0);
  }

  void add_parameters(PyObject* parameters) {
    const py::list items = owned(PySequence_List(parameters));
    for (const py::handle item : items) {
      if (learns(item.ptr()) && (stateful_.size() == 0 || stateful_.find(item.ptr()) >= 0)) finder_.add(item.ptr());
    }
  }

  void add_state() {
    PyObject *key = nullptr, *value = nullptr;
    const Py_ssize_t size = PyDict_GET_SIZE(state_.ptr());
    for (Py_ssize_t at = 0; PyDict_Next(state_.ptr(), &at, &key, &value) != 0;) {
      const auto key_held = py::reinterpret_borrow<py::object>(key), value_held = py::reinterpret_borrow<py::object>(value);
      if (PyObject_TypeCheck(key, tensor_type_) == 0 || learns(key)) finder_.add(value);
      refuse_other_size(state_.ptr(), size);
    }
  }

 private:
  bool learns(PyObject* tensor) const { return requires_grad_.of(tensor).ptr() == Py_True; }

  StorageFinder& finder_;
  const py::dict& state_;
  PyTypeObject* tensor_type_;
  const Attribute requires_grad_{names().requires_grad.text()};
  AddressMap stateful_{64};
};

void add_owned(const py::dict& found, const py::list& groups, const py::dict& state, StorageIndex* index, bool in_index,
               const py::object& tensor_type, const py::function& values, const py::object& wrappers) {
  if (!PyType_Check(tensor_type.ptr())) throw py::type_error("tensor_type must be a type");
  if (!torch_names().keys_last) return;  // that of a storage which is gone may be another's by now: then none is known to be lazy
  StorageFinder finder(found, index, in_index, tensor_type, values, wrappers, false);
  OwnedByOptimizer optimizer(finder, state, reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
  for (const py::handle parameters : groups) optimizer.add_parameters(parameters.ptr());
  optimizer.add_state();
}

void add_declared(const py::dict& found, const py::object& value, const py::object& tensor_type, const py::function& values,
                  const py::object& wrappers) {
  if (!PyType_Check(tensor_type.ptr())) throw py::type_error("tensor_type must be a type");
  if (!torch_names().keys_last) return;
  StorageFinder(found, nullptr, false, tensor_type, values, wrappers, true).add(value.ptr());
}

}  // namespace

void bind_owned_storages(py::module_& module) {
  module.def("add_owned", &add_owned, py::arg("found"), py::arg("groups"), py::arg("state"), py::arg("index").none(true),
             py::arg("in_index"), py::arg("tensor_type"), py::arg("values"), py::arg("wrappers") = py::none());
  module.def("add_declared", &add_declared, py::arg("found"), py::arg("value"), py::arg("tensor_type"), py::arg("values"),
             py::arg("wrappers") = py::none());
}

}  // namespace lazyckpt
