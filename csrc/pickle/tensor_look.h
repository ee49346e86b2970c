// What a tensor is, asked in the shortest way.
#pragma once

#include <memory>
#include <vector>

#include "pickle/attribute.h"
#include "pickle/dlpack.h"
#include "pickle/objects.h"
#include "pickle/saved_storage.h"

namespace lazyckpt {

struct LookNames {
  Name dict{"__dict__"}, is_cpu{"is_cpu"}, is_neg{"is_neg"}, is_complex{"is_complex"}, is_conj{"is_conj"}, is_nested{"is_nested"},
      size{"size"}, stride{"stride"}, layout{"layout"}, dtype{"dtype"}, requires_grad{"requires_grad"},
      untyped_storage{"untyped_storage"}, storage_offset{"storage_offset"}, nbytes{"nbytes"};
};

inline const LookNames& look_names() {
  static const LookNames& kept = *std::make_unique<LookNames>().release();
  return kept;
}

// What the tensors of a state are asked, in one pass over it.
class TensorQuestions {
 public:
  bool is_strided(PyObject* tensor, const pybind11::object& strided) const { return layout_.of(tensor).is(strided); }
  pybind11::object dtype(PyObject* tensor) const { return dtype_.of(tensor); }
  bool requires_grad(PyObject* tensor) const { return is_true(requires_grad_.of(tensor)); }
  pybind11::object storage(PyObject* tensor) const { return storage_.of(tensor); }
  Py_ssize_t storage_offset(PyObject* tensor) const { return to_size(storage_offset_.of(tensor).ptr()); }
  Py_ssize_t bytes_of_storage(PyObject* storage) const { return to_size(bytes_of_storage_.of(storage).ptr()); }

  // Its values are in its memory as they are.
  bool is_resolved(PyObject* tensor, PyObject* dtype) {
    return !is_true(is_neg_.of(tensor)) && !(is_complex(dtype) && is_true(is_conj_.of(tensor))) && !is_true(is_nested_.of(tensor));
  }

  // As is_plain() in ckpt/plan/pickler.py.
  bool is_bare(PyObject* tensor, PyObject* dtype) {
    return !is_true(dict_.of(tensor)) && !is_true(hooks_.of(tensor)) && is_resolved(tensor, dtype);
  }

 private:
  // One is mostly that of the tensor before.
  bool is_complex(PyObject* dtype) {
    if (dtype != known_dtype_.ptr()) {
      is_complex_ = is_true(look_names().is_complex.of(dtype));
      known_dtype_ = pybind11::reinterpret_borrow<pybind11::object>(dtype);
    }
    return is_complex_;
  }

  static Attribute value(const Name& name) { return Attribute(name.text()); }
  static Attribute method(const Name& name) { return Attribute(name.text(), Attribute::Kind::kMethod); }

  const LookNames& names_ = look_names();
  Attribute layout_ = value(names_.layout), dtype_ = value(names_.dtype), requires_grad_ = value(names_.requires_grad),
            dict_ = value(names_.dict), is_nested_ = value(names_.is_nested), hooks_{torch_names().backward_hooks};
  Attribute is_neg_ = method(names_.is_neg), is_conj_ = method(names_.is_conj), storage_ = method(names_.untyped_storage),
            storage_offset_ = method(names_.storage_offset), bytes_of_storage_ = method(names_.nbytes);
  pybind11::object known_dtype_;
  bool is_complex_ = false;
};

struct TensorShape {
  std::vector<int64_t> sizes, strides;
  int64_t numel = 1;
  unsigned long long address = 0;  // where it is told for nothing
  int32_t device_type = kDlCpu, device_id = 0;

  // False if the tensor is neither on the CPU nor on a CUDA device.
  bool look(const DlExchange* exchange, PyObject* tensor) {
    *this = {std::move(sizes), std::move(strides), 1, 0, kDlCpu, 0};
    if (exchange != nullptr) {
      DlTensor seen{};
      if (exchange->look(tensor, &seen) != 0) {
        PyErr_Clear();
        return false;
      }
      sizes.assign(seen.shape, seen.shape + seen.dimensions);
      strides.assign(seen.strides, seen.strides + seen.dimensions);
      address = reinterpret_cast<uintptr_t>(seen.data);
      device_type = seen.device_type;
      device_id = seen.device_id;
    } else {
      if (!is_true(look_names().is_cpu.of(tensor))) return false;
      copy_numbers(look_names().size.call_on(tensor).ptr(), sizes);
      copy_numbers(look_names().stride.call_on(tensor).ptr(), strides);
    }
    for (const int64_t each : sizes) numel *= each;
    return device_type == kDlCpu || device_type == kDlCuda;
  }

  // From the first to the last element that it has, which need not be all of these.
  int64_t span() const {
    int64_t last = 0;
    for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
    return numel == 0 ? 0 : last + 1;
  }

 private:
  static void copy_numbers(PyObject* tuple, std::vector<int64_t>& numbers) {
    numbers.clear();
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) numbers.push_back(to_size(PyTuple_GET_ITEM(tuple, i)));
  }
};

}  // namespace lazyckpt
