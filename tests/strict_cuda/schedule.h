// Work in streams: put in order, checked against all other work, and done by a thread of the driver's own.
#pragma once

#include <cstdio>
#include <cstring>

#include "state.h"

namespace strict {

inline uint64_t scramble(uint64_t value) {
  value += 0x9e3779b97f4a7c15;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

inline uint64_t chance_of(const State& s, const Operation& operation) {
  return scramble(s.seed ^ scramble(operation.stream->component ^ scramble(operation.position)));
}

// ---- doing it --------------------------------------------------------------------------------------------------------

inline bool is_done(const State& s, const Clock& clock) {
  for (Component component = 0; component < clock.size(); ++component)
    if (s.done[component] < clock.at(component)) return false;
  return true;
}

inline bool is_held(const State& s, const Operation& operation) {
  if (s.hold == 0 || operation.engine == kCompute || operation.transfers.empty()) return false;
  return s.hold == 1 || operation.transfers.front().from_allocated;
}

inline void move_bytes(State& s, Operation& operation) {
  std::vector<size_t> order(operation.transfers.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  const uint64_t chance = chance_of(s, operation);  // the copies of a batch have no order
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return scramble(chance + a) < scramble(chance + b); });
  Context& context = *operation.stream->context;
  for (const size_t i : order) {
    const Transfer& transfer = operation.transfers[i];
    if (operation.engine != kCompute) ++s.counts["copies that ended"];
    if (transfer.failure != kSuccess && context.error == kSuccess) context.error = transfer.failure;
    if (context.error != kSuccess || transfer.cancelled) continue;
    void* const to = reinterpret_cast<void*>(transfer.to);
    if (transfer.fill >= 0) {
      std::memset(to, transfer.fill, transfer.bytes);
    } else {
      std::memmove(to, reinterpret_cast<const void*>(transfer.from), transfer.bytes);
    }
  }
}

inline void finish_first(State& s, Stream& stream) {
  Operation& operation = stream.queue.front();
  if (!operation.transfers.empty()) {
    move_bytes(s, operation);
    stream.context->engine_free[operation.engine] = Time::now();
  }
  s.done[stream.component] = operation.position;
  stream.queue.pop_front();
  if (stream.queue.empty()) s.busy.erase(std::find(s.busy.begin(), s.busy.end(), &stream));
}

// Does one operation whose time has come. Else says when one will be due.
inline bool do_one(State& s, Time::time_point& next) {
  const auto now = Time::now();
  Operation* first[kMostDevices][kEngines] = {};
  for (Stream* stream : s.busy) {
    Operation& operation = stream->queue.front();
    if (is_held(s, operation) || !is_done(s, operation.start.own)) continue;
    if (operation.transfers.empty()) {
      finish_first(s, *stream);
      return true;
    }
    if (operation.ready_number == 0) {
      operation.ready_number = ++s.last_number;
      operation.ready_at = now;
    }
    Operation*& its = first[stream->context->device][operation.engine];
    if (its == nullptr || operation.ready_number < its->ready_number) its = &operation;
  }
  Operation* chosen = nullptr;
  next = Time::time_point::max();
  for (const auto& engines : first) {
    for (Operation* operation : engines) {
      if (operation == nullptr) continue;
      const auto idle_since = operation->stream->context->engine_free[operation->engine];
      const auto due = std::max(operation->ready_at, idle_since) + operation->delay;
      if (due > now) {
        next = std::min(next, due);
      } else if (chosen == nullptr || chance_of(s, *operation) < chance_of(s, *chosen)) {
        chosen = operation;
      }
    }
  }
  if (chosen != nullptr) finish_first(s, *chosen->stream);
  return chosen != nullptr;
}

[[noreturn]] inline void work(State& s) {
  Lock lock(s.mutex);
  for (;;) {
    Time::time_point next;
    if (do_one(s, next)) {
      s.changed.notify_all();
    } else if (next == Time::time_point::max()) {
      s.changed.wait(lock);
    } else {
      s.changed.wait_until(lock, next);
    }
  }
}

inline void wait_for(State& s, Lock& lock, const Clock& clock) {
  s.changed.wait(lock, [&] { return is_done(s, clock); });
}

// ---- putting it in order ---------------------------------------------------------------------------------------------

inline void record(State& s, const Operation& operation) {
  const bool is_copy = operation.engine != kCompute;
  const Clock& known = is_copy ? operation.start.joint : operation.start.own;
  const std::string place = " (number " + std::to_string(operation.position) + " of the " + name_of(*operation.stream) + ", " +
                            operation.call + " by thread " + std::to_string(known_thread(s).component) + ")";
  const auto one = [&](const Range& range, const char* what, bool is_write) {
    auto text = std::make_shared<const std::string>(std::string(what) + " of " + text_of(range) + place);
    const Access access{operation.stream->component, operation.position, is_copy, text};
    s.history.record(range, access, is_write, known, [&](const Access& before) {
      s.violation("race: nothing orders the " + *text + " behind the " + *before.text);
    });
  };
  for (const Transfer& transfer : operation.transfers) {
    if (transfer.fill < 0) one({transfer.from, transfer.bytes}, "read", false);
    one({transfer.to, transfer.bytes}, "write", true);
  }
}

inline void start_worker(State& s) {
  if (s.worker_runs) return;
  s.worker_runs = true;
  std::thread([&s] { work(s); }).detach();
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

// Until a copy has ended, nothing is promised about its target. Host memory then holds what is in no tensor.
inline void poison(State& s, const Range& range) {
  bool in_use = false;
  s.history.each(range, [&](const Access& access) { in_use = in_use || s.done[access.where] < access.position; });
  if (!in_use) std::memset(reinterpret_cast<void*>(range.begin), 0xa5, range.bytes);
}

inline void enqueue(State& s, Stream& stream, Operation operation) {
  if (stream.capture != nullptr) {
    stream.capture->operations.push_back(std::move(operation));
    return;
  }
  operation.stream = &stream;
  operation.start = next_start(s, stream);
  operation.position = ++stream.position;
  if (!operation.transfers.empty()) {
    operation.delay = std::chrono::duration_cast<Time::duration>(std::chrono::duration<double>(
        s.most_delay_s * static_cast<double>(chance_of(s, operation) >> 11) / static_cast<double>(1ull << 53)));
    if (operation.engine == kToHost)
      for (const Transfer& transfer : operation.transfers) poison(s, {transfer.to, transfer.bytes});
    record(s, operation);
  }
  stream.clock = operation.start;
  stream.clock.raise(stream.component, operation.position);
  if (stream.queue.empty()) s.busy.push_back(&stream);
  stream.queue.push_back(std::move(operation));
  start_worker(s);
  s.changed.notify_all();
}

}  // namespace strict
