#include "pickle/state_pickler.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pickle/address_map.h"
#include "pickle/objects.h"
#include "pickle/opcodes.h"
#include "pickle/saved_storage.h"
#include "pickle/state_form.h"
#include "pickle/tensor_look.h"
#include "pickle/vocabulary.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

// ---- type_filter -------------------------------------------------------------------------------------------------

// type_filter(types, call) is a function f(obj): None if obj's exact type is among `types`, else call(obj).
PyObject* filter_by_type(PyObject* self, PyObject* object) {
  PyObject* types = PyTuple_GET_ITEM(self, 0);
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  for (Py_ssize_t i = 0, count = PyTuple_GET_SIZE(types); i < count; ++i) {
    if (PyTuple_GET_ITEM(types, i) == type) Py_RETURN_NONE;
  }
  return PyObject_CallOneArg(PyTuple_GET_ITEM(self, 1), object);
}

PyMethodDef filter_method = {"type_filter", filter_by_type, METH_O, nullptr};

// ---- Names ---------------------------------------------------------------------------------------------------------

struct Names {
  Name dict{"__dict__"}, reduce_ex{"__reduce_ex__"}, storage{"storage"};
};

const Names& names() {
  static const Names& kept = *std::make_unique<Names>().release();
  return kept;
}

// ---- The pickler -------------------------------------------------------------------------------------------------

// An object that this pickler leaves to the one in Python.
struct Unsupported {};

// What is new for each save.
struct Tables {
  py::dict records;      // storage -> record: of all of them whenever `reduce` is called, else perhaps of none
  py::list order;        // the records, as they are numbered
  py::dict remaps;       // storages that take the way through Python
  py::function reduce;   // that way: a tensor's (function, arguments), or NotImplemented
};

// Which storages have a record. Python's tables know them by a key that takes long to ask for, so that these learn of what was
// added here when they are needed, which they mostly are not.
class KnownStorages {
 public:
  explicit KnownStorages(const Tables& tables) : tables_(tables), has_remaps_(!tables.remaps.empty()) {}

  bool has(PyObject* storage) const {
    if (torch_names().one_object && !has_remaps_) return by_object_.find(storage) >= 0;
    const py::object key = storage_key(storage);
    return find(tables_.records, key.ptr()) != nullptr || find(tables_.remaps, key.ptr()) != nullptr;
  }

  void add(const py::object& record) {
    if (PyList_Append(tables_.order.ptr(), record.ptr()) != 0) throw py::error_already_set();
    if (torch_names().one_object && !has_remaps_) return note_added();
    show_added();
  }

  // Before Python looks into its tables, and behind it.
  void show_added() {
    for (; shown_ < count(); ++shown_) {
      PyObject* record = at(shown_);
      const py::object key = storage_key(storage_of(record));
      if (PyDict_SetItem(tables_.records.ptr(), key.ptr(), record) != 0) throw py::error_already_set();
    }
  }
  void note_added() {
    for (; noted_ < count(); ++noted_) by_object_.set(storage_of(at(noted_)), static_cast<uint32_t>(noted_));
  }
  void note_shown() {
    note_added();
    shown_ = count();
  }

 private:
  Py_ssize_t count() const { return PyList_GET_SIZE(tables_.order.ptr()); }
  PyObject* at(Py_ssize_t number) const { return PyList_GET_ITEM(tables_.order.ptr(), number); }
  static PyObject* storage_of(PyObject* record) { return reinterpret_cast<const SavedStorage*>(record)->storage; }

  const Tables& tables_;
  const bool has_remaps_;
  AddressMap by_object_{256};  // which the records keep
  Py_ssize_t shown_ = 0, noted_ = 0;  // records [0, ...) of the order
};

constexpr size_t kBatch = 1000;  // items that pickle appends or sets by one opcode

// Writes what pickle.Pickler(protocol=2) writes for the same object, opcode for opcode.
class StatePickler {
 public:
  StatePickler(const Vocabulary& vocabulary, const Tables& tables) : words_(vocabulary), tables_(tables), storages_(tables), ask_(vocabulary) {}

  py::bytes dump(PyObject* root) {
    save(root);
    const std::string_view data = out_.end();
    return {data.data(), data.size()};
  }

