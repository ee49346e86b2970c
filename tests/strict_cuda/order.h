// What is ordered behind what, and what races: of this the thread that does the work knows nothing, and a driver of which this
// is told nothing either.
#pragma once

#include "state.h"

namespace strict {

inline void record(State& s, const Operation& operation) {
  const bool by_copy = is_copy(operation.engine);
  const Clock& known = by_copy ? operation.start.joint : operation.start.own;
  const std::string place = " (number " + std::to_string(operation.position) + " of the " + name_of(*operation.stream) + ", " +
                            operation.call + " by thread " + std::to_string(known_thread(s).component) + ")";
  const auto one = [&](const Range& range, const char* what, bool is_write) {
    auto text = std::make_shared<const std::string>(std::string(what) + " of " + text_of(range) + place);
    const Access access{operation.stream->component, operation.position, by_copy, text};
    s.history.record(range, access, is_write, known, [&](const Access& before) {
      s.violation("race: nothing orders the " + *text + " behind the " + *before.text);
    });
  };
  for (const Transfer& transfer : operation.transfers) {
    if (transfer.fill < 0) one({transfer.from, transfer.bytes}, "read", false);
    one({transfer.to, transfer.bytes}, "write", true);
  }
}

// The clock that the stream's next operation begins with.
inline Knowledge next_start(State& s, const Stream& stream) {
  Knowledge start = stream.clock;
  start.own.join(s.of_threads[known_thread(s).component]);
  start.joint.join(s.of_all_threads);
  if (stream.is_legacy) {
    for (const Stream* other : s.streams)
      if (other->context == stream.context && other->is_blocking) start.join(other->clock);
  } else if (stream.is_blocking) {
    start.join(stream.context->legacy->clock);
  }
  return start;
}

// The operation's place, and the races that it brings.
inline void put_in_order(State& s, Stream& stream, Operation& operation) {
  operation.stream = &stream;
  operation.start = next_start(s, stream);
  operation.position = ++stream.position;
  record(s, operation);
  stream.clock = operation.start;
  stream.clock.raise(stream.component, operation.position);
}

// Whether what was enqueued later, and is not done yet, waits for this.
inline bool is_waited_for(const State& s, const Operation& operation, const Access& by) {
  for (const Stream* stream : s.busy) {
    if (stream->component != by.where) continue;
    for (const Operation& queued : stream->queue)
      if (queued.position == by.position) return queued.start.own.at(operation.stream->component) >= operation.position;
  }
  return false;
}

// The calling thread reads or writes memory itself. A function that the driver has called stands in its stream's order.
inline void touch(State& s, const Range& range, bool is_write) {
  const Thread& own = known_thread(s);
  const Operation* const function = own.function;
  const std::string who = function == nullptr ? "host's " : "function's ";
  auto text = std::make_shared<const std::string>(who + (is_write ? "write" : "read") + " of " + text_of(range) + " by thread " +
                                                  std::to_string(own.component));
  const Access access{function == nullptr ? own.component : function->stream->component,
                      function == nullptr ? own.ticks : function->position, false, text};
  s.history.record(range, access, is_write, function == nullptr ? s.of_threads[own.component] : function->start.own,
                   [&](const Access& before) {
                     if (function != nullptr && is_waited_for(s, *function, before)) return;
                     s.violation("race: nothing orders the " + *text + " behind the " + *before.text);
                   });
}

// With nothing going on and no access on record there is nothing to put in order either: all clocks begin anew.
inline void forget_order(State& s) {
  s.history.forget_all();
  for (const Component thread : s.ended_threads) {
    for (auto& [handle, context] : s.context_handles) {
      const auto own = context->of_threads.find(thread);
      if (own == context->of_threads.end()) continue;
      own->second->is_destroyed = true;
      context->of_threads.erase(own);
    }
  }
  for (auto handle = s.stream_handles.begin(); handle != s.stream_handles.end();)
    handle = handle->second->is_destroyed ? s.stream_handles.erase(handle) : std::next(handle);
  for (auto handle = s.event_handles.begin(); handle != s.event_handles.end();)
    handle = handle->second->is_destroyed ? s.event_handles.erase(handle) : std::next(handle);
  for (auto event = s.events.begin(); event != s.events.end();) {
    Event* const each = *event;
    each->clock = {};
    each->stream = nullptr;
    event = each->is_destroyed ? s.events.erase(event) : std::next(event);
    if (each->is_destroyed) delete each;
  }
  for (auto stream = s.streams.begin(); stream != s.streams.end();) {
    Stream* const each = *stream;
    each->clock = {};
    stream = each->is_destroyed ? s.streams.erase(stream) : std::next(stream);
    if (!each->is_destroyed) continue;
    s.free_components.push_back(each->component);
    delete each;
  }
  s.free_components.insert(s.free_components.end(), s.ended_threads.begin(), s.ended_threads.end());
  s.ended_threads.clear();
  for (Context& context : s.contexts) context.last_position = 0;
  s.of_threads.clear();
  s.of_all_threads = {};
}

}  // namespace strict
