// Copies, and the names of errors: the rest of the driver's face. Included by strict_cuda.cc alone.
#pragma once

namespace {

enum class Pinned { kYes, kNo, kUnknown };

// Fills in what a transfer needs to know of its memory. Host memory is that of the side that lies on the host.
int look_at(Call& call, strict::Engine engine, Transfer& transfer, Pinned& pinned) {
  State& s = call.s;
  const Range to{transfer.to, transfer.bytes}, from{transfer.from, transfer.bytes};
  pinned = Pinned::kYes;
  if (engine != strict::kToHost) {
    const auto* const target = strict::device_memory_of(s, call.name, to);
    if (target == nullptr) return strict::kInvalidValue;
    transfer.keeps_to = target->owned;
  }
  if (engine != strict::kFromHost) {
    const auto* const source = strict::device_memory_of(s, call.name, from);
    if (source == nullptr) return strict::kInvalidValue;
    transfer.keeps_from = source->owned;
    transfer.from_allocated = source->owned != nullptr;
  }
  if (engine == strict::kOnDevice) return 0;
  const Range& host = engine == strict::kToHost ? to : from;
  const strict::Registration* registration = nullptr;
  if (!strict::look_at_host_memory(s, call.name, host, registration)) return strict::kInvalidValue;
  if (registration == nullptr) {
    strict::drop_told_memory(s, "host memory at " + strict::text_of(host), host);
    pinned = Pinned::kNo;
  } else {
    (engine == strict::kToHost ? transfer.keeps_to : transfer.keeps_from) = registration->owned;
  }
  return 0;
}

// Pageable memory is copied through the driver's own: the call returns when that is done, and keeps others out until then.
void wait_for_pageable(Call& call, const Stream& stream) {
  if (stream.capture != nullptr) return;
  const strict::Knowledge clock = stream.clock;
  strict::wait_for(call.s, call.lock, clock.own);
  strict::learn(call.s, clock);
}

int copy(const char* name, strict::Engine engine, Address to, Address from, size_t bytes, StreamHandle handle) {
  return run_call(name, Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (const int code = strict::check_enqueue(call, *stream)) return code;
    if (bytes == 0) return 0;
    Transfer transfer;
    transfer.to = to;
    transfer.from = from;
    transfer.bytes = bytes;
    transfer.failure = call.late;
    Pinned pinned = Pinned::kUnknown;
    if (const int code = look_at(call, engine, transfer, pinned)) return code;
    if (engine != strict::kOnDevice) ++call.s.counts[pinned == Pinned::kYes ? "pinned copies" : "pageable copies"];
    Operation operation;
    operation.engine = engine;
    operation.call = name;
    operation.transfers.push_back(transfer);
    strict::enqueue(call.s, *stream, std::move(operation));
    if (pinned == Pinned::kNo) wait_for_pageable(call, *stream);
    return 0;
  });
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

bool is_well_formed(const Batch& batch) {
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
strict::Engine engine_for(State& s, const Transfer& transfer) {
  const bool to_device = strict::entry_at(s.device_memory, transfer.to) != s.device_memory.end();
  const bool from_device = strict::entry_at(s.device_memory, transfer.from) != s.device_memory.end();
  if (to_device) return from_device ? strict::kOnDevice : strict::kFromHost;
  return strict::kToHost;
}

int look_at_batched(Call& call, const Batch& batch, size_t index, Operation& operation) {
  ++call.s.counts["batched copies"];
  const strict::Fault fault = strict::fault_of(call.s, "batched copies");
  if (fault.code != 0 && !fault.late) return fault.code;
  Transfer transfer;
  transfer.to = batch.to[index];
  transfer.from = batch.from[index];
  transfer.bytes = batch.sizes[index];
  transfer.failure = fault.code != 0 ? fault.code : call.late;
  if (transfer.bytes == 0) return strict::kInvalidValue;
  const strict::Engine engine = engine_for(call.s, transfer);
  Pinned pinned = Pinned::kUnknown;
  if (const int code = look_at(call, engine, transfer, pinned)) return code;
  if (pinned == Pinned::kNo) return strict::kInvalidValue;
  if (engine != strict::kOnDevice) ++call.s.counts["pinned copies"];
  operation.engine = engine;
  operation.transfers.push_back(transfer);
  return 0;
}

}  // namespace

DRIVER cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, StreamHandle stream) {
  return copy("cuMemcpyDtoHAsync", strict::kToHost, reinterpret_cast<Address>(to), from, bytes, stream);
}

DRIVER cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, StreamHandle stream) {
  return copy("cuMemcpyHtoDAsync", strict::kFromHost, to, reinterpret_cast<Address>(from), bytes, stream);
}

DRIVER cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, StreamHandle stream) {
  return copy("cuMemcpyDtoDAsync", strict::kOnDevice, to, from, bytes, stream);
}

#ifndef STRICT_WITHOUT_BATCHES
// The copies of a batch have no order among each other. What comes before one that is refused may have been enqueued: it is.
DRIVER cuMemcpyBatchAsync(Address* to, Address* from, size_t* sizes, size_t count, CopyAttributes* attributes,
                          size_t* first_copies, size_t attribute_count, size_t* failed, StreamHandle handle) {
  return run_call("cuMemcpyBatchAsync", Needs::kContext, [&](Call& call) -> int {
    const Batch batch{to, from, sizes, count, attributes, first_copies, attribute_count, failed};
    if (failed != nullptr) *failed = SIZE_MAX;
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (stream->is_legacy || !is_well_formed(batch)) return strict::kInvalidValue;
    if (stream->capture != nullptr) return strict::invalidate(call, *stream->capture, strict::kCaptureUnsupported);
    Operation operation;
    operation.call = call.name;
    int code = 0;
    for (size_t index = 0; index < count && code == 0; ++index) {
      code = look_at_batched(call, batch, index, operation);
      if (code != 0 && failed != nullptr) *failed = index;
    }
    if (!operation.transfers.empty()) strict::enqueue(call.s, *stream, std::move(operation));
    return code;
  });
}
#endif