 private:
  void save(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    if (object == Py_None) return out_.put('N');
    if (type == &PyBool_Type) return out_.put_bool(object == Py_True);
    if (type == &PyLong_Type) return save_int(object);
    if (type == &PyFloat_Type) return out_.put_float(PyFloat_AS_DOUBLE(object));
    if (is_record(type)) return put_record(py::reinterpret_borrow<py::object>(object));
    if (out_.put_again(object)) return;
    if (type == &PyUnicode_Type) return save_text(object);
    if (Py_EnterRecursiveCall(" while pickling an object") != 0) throw py::error_already_set();
    const Descent descent;
    if (is(type, words_.tensor_type)) return save_tensor(object);
    if (type == &PyDict_Type) return save_dict(object);
    if (type == &PyList_Type) return save_list(object);
    if (type == &PyTuple_Type) return save_tuple(object);
    if (is(type, words_.ordered_dict)) return save_ordered_dict(object);
    if (is(type, words_.parameter_type)) return save_parameter(object);
    if (!PyType_Check(object) && !PyFunction_Check(object) && !is(type, words_.dtype_type)) throw Unsupported();
    save_global(object);
  }

  struct Descent {
    Descent() = default;
    Descent(const Descent&) = delete;
    Descent& operator=(const Descent&) = delete;
    ~Descent() { Py_LeaveRecursiveCall(); }
  };

  static bool is(PyTypeObject* type, const py::object& known) { return reinterpret_cast<PyObject*>(type) == known.ptr(); }

  // ---- Values ----

  void memoize(PyObject* object) {
    if (object != nullptr) keep_.push_back(py::reinterpret_borrow<py::object>(object));
    out_.memoize(object);
  }

