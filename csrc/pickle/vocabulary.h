// What picklings have in common, from save to save; ckpt/plan/pickler.py makes it.
#pragma once

#include <optional>
#include <vector>

#include "pickle/dlpack.h"
#include "pickle/torch_calls.h"

namespace lazyckpt {

// What the table of classes has of a dtype, borrowed from there.
struct KnownDtype {
  PyObject *dtype, *type;  // type: the class of its storages; null: it has none of its own
  Py_ssize_t itemsize;     // bytes
};

struct Vocabulary {
  pybind11::dict globals;  // function, class or dtype -> the opcodes that name it
  pybind11::dict classes;  // dtype -> (class of its storages or None, bytes per element)
  pybind11::object tensor_type, parameter_type, ordered_dict, dtype_type, strided, rebuild_tensor, location_tag;
  const DlExchange* exchange;  // null: a tensor is asked by its methods
  std::optional<TorchCalls> calls;  // none: as well
  std::vector<std::optional<KnownDtype>> by_number;  // by the numbers that calls have for dtypes
  mutable std::vector<pybind11::object> keys;  // "0", "1", ...: the same texts for each save, which nobody else has

  static KnownDtype to_known(PyObject* dtype, PyObject* entry) {
    PyObject* type = PyTuple_GET_ITEM(entry, 0);
    return {dtype, type == Py_None ? nullptr : type, to_size(PyTuple_GET_ITEM(entry, 1))};
  }

  // `asked`: as TorchCalls::find() takes it; `refused`: tensors that the exchange must not tell of, or they would have to be told
  // apart; `dtypes`: of each dtype a tensor. Calls are used only if each has a number of its own.
  void use_calls(const pybind11::tuple& asked, const pybind11::list& refused, const pybind11::dict& dtypes) {
    std::optional<TorchCalls> found = exchange == nullptr ? std::nullopt : TorchCalls::find(asked);
    if (!found) return;
    for (const pybind11::handle tensor : refused) {
      DlTensor seen{};
      if (exchange->look(tensor.ptr(), &seen) == 0) return;
      PyErr_Clear();
    }
    for (const auto& [dtype, tensor] : dtypes) {
      const int32_t number = found->dtype(tensor.ptr());
      PyObject* entry = lazyckpt::find(classes, dtype.ptr());
      if (number < 0 || number >= kMostDtypes || entry == nullptr) return;
      if (by_number.size() <= static_cast<size_t>(number)) by_number.resize(static_cast<size_t>(number) + 1);
      if (by_number[static_cast<size_t>(number)]) return;
      by_number[static_cast<size_t>(number)] = to_known(dtype.ptr(), entry);
    }
    calls = found;
  }

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
  static constexpr int32_t kMostDtypes = 256;

  static pybind11::object to_text(Py_ssize_t number) {
    const pybind11::object made = owned(PyLong_FromSsize_t(number));
    return owned(PyObject_Str(made.ptr()));
  }
};

}  // namespace lazyckpt
