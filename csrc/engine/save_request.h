// A save as a caller asks for it: what a file is to hold, where it goes and how it is written.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "base/device.h"
#include "engine/engine.h"
#include "format/file_spec.h"
#include "format/torch_zip.h"
#include "format/torch_zip_sequence.h"
#include "os/file.h"

namespace lazyckpt {

struct SaveRequest {
  TorchFile file;
  std::optional<TorchZipSequence> sequence = {};  // instead of what `file` holds
  bool packed = false;  // the head and the storages of `file`, one behind the other, and nothing else
  Share share;          // of several processes that write it together
  CaptureChecks checks;
  ReuseRequest reuse;
  double timeout_s = 0;
  Streams streams = {};  // of each device with bytes in the file

  // As WritableFile has them:
  std::string path;
  std::optional<IoLimits> expected_limits = {};
  bool with_directory = false;
  std::string like = {};
  int directory = -1;
};

// Lays the file out and makes it, and hands both to the engine: see Engine::submit(). The job of a file that is shared keeps the
// layout; that of a sequence keeps where each archive lies.
std::shared_ptr<Job> submit(Engine& engine, const SaveRequest& request, const Interrupt& interrupt);

}  // namespace lazyckpt
