#include "pickle/state_form.h"

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>

#include "pickle/objects.h"
#include "pickle/saved_storage.h"
#include "pickle/tensor_look.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

struct Names {
  Name items{"items"}, global_offsets{"global_offsets"};
};

const Names& names() {
  static const Names& kept = *std::make_unique<Names>().release();
  return kept;
}

// Of an object that nobody here knows.
struct Unknown {};

enum class Kind { kDict, kList, kTensor, kWrapped, kValue };

class FormReader {
 public:
  FormReader(const Vocabulary& words, const py::object& wrapper, const py::function& is_value)
      : words_(words), is_value_(is_value), key_("0"), ask_(words) {
    if (wrapper.is_none()) return;
    const auto parts = wrapper.cast<py::tuple>();
    if (parts.size() != 3 || !PyType_Check(PyTuple_GET_ITEM(parts.ptr(), 0))) throw py::type_error("wrapper is a type and two names");
    wrapped_ = reinterpret_cast<PyTypeObject*>(PyTuple_GET_ITEM(parts.ptr(), 0));
    local_ = parts[1];
    spec_ = parts[2];
  }

  void add(PyObject* object) {
    switch (kind_of(object)) {
      case Kind::kDict: return add_dict(object);
      case Kind::kList: return is_terminal(object) ? add_value(object) : add_list(object);
      case Kind::kTensor: return add_plain(object);
      case Kind::kWrapped: return add_wrapped(object);
      case Kind::kValue: return add_value(object);
    }
  }

  py::tuple found() const { return py::make_tuple(py::bytes(form_), py::bytes(kinds_), tensors_, records_, partial_, specs_, values_); }

 private:
  Kind kind_of(PyObject* object) {
    PyTypeObject* type = Py_TYPE(object);
    if (type == wrapped_) return Kind::kWrapped;
    if (is(type, words_.tensor_type) || is(type, words_.parameter_type)) return Kind::kTensor;
    if (type == &PyDict_Type || is(type, words_.ordered_dict)) return Kind::kDict;
    if (type == &PyList_Type) return Kind::kList;
    if (object == Py_None || type == &PyBool_Type || type == &PyLong_Type || type == &PyFloat_Type || type == &PyUnicode_Type ||
        type == &PyBytes_Type || type == &PyTuple_Type) {
      return Kind::kValue;
    }
    const auto [at, is_new] = known_.emplace(type, false);
    if (is_new) at->second = is_true(is_value_(py::handle(reinterpret_cast<PyObject*>(type))));
    if (!at->second) throw Unknown();
    return Kind::kValue;
  }

  static bool is(PyTypeObject* type, const py::object& known) { return reinterpret_cast<PyObject*>(type) == known.ptr(); }

