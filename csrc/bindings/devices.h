// Trying out whether devices do what the engine relies on.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

void bind_devices(pybind11::module_& module);

}  // namespace lazyckpt
