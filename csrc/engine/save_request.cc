#include "engine/save_request.h"

#include <utility>
#include <vector>

#include "format/zip_layout.h"

namespace lazyckpt {

std::shared_ptr<Job> submit(Engine& engine, const SaveRequest& request, const Interrupt& interrupt) {
  const bool shared = !request.share.whole();
  auto target = std::make_unique<WritableFile>(request.path, request.file.direct, shared, request.expected_limits,
                                               request.with_directory, request.like, request.directory);
  ZipLayout layout;
  FileSpec spec;
  std::vector<ByteRange> archives;
  try {
    spec = request.sequence ? describe(*request.sequence, target->limits(), layout, archives)
                            : describe(request.file, target->limits(), request.share, layout);
  } catch (...) {
    target->discard();
    throw;
  }
  auto job = engine.submit(std::move(target), std::move(spec), request.checks, request.timeout_s, interrupt, request.streams);
  if (request.sequence) job->payloads = layout.payload_offsets;
  job->archives = std::move(archives);
  if (shared) job->layout = std::make_unique<ZipLayout>(std::move(layout));
  return job;
}

}  // namespace lazyckpt
