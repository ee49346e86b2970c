#include "jobs/baseline.h"

#include <algorithm>

namespace lazyckpt {

Baseline::Baseline(CloneSource source, std::vector<Mark> marks, bool joined)
    : source_(std::move(source)), marks_(std::move(marks)), joined_(joined), good_(source_.note()) {}

bool Baseline::settle() { return good_ && (joined_ ? source_.note() : source_.unchanged()); }

const Mark* Baseline::find(uint64_t offset, uint64_t length) const {
  const auto before = [](const Mark& mark, uint64_t at) { return mark.offset < at; };
  const auto found = std::lower_bound(marks_.begin(), marks_.end(), offset, before);
  return found != marks_.end() && found->offset == offset && found->length == length ? &*found : nullptr;
}

}  // namespace lazyckpt
