// The opcodes of pickle protocol 2, as Python's own pickler chooses them, and its memo. Knows bytes and addresses, not Python.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace lazyckpt {

// Which objects were pickled before, by address. Open addressing: it is asked for every object.
class Memo {
 public:
  Memo() : slots_(1 << 12) {}

  // The index that the object has in the pickle; -1 if it has none.
  int64_t find(const void* object) const {
    const Slot& slot = slots_[locate(object)];
    return slot.object == nullptr ? -1 : int64_t{slot.index};
  }

  void add(const void* object, uint32_t index) {
    if (++used_ * 2 > slots_.size()) grow();
    slots_[locate(object)] = {object, index};
  }

 private:
  struct Slot {
    const void* object = nullptr;
    uint32_t index = 0;
  };

  size_t locate(const void* object) const {
    const size_t mask = slots_.size() - 1;
    size_t at = (reinterpret_cast<uintptr_t>(object) >> 4) * 0x9E3779B97F4A7C15u >> 20 & mask;
    while (slots_[at].object != nullptr && slots_[at].object != object) at = (at + 1) & mask;
    return at;
  }

  void grow() {
    std::vector<Slot> old(slots_.size() * 4);
    old.swap(slots_);
    for (const Slot& slot : old) {
      if (slot.object != nullptr) slots_[locate(slot.object)] = slot;
    }
  }

  std::vector<Slot> slots_;
  size_t used_ = 0;
};

class OpcodeWriter {
 public:
  OpcodeWriter() { put("\x80\x02"); }

  // The whole pickle.
  std::string end() {
    put('.');
    return std::move(bytes_);
  }

  void put(char opcode) { bytes_ += opcode; }
  void put(std::string_view opcodes) { bytes_ += opcodes; }
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
    if (object != nullptr) memo_.add(object, next_);
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
  template <typename Number>
  void put_number(Number number) {  // little-endian, as all machines that we run on
    char bytes[sizeof number];
    std::memcpy(bytes, &number, sizeof number);
    bytes_.append(bytes, sizeof number);
  }

  void put_long(long long value) {
    size_t bytes = sizeof value;  // as few as keep the sign
    while (value >> (bytes * 8 - 9) == (value < 0 ? -1 : 0)) --bytes;
    put('\x8a');
    put(static_cast<char>(bytes));
    bytes_.append(reinterpret_cast<const char*>(&value), bytes);
  }

  void put_indexed(char short_opcode, char long_opcode, uint32_t index) {
    put(index < 256 ? short_opcode : long_opcode);
    if (index < 256) {
      put(static_cast<char>(index));
    } else {
      put_number(index);
    }
  }

  std::string bytes_;
  Memo memo_;
  uint32_t next_ = 0;  // the index of the next object
};

}  // namespace lazyckpt
