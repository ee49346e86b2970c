#include "bindings/devices.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>

#include "base/error.h"
#include "cuda/driver.h"
#include "cuda/self_check.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

const char* name_of(cuda::Verdict verdict) {
  switch (verdict) {
    case cuda::Verdict::kPassed: return "passed";
    case cuda::Verdict::kFailed: return "failed";
    case cuda::Verdict::kInconclusive: return "inconclusive";
    case cuda::Verdict::kLate: return "late";
  }
  throw Error(ErrorKind::kDevice, "a verdict without a name");
}

// (verdict, reason). Throws if there is no driver, or no such device.
py::tuple check_device(int device, double timeout_s, const std::optional<std::string>& library) {
  cuda::SelfCheck found;
  {
    py::gil_scoped_release release;
    const auto driver = std::make_shared<const cuda::Driver>(library.value_or(""));
    found = cuda::check_device(std::make_shared<const cuda::Context>(driver, device), timeout_s);
  }
  return py::make_tuple(name_of(found.verdict), found.reason);
}

}  // namespace

void bind_devices(py::module_& module) {
  module.def("check_device", &check_device, py::arg("device"), py::arg("timeout_s"), py::arg("driver") = py::none());
}

}  // namespace lazyckpt
