// What torch tells of a tensor by the C exchange API of DLPack 1 (from torch 2.10): address, device, shape and strides by one
// call, where the methods of a tensor take a microsecond. The structures are those of the standard, which does not change within
// version 1: https://dmlc.github.io/dlpack/latest/c_api.html.
#pragma once

#include <cstdint>
#include <memory>

#include "pickle/objects.h"

namespace lazyckpt {

struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t *shape, *strides;  // of the tensor, borrowed; strides in elements
  uint64_t byte_offset;
};

constexpr int32_t kDlCpu = 1, kDlCuda = 2;

struct DlExchange {
  struct {
    uint32_t major, minor;
    const DlExchange* previous;
  } header;
  void *allocate, *export_managed, *import_managed;
  int (*look)(void* tensor, DlTensor* out);  // borrows; nonzero: a Python error is set
  void* current_stream;
};

// Null where this torch has none, or one that does not tell strides as they are (older ones smooth those of length 1).
inline const DlExchange* find_dl_exchange(const pybind11::object& tensor_type, const pybind11::object& probe) {
  constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
  constexpr const char* kCapsule = "dlpack_exchange_api";
  if (!pybind11::hasattr(tensor_type, kAttribute)) return nullptr;
  const pybind11::object capsule = tensor_type.attr(kAttribute);
  if (PyCapsule_IsValid(capsule.ptr(), kCapsule) == 0) return nullptr;
  const auto* api = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), kCapsule));
  if (api->header.major != 1 || api->look == nullptr) return nullptr;
  DlTensor found{};
  if (api->look(probe.ptr(), &found) != 0) {
    PyErr_Clear();
    return nullptr;
  }
  const auto sizes = pybind11::tuple(probe.attr("shape")), strides = pybind11::tuple(probe.attr("stride")());
  bool same = found.data == reinterpret_cast<void*>(pybind11::cast<uintptr_t>(probe.attr("data_ptr")())) &&
              found.device_type == kDlCpu && found.byte_offset == 0 && found.dimensions == static_cast<int32_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = pybind11::cast<int64_t>(sizes[i]) == found.shape[i] && pybind11::cast<int64_t>(strides[i]) == found.strides[i];
  }
  return same ? api : nullptr;
}

}  // namespace lazyckpt
