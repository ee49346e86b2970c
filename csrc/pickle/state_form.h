// The form of a state dict: all that a plan for saving it depends on, but the values. ckpt/sharded/plan_cache.py says what for.
#pragma once

#include <pybind11/pybind11.h>

#include "pickle/vocabulary.h"

namespace lazyckpt {

// Goes over nested dicts and lists as torch.distributed.checkpoint does. Returns None if there is something in it that it does not
// know; else
//   form: bytes, which are equal for equal forms: containers, keys, which leaves are tensors, and of each of these shape, strides,
//     dtype, device, and whether it and what it wraps require gradients;
//   kinds: bytes, one for each leaf: b"T" a tensor, b"D" the part of a whole one that lies here, b"V" a value;
//   tensors: of the leaves that are no values, the part that lies here;
//   records: of each of those, of all bytes from its first element to its last;
//   partial: which of the records are less than their storages;
//   specs: of each leaf of kind b"D" where it belongs in the whole, as it says itself;
//   values: the other leaves.
// `wrapper`: the type of tensors that are parts of whole ones, and the names of two attributes: of the part, of the spec; or None.
// `is_value(type)`: whether objects of it are values.
pybind11::object read_form(const Vocabulary& words, const pybind11::dict& state, const pybind11::object& wrapper,
                           const pybind11::function& is_value);

}  // namespace lazyckpt