  // Whether a list holds values alone, and so is one.
  bool is_terminal(PyObject* list) {
    const Descent descent;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
      const auto item = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list, i));
      const Kind kind = kind_of(item.ptr());
      if (kind != Kind::kValue && !(kind == Kind::kList && is_terminal(item.ptr()))) return false;
    }
    return true;
  }

  void add_dict(PyObject* dict) {
    const Descent descent;
    const Py_ssize_t size = PyDict_GET_SIZE(dict);
    put('{', size);
    if (!PyDict_CheckExact(dict)) return add_items(dict);
    PyObject *key = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value) != 0;) {
      const auto key_held = py::reinterpret_borrow<py::object>(key), value_held = py::reinterpret_borrow<py::object>(value);
      put_key(key);
      add(value);
      if (PyDict_GET_SIZE(dict) != size) throw Unknown();
    }
  }

  // In the order that it has of its own.
  void add_items(PyObject* ordered) {
    const py::list items = owned(PySequence_List(names().items.call_on(ordered).ptr()));
    for (const py::handle item : items) {
      put_key(PyTuple_GET_ITEM(item.ptr(), 0));
      add(PyTuple_GET_ITEM(item.ptr(), 1));
    }
  }

  void put_key(PyObject* key) {
    if (PyLong_CheckExact(key)) {
      int overflow = 0;
      const long long number = PyLong_AsLongLongAndOverflow(key, &overflow);
      if (overflow != 0) throw Unknown();
      return put('I', number);
    }
    Py_ssize_t length = 0;
    const char* text = PyUnicode_CheckExact(key) ? PyUnicode_AsUTF8AndSize(key, &length) : nullptr;
    if (text == nullptr) {
      PyErr_Clear();
      throw Unknown();
    }
    put('S', length);
    form_.append(text, static_cast<size_t>(length));
  }

  void add_list(PyObject* list) {
    const Descent descent;
    const Py_ssize_t size = PyList_GET_SIZE(list);
    put('[', size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (PyList_GET_SIZE(list) != size) throw Unknown();
      add(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(list, i)).ptr());
    }
  }

  void add_value(PyObject* value) {
    form_.push_back('V');
    kinds_.push_back('V');
    values_.append(py::handle(value));
  }

  // See is_named_part() in ckpt/plan/shards.py.
  void add_plain(PyObject* tensor) {
    const py::dict attributes = look_names().dict.of(tensor);
    if (PyDict_GET_SIZE(attributes.ptr()) > 0 && find(attributes, names().global_offsets.text()) != nullptr) throw Unknown();
    add_tensor(tensor, 'T');
  }

  void add_wrapped(PyObject* tensor) {
    const py::object local = owned(PyObject_GetAttr(tensor, local_.ptr())), spec = owned(PyObject_GetAttr(tensor, spec_.ptr()));
    if (!is(Py_TYPE(local.ptr()), words_.tensor_type)) throw Unknown();  // the result of a collective under way, for one
    form_.push_back(ask_.requires_grad_of_any(tensor) ? 'G' : 'N');
    add_tensor(local.ptr(), 'D');
    specs_.append(spec);
  }

  void add_tensor(PyObject* tensor, char kind) {
    if (!ask_.is_strided(tensor)) throw Unknown();
    const std::optional<KnownDtype> dtype = ask_.dtype(tensor);
    if (!dtype || !ask_.is_resolved(tensor, dtype->dtype) || !shape_.look(words_.exchange, tensor)) throw Unknown();
    const Py_ssize_t itemsize = dtype->itemsize;
    const py::object storage = ask_.storage(tensor);
    const Py_ssize_t all = ask_.bytes_of_storage(tensor, storage.ptr());
    const Py_ssize_t low = ask_.storage_offset(tensor) * itemsize, bytes = shape_.span() * itemsize;
    if (low < 0 || low + bytes > all) throw Unknown();  // memory that was taken away

    put(kind, reinterpret_cast<intptr_t>(dtype->dtype));  // of which torch has one of each kind
    put(ask_.requires_grad(tensor) ? 'G' : 'N', static_cast<Py_ssize_t>(shape_.sizes.size()));
    put(static_cast<char>(shape_.device_type), shape_.device_id);
    put_numbers(shape_.sizes);
    put_numbers(shape_.strides);
    kinds_.push_back(kind);
    tensors_.append(py::handle(tensor));
    if (bytes != all) partial_.append(records_.size());
    records_.append(make(storage, dtype->dtype, tensor, low, bytes));
  }

  py::object make(const py::object& storage, PyObject* dtype, PyObject* tensor, Py_ssize_t low, Py_ssize_t bytes) {
    py::object made = make_record(storage.ptr(), key_.ptr(), dtype, tensor, bytes, nullptr, 0);
    SavedStorage& record = *reinterpret_cast<SavedStorage*>(made.ptr());
    record.low = low;
    if (bytes > 0 && shape_.address != 0) record.address = shape_.address - static_cast<unsigned long long>(low);
    if (shape_.device_type == kDlCuda) {
      py::object& tag = device_tags_[shape_.device_id];
      if (!tag) tag = words_.location_tag(storage);
      Py_SETREF(record.location, tag.inc_ref().ptr());
    }
    return made;
  }

  void put(char tag, int64_t number) {
    form_.push_back(tag);
    form_.append(reinterpret_cast<const char*>(&number), sizeof(number));
  }

  void put_numbers(const std::vector<int64_t>& numbers) {
    form_.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
  }

  struct Descent {
    Descent() {
      if (Py_EnterRecursiveCall(" while looking through a state") != 0) throw py::error_already_set();
    }
    Descent(const Descent&) = delete;
    Descent& operator=(const Descent&) = delete;
    ~Descent() { Py_LeaveRecursiveCall(); }
  };

  const Vocabulary& words_;
  const py::function& is_value_;
  const py::str key_;
  PyTypeObject* wrapped_ = nullptr;  // as long as its module
  py::object local_, spec_;
  std::unordered_map<PyTypeObject*, bool> known_;  // other types: whether they are values
  std::map<int32_t, py::object> device_tags_;      // by the number of a CUDA device
  TensorQuestions ask_;
  TensorShape shape_;                              // of the tensor at hand
  std::string form_, kinds_;
  py::list tensors_, records_, partial_, specs_, values_;
};

}  // namespace

py::object read_form(const Vocabulary& words, const py::dict& state, const py::object& wrapper, const py::function& is_value) {
  if (words.classes.empty()) return py::none();  // tensors may be what nobody here knows
  FormReader reader(words, wrapper, is_value);
  try {
    reader.add(state.ptr());
  } catch (const Unknown&) {
    return py::none();
  }
  return reader.found();
}

}  // namespace lazyckpt
