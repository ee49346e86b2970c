// What objects answer, asked past the look-up of names.
#pragma once

#include <array>

#include "pickle/objects.h"

namespace lazyckpt {

// An attribute, or a method without arguments, that many objects of few types are asked for, one after the other. Where a type
// has it from C, and looks attributes up as all types do, the C function is called; elsewhere the object is asked by the name.
// Not for longer than one pass over a state: somebody may replace what a class has.
//
// A method that an object has for itself, in its own __dict__, is not seen.
class Attribute {
 public:
  enum class Kind { kValue, kMethod };

  // `name` is interned, and kept as long as this.
  explicit Attribute(PyObject* name, Kind kind = Kind::kValue) : name_(name), kind_(kind) {}

  // The value, or what the method returns.
  pybind11::object of(PyObject* object) const {
    const Found& found = find(Py_TYPE(object));
    if (found.get != nullptr) return owned(found.get(object, found.closure));
    if (found.call != nullptr) return owned(found.call(object, nullptr));
    return owned(kind_ == Kind::kValue ? PyObject_GetAttr(object, name_) : PyObject_CallMethodNoArgs(object, name_));
  }

 private:
  struct Found {
    pybind11::object type;  // kept, so that no other one has its address
    getter get = nullptr;
    void* closure = nullptr;
    PyCFunction call = nullptr;
  };

  const Found& find(PyTypeObject* type) const {
    auto* const wanted = reinterpret_cast<PyObject*>(type);
    for (const Found& each : found_) {
      if (each.type.ptr() == wanted) return each;
    }
    Found& found = found_[next_++ % found_.size()];
    found = look_up(type);
    return found;
  }

  Found look_up(PyTypeObject* type) const {
    Found found;
    found.type = pybind11::reinterpret_borrow<pybind11::object>(reinterpret_cast<PyObject*>(type));
    if (type->tp_getattro != PyObject_GenericGetAttr) return found;
    const auto has = pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr(found.type.ptr(), name_));
    if (!has) {
      if (PyErr_ExceptionMatches(PyExc_AttributeError) == 0) throw pybind11::error_already_set();
      PyErr_Clear();
      return found;
    }
    if (kind_ == Kind::kValue && Py_TYPE(has.ptr()) == &PyGetSetDescr_Type && describes(has.ptr(), type)) {
      const PyGetSetDef* definition = reinterpret_cast<PyGetSetDescrObject*>(has.ptr())->d_getset;
      found.get = definition->get;
      found.closure = definition->closure;
    } else if (kind_ == Kind::kMethod && Py_TYPE(has.ptr()) == &PyMethodDescr_Type && describes(has.ptr(), type)) {
      const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(has.ptr())->d_method;
      if (definition->ml_flags == METH_NOARGS) found.call = definition->ml_meth;
    }
    return found;
  }

  static bool describes(PyObject* descriptor, PyTypeObject* type) {
    return PyType_IsSubtype(type, reinterpret_cast<PyDescrObject*>(descriptor)->d_type) != 0;
  }

  PyObject* name_;
  Kind kind_;
  mutable std::array<Found, 2> found_;  // as tensors and parameters
  mutable size_t next_ = 0;
};

}  // namespace lazyckpt
