// The module ckpt._native: the Python face of the core. Each of its parts stands in a file of its own.
#include <pybind11/pybind11.h>

#include "bindings/devices.h"
#include "bindings/engine.h"
#include "bindings/errors.h"
#include "bindings/files.h"
#include "bindings/reading.h"
#include "pickle/owned_storages.h"
#include "pickle/saved_storage.h"
#include "pickle/state_pickler.h"

using namespace lazyckpt;

PYBIND11_MODULE(_native, module) {
  module.doc() = "The engine of ckpt. Private: its names change without notice.";
  pybind11::register_exception_translator(&translate);
  bind_kinds(module);
  bind_job(module);
  bind_samples(module);
  bind_engine(module);
  bind_devices(module);
  bind_files(module);
  bind_reading(module);
  bind_records(module);
  bind_owned_storages(module);
  bind_pickling(module);
  bind_leak(module);
  bind_faults(module);
}
