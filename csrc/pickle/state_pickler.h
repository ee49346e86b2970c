// Native parts of pickling: plain C functions, because they run for each object, or for each tensor, of a state. What is
// rare or hard they leave to ckpt/plan/pickler.py, which also says what all of it is for.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

void bind_pickling(pybind11::module_& module);

}  // namespace lazyckpt
