// The one error type of the core. A job keeps the first one it meets and every later call on that job rethrows it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace lazyckpt {

enum class ErrorKind {
  kStorage,    // a storage system call failed; code() is its errno, path() the file
  kChanged,    // checksum mode saw bytes change between save() and their capture; code() is the record's index
  kCorrupt,    // a file does not hold what its directory promises
  kDeadline,   // a wait outran its deadline
  kClosed,     // the engine was closed
  kForked,     // the engine belongs to the parent of this process
  kCancelled,  // the caller gave the job up
  kDevice,     // the CUDA driver is missing, or one of its calls failed; code() is its CUresult
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, int code = 0, std::string path = {})
      : std::runtime_error(message), kind_(kind), code_(code), path_(std::move(path)) {}

  ErrorKind kind() const { return kind_; }
  int code() const { return code_; }
  const std::string& path() const { return path_; }
  // Which bytes of the file are meant: `length` of them; 0: that is not known.
  uint64_t offset() const { return offset_; }
  uint64_t length() const { return length_; }
  Error& at(uint64_t offset, uint64_t length) {
    offset_ = offset;
    length_ = length;
    return *this;
  }
  // One that shares no memory with this, to be thrown to another thread: std::runtime_error counts the references to its
  // text, out of sight of the thread sanitizer.
  Error apart() const { return Error(kind_, std::string(what()), code_, path_).at(offset_, length_); }

 private:
  ErrorKind kind_;
  int code_;
  std::string path_;
  uint64_t offset_ = 0;
  uint64_t length_ = 0;
};

}  // namespace lazyckpt
