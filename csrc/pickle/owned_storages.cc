#include "pickle/owned_storages.h"

#include <memory>
#include <unordered_set>

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

// Adds the storages of all tensors in dicts, lists and tuples, however deep. For objects of other kinds it asks `values`.
class StorageFinder {
 public:
  // `declared`: all of the storages is lazy, which None before the tensors says.
  StorageFinder(const py::dict& found, const StorageIndex* index, const py::object& tensor_type, const py::function& values,
                const py::object& wrappers, bool declared)
      : found_(found), index_(index), tensor_type_(reinterpret_cast<PyTypeObject*>(tensor_type.ptr())), values_(values),
        wrappers_(wrappers), declared_(declared) {}

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
    py::object items;
    if (PyDict_CheckExact(value)) {
      items = owned(PyDict_Values(value));
    } else if (PyList_Check(value) || PyTuple_Check(value)) {
      items = owned(PySequence_List(value));
    } else {
      items = values_(py::handle(value));
    }
    for (const py::handle item : items) add(item.ptr());
  }

  void add_tensor(PyObject* tensor) {
    try {
      py::object storage = index_ == nullptr ? py::object() : index_->find(tensor);
      if (!storage) storage = names().untyped_storage.call_on(tensor);
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
  const StorageIndex* index_;
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
    for (Py_ssize_t at = 0; PyDict_Next(state.ptr(), &at, &key, &value) != 0;) stateful_.insert(key);
  }

  void add_parameters(PyObject* parameters) {
    const py::list items = owned(PySequence_List(parameters));
    for (const py::handle item : items) {
      if (learns(item.ptr()) && (stateful_.empty() || stateful_.count(item.ptr()) != 0)) finder_.add(item.ptr());
    }
  }

  void add_state() {
    const py::list items = owned(PyDict_Items(state_.ptr()));
    for (const py::handle item : items) {
      PyObject* key = PyTuple_GET_ITEM(item.ptr(), 0);
      if (PyObject_TypeCheck(key, tensor_type_) == 0 || learns(key)) finder_.add(PyTuple_GET_ITEM(item.ptr(), 1));
    }
  }

 private:
  static bool learns(PyObject* tensor) { return names().requires_grad.of(tensor).ptr() == Py_True; }

  StorageFinder& finder_;
  const py::dict& state_;
  PyTypeObject* tensor_type_;
  std::unordered_set<PyObject*> stateful_;
};

void add_owned(const py::dict& found, const py::list& groups, const py::dict& state, const StorageIndex* index,
               const py::object& tensor_type, const py::function& values, const py::object& wrappers) {
  if (!PyType_Check(tensor_type.ptr())) throw py::type_error("tensor_type must be a type");
  if (!torch_names().keys_last) return;  // that of a storage which is gone may be another's by now: then none is known to be lazy
  StorageFinder finder(found, index, tensor_type, values, wrappers, false);
  OwnedByOptimizer optimizer(finder, state, reinterpret_cast<PyTypeObject*>(tensor_type.ptr()));
  for (const py::handle parameters : groups) optimizer.add_parameters(parameters.ptr());
  optimizer.add_state();
}

void add_declared(const py::dict& found, const py::object& value, const py::object& tensor_type, const py::function& values,
                  const py::object& wrappers) {
  if (!PyType_Check(tensor_type.ptr())) throw py::type_error("tensor_type must be a type");
  if (!torch_names().keys_last) return;
  StorageFinder(found, nullptr, tensor_type, values, wrappers, true).add(value.ptr());
}

}  // namespace

void bind_owned_storages(py::module_& module) {
  module.def("add_owned", &add_owned, py::arg("found"), py::arg("groups"), py::arg("state"), py::arg("index").none(true),
             py::arg("tensor_type"), py::arg("values"), py::arg("wrappers") = py::none());
  module.def("add_declared", &add_declared, py::arg("found"), py::arg("value"), py::arg("tensor_type"), py::arg("values"),
             py::arg("wrappers") = py::none());
}

}  // namespace lazyckpt
