// Reading files of records into memory that Python owns.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

void bind_reading(pybind11::module_& module);

}  // namespace lazyckpt