  void save_int(PyObject* object) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
    if (overflow != 0) throw Unsupported();
    out_.put_int(value);
  }

  void save_text(PyObject* object) {
    if (out_.put_again(object)) return;
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    if (text == nullptr) {  // lone surrogates
      PyErr_Clear();
      throw Unsupported();
    }
    out_.put_text({text, static_cast<size_t>(length)});
    memoize(object);
  }

  void save_global(PyObject* object) {
    if (out_.put_again(object)) return;
    PyObject* opcodes = PyDict_GetItemWithError(words_.globals.ptr(), object);
    if (opcodes == nullptr) PyErr_Clear();  // a class that cannot be hashed, for one
    if (opcodes == nullptr) throw Unsupported();
    out_.put({PyBytes_AS_STRING(opcodes), static_cast<size_t>(PyBytes_GET_SIZE(opcodes))});
    memoize(object);
  }

  // ---- Containers ----

  void save_dict(PyObject* object) {
    out_.put('}');
    memoize(object);
    const Py_ssize_t size = PyDict_GET_SIZE(object);
    Py_ssize_t position = 0;
    if (size == 1) {
      save_next(object, position);
      return out_.put('s');
    }
    for (size_t batch = size == 0 ? 0 : kBatch; batch == kBatch;) {
      out_.put('(');
      for (batch = 0; batch < kBatch && save_next(object, position); ++batch) {
      }
      out_.put('u');
    }
    if (PyDict_GET_SIZE(object) != size) throw Unsupported();
  }

  bool save_next(PyObject* dict, Py_ssize_t& position) {
    PyObject *key = nullptr, *value = nullptr;
    if (PyDict_Next(dict, &position, &key, &value) == 0) return false;
    const auto key_held = py::reinterpret_borrow<py::object>(key), value_held = py::reinterpret_borrow<py::object>(value);
    save(key);
    save(value);
    return true;
  }

  void save_list(PyObject* object) {
    out_.put(']');
    memoize(object);
    const Py_ssize_t size = PyList_GET_SIZE(object);
    const auto save_item = [&](Py_ssize_t i) {
      if (PyList_GET_SIZE(object) != size) throw Unsupported();
      save(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(object, i)).ptr());
    };
    if (size == 1) {
      save_item(0);
      return out_.put('a');
    }
    for (Py_ssize_t i = 0; i < size;) {
      out_.put('(');
      for (size_t batch = 0; batch < kBatch && i < size; ++batch) save_item(i++);
      out_.put('e');
    }
  }

  void save_tuple(PyObject* object) {
    const Py_ssize_t size = PyTuple_GET_SIZE(object);
    if (size == 0) return out_.put(')');
    out_.begin_tuple(size);
    for (Py_ssize_t i = 0; i < size; ++i) save(PyTuple_GET_ITEM(object, i));
    if (out_.knows(object)) throw Unsupported();  // it holds itself
    keep_.push_back(py::reinterpret_borrow<py::object>(object));
    out_.end_tuple(static_cast<size_t>(size), object);
  }

  void save_ordered_dict(PyObject* object) {
    if (PyDict_GET_SIZE(object) == 0 && !is_true(names().dict.of(object))) return save_empty_ordered_dict(object);
    const py::object two = owned(PyLong_FromLong(2));
    keep_.push_back(owned(PyObject_CallMethodOneArg(object, names().reduce_ex.text(), two.ptr())));
    PyObject* parts = keep_.back().ptr();  // (class, (), state, None, iterator of items)
    if (!PyTuple_CheckExact(parts) || PyTuple_GET_SIZE(parts) != 5 || PyTuple_GET_ITEM(parts, 3) != Py_None ||
        PyTuple_GET_ITEM(parts, 0) != words_.ordered_dict.ptr()) {
      throw Unsupported();
    }
    save_empty_ordered_dict(object);
    save_items(PyTuple_GET_ITEM(parts, 4));
    if (PyTuple_GET_ITEM(parts, 2) != Py_None) {
      save(PyTuple_GET_ITEM(parts, 2));
      out_.put('b');
    }
  }

  void save_empty_ordered_dict(PyObject* object) {
    save_global(words_.ordered_dict.ptr());
    out_.put(")R");
    memoize(object);
  }

  void save_items(PyObject* items) {
    const py::list all = owned(PySequence_List(items));  // the pairs are not pickled, only what is in them
    const size_t size = all.size();
    const auto save_item = [&](size_t i) {
      PyObject* item = PyList_GET_ITEM(all.ptr(), static_cast<Py_ssize_t>(i));
      save(PyTuple_GET_ITEM(item, 0));
      save(PyTuple_GET_ITEM(item, 1));
    };
    for (size_t i = 0; i < size;) {
      if (i + 1 == size) {
        save_item(i++);
        out_.put('s');
        break;
      }
      out_.put('(');
      for (size_t batch = 0; batch < kBatch && i < size; ++batch) save_item(i++);
      out_.put('u');
    }
  }

  // ---- Tensors ----

  void save_tensor(PyObject* tensor) {
    if (save_simple_tensor(tensor)) return;
    const py::object reduced = reduce(tensor);
    if (!PyTuple_CheckExact(reduced.ptr()) || PyTuple_GET_SIZE(reduced.ptr()) != 2) throw Unsupported();
    save_global(PyTuple_GET_ITEM(reduced.ptr(), 0));
    save(PyTuple_GET_ITEM(reduced.ptr(), 1));
    out_.put('R');
    memoize(tensor);
  }

  py::object reduce(PyObject* object) {
    storages_.show_added();
    keep_.push_back(owned(PyObject_CallOneArg(tables_.reduce.ptr(), object)));
    storages_.note_shown();
    return keep_.back();
  }

  // A plain tensor that covers its storage and is the first to do so: nearly all that there are, and the reason for this file.
  // False for any other; then nothing has been written.
  bool save_simple_tensor(PyObject* tensor) {
    if (!ask_.is_strided(tensor)) return false;
    const std::optional<KnownDtype> dtype = ask_.dtype(tensor);
    if (!dtype || dtype->type == nullptr || !ask_.is_bare(tensor, dtype->dtype)) return false;
    if (!shape_.look(words_.exchange, tensor)) return false;  // first: elsewhere a tensor need not have a storage
    const py::object storage = ask_.storage(tensor);
    if (storages_.has(storage.ptr())) return false;
    const int64_t bytes = ask_.bytes_of_storage(tensor, storage.ptr());
    if (bytes != shape_.numel * dtype->itemsize || ask_.storage_offset(tensor) != 0) return false;

    const py::object record = add_record(storage, *dtype, tensor, bytes);
    save_global(words_.rebuild_tensor.ptr());
    out_.begin_tuple(6);
    put_record(record);
    out_.put_int(0);
    put_numbers(shape_.sizes);
    put_numbers(shape_.strides);
    out_.put_bool(ask_.requires_grad(tensor));
    save_empty_ordered_dict(nullptr);
    out_.end_tuple(6, nullptr);
    out_.put('R');
    memoize(tensor);
    return true;
  }

  // For the tensor in shape_.
  py::object add_record(const py::object& storage, const KnownDtype& dtype, PyObject* tensor, Py_ssize_t bytes) {
    const py::object key = words_.key_text(PyList_GET_SIZE(tables_.order.ptr()));
    py::object made = make_record(storage.ptr(), key.ptr(), dtype.dtype, tensor, bytes, dtype.type, shape_.numel);
    SavedStorage& record = *reinterpret_cast<SavedStorage*>(made.ptr());
    record.address = shape_.address;
    if (shape_.device_type == kDlCuda) {
      std::string& tag = device_tags_[shape_.device_id];
      if (tag.empty()) tag = py::cast<std::string>(words_.location_tag(storage));
      // A text for each, as torch.save has it: whether two lie on one device must not show in which objects are shared.
      Py_SETREF(record.location, py::str(tag).release().ptr());
    }
    storages_.add(made);
    return made;
  }

  void put_numbers(const std::vector<int64_t>& numbers) {
    if (numbers.empty()) return out_.put(')');
    out_.begin_tuple(numbers.size());
    for (const int64_t number : numbers) out_.put_int(number);
    out_.end_tuple(numbers.size(), nullptr);
  }

  // ("storage", class, key, location, number of elements), by which the reader finds the storage.
  void put_record(const py::object& object) {
    const SavedStorage& record = *reinterpret_cast<const SavedStorage*>(object.ptr());
    if (record.type == nullptr) throw Unsupported();
    out_.begin_tuple(5);
    save_text(names().storage.text());
    save_global(record.type);
    save_text(record.key);
    save_text(record.location);
    out_.put_int(record.numel);
    out_.end_tuple(5, nullptr);
    out_.put('Q');
  }

  void save_parameter(PyObject* parameter) {
    const py::object reduced = reduce(parameter);
    if (!PyTuple_CheckExact(reduced.ptr())) throw Unsupported();  // NotImplemented: it has attributes
    save_global(PyTuple_GET_ITEM(reduced.ptr(), 0));
    save(PyTuple_GET_ITEM(reduced.ptr(), 1));
    out_.put('R');
    memoize(parameter);
  }

  const Vocabulary& words_;
  const Tables& tables_;
  OpcodeWriter out_;
  KnownStorages storages_;
  TensorQuestions ask_;
  TensorShape shape_;  // of the tensor at hand
  std::map<int32_t, std::string> device_tags_;  // by the number of a CUDA device
  std::vector<py::object> keep_;  // all that has a number, so that no later object has its address
};

