// What a tensor is, asked in the shortest way.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "pickle/attribute.h"
#include "pickle/dlpack.h"
#include "pickle/objects.h"
#include "pickle/saved_storage.h"
#include "pickle/vocabulary.h"

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

// What the tensors of a state are asked, in one pass over it. They are exactly of the class Tensor or Parameter, but where it says
// otherwise. Of what is not on the CPU or a CUDA device, or not strided, or nested, TensorShape::look() must be asked, too.
class TensorQuestions {
 public:
  explicit TensorQuestions(const Vocabulary& words)
      : words_(words), calls_(words.calls && words.calls->are_own() ? &*words.calls : nullptr) {}

  bool is_strided(PyObject* tensor) const {
    return calls_ != nullptr ? calls_->is_strided(tensor) : layout_.of(tensor).is(words_.strided);
  }

  // None if it is none of those that the vocabulary knows.
  std::optional<KnownDtype> dtype(PyObject* tensor) const {
    if (calls_ != nullptr) {
      const auto number = static_cast<size_t>(calls_->dtype(tensor));
      return number < words_.by_number.size() ? words_.by_number[number] : std::nullopt;
    }
    const pybind11::object dtype = dtype_.of(tensor);  // torch keeps it
    PyObject* entry = find(words_.classes, dtype.ptr());
    return entry == nullptr ? std::nullopt : std::make_optional(Vocabulary::to_known(dtype.ptr(), entry));
  }

  bool requires_grad(PyObject* tensor) const {
    return calls_ != nullptr ? calls_->requires_grad(tensor) : requires_grad_of_any(tensor);
  }
  bool requires_grad_of_any(PyObject* tensor) const { return is_true(requires_grad_.of(tensor)); }  // of whatever class

  pybind11::object storage(PyObject* tensor) const { return storage_.of(tensor); }
  int64_t storage_offset(PyObject* tensor) const {
    return calls_ != nullptr ? calls_->storage_offset(tensor) : to_size(storage_offset_.of(tensor).ptr());
  }
  int64_t bytes_of_storage(PyObject* tensor, PyObject* storage) const {
    return calls_ != nullptr ? calls_->bytes_of_storage(tensor) : to_size(bytes_of_storage_.of(storage).ptr());
  }

  // Its values are in its memory as they are.
  bool is_resolved(PyObject* tensor, PyObject* dtype) {
    if (calls_ != nullptr) return !calls_->is_neg(tensor) && !calls_->is_conj(tensor);
    return !is_true(is_neg_.of(tensor)) && !(is_complex(dtype) && is_true(is_conj_.of(tensor))) && !is_true(is_nested_.of(tensor));
  }

  // As is_plain() in ckpt/plan/pickler.py.
  bool is_bare(PyObject* tensor, PyObject* dtype) {
    const bool has_hooks = calls_ != nullptr ? calls_->has_hooks(tensor) : is_true(hooks_.of(tensor));
    return !has_hooks && !has_attributes(tensor) && is_resolved(tensor, dtype);
  }

 private:
  // Without making the dict that it would have them in. Where Python cannot tell, for want of memory, there may be some.
  static bool has_attributes(PyObject* tensor) {
    PyObject** const dict = _PyObject_GetDictPtr(tensor);
    return dict == nullptr || (*dict != nullptr && PyDict_GET_SIZE(*dict) > 0);
  }

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

  const Vocabulary& words_;
  const TorchCalls* const calls_;
  const LookNames& names_ = look_names();
  Attribute layout_ = value(names_.layout), dtype_ = value(names_.dtype), requires_grad_ = value(names_.requires_grad),
            is_nested_ = value(names_.is_nested), hooks_{torch_names().backward_hooks};
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
