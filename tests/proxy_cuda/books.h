// What the proxy knows of the driver behind it: by what was asked of it, and by asking it itself about what others have made.
#pragma once

#include "real.h"

namespace proxy {

using strict::Address;
using strict::Call;
using strict::Context;
using strict::Event;
using strict::Range;
using strict::State;
using strict::Stream;

inline bool is_default(const void* handle) { return reinterpret_cast<uintptr_t>(handle) <= strict::kPerThreadHandle; }

inline void adopt(State& s, Context& context, void* handle, int device) {
  s.context_handles.erase(context.handle);
  strict::begin_context(s, context, device);
  s.context_handles.erase(context.handle);
  context.handle = handle;
  s.context_handles[handle] = &context;
  context.references = 1;
}

// Null for none. Those that this library has not retained are not the primary ones: green ones, and what others have made.
inline Context* context_at(State& s, void* handle) {
  if (handle == nullptr) return nullptr;
  const auto known = s.context_handles.find(handle);
  if (known != s.context_handles.end()) return known->second;
  int device = 0;
  forward("cuCtxGetDevice", &device);  // it is current just now
  auto* const context = new Context;
  context->is_green = true;
  adopt(s, *context, handle, device);
  trace(s, 0, "context c%llu %d", static_cast<unsigned long long>(context->number), device);
  return context;
}

// As with torch's streams: asked of the driver, at first sight.
inline Stream* foreign_stream(Call& call, void* handle) {
  State& s = call.s;
  unsigned flags = 0;
  void* owner = nullptr;
  forward("cuStreamGetFlags", handle, &flags);
  const bool told = forward("cuStreamGetCtx", handle, &owner) == 0;
  Context* const context = told && s.context_handles.count(owner) != 0 ? s.context_handles[owner] : call.context;
  Stream* const stream = strict::new_stream(s, *context, flags == 0);
  s.stream_handles.erase(stream->handle);
  stream->handle = handle;
  s.stream_handles[handle] = stream;
  trace(s, 0, "stream s%llu %d %u", static_cast<unsigned long long>(stream->number), context->device, flags);
  return stream;
}

// `accepted`: by the driver, so that a handle which has been destroyed is somebody's new one.
inline Stream* stream_at(Call& call, void* handle, bool accepted) {
  if (call.context == nullptr) return nullptr;
  if (!is_default(handle)) {
    const auto known = call.s.stream_handles.find(handle);
    if (known == call.s.stream_handles.end() ? accepted : known->second->is_destroyed && accepted)
      return foreign_stream(call, handle);
  }
  Stream* stream = nullptr;
  strict::stream_at(call, static_cast<strict::StreamHandle>(handle), stream);
  return stream;
}

inline Event* event_at(Call& call, void* handle) {
  Event* event = nullptr;
  strict::event_at(call, handle, event);
  return event;
}

// ---- memory of others ------------------------------------------------------------------------------------------------

enum : int { kMemoryType = 2, kOrdinal = 9, kIsOneAllocation = 10, kBegin = 11, kSize = 12 };
constexpr unsigned kOfHost = 1, kOfDevice = 2;

struct Known {
  unsigned type = 0;  // 0: the driver does not know it
  int device = 0;
  bool is_mapped = false;  // piece by piece, as expandable segments and pools are: a copy may reach from one into the next
  Range range;             // empty if the driver does not tell
};

inline Known ask_about(Address address) {
  Known known;
  if (forward("cuPointerGetAttribute", static_cast<void*>(&known.type), int{kMemoryType}, address) != 0) return {};
  bool whole = true;
  size_t bytes = 0;
  Address begin = 0;
  forward("cuPointerGetAttribute", static_cast<void*>(&known.device), int{kOrdinal}, address);
  if (forward("cuPointerGetAttribute", static_cast<void*>(&whole), int{kIsOneAllocation}, address) == 0) known.is_mapped = !whole;
  if (forward("cuPointerGetAttribute", static_cast<void*>(&begin), int{kBegin}, address) == 0 &&
      forward("cuPointerGetAttribute", static_cast<void*>(&bytes), int{kSize}, address) == 0)
    known.range = {begin, bytes};
  return known;
}

// Takes down what the driver says of device memory that was not allocated here. Whose ends it does not tell is what was asked for.
inline void look_up_device_memory(State& s, const Range& range) {
  const auto found = strict::entry_at(s.device_memory, range.begin);
  if (found != s.device_memory.end() && found->second.is_allocated) return;
  Known known = ask_about(range.begin);
  if (known.type != kOfDevice || known.range.bytes == 0) return;
  while (known.is_mapped && known.range.end() < range.end()) {
    const Known next = ask_about(known.range.end());
    if (next.type != kOfDevice || !next.is_mapped || next.range.bytes == 0 || next.device != known.device) break;
    known.range.bytes = next.range.end() - known.range.begin;
  }
  if (found != s.device_memory.end() && found->second.range.holds(known.range) && found->second.device == known.device) return;
  for (auto old = strict::first_that_meets(s.device_memory, known.range);
       old != s.device_memory.end() && known.range.holds(old->second.range) && !old->second.is_allocated;
       old = strict::first_that_meets(s.device_memory, known.range))
    s.device_memory.erase(old);  // it has grown
  strict::tell_of_memory(s, known.device, known.range, false);
  trace(s, 0, "memory %d 0x%llx %zu", known.device, known.range.begin, known.range.bytes);
}

// Pinned by others, wholly.
inline bool is_pinned_elsewhere(const Range& range) {
  const Known known = ask_about(range.begin);
  return known.type == kOfHost && known.range.holds(range);
}

}  // namespace proxy
