// What a tensor is, asked in the shortest way.
#pragma once

#include <memory>
#include <vector>

#include "pickle/dlpack.h"
#include "pickle/objects.h"
#include "pickle/saved_storage.h"

namespace lazyckpt {

struct LookNames {
  Name dict{"__dict__"}, is_cpu{"is_cpu"}, is_neg{"is_neg"}, is_complex{"is_complex"}, is_conj{"is_conj"}, is_nested{"is_nested"},
      size{"size"}, stride{"stride"};
};

inline const LookNames& look_names() {
  static const LookNames& kept = *std::make_unique<LookNames>().release();
  return kept;
}

// Its values are in its memory as they are.
inline bool is_resolved(PyObject* tensor, PyObject* dtype) {
  const LookNames& name = look_names();
  return !is_true(name.is_neg.call_on(tensor)) &&
         !(is_true(name.is_complex.of(dtype)) && is_true(name.is_conj.call_on(tensor))) && !is_true(name.is_nested.of(tensor));
}

// As is_plain() in ckpt/plan/pickler.py.
inline bool is_bare(PyObject* tensor, PyObject* dtype) {
  return is_resolved(tensor, dtype) && !is_true(look_names().dict.of(tensor)) &&
         !is_true(owned(PyObject_GetAttr(tensor, torch_names().backward_hooks)));
}

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
