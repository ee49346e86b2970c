// The opcodes of pickle protocol 2, as Python's own pickler chooses them, and its memo. Knows bytes and addresses, not Python.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "pickle/address_map.h"

namespace lazyckpt {

class OpcodeWriter {
 public:
  OpcodeWriter() : bytes_(size_t{1} << 14) { put("\x80\x02"); }

  // The whole pickle, which lasts as long as this.
  std::string_view end() {
    put('.');
    return {bytes_.data(), used_};
  }

  void put(char opcode) { *take(1) = opcode; }
  void put(std::string_view opcodes) { std::copy(opcodes.begin(), opcodes.end(), take(opcodes.size())); }
  void put_bool(bool value) { put(value ? '\x88' : '\x89'); }

  void put_int(long long value) {
    if (value >= 0 && value <= 0xff) {
      put('K');
      put(static_cast<char>(value));
    } else if (value >= 0 && value <= 0xffff) {
      put('M');
      put_number(static_cast<uint16_t>(value));
    } else if (value >= INT32_MIN && value <= INT32_MAX) {
      put('J');
      put_number(static_cast<int32_t>(value));
    } else {
      put_long(value);
    }
  }

  void put_float(double value) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    put('G');
    put_number(__builtin_bswap64(bits));
  }

  void put_text(std::string_view utf8) {
    put('X');
    put_number(static_cast<uint32_t>(utf8.size()));
    put(utf8);
  }

  // An object that is memoized already is only referred to; false if it is not.
  bool put_again(const void* object) {
    const int64_t index = memo_.find(object);
    if (index >= 0) put_indexed('h', 'j', static_cast<uint32_t>(index));
    return index >= 0;
  }

  bool knows(const void* object) const { return memo_.find(object) >= 0; }

  // Numbers the object on top of the reader's stack; null: one that nothing can refer to again.
  void memoize(const void* object) {
    if (object != nullptr) memo_.set(object, next_);
    put_indexed('q', 'r', next_++);
  }

  // Around the items of a tuple that is not empty.
  void begin_tuple(size_t size) {
    if (size > 3) put('(');
  }

  void end_tuple(size_t size, const void* object) {
    put(size > 3 ? 't' : static_cast<char>(0x84 + size));
    memoize(object);
  }

 private:
  // Room for so many bytes more, at the end.
  char* take(size_t bytes) {
    if (bytes_.size() - used_ < bytes) bytes_.resize(std::max(bytes_.size() * 2, used_ + bytes));
    char* const begin = bytes_.data() + used_;
    used_ += bytes;
    return begin;
  }

  template <typename Number>
  void put_number(Number number) {  // little-endian, as all machines that we run on
    std::memcpy(take(sizeof number), &number, sizeof number);
  }

  void put_long(long long value) {
    size_t bytes = sizeof value;  // as few as keep the sign
    while (value >> (bytes * 8 - 9) == (value < 0 ? -1 : 0)) --bytes;
    put('\x8a');
    put(static_cast<char>(bytes));
    std::memcpy(take(bytes), &value, bytes);
  }

  void put_indexed(char short_opcode, char long_opcode, uint32_t index) {
    put(index < 256 ? short_opcode : long_opcode);
    if (index < 256) {
      put(static_cast<char>(index));
    } else {
      put_number(index);
    }
  }

  std::vector<char> bytes_;  // its first used_ ones
  size_t used_ = 0;
  AddressMap memo_;
  uint32_t next_ = 0;  // the index of the next object
};

}  // namespace lazyckpt
