// Whether a device orders copies as the engine relies on: tried out on scratch memory of its own.
#pragma once

#include <memory>
#include <string>

#include "cuda/driver.h"

namespace lazyckpt::cuda {

enum class Verdict {
  kPassed,
  kFailed,        // a rule was broken, or the driver refused a call
  kInconclusive,  // it cannot be told: without the waits nothing went wrong either, or a graph is being captured
  kLate,          // the device had not done it in time
};

struct SelfCheck {
  Verdict verdict = Verdict::kPassed;
  std::string reason;  // empty if passed
};

// On the default stream and on another one, with copies on a third, as a lane has it:
//
//   read after write    a copy that waits for an event behind a write brings what was written, and nothing older
//   write after read    a write that waits for an event behind a copy changes nothing that the copy brings
//   control             without the two waits, both go wrong; else all this shows nothing
//   sizes               copies to the host and back, of odd sizes at odd places, bring the bytes that were there
//
// Work is delayed by functions on the host (cuLaunchHostFunc), so no rate matters. Takes about 10 MiB of the device and of pinned
// memory, and some 0.1 s; these are lost if the device hangs. Does not disturb captures of other threads.
SelfCheck check_device(const std::shared_ptr<const Context>& context, double timeout_s);

}  // namespace lazyckpt::cuda
