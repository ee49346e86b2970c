// Whether copies may be made as they are asked for.
#pragma once

#include "call.h"

namespace strict {

enum class Pinned { kYes, kNo, kUnknown };

// Fills in what a transfer needs to know of its memory. Host memory is that of the side that lies on the host.
inline int look_at(Call& call, const Stream& stream, Engine engine, Transfer& transfer, Pinned& pinned) {
  State& s = call.s;
  const Range to{transfer.to, transfer.bytes}, from{transfer.from, transfer.bytes};
  pinned = Pinned::kYes;
  if (engine != kToHost) {
    const auto* const target = device_memory_of(s, call.name, to);
    if (target == nullptr) return kInvalidValue;
    look_at_owner(s, call.name, to, *target, stream);
    transfer.keeps_to = target->owned;
  }
  if (engine != kFromHost) {
    const auto* const source = device_memory_of(s, call.name, from);
    if (source == nullptr) return kInvalidValue;
    look_at_owner(s, call.name, from, *source, stream);
    transfer.keeps_from = source->owned;
    transfer.from_allocated = source->is_allocated;
  }
  if (engine == kOnDevice) return 0;
  const Range& host = engine == kToHost ? to : from;
  const Registration* registration = nullptr;
  if (!look_at_host_memory(s, call.name, host, registration)) return kInvalidValue;
  if (registration == nullptr) {
    drop_told_memory(s, "host memory at " + text_of(host), host);
    pinned = Pinned::kNo;
  } else {
    (engine == kToHost ? transfer.keeps_to : transfer.keeps_from) = registration->owned;
  }
  return 0;
}

// CUmemcpyAttributes, as of 12.8.
struct CopyAttributes {
  int source_order, source_hint[2], target_hint[2];
  unsigned flags;
};

struct Batch {
  Address *to, *from;
  size_t *sizes, count;
  CopyAttributes* attributes;
  size_t *first_copies, attribute_count, *failed;
};

inline bool is_well_formed(const Batch& batch) {
  if (batch.to == nullptr || batch.from == nullptr || batch.sizes == nullptr || batch.count == 0) return false;
  if (batch.attributes == nullptr || batch.first_copies == nullptr || batch.attribute_count == 0) return false;
  if (batch.attribute_count > batch.count || batch.first_copies[0] != 0) return false;
  for (size_t i = 0; i < batch.attribute_count; ++i) {
    if (i > 0 && batch.first_copies[i] <= batch.first_copies[i - 1]) return false;
    if (batch.first_copies[i] >= batch.count) return false;
    if (batch.attributes[i].source_order < 1 || batch.attributes[i].source_order > 3) return false;
  }
  return true;
}

// Which way a copy goes is told by its addresses.
inline Engine engine_for(State& s, const Transfer& transfer) {
  const bool to_device = entry_at(s.device_memory, transfer.to) != s.device_memory.end();
  const bool from_device = entry_at(s.device_memory, transfer.from) != s.device_memory.end();
  if (to_device) return from_device ? kOnDevice : kFromHost;
  return kToHost;
}

// The first copy's target.
inline bool goes_to_allocated(State& s, const Batch& batch) {
  const auto found = entry_at(s.device_memory, batch.to[0]);
  return found != s.device_memory.end() && found->second.is_allocated;
}

}  // namespace strict
