#include "pickle/torch_calls.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <type_traits>

namespace py = pybind11;

namespace lazyckpt {
namespace {

constexpr size_t kWord = sizeof(void*);

}  // namespace

// asked: (libraries, {what is asked: symbol}, probe, its implementation, a tensor with hooks, its hooks,
//         [(tensor, implementation, is strided, offset, bytes of its storage, is_neg, is_conj, requires_grad), ...],
//         [(class, name), ...])
std::optional<TorchCalls> TorchCalls::find(const py::tuple& asked) {
  TorchCalls calls;
  if (asked.size() != 8 || !calls.look_up(asked[0].cast<std::vector<std::string>>(), asked[1])) return std::nullopt;
  const py::object hooks = asked[5];
  if (!calls.find_places(asked[2], asked[3].cast<uintptr_t>(), asked[4], hooks.ptr())) return std::nullopt;
  for (const py::handle probe : asked[6].cast<py::list>()) {
    if (!calls.answers_as(probe.cast<py::tuple>())) return std::nullopt;
  }
  for (const py::handle each : asked[7].cast<py::list>()) {
    const auto pair = each.cast<py::tuple>();
    calls.methods_.push_back({pair[0], pair[1], owned(PyObject_GetAttr(pair[0].ptr(), pair[1].ptr()))});
  }
  return calls;
}

bool TorchCalls::are_own() const {
  return std::all_of(methods_.begin(), methods_.end(), [](const Method& each) {
    return owned(PyObject_GetAttr(each.owner.ptr(), each.name.ptr())).is(each.value);
  });
}

bool TorchCalls::look_up(const std::vector<std::string>& libraries, const py::dict& symbols) {
  std::vector<void*> handles;
  for (const std::string& library : libraries) {
    void* handle = ::dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);  // never another one than torch itself uses
    if (handle != nullptr) handles.push_back(handle);
  }
  const auto find = [&](auto& field, const char* asked) {
    if (!symbols.contains(asked)) return false;
    const auto symbol = symbols[asked].cast<std::string>();
    for (void* handle : handles) {
      void* found = ::dlsym(handle, symbol.c_str());
      if (found == nullptr) continue;
      field = reinterpret_cast<std::decay_t<decltype(field)>>(found);
      return true;
    }
    return false;
  };
  return find(table_.layout, "layout") && find(table_.dtype, "dtype") && find(table_.storage_offset, "storage_offset") &&
         find(table_.storage_size, "storage_size") && find(table_.is_neg, "is_neg") && find(table_.is_conj, "is_conj") &&
         find(table_.requires_grad, "requires_grad");
}

// By what is there: each of the two words lies at one place.
bool TorchCalls::find_places(const py::object& probe, uintptr_t implementation, const py::object& hooked, PyObject* hooks) {
  const auto bytes = static_cast<size_t>(Py_TYPE(probe.ptr())->tp_basicsize);
  if (Py_TYPE(hooked.ptr()) != Py_TYPE(probe.ptr()) || implementation == 0 || hooks == Py_None) return false;
  size_t places = 0, hook_places = 0;
  for (size_t at = sizeof(PyObject); at + kWord <= bytes; at += kWord) {
    if (word(probe.ptr(), at) == reinterpret_cast<void*>(implementation)) {
      place_ = at;
      ++places;
    }
    if (word(hooked.ptr(), at) == hooks) {
      hooks_place_ = at;
      ++hook_places;
    }
  }
  if (places != 1 || hook_places != 1 || !has_hooks(hooked.ptr()) || has_hooks(probe.ptr())) return false;
  return table_.layout(handle(probe.ptr()), &strided_) == 0;
}

bool TorchCalls::answers_as(const py::tuple& probe) const {
  PyObject* tensor = probe[0].ptr();
  if (word(tensor, place_) != reinterpret_cast<void*>(probe[1].cast<uintptr_t>()) || has_hooks(tensor)) return false;
  const auto strided = probe[2].cast<bool>();
  if (is_strided(tensor) != strided || is_neg(tensor) != probe[5].cast<bool>() || is_conj(tensor) != probe[6].cast<bool>() ||
      requires_grad(tensor) != probe[7].cast<bool>()) {
    return false;
  }
  return !strided || (storage_offset(tensor) == probe[3].cast<int64_t>() && bytes_of_storage(tensor) == probe[4].cast<int64_t>());
}

}  // namespace lazyckpt
