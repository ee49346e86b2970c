// The steps of a publish, checksums, and what only tests ask for: faults and crash points.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

void bind_files(pybind11::module_& module);
void bind_leak(pybind11::module_& module);
void bind_faults(pybind11::module_& module);

}  // namespace lazyckpt
