// What all calls have in common: the driver's lock, errors that stay, handles, and the rules of stream captures.
#pragma once

#include <thread>

#include "memory.h"

namespace strict {

enum class Needs {
  kNothing,
  kDriver,
  kContext,
  kContextEvenBroken,  // what gives back does so in any case, and returns the context's error all the same
};

struct Call {
  State& s;
  Lock& driver;  // keeps other threads' calls out
  Lock& lock;
  const std::string name;
  Context* context = nullptr;
  int late = kSuccess;  // with which what it enqueues will fail
};

// The code of a fault that is due now.
inline Fault fault_of(State& s, const std::string& name) {
  const auto found = s.faults.find(name);
  if (found == s.faults.end() || found->second.empty()) return {};
  Fault& next = found->second.front();
  if (next.skip-- > 0) return {};
  const Fault due = next;
  found->second.pop_front();
  return due;
}

inline int look_at_context(Needs needs, Call& call) {
  call.context = this_thread().current;
  if (call.context == nullptr) return kInvalidContext;
  if (call.context->references == 0) return kContextIsDestroyed;
  return needs == Needs::kContext ? call.context->error : kSuccess;
}

// Whoever is told of a context's error knows that nothing goes on there any more.
inline int told(Call& call, int code) {
  if (code == kSuccess || code == kNotReady) return code;
  for (const Stream* stream : call.s.streams)
    if (stream->context->error == code) learn(call.s, stream->clock);
  return code;
}

// A function that the driver has called may not call it.
inline bool is_called_by_driver(State& s, const std::string& name) {
  if (this_thread().function == nullptr) return false;
  Lock lock(s.mutex);
  s.violation(name + " is called by a function that the driver has called");
  return true;
}

inline void take_time(State& s, const std::string& name) {
  double seconds = 0;
  {
    Lock lock(s.mutex);
    if (const auto found = s.delays.find(name); found != s.delays.end()) seconds = found->second;
  }
  if (seconds > 0) std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

template <typename Body>
int run_call(const char* name, Needs needs, Body body) {
  State& s = state();
  if (is_called_by_driver(s, name)) return kNotPermitted;
  take_time(s, name);
  Lock driver(s.calls), lock(s.mutex);
  Call call{s, driver, lock, name};
  ++s.counts[name];
  if (s.is_shut_down) return kDeinitialized;
  if (needs != Needs::kNothing && !s.is_initialized) return kNotInitialized;
  const Fault fault = fault_of(s, name);
  if (fault.code != kSuccess && !fault.late) return fault.code;
  call.late = fault.code;
  if (needs == Needs::kContext || needs == Needs::kContextEvenBroken) {
    const int code = look_at_context(needs, call);
    if (code != kSuccess) return told(call, code);
  }
  tick(s);
  const int code = body(call);
  return told(call, code == kSuccess && needs == Needs::kContextEvenBroken ? call.context->error : code);
}

// ---- handles ---------------------------------------------------------------------------------------------------------

using StreamHandle = Stream*;  // all of these as they are handed out: see State::stream_handles
constexpr uintptr_t kLegacyHandle = 1, kPerThreadHandle = 2;

inline Stream* new_stream(State& s, Context& context, bool is_blocking) {
  auto* stream = new Stream;  // kept for ever, so that what has been destroyed is known when it comes again
  stream->context = &context;
  stream->is_blocking = is_blocking;
  stream->component = s.new_component(false);
  stream->handle = stream;
  stream->number = ++s.last_number;
  s.streams.insert(stream);
  s.stream_handles[stream->handle] = stream;
  return stream;
}

// A context without anything in it.
inline void begin_context(State& s, Context& context, int device) {
  context.handle = &context;
  context.number = ++s.last_number;
  context.device = device;
  context.error = kSuccess;
  context.legacy = new_stream(s, context, true);
  context.legacy->is_legacy = true;
  s.context_handles[context.handle] = &context;
}

inline int stream_at(Call& call, StreamHandle handle, Stream*& stream) {
  State& s = call.s;
  const auto number = reinterpret_cast<uintptr_t>(handle);
  if (number <= kLegacyHandle) {
    stream = call.context->legacy;
    return kSuccess;
  }
  if (number == kPerThreadHandle) {
    Stream*& own = call.context->of_threads[known_thread(s).component];
    if (own == nullptr) own = new_stream(s, *call.context, true);
    stream = own;
    return kSuccess;
  }
  const auto found = s.stream_handles.find(handle);
  if (found == s.stream_handles.end()) {
    s.violation(call.name + " is given a handle that is no stream's");
    return kInvalidHandle;
  }
  if (found->second->is_destroyed) {
    s.violation(call.name + " is given a destroyed stream: the " + name_of(*found->second));
    return kInvalidHandle;
  }
  stream = found->second;
  return stream->context->error;
}

inline Event* new_event(State& s, Context& context) {
  auto* event = new Event;  // kept for ever, as streams are
  event->context = &context;
  event->handle = event;
  event->number = ++s.last_number;
  s.events.insert(event);
  s.event_handles[event->handle] = event;
  return event;
}

inline int event_at(Call& call, void* handle, Event*& event) {
  State& s = call.s;
  const auto found = s.event_handles.find(handle);
  if (found == s.event_handles.end()) {
    s.violation(call.name + " is given a handle that is no event's");
    return kInvalidHandle;
  }
  if (found->second->is_destroyed) {
    s.violation(call.name + " is given a destroyed event");
    return kInvalidHandle;
  }
  event = found->second;
  return kSuccess;
}

// ---- captures --------------------------------------------------------------------------------------------------------

inline int invalidate(Call& call, Capture& capture, int code) {
  ++call.s.counts["captures broken"];
  if (!capture.is_invalid)
    call.s.violation(call.name + " by thread " + std::to_string(known_thread(call.s).component) +
                     " breaks the capture of the " + name_of(*capture.origin) + " with " + std::to_string(code));
  capture.is_invalid = true;
  return code;
}

// Calls that do more than put work into streams.
inline int check_unsafe(Call& call) {
  const Thread& own = known_thread(call.s);
  int code = kSuccess;
  for (const auto& capture : call.s.captures) {
    const bool is_own = capture->owner == own.component;
    const bool forbids = (own.capture_mode == kGlobal && !is_own && capture->mode == kGlobal) ||
                         (own.capture_mode != kRelaxed && is_own && capture->mode != kRelaxed);
    if (forbids) code = invalidate(call, *capture, kCaptureUnsupported);
  }
  return code;
}

inline bool is_implicitly_captured(const State& s, const Stream& stream, Capture** captured) {
  if (!stream.is_legacy) return false;
  for (const Stream* other : s.streams) {
    if (other->context != stream.context || !other->is_blocking || other->capture == nullptr) continue;
    *captured = other->capture.get();
    return true;
  }
  return false;
}

// Before work is put into a stream.
inline int check_enqueue(Call& call, const Stream& stream) {
  Capture* captured = nullptr;
  if (is_implicitly_captured(call.s, stream, &captured)) return invalidate(call, *captured, kCaptureImplicit);
  return stream.capture != nullptr && stream.capture->is_invalid ? kCaptureInvalidated : kSuccess;
}

// Before a stream is asked or waited for.
inline int check_wait(Call& call, const Stream& stream) {
  Capture* captured = nullptr;
  if (is_implicitly_captured(call.s, stream, &captured)) return invalidate(call, *captured, kCaptureImplicit);
  if (stream.capture != nullptr) return invalidate(call, *stream.capture, kCaptureUnsupported);
  return kSuccess;
}

inline int begin_capture(Call& call, Stream& stream, int mode) {
  if (stream.is_legacy || stream.capture != nullptr || mode < kGlobal || mode > kRelaxed) return kInvalidValue;
  stream.capture = std::make_shared<Capture>();
  stream.capture->mode = mode;
  stream.capture->owner = known_thread(call.s).component;
  stream.capture->origin = &stream;
  call.s.captures.insert(stream.capture);
  return kSuccess;
}

inline int end_capture(Call& call, Stream& stream) {
  const std::shared_ptr<Capture> capture = stream.capture;
  if (capture == nullptr) return kInvalidValue;
  if (capture->origin != &stream) return kCaptureUnmatched;
  if (capture->mode != kRelaxed && capture->owner != known_thread(call.s).component) return kCaptureWrongThread;
  for (Stream* other : call.s.streams)
    if (other->capture == capture) other->capture = nullptr;
  call.s.captures.erase(capture);
  stream.graph = capture->is_invalid ? std::vector<Operation>() : capture->operations;
  return capture->is_invalid ? kCaptureInvalidated : kSuccess;
}

}  // namespace strict
