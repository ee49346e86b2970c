// What torch answers of a tensor by plain functions of its libraries, found at run time. A method of a tensor costs the caller 40
// to 90 nanoseconds, of which the answer is one or two: around it torch looks for overrides, keeps warnings, lets go of the GIL.
//
// The aoti_torch ones are torch's stable C interface. The others, and where in its Python object a tensor lies, are not promised:
// ckpt/torch_private.py names them, and all are tried on tensors whose answers are known before any of them is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pickle/objects.h"

namespace lazyckpt {

// Only for tensors whose Python object is exactly a Tensor or a Parameter of torch.
class TorchCalls {
 public:
  // `asked`: the libraries, the symbols by what is asked, and tensors with their answers, as direct_calls() in
  // ckpt/torch_private.py gives them. None if anything is not there, or answers otherwise.
  static std::optional<TorchCalls> find(const pybind11::tuple& asked);

  // Whether the classes have still what torch has put there. What somebody has put there instead is to be asked, as ever.
  bool are_own() const;

  bool is_strided(PyObject* tensor) const { return answer<int32_t>(table_.layout, tensor) == strided_; }
  int32_t dtype(PyObject* tensor) const { return answer<int32_t>(table_.dtype, tensor); }
  int64_t storage_offset(PyObject* tensor) const { return answer<int64_t>(table_.storage_offset, tensor); }
  int64_t bytes_of_storage(PyObject* tensor) const { return answer<int64_t>(table_.storage_size, tensor); }
  bool is_neg(PyObject* tensor) const { return table_.is_neg(handle(tensor)); }
  bool is_conj(PyObject* tensor) const { return table_.is_conj(handle(tensor)); }
  bool requires_grad(PyObject* tensor) const { return table_.requires_grad(word(tensor, place_)); }
  bool has_hooks(PyObject* tensor) const { return word(tensor, hooks_place_) != nullptr; }

 private:
  struct Table {
    int32_t (*layout)(void* tensor, int32_t* answer);
    int32_t (*dtype)(void* tensor, int32_t* answer);
    int32_t (*storage_offset)(void* tensor, int64_t* answer);
    int32_t (*storage_size)(void* tensor, int64_t* answer);
    bool (*is_neg)(const void* tensor);
    bool (*is_conj)(const void* tensor);
    bool (*requires_grad)(const void* implementation);
  };

  struct Method {
    pybind11::object owner, name, value;  // a class, and what it has under the name
  };

  TorchCalls() = default;
  bool look_up(const std::vector<std::string>& libraries, const pybind11::dict& symbols);
  bool find_places(const pybind11::object& probe, uintptr_t implementation, const pybind11::object& hooked, PyObject* hooks);
  bool answers_as(const pybind11::tuple& probe) const;

  // A handle of torch's interface is the address of the tensor that lies in the Python object.
  void* handle(PyObject* tensor) const { return reinterpret_cast<char*>(tensor) + place_; }
  static void* word(PyObject* object, size_t place) { return *reinterpret_cast<void**>(reinterpret_cast<char*>(object) + place); }

  template <typename Number>
  Number answer(int32_t (*ask)(void*, Number*), PyObject* tensor) const {
    Number found = -1;
    if (ask(handle(tensor), &found) != 0) throw pybind11::value_error("torch does not answer for a tensor");
    return found;
  }

  Table table_{};
  size_t place_ = 0, hooks_place_ = 0;  // bytes from the beginning of the Python object
  int32_t strided_ = -1;
  std::vector<Method> methods_;  // whose answers these are
};

}  // namespace lazyckpt
