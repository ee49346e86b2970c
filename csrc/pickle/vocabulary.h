// What picklings have in common, from save to save; ckpt/plan/pickler.py makes it.
#pragma once

#include "pickle/dlpack.h"

namespace lazyckpt {

struct Vocabulary {
  pybind11::dict globals;  // function, class or dtype -> the opcodes that name it
  pybind11::dict classes;  // dtype -> (class of its storages or None, bytes per element)
  pybind11::object tensor_type, parameter_type, ordered_dict, dtype_type, strided, rebuild_tensor, location_tag;
  const DlExchange* exchange;  // null: a tensor is asked by its methods
};

}  // namespace lazyckpt
