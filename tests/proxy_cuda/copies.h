// Memory and copies: the rest of the proxy's face. Included by proxy_cuda.cc alone.
#pragma once

DRIVER cuMemAlloc_v2(Address* address, size_t bytes) {
  return pass("cuMemAlloc", [&] { return forward("cuMemAlloc_v2", address, bytes); }, [&](Call& call, int code) {
    if (code != 0 || call.context == nullptr) return;
    strict::note_allocation(call.s, *call.context, {*address, bytes}, nullptr);
    trace(call.s, 0, "cuMemAlloc_v2 0x%llx %zu", *address, bytes);
  });
}

DRIVER cuMemFree_v2(Address address) {
  return pass("cuMemFree", [&] { return forward("cuMemFree_v2", address); }, [&](Call& call, int code) {
    if (code == 0) expect(call, strict::give_back(call.s, address), 0);
    trace(call.s, code, "cuMemFree_v2 0x%llx", address);
  });
}

DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) {
  return pass("cuMemGetInfo", [&] { return forward("cuMemGetInfo_v2", free, total); });
}

DRIVER cuMemHostRegister_v2(void* begin, size_t bytes, unsigned flags) {
  return pass("cuMemHostRegister", [&] { return forward("cuMemHostRegister_v2", begin, bytes, flags); },
              [&](Call& call, int code) {
                if (code != 0 || call.context == nullptr) return;
                const Range range{reinterpret_cast<Address>(begin), bytes};
                expect(call, strict::register_memory(call.s, *call.context, range, nullptr), 0);
                trace(call.s, 0, "cuMemHostRegister_v2 0x%llx %zu %u", range.begin, bytes, flags);
              },
              false);
}

DRIVER cuMemHostUnregister(void* begin) {
  return pass("cuMemHostUnregister", [&] { return forward("cuMemHostUnregister", begin); }, [&](Call& call, int code) {
    const auto address = reinterpret_cast<Address>(begin);
    if (code == 0) expect(call, strict::unregister_memory(call.s, call.name, address, false), 0);
    trace(call.s, code, "cuMemHostUnregister 0x%llx", address);
  });
}

DRIVER cuPointerGetAttribute(void* value, int attribute, Address address) {
  return pass("cuPointerGetAttribute", [&] { return forward("cuPointerGetAttribute", value, attribute, address); });
}

DRIVER cuGetErrorName(int code, const char** name) { return forward("cuGetErrorName", code, name); }
DRIVER cuGetErrorString(int code, const char** text) { return forward("cuGetErrorString", code, text); }

namespace {

// Device memory of which nobody knows the ends reaches as far as it is used.
void look_up(State& s, int device, Range range) {
  proxy::look_up_device_memory(s, range);
  const auto found = strict::entry_at(s.device_memory, range.begin);
  if (found != s.device_memory.end()) {
    const auto next = std::next(found);
    const bool joins = next != s.device_memory.end() && next->second.range.meets(range);
    if (!found->second.is_guessed || joins || found->second.range.holds(range)) return;
    found->second.range.bytes = range.end() - found->second.range.begin;
    range = found->second.range;
  } else {
    strict::tell_of_memory(s, device, range, true);
  }
  trace(s, 0, "memory %d 0x%llx %zu", device, range.begin, range.bytes);
}

// Takes down one copy, and whether host memory is pinned.
bool take_down(Call& call, const Stream& stream, strict::Engine engine, strict::Transfer& transfer, strict::Pinned& pinned) {
  const Range to{transfer.to, transfer.bytes}, from{transfer.from, transfer.bytes};
  const int device = stream.context->device;
  if (engine != strict::kToHost) look_up(call.s, device, to);
  if (engine != strict::kFromHost) look_up(call.s, device, from);
  if (strict::look_at(call, stream, engine, transfer, pinned) != 0) return false;
  const Range& host = engine == strict::kToHost ? to : from;
  if (engine != strict::kOnDevice && pinned == strict::Pinned::kNo && proxy::is_pinned_elsewhere(host))
    pinned = strict::Pinned::kYes;
  return true;
}

// `ask` asks the driver behind.
template <typename Ask>
int copy(const char* name, strict::Engine engine, Address to, Address from, size_t bytes, void* handle, Ask ask) {
  return pass(name, ask, [&](Call& call, int code) {
    Stream* const stream = proxy::stream_at(call, handle, code == 0);
    if (stream == nullptr || bytes == 0) return;
    strict::Operation operation;
    operation.engine = engine;
    operation.transfers.push_back({});
    strict::Transfer& transfer = operation.transfers.front();
    transfer.to = to;
    transfer.from = from;
    transfer.bytes = bytes;
    strict::Pinned pinned = strict::Pinned::kUnknown;
    const bool right = take_down(call, *stream, engine, transfer, pinned);
    trace(call.s, code, "%s_v2 0x%llx 0x%llx %zu %s", name, to, from, bytes, token(handle, *stream).c_str());
    if (code != 0 || !right) return;
    enter(call, *stream, std::move(operation));
    if (pinned == strict::Pinned::kNo && !is_captured(*stream)) strict::learn(call.s, stream->clock);
  });
}

// Those before one that is refused may have been enqueued. They are taken for it: whoever makes them again is not wrong.
void note_batch(Call& call, const strict::Batch& batch, void* handle, int code) {
  Stream* const stream = proxy::stream_at(call, handle, code == 0);
  if (stream == nullptr || !strict::is_well_formed(batch)) return;
  const size_t most = code == 0 ? batch.count : batch.failed != nullptr ? std::min(*batch.failed, batch.count) : 0;
  strict::Operation operation;
  std::string copies;
  for (size_t i = 0; i < most; ++i) {
    strict::Transfer transfer;
    transfer.to = batch.to[i];
    transfer.from = batch.from[i];
    transfer.bytes = batch.sizes[i];
    const strict::Engine engine = strict::engine_for(call.s, transfer);
    strict::Pinned pinned = strict::Pinned::kUnknown;
    if (take_down(call, *stream, engine, transfer, pinned)) operation.transfers.push_back(transfer);
    operation.engine = engine;
    char text[80];
    std::snprintf(text, sizeof text, " 0x%llx 0x%llx %zu", transfer.to, transfer.from, transfer.bytes);
    copies += text;
  }
  if (most > 0) trace(call.s, 0, "cuMemcpyBatchAsync %s%s", token(handle, *stream).c_str(), copies.c_str());
  if (!operation.transfers.empty()) enter(call, *stream, std::move(operation));
}

}  // namespace

