// Numbers for objects, by their addresses. Knows addresses, not Python: who uses it sees to it that no object goes meanwhile, and
// another one comes to its place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lazyckpt {

// Open addressing: it is asked for every object of a state.
class AddressMap {
 public:
  explicit AddressMap(size_t slots = 1 << 12) : slots_(slots) {}  // a power of two

  // -1 if the object has none.
  int64_t find(const void* object) const {
    const Slot& slot = slots_[locate(object)];
    return slot.object == nullptr ? -1 : int64_t{slot.number};
  }

  void set(const void* object, uint32_t number) {
    Slot* slot = &slots_[locate(object)];
    if (slot->object == nullptr && ++used_ * 2 > slots_.size()) {
      grow();
      slot = &slots_[locate(object)];
    }
    *slot = {object, number};
  }

  size_t size() const { return used_; }

 private:
  struct Slot {
    const void* object = nullptr;
    uint32_t number = 0;
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

}  // namespace lazyckpt
