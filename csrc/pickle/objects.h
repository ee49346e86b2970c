// Small helpers for plain C functions over Python objects: what runs for each tensor of a state cannot afford more.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline bool is_true(const pybind11::object& object) {
  const int truth = PyObject_IsTrue(object.ptr());
  if (truth < 0) throw pybind11::error_already_set();
  return truth != 0;
}

inline Py_ssize_t to_size(PyObject* number) {
  const Py_ssize_t value = PyLong_AsSsize_t(number);
  if (value == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return value;
}

// The entry of a dict, borrowed; null if there is none.
inline PyObject* find(const pybind11::dict& dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict.ptr(), key);
  if (value == nullptr && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return value;
}

// An attribute's name, interned once; never destroyed, because the interpreter may be gone before static objects.
class Name {
 public:
  explicit Name(const char* text) : name_(PyUnicode_InternFromString(text)) {}
  PyObject* text() const { return name_; }
  pybind11::object of(PyObject* object) const { return owned(PyObject_GetAttr(object, name_)); }
  pybind11::object call_on(PyObject* object) const { return owned(PyObject_CallMethodNoArgs(object, name_)); }

 private:
  PyObject* name_;
};

}  // namespace lazyckpt
