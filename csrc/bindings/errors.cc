#include "bindings/errors.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kStorage: return "StorageError";
    case ErrorKind::kChanged: return "CaptureError";
    case ErrorKind::kCorrupt: return "CorruptError";
    case ErrorKind::kDeadline: return "DeadlineError";
    case ErrorKind::kClosed: return "ClosedError";
    case ErrorKind::kForked: return "ForkedError";
    case ErrorKind::kCancelled: return "CancelledError";
    case ErrorKind::kDevice: return "DeviceError";
  }
  return "CheckpointError";
}

}  // namespace

py::str to_text(const std::string& bytes) {
  const auto length = static_cast<Py_ssize_t>(bytes.size());
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(bytes.data(), length, "backslashreplace"));
}

py::object to_python(const Error& error) {
  const py::object type = py::module_::import("ckpt.errors").attr(class_of(error.kind()));
  const bool is_storage = error.kind() == ErrorKind::kStorage;
  const py::object exception =
      is_storage ? type(error.code(), to_text(error.what()), to_text(error.path())) : type(to_text(error.what()));
  if (error.length() > 0 && (is_storage || error.kind() == ErrorKind::kCorrupt)) {
    exception.attr("bytes_at") = py::make_tuple(error.offset(), error.offset() + error.length());
  }
  if (error.kind() == ErrorKind::kChanged) exception.attr("record") = error.code();
  if (error.kind() == ErrorKind::kDevice) exception.attr("code") = error.code();
  return exception;
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object exception = to_python(error);
    PyErr_SetObject(py::type::of(exception).ptr(), exception.ptr());
  }
}

void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace lazyckpt
