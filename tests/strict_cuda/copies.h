// Copies, and what else is put into streams. Included by strict_cuda.cc alone.
#pragma once

namespace {

// Pageable memory is copied through the driver's own: the call returns when that is done, and keeps others out until then.
void wait_for_pageable(Call& call, const Stream& stream) {
  if (stream.capture != nullptr) return;
  const strict::Knowledge clock = stream.clock;
  strict::wait_for(call.s, call.lock, stream, stream.position);
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
    strict::Pinned pinned = strict::Pinned::kUnknown;
    if (const int code = strict::look_at(call, *stream, engine, transfer, pinned)) return code;
    if (engine != strict::kOnDevice) ++call.s.counts[pinned == strict::Pinned::kYes ? "pinned copies" : "pageable copies"];
    Operation operation;
    operation.engine = engine;
    operation.call = name;
    operation.transfers.push_back(transfer);
    strict::enqueue(call.s, *stream, std::move(operation));
    if (pinned == strict::Pinned::kNo) wait_for_pageable(call, *stream);
    return 0;
  });
}

int fill_memory(const char* name, Address to, int value, size_t bytes, StreamHandle handle) {
  return run_call(name, Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (const int code = strict::check_enqueue(call, *stream)) return code;
    if (bytes == 0) return 0;
    const Range range{to, bytes};
    const auto* const target = strict::device_memory_of(call.s, call.name, range);
    if (target == nullptr) return strict::kInvalidValue;
    strict::look_at_owner(call.s, call.name, range, *target, *stream);
    Transfer transfer;
    transfer.to = to;
    transfer.bytes = bytes;
    transfer.fill = value;
    transfer.failure = call.late;
    transfer.keeps_to = target->owned;
    Operation operation;
    operation.call = name;
    operation.transfers.push_back(transfer);
    strict::enqueue(call.s, *stream, std::move(operation));
    return 0;
  });
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

DRIVER cuMemsetD8Async(Address to, unsigned char value, size_t bytes, StreamHandle stream) {
  return fill_memory("cuMemsetD8Async", to, value, bytes, stream);
}

// Called when all that stands before it in the stream has been done, and what stands behind it waits for its return. Not at all
// if the context is broken.
DRIVER cuLaunchHostFunc(StreamHandle handle, void (*function)(void*), void* data) {
  return run_call("cuLaunchHostFunc", Needs::kContext, [&](Call& call) -> int {
    Stream* stream = nullptr;
    if (function == nullptr) return strict::kInvalidValue;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (const int code = strict::check_enqueue(call, *stream)) return code;
    Operation operation;
    operation.engine = strict::kHostFunction;
    operation.call = call.name;
    operation.function = function;
    operation.data = data;
    strict::enqueue(call.s, *stream, std::move(operation));
    return 0;
  });
}