py::object dump(const Vocabulary& vocabulary, const py::object& root, py::dict records, py::list order, py::dict remaps,
                py::function reduce) {
  const Tables tables{std::move(records), std::move(order), std::move(remaps), std::move(reduce)};
  try {
    return StatePickler(vocabulary, tables).dump(root.ptr());
  } catch (const Unsupported&) {
    return py::none();
  }
}

}  // namespace

void bind_pickling(py::module_& module) {
  module.def("type_filter", [](const py::tuple& types, const py::function& call) {
    return owned(PyCFunction_New(&filter_method, py::make_tuple(types, call).ptr()));
  });
  py::class_<Vocabulary>(module, "StatePickler")
      .def(py::init([](py::dict globals, py::dict classes, py::object tensor_type, py::object parameter_type,
                       py::object ordered_dict, py::object dtype_type, py::object strided, py::object rebuild_tensor,
                       py::object location_tag, const py::object& probe, const py::object& calls, const py::list& refused,
                       const py::dict& dtypes) {
             const DlExchange* exchange = probe.is_none() ? nullptr : find_dl_exchange(tensor_type, probe);
             Vocabulary words{std::move(globals),        std::move(classes),      std::move(tensor_type),
                              std::move(parameter_type), std::move(ordered_dict), std::move(dtype_type),
                              std::move(strided),        std::move(rebuild_tensor), std::move(location_tag), exchange, {}, {}, {}};
             if (!calls.is_none()) words.use_calls(calls, refused, dtypes);
             return words;
           }),
           py::kw_only(), py::arg("globals"), py::arg("classes"), py::arg("tensor_type"), py::arg("parameter_type"),
           py::arg("ordered_dict"), py::arg("dtype_type"), py::arg("strided"), py::arg("rebuild_tensor"),
           py::arg("location_tag"), py::arg("probe"), py::arg("calls"),
           py::arg("refused"), py::arg("dtypes"))
      .def_property_readonly("calls_directly", [](const Vocabulary& words) { return words.calls.has_value(); })
      .def_property_readonly("exchanges", [](const Vocabulary& words) { return words.exchange != nullptr; })
      .def("dump", &dump, py::arg("root"), py::kw_only(), py::arg("records"), py::arg("order"), py::arg("remaps"),
           py::arg("reduce"))
      .def("read_form", &read_form, py::arg("state"), py::kw_only(), py::arg("wrapper"), py::arg("is_value"));
}

}  // namespace lazyckpt
