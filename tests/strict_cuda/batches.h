// Many copies by one call. Included by strict_cuda.cc alone.
#pragma once

namespace {

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

// The first copy's target.
bool goes_to_allocated(State& s, const Batch& batch) {
  const auto found = strict::entry_at(s.device_memory, batch.to[0]);
  return found != s.device_memory.end() && found->second.owned != nullptr;
}

int look_at_batched(Call& call, const Stream& stream, const Batch& batch, size_t index, Operation& operation) {
  ++call.s.counts["batched copies"];
  strict::Fault fault = strict::fault_of(call.s, "batched copies");
  if (fault.code == 0 && goes_to_allocated(call.s, batch)) fault = strict::fault_of(call.s, "copies batched on a device");
  if (fault.code != 0 && !fault.late) return fault.code;
  Transfer transfer;
  transfer.to = batch.to[index];
  transfer.from = batch.from[index];
  transfer.bytes = batch.sizes[index];
  transfer.failure = fault.code != 0 ? fault.code : call.late;
  if (transfer.bytes == 0) return strict::kInvalidValue;
  const strict::Engine engine = engine_for(call.s, transfer);
  Pinned pinned = Pinned::kUnknown;
  if (const int code = look_at(call, stream, engine, transfer, pinned)) return code;
  if (pinned == Pinned::kNo) return strict::kInvalidValue;
  if (engine != strict::kOnDevice) ++call.s.counts["pinned copies"];
  operation.engine = engine;
  operation.transfers.push_back(transfer);
  return 0;
}

}  // namespace

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
    if (goes_to_allocated(call.s, batch)) ++call.s.counts["batches on a device"];
    Operation operation;
    operation.call = call.name;
    int code = 0;
    for (size_t index = 0; index < count && code == 0; ++index) {
      code = look_at_batched(call, *stream, batch, index, operation);
      if (code != 0 && failed != nullptr) *failed = index;
    }
    if (!operation.transfers.empty()) strict::enqueue(call.s, *stream, std::move(operation));
    return code;
  });
}
