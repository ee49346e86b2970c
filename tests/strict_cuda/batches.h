// Many copies by one call. Included by strict_cuda.cc alone.
#pragma once

namespace {

int look_at_batched(Call& call, const Stream& stream, const strict::Batch& batch, size_t index, Operation& operation) {
  ++call.s.counts["batched copies"];
  strict::Fault fault = strict::fault_of(call.s, "batched copies");
  if (fault.code == 0 && strict::goes_to_allocated(call.s, batch)) fault = strict::fault_of(call.s, "copies batched on a device");
  if (fault.code != 0 && !fault.late) return fault.code;
  Transfer transfer;
  transfer.to = batch.to[index];
  transfer.from = batch.from[index];
  transfer.bytes = batch.sizes[index];
  transfer.failure = fault.code != 0 ? fault.code : call.late;
  if (transfer.bytes == 0) return strict::kInvalidValue;
  const strict::Engine engine = strict::engine_for(call.s, transfer);
  strict::Pinned pinned = strict::Pinned::kUnknown;
  if (const int code = strict::look_at(call, stream, engine, transfer, pinned)) return code;
  if (pinned == strict::Pinned::kNo) return strict::kInvalidValue;
  if (engine != strict::kOnDevice) ++call.s.counts["pinned copies"];
  operation.engine = engine;
  operation.transfers.push_back(transfer);
  return 0;
}

}  // namespace

// The copies of a batch have no order among each other. What comes before one that is refused may have been enqueued: it is.
DRIVER cuMemcpyBatchAsync(Address* to, Address* from, size_t* sizes, size_t count, strict::CopyAttributes* attributes,
                          size_t* first_copies, size_t attribute_count, size_t* failed, StreamHandle handle) {
  return run_call("cuMemcpyBatchAsync", Needs::kContext, [&](Call& call) -> int {
    const strict::Batch batch{to, from, sizes, count, attributes, first_copies, attribute_count, failed};
    if (failed != nullptr) *failed = SIZE_MAX;
    Stream* stream = nullptr;
    if (const int code = strict::stream_at(call, handle, stream)) return code;
    if (stream->is_legacy || !strict::is_well_formed(batch)) return strict::kInvalidValue;
    if (stream->capture != nullptr) return strict::invalidate(call, *stream->capture, strict::kCaptureUnsupported);
    if (strict::goes_to_allocated(call.s, batch)) ++call.s.counts["batches on a device"];
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
