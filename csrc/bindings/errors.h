// Errors of the core as exceptions of ckpt.errors, and what else every binding needs.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <string>

#include "base/error.h"

namespace lazyckpt {

// Names of files and of records in a damaged file need not be UTF-8.
pybind11::str to_text(const std::string& bytes);

pybind11::object to_python(const Error& error);

// For pybind11: raises an Error as its exception.
void translate(std::exception_ptr pointer);

// Lets Python's signal handlers run during a wait (Ctrl-C); they only run on the main thread.
void check_signals();

}  // namespace lazyckpt
