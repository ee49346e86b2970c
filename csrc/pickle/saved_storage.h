// One storage, or one run of it, on its way to the file as `data/<key>`: the Python type ckpt._native.SavedStorage, and what is done
// for each of them in the time of whoever saves. ckpt/plan/pickler.py says what all of it is for.
#pragma once

#include <vector>

#include "pickle/address_map.h"
#include "pickle/objects.h"

namespace lazyckpt {

// Objects are null where Python sees None. Takes no part in the cyclic collector, which would visit them by the ten thousand:
// nothing that they hold refers to them.
struct SavedStorage {
  PyObject ob_base;
  PyObject *storage, *key, *location;
  PyObject* dtype;   // as torch tells storages apart: null for untyped
  PyObject* tensor;  // one that views it, for its version counter and its name
  PyObject* type;    // the class that names it in the pickle
  PyObject* others;  // a list of more saved tensors that view it: they may have counters of their own
  PyObject* views;   // a list of byte intervals
  PyObject* counted;  // a list of tensors and their counters when it was placed, by turns: of all but `tensor`
  Py_ssize_t low;    // the first byte of the storage that is written
  Py_ssize_t nbytes;
  Py_ssize_t numel;  // of `type`
  Py_ssize_t version;  // the counter of `tensor` when it was placed; -1: it has none
  unsigned long long address;  // of the storage; 0: not known yet
  char whole;  // must be written whole: a bare storage, or a tensor that covers it
  char typed;  // named as its dtype by a pickling that we cannot change
};

bool is_record(PyTypeObject* type);

// Attributes that torch does not promise to keep, as ckpt/torch_private.py has found them; null: without it.
struct TorchNames {
  PyObject *storage_key = nullptr, *version = nullptr, *backward_hooks = nullptr;
  bool keys_last = false;   // a storage has one key for all its life
  bool one_object = false;  // and one object that stands for it
};
const TorchNames& torch_names();

// What two objects that stand for one storage have in common.
pybind11::object storage_key(PyObject* storage);

// Of a storage on the CPU that a tensor covers.
pybind11::object make_record(PyObject* storage, PyObject* key, PyObject* dtype, PyObject* tensor, Py_ssize_t nbytes, PyObject* type,
                             Py_ssize_t numel);

// The storages that are saved, and whose they are. An optimizer's state is, mostly, the very tensors that are saved, and to find
// their storages here takes a tenth of asking torch.
class StorageIndex {
 public:
  explicit StorageIndex(const pybind11::list& records);

  pybind11::object find(PyObject* tensor) const;  // null if it is not among those that are saved

  // Where storages have one object: they need not be told apart by their keys, and the tensors of owners are noted here.
  static bool takes_owners() { return torch_names().one_object; }
  void note_owner(PyObject* storage, PyObject* tensor);  // nothing, if the storage is not saved

  struct Owners {
    pybind11::object first;  // null: none
    std::vector<pybind11::object> more;
  };
  const Owners& owners_of(PyObject* storage) const;

 private:
  struct Place {
    PyObject* storage;  // borrowed from a record
    Owners owners;
  };

  static size_t slots_for(size_t count);
  AddressMap by_tensor_, by_storage_;  // to places_
  std::vector<Place> places_;
};

void bind_records(pybind11::module_& module);

}  // namespace lazyckpt
