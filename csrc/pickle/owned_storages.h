// The storages that a step of an optimizer writes to, and those that a caller declares; ckpt/plan/lazy_storages.py says what for.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

void bind_owned_storages(pybind11::module_& module);

}  // namespace lazyckpt