DRIVER cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
  return copy("cuMemcpyDtoHAsync", strict::kToHost, reinterpret_cast<Address>(to), from, bytes, stream,
              [&] { return forward("cuMemcpyDtoHAsync_v2", to, from, bytes, stream); });
}

DRIVER cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
  return copy("cuMemcpyHtoDAsync", strict::kFromHost, to, reinterpret_cast<Address>(from), bytes, stream,
              [&] { return forward("cuMemcpyHtoDAsync_v2", to, from, bytes, stream); });
}

DRIVER cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
  return copy("cuMemcpyDtoDAsync", strict::kOnDevice, to, from, bytes, stream,
              [&] { return forward("cuMemcpyDtoDAsync_v2", to, from, bytes, stream); });
}

DRIVER cuMemcpyBatchAsync(Address* to, Address* from, size_t* sizes, size_t count, strict::CopyAttributes* attributes,
                          size_t* first_copies, size_t attribute_count, size_t* failed, void* stream) {
  const strict::Batch batch{to, from, sizes, count, attributes, first_copies, attribute_count, failed};
  return pass("cuMemcpyBatchAsync",
              [&] {
                return forward("cuMemcpyBatchAsync", to, from, sizes, count, attributes, first_copies, attribute_count, failed,
                               stream);
              },
              [&](Call& call, int code) { note_batch(call, batch, stream, code); });
}

DRIVER cuMemsetD8Async(Address to, unsigned char value, size_t bytes, void* handle) {
  return pass("cuMemsetD8Async", [&] { return forward("cuMemsetD8Async", to, value, bytes, handle); }, [&](Call& call, int code) {
    Stream* const stream = proxy::stream_at(call, handle, code == 0);
    if (stream == nullptr || bytes == 0) return;
    look_up(call.s, stream->context->device, {to, bytes});
    trace(call.s, code, "cuMemsetD8Async 0x%llx %d %zu %s", to, value, bytes, token(handle, *stream).c_str());
    const auto* const target = strict::device_memory_of(call.s, call.name, {to, bytes});
    if (code != 0 || target == nullptr) return;
    strict::look_at_owner(call.s, call.name, {to, bytes}, *target, *stream);
    strict::Operation operation;
    operation.transfers.push_back({});
    operation.transfers.front().to = to;
    operation.transfers.front().bytes = bytes;
    operation.transfers.front().fill = value;
    enter(call, *stream, std::move(operation));
  });
}

namespace {

struct Wrapped {
  strict::Operation operation;  // its place in the order
  void (*function)(void*);
  void* data;
};

// So that what the function itself does has its place, and what it may not do is seen.
void call_wrapped(void* given) {
  std::unique_ptr<Wrapped> wrapped(static_cast<Wrapped*>(given));
  strict::this_thread().function = &wrapped->operation;
  wrapped->function(wrapped->data);
  strict::this_thread().function = nullptr;
}

}  // namespace

DRIVER cuLaunchHostFunc(void* handle, void (*function)(void*), void* data) {
  auto* const wrapped = new Wrapped{{}, function, data};
  std::string place = "0";
  const auto ask = [&] {
    State& s = strict::state();
    {
      strict::Lock none, lock(s.mutex);
      Call call{s, none, lock, "cuLaunchHostFunc"};
      call.context = strict::this_thread().current;
      Stream* const stream = proxy::stream_at(call, handle, true);
      if (stream != nullptr) {
        enter(call, *stream, {});
        place = token(handle, *stream);
        wrapped->operation.stream = stream;
        wrapped->operation.start = stream->clock;
        wrapped->operation.position = stream->position;
      }
    }
    return forward("cuLaunchHostFunc", handle, &call_wrapped, static_cast<void*>(wrapped));
  };
  return pass("cuLaunchHostFunc", ask, [&](Call& call, int code) {
    if (code != 0) delete wrapped;
    trace(call.s, code, "cuLaunchHostFunc %s", place.c_str());
  });
}
