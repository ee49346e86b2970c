// What picklings have in common, from save to save; ckpt/plan/pickler.py makes it.
#pragma once

#include <vector>

#include "pickle/dlpack.h"

namespace lazyckpt {

struct Vocabulary {
  pybind11::dict globals;  // function, class or dtype -> the opcodes that name it
  pybind11::dict classes;  // dtype -> (class of its storages or None, bytes per element)
  pybind11::object tensor_type, parameter_type, ordered_dict, dtype_type, strided, rebuild_tensor, location_tag;
  const DlExchange* exchange;  // null: a tensor is asked by its methods
  mutable std::vector<pybind11::object> keys;  // "0", "1", ...: the same texts for each save, which nobody else has

  // The number as a text, as str() makes it: a new one, or one digit, of which Python has one of each.
  pybind11::object key_text(Py_ssize_t number) const {
    const auto wanted = static_cast<size_t>(number);
    while (keys.size() <= wanted && wanted < kMostKeys) {
      const size_t next = keys.size();
      pybind11::object text = to_text(static_cast<Py_ssize_t>(next));
      if (keys.size() == next) keys.push_back(std::move(text));
    }
    return wanted < kMostKeys ? keys[wanted] : to_text(number);
  }

 private:
  static constexpr size_t kMostKeys = 1 << 14;

  static pybind11::object to_text(Py_ssize_t number) {
    const pybind11::object made = owned(PyLong_FromSsize_t(number));
    return owned(PyObject_Str(made.ptr()));
  }
};

}  // namespace lazyckpt
