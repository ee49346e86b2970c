// Saving: (address, bytes) in, jobs out. It checks what Python hands over, makes a SaveRequest of it, and says in Python what
// became of that.
//
// Lifetime contract: submit() reads what is COPY before it returns; the memory of what is LAZY must stay allocated until
// the job is captured or finished, that of what is OWNED until it is finished; memory of a device, whatever its kind, until the
// job is released. The GIL is released in every call that can wait.
#pragma once

#include <pybind11/pybind11.h>

namespace lazyckpt {

void bind_kinds(pybind11::module_& module);
void bind_job(pybind11::module_& module);
void bind_samples(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace lazyckpt
