// Memory: whose an address is, how far it reaches, and what is still going on there.
#pragma once

#include <cstring>

#include "order.h"

namespace strict {

// The entry of a map by begin whose range holds the address.
template <typename Map>
auto entry_at(Map& map, Address address) {
  auto next = map.upper_bound(address);
  if (next == map.begin()) return map.end();
  auto entry = std::prev(next);
  return address < entry->second.range.end() ? entry : map.end();
}

template <typename Map>
auto first_that_meets(Map& map, const Range& range) {
  auto entry = entry_at(map, range.begin);
  if (entry == map.end()) entry = map.lower_bound(range.begin);
  return entry != map.end() && entry->second.range.meets(range) ? entry : map.end();
}

inline void refuse(State& s, const std::string& call, const Range& range, const std::string& why) {
  s.violation(call + " is given " + text_of(range) + ", which " + why);
}

// Null if the range does not lie within one piece of a device's memory.
inline const DeviceMemory* device_memory_of(State& s, const std::string& call, const Range& range) {
  const auto found = entry_at(s.device_memory, range.begin);
  if (found == s.device_memory.end()) {
    refuse(s, call, range, "is no memory of a device");
    return nullptr;
  }
  if (found->second.range.holds(range)) return &found->second;
  const auto next = std::next(found);
  const bool joins = next != s.device_memory.end() && next->second.range.meets(range);
  refuse(s, call, range, (joins ? "joins two allocations, the first being " : "crosses the end of the allocation ") +
                             text_of(found->second.range));
  return nullptr;
}

// Between devices copies go otherwise, and wait for more than their stream.
inline void look_at_owner(State& s, const std::string& call, const Range& range, const DeviceMemory& memory, const Stream& stream) {
  if (memory.device == stream.context->device) return;
  s.violation(call + " on the " + name_of(stream) + " is given memory of device " + std::to_string(memory.device) + ": " +
              text_of(range));
}

// Of host memory of a copy: whether it is pinned, and false if it is so in part.
inline bool look_at_host_memory(State& s, const std::string& call, const Range& range, const Registration*& pinned) {
  const auto found = first_that_meets(s.registrations, range);
  pinned = found == s.registrations.end() ? nullptr : &found->second;
  if (pinned == nullptr || pinned->range.holds(range)) return true;
  refuse(s, call, range, "is registered in part, as " + text_of(pinned->range));
  return false;
}

// Whatever is still going on in memory that goes: it is told, and no byte is moved there any more. A device whose context an
// error has ended does nothing more.
inline void end_of_memory(State& s, const std::string& call, const Range& range, bool only_copies, const Context* context) {
  bool in_use = false;
  s.history.each(range, [&](const Access& access) {
    if ((only_copies && !access.is_copy) || s.of_all_threads.at(access.where) >= access.position) return;
    if (context != nullptr && context->error != kSuccess) return;
    in_use = true;
    s.violation(call + " gives up " + text_of(range) + " while it may be in use: nobody has waited for " + *access.text);
  });
  if (in_use && !only_copies) ++s.frees_in_use;
  s.history.forget(range);
  for (Stream* stream : s.busy) {
    for (Operation& operation : stream->queue) {
      for (Transfer& transfer : operation.transfers) {
        const bool reads = transfer.fill < 0 && range.meets({transfer.from, transfer.bytes});
        const bool here = reads || range.meets({transfer.to, transfer.bytes});
        transfer.cancelled = transfer.cancelled || here;
      }
    }
  }
}

// What tests have told of, and have given up without telling: new memory lies there now.
inline void drop_told_memory(State& s, const std::string& call, const Range& range) {
  for (auto found = first_that_meets(s.device_memory, range); found != s.device_memory.end();
       found = first_that_meets(s.device_memory, range)) {
    if (found->second.is_allocated) return;
    end_of_memory(s, call, found->second.range, true, &s.contexts[found->second.device]);
    s.device_memory.erase(found);
  }
}

inline void tell_of_memory(State& s, int device, const Range& range, bool is_guessed) {
  bool known = true;  // only by guesses, which this explains
  std::vector<Address> old;
  auto found = first_that_meets(s.device_memory, range);
  for (; found != s.device_memory.end() && found->second.range.meets(range); ++found) {
    if (found->second.is_allocated) return;
    old.push_back(found->first);
    known = known && found->second.is_guessed && range.holds(found->second.range);
  }
  for (const Address begin : old) {
    const DeviceMemory& gone = s.device_memory[begin];
    if (!known || is_guessed) end_of_memory(s, "new memory at " + text_of(range), gone.range, true, &s.contexts[gone.device]);
    s.device_memory.erase(begin);
  }
  s.device_memory[range.begin] = DeviceMemory{range, device, nullptr, is_guessed, false, ++s.last_number};
}

// What cuMemAlloc has given out.
inline void note_allocation(State& s, Context& context, const Range& range, std::shared_ptr<char> owned) {
  drop_told_memory(s, "cuMemAlloc", range);
  s.history.forget(range);
  context.taken += range.bytes;
  s.device_memory[range.begin] = DeviceMemory{range, context.device, std::move(owned), false, true, ++s.last_number};
}

inline int allocate(State& s, Context& context, size_t bytes, Address* address) {
  if (address == nullptr || bytes == 0) return kInvalidValue;
  if (s.memory_of_others[context.device] + context.taken + bytes > s.memory_total) return kOutOfMemory;
  void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (memory == nullptr) return kOutOfMemory;
  std::memset(memory, 0xcd, bytes);
  *address = reinterpret_cast<Address>(memory);
  note_allocation(s, context, {*address, bytes}, std::shared_ptr<char>(static_cast<char*>(memory), std::free));
  return kSuccess;
}

inline int give_back(State& s, Address address) {
  const auto found = s.device_memory.find(address);
  if (found == s.device_memory.end() || !found->second.is_allocated) return kInvalidValue;
  end_of_memory(s, "cuMemFree", found->second.range, false, &s.contexts[found->second.device]);
  s.contexts[found->second.device].taken -= found->second.range.bytes;
  s.device_memory.erase(found);
  return kSuccess;
}

inline int register_memory(State& s, Context& context, const Range& range, std::shared_ptr<char> owned) {
  if (range.begin == 0 || range.bytes == 0 || range.end() < range.begin) return kInvalidValue;
  size_t registered = 0;
  for (const auto& [begin, other] : s.registrations) registered += other.range.bytes;
  if (range.bytes > s.largest_registration || range.bytes + registered > s.most_registered) return kOutOfMemory;
  // Pages are pinned, and none twice.
  const Address first = range.begin / kPage * kPage, end = (range.end() + kPage - 1) / kPage * kPage;
  for (const auto& [begin, other] : s.registrations)
    if (begin < end && first < (other.range.end() + kPage - 1) / kPage * kPage) return kAlreadyRegistered;
  drop_told_memory(s, "cuMemHostRegister", range);
  s.history.forget(range);
  s.registrations[range.begin] = Registration{range, &context, std::move(owned)};
  return kSuccess;
}

inline int unregister_memory(State& s, const std::string& call, Address address, bool is_owned) {
  const auto found = s.registrations.find(address);
  if (found == s.registrations.end()) return is_owned ? kInvalidValue : kNotRegistered;
  if ((found->second.owned != nullptr) != is_owned) return kInvalidValue;
  end_of_memory(s, call, found->second.range, false, found->second.context);
  s.registrations.erase(found);
  return kSuccess;
}

// Between tests: memory of before is given out anew without a word.
inline void forget_told_memory(State& s) {
  for (auto entry = s.device_memory.begin(); entry != s.device_memory.end();)
    entry = entry->second.is_allocated ? std::next(entry) : s.device_memory.erase(entry);
}

}  // namespace strict
