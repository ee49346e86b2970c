#include "engine/save_request.h"

#include <utility>
#include <vector>

#include "format/packed_file.h"
#include "format/zip_layout.h"

namespace lazyckpt {
namespace {

FileSpec lay_out(const SaveRequest& request, const IoLimits& limits, ZipLayout& layout, std::vector<ByteRange>& archives) {
  if (request.packed) return describe_packed(request.file.head, request.file.storages);
  if (request.sequence) return describe(*request.sequence, limits, layout, archives);
  return describe(request.file, limits, request.share, layout);
}

}  // namespace

std::shared_ptr<Job> submit(Engine& engine, const SaveRequest& request, const Interrupt& interrupt) {
  const bool shared = !request.share.whole();
  auto target = std::make_unique<WritableFile>(request.path, request.file.direct, shared, request.expected_limits,
                                               request.with_directory, request.like, request.directory);
  const auto layout = std::make_shared<ZipLayout>();
  FileSpec spec;
  std::vector<ByteRange> archives;
  try {
    spec = lay_out(request, target->limits(), *layout, archives);
    spec.kept = layout;
  } catch (...) {
    target->discard();
    throw;
  }
  auto job = engine.submit(std::move(target), std::move(spec), request.checks, request.timeout_s, interrupt, request.streams,
                           request.reuse);
  if (request.sequence) job->payloads = layout->payload_offsets;
  job->archives = std::move(archives);
  if (shared) job->layout = layout;
  return job;
}

}  // namespace lazyckpt
