// Work in streams: done by a thread of the driver's own. Functions of the host are called by another one.
#pragma once

#include <cstdio>
#include <cstring>

#include "order.h"

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

inline bool is_done(const State& s, const Clock& clock) {
  for (Component component = 0; component < clock.size(); ++component)
    if (s.done[component] < clock.at(component)) return false;
  return true;
}

inline bool is_held(const State& s, const Operation& operation) {
  if (s.hold == 0 || !is_copy(operation.engine)) return false;
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
    if (is_copy(operation.engine)) ++s.counts["copies that ended"];
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
  if (!operation.transfers.empty()) move_bytes(s, operation);
  if (!operation.is_mark()) s.contexts[stream.context->device].engine_free[operation.engine] = Time::now();
  s.done[stream.component] = operation.position;
  stream.queue.pop_front();
  if (stream.queue.empty()) s.busy.erase(std::find(s.busy.begin(), s.busy.end(), &stream));
}

// Those that wait for nothing any more, the first one on each engine of each device. True if that was a mark, which it has done.
inline bool look_for_ready(State& s, Time::time_point now, Operation* (&first)[kMostDevices][kEngines]) {
  for (Stream* stream : s.busy) {
    Operation& operation = stream->queue.front();
    if (is_held(s, operation) || !is_done(s, operation.waits)) continue;
    if (operation.is_mark()) {
      finish_first(s, *stream);
      return true;
    }
    if (operation.engine == kHostFunction && s.running != nullptr) continue;
    if (operation.ready_number == 0) {
      operation.ready_number = ++s.last_number;
      operation.ready_at = now;
    }
    Operation*& its = first[stream->context->device][operation.engine];
    if (its == nullptr || operation.ready_number < its->ready_number) its = &operation;
  }
  return false;
}

// A function is called by another thread, which is told.
inline void do_chosen(State& s, Operation& chosen) {
  if (chosen.function == nullptr || chosen.stream->context->error != kSuccess) return finish_first(s, *chosen.stream);
  chosen.is_running = true;
  s.running = &chosen;
}

// Does one operation whose time has come. Else says when one will be due.
inline bool do_one(State& s, Time::time_point& next) {
  const auto now = Time::now();
  next = Time::time_point::max();
  Operation* first[kMostDevices][kEngines] = {};
  if (look_for_ready(s, now, first)) return true;
  Operation* chosen = nullptr;
  for (const auto& engines : first) {
    for (Operation* operation : engines) {
      if (operation == nullptr) continue;
      const auto idle_since = s.contexts[operation->stream->context->device].engine_free[operation->engine];
      const auto due = std::max(operation->ready_at, idle_since) + operation->delay;
      if (due > now) {
        next = std::min(next, due);
      } else if (chosen == nullptr || chance_of(s, *operation) < chance_of(s, *chosen)) {
        chosen = operation;
      }
    }
  }
  if (chosen != nullptr) do_chosen(s, *chosen);
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

[[noreturn]] inline void call_functions(State& s) {
  Lock lock(s.mutex);
  for (;;) {
    s.changed.wait(lock, [&] { return s.running != nullptr; });
    Operation& operation = *s.running;
    known_thread(s);
    this_thread().function = &operation;
    lock.unlock();
    operation.function(operation.data);
    lock.lock();
    this_thread().function = nullptr;
    s.running = nullptr;
    finish_first(s, *operation.stream);
    s.changed.notify_all();
  }
}

inline bool is_done(const State& s, const Stream& stream, uint64_t position) { return s.done[stream.component] >= position; }

inline void wait_for(State& s, Lock& lock, const Stream& stream, uint64_t position) {
  s.changed.wait(lock, [&] { return is_done(s, stream, position); });
}

inline void start_worker(State& s) {
  if (s.worker_runs) return;
  s.worker_runs = true;
  std::thread([&s] { work(s); }).detach();
  std::thread([&s] { call_functions(s); }).detach();
}

// Until a copy has ended, nothing is promised about its target. Host memory then holds what is in no tensor.
inline void poison(State& s, const Range& range) {
  bool in_use = false;
  s.history.each(range, [&](const Access& access) { in_use = in_use || s.done[access.where] < access.position; });
  if (!in_use) std::memset(reinterpret_cast<void*>(range.begin), 0xa5, range.bytes);
}

// What an operation waits for beside the one before it in its stream: on the default streams for others, and others for these.
inline void add_waits(State& s, const Stream& stream, Operation& operation) {
  if (stream.is_legacy) {
    for (const Stream* other : s.streams)
      if (other->context == stream.context && other->is_blocking) operation.waits.raise(other->component, other->position);
  } else if (stream.is_blocking) {
    operation.waits.raise(stream.context->legacy->component, stream.context->legacy->position);
  }
  Context& device = s.contexts[stream.context->device];
  if (s.order == Order::kOneQueue) operation.waits.raise(device.last_component, device.last_position);
  device.last_component = stream.component;
  device.last_position = stream.position + 1;
}

inline void enqueue(State& s, Stream& stream, Operation operation) {
  if (stream.capture != nullptr) {
    stream.capture->operations.push_back(std::move(operation));
    return;
  }
  add_waits(s, stream, operation);
  if (operation.engine == kToHost)
    for (const Transfer& transfer : operation.transfers) poison(s, {transfer.to, transfer.bytes});
  put_in_order(s, stream, operation);
  if (!operation.is_mark()) {
    operation.delay = std::chrono::duration_cast<Time::duration>(std::chrono::duration<double>(
        s.most_delay_s * static_cast<double>(chance_of(s, operation) >> 11) / static_cast<double>(1ull << 53)));
  }
  if (stream.queue.empty()) s.busy.push_back(&stream);
  stream.queue.push_back(std::move(operation));
  start_worker(s);
  s.changed.notify_all();
}

}  // namespace strict
