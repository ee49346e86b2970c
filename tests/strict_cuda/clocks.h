// What happens before what: vector clocks, and the accesses to memory that they put in order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace strict {

using Address = unsigned long long;
using Component = size_t;  // of a clock: a stream, or a thread of the host

// How far each component had come at a moment.
class Clock {
 public:
  uint64_t at(Component component) const { return component < at_.size() ? at_[component] : 0; }
  size_t size() const { return at_.size(); }

  void raise(Component component, uint64_t position) {
    if (component >= at_.size()) at_.resize(component + 1);
    at_[component] = std::max(at_[component], position);
  }

  void join(const Clock& other) {
    if (at_.size() < other.at_.size()) at_.resize(other.at_.size());
    for (size_t i = 0; i < other.at_.size(); ++i) at_[i] = std::max(at_[i], other.at_[i]);
  }

 private:
  std::vector<uint64_t> at_;
};

// `own`: what follows from the calls alone. `joint`: as if threads told each other at once what they learn.
struct Knowledge {
  Clock own, joint;

  void raise(Component component, uint64_t position) {
    own.raise(component, position);
    joint.raise(component, position);
  }

  void join(const Knowledge& other) {
    own.join(other.own);
    joint.join(other.joint);
  }
};

struct Range {
  Address begin = 0;
  size_t bytes = 0;
  Address end() const { return begin + bytes; }
  bool meets(const Range& other) const { return begin < other.end() && other.begin < end(); }
  bool holds(const Range& other) const { return begin <= other.begin && other.end() <= end(); }
};

struct Access {
  Component where = 0;
  uint64_t position = 0;
  bool is_copy = true;  // else a kernel's, or the host's
  std::shared_ptr<const std::string> text;
};

// For each byte: the last write, and the reads since then.
class History {
 public:
  // Calls `race` for each access of before that `known` does not put before this one, and that conflicts with it.
  void record(const Range& range, const Access& access, bool is_write, const Clock& known,
              const std::function<void(const Access&)>& race) {
    cut(range.begin);
    cut(range.end());
    fill_gaps(range);
    const auto look_at = [&](const Access& before) {
      if (known.at(before.where) < before.position) race(before);
    };
    for (auto piece = pieces_.lower_bound(range.begin); piece != pieces_.end() && piece->first < range.end(); ++piece) {
      Piece& its = piece->second;
      if (its.write) look_at(*its.write);
      if (is_write) {
        for (const Access& read : its.reads) look_at(read);
        its.reads.clear();
        its.write = access;
      } else {
        // Of a component's reads the last one speaks for all.
        const auto same = std::find_if(its.reads.begin(), its.reads.end(), [&](const Access& read) {
          return read.where == access.where && read.is_copy == access.is_copy;
        });
        if (same == its.reads.end()) {
          its.reads.push_back(access);
        } else {
          *same = access;
        }
      }
    }
  }

  void each(const Range& range, const std::function<void(const Access&)>& look) const {
    auto piece = pieces_.upper_bound(range.begin);
    if (piece != pieces_.begin()) --piece;
    for (; piece != pieces_.end() && piece->first < range.end(); ++piece) {
      if (piece->second.end <= range.begin) continue;
      if (piece->second.write) look(*piece->second.write);
      for (const Access& read : piece->second.reads) look(read);
    }
  }

  void forget(const Range& range) {
    cut(range.begin);
    cut(range.end());
    pieces_.erase(pieces_.lower_bound(range.begin), pieces_.lower_bound(range.end()));
  }

  void forget_all() { pieces_.clear(); }

 private:
  struct Piece {
    Address end = 0;
    std::optional<Access> write;
    std::vector<Access> reads;
  };

  void cut(Address place) {
    auto next = pieces_.upper_bound(place);
    if (next == pieces_.begin()) return;
    auto piece = std::prev(next);
    if (piece->first == place || piece->second.end <= place) return;
    Piece rest = piece->second;
    piece->second.end = place;
    pieces_.emplace(place, std::move(rest));
  }

  void fill_gaps(const Range& range) {
    Address at = range.begin;
    for (auto piece = pieces_.lower_bound(range.begin); at < range.end(); at = piece->second.end, ++piece) {
      const Address next = piece == pieces_.end() ? range.end() : std::min(piece->first, range.end());
      if (at < next) piece = pieces_.emplace(at, Piece{next, {}, {}}).first;
    }
  }

  std::map<Address, Piece> pieces_;
};

}  // namespace strict
