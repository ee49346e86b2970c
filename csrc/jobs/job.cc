#include "jobs/job.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/crc32.h"

namespace lazyckpt {

double monotonic_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ---- CrcChain ----------------------------------------------------------------------------------------------------

void CrcChain::add(std::vector<Chunk>& chunks, size_t index) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (ready_.size() < chunks.size()) ready_.resize(chunks.size());
  ready_[index] = true;
  for (; folded_ < chunks.size() && ready_[folded_]; ++folded_) {
    for (const Piece& piece : chunks[folded_].pieces) {
      if (piece.record == kStructure) continue;
      uint32_t& crc = record_crcs_[piece.record];
      crc = crc == 0 ? piece.crc : crc32_combine(crc, piece.crc, piece.length);
    }
  }
  advanced_.notify_all();
}

bool CrcChain::wait_for(size_t index) {
  std::unique_lock<std::mutex> lock(mutex_);
  advanced_.wait(lock, [&] { return folded_ > index || given_up_; });
  return !given_up_;
}

void CrcChain::give_up() {
  std::lock_guard<std::mutex> lock(mutex_);
  given_up_ = true;
  advanced_.notify_all();
}

namespace {

constexpr uint64_t kPiece = uint64_t{4} << 20;  // smaller chunks are joined, larger ones are pieces as they are

// No piece of a chunk reaches from one part of the file into the next.
void add_parts(Checksums& sums, const std::vector<Chunk>& chunks, uint64_t every) {
  sums.piece_bytes = every;
  uint64_t at = 0;
  for (const Chunk& chunk : chunks) {
    for (const Piece& piece : chunk.pieces) {
      if (at % every == 0) sums.pieces.push_back(0);
      sums.pieces.back() = crc32_combine(sums.pieces.back(), piece.crc, piece.length);
      at += piece.length;
    }
  }
}

// Of a file that one process writes: its chunks follow each other from the beginning, and each is of the same size but the last.
void add_pieces(Checksums& sums, const std::vector<Chunk>& chunks, uint64_t every) {
  if (every > 0) return add_parts(sums, chunks, every);
  if (chunks.empty()) return;
  sums.piece_bytes = std::max<uint64_t>(kPiece, chunks.size() > 1 ? chunks[1].offset : chunks[0].content);
  for (const Chunk& chunk : chunks) {
    if (chunk.offset % sums.piece_bytes == 0) sums.pieces.push_back(0);
    sums.pieces.back() = crc32_combine(sums.pieces.back(), chunk.crc, chunk.content);
  }
}

}  // namespace

// ---- Job ---------------------------------------------------------------------------------------------------------

Job::Job(std::shared_ptr<Monitor> shared, std::unique_ptr<WritableFile> target, FileSpec description,
         size_t chunk_bytes, const CaptureChecks& how, double capture_timeout_s)
    : monitor(std::move(shared)),
      file(std::move(target)),
      spec(std::move(description)),
      range(written_range(spec, chunk_bytes)),
      fields(fields_in(spec, range)),
      checks(how),
      timeout_s(capture_timeout_s),
      crcs(spec.record_count),
      chunks(cut_into_chunks(spec, file->limits(), chunk_bytes)) {
  stats.bytes_total = range.end - range.begin;
  if (!checks.verify) note_witnesses();
  if (checks.probe && !checks.verify) probes.emplace(chunks, spec);
  if (checks.sum) word_sums.resize(spec.record_count);
  for (uint64_t i = fields.begin; i < fields.end; ++i) field_records.push_back(spec.crc_fields[i].record);
  for (const Chunk& chunk : chunks) {
    uncaptured += (chunk.lazy_bytes > 0 ? 1 : 0) + chunk.device_shares.size();
    stats.bytes_from_devices += chunk.device_lazy_bytes + chunk.device_copy_bytes;
    stats.bytes_of_structure += structure_bytes(chunk);
  }
  for (const Extent& extent : spec.extents) {
    if (!on_device(extent.kind) || has_device(extent.device)) continue;
    devices.emplace_back();
    devices.back().device = extent.device;
  }
}

void Job::note_witnesses() {
  const double begin = monotonic_seconds();
  witnesses.emplace(chunks);
  stats.witness_s = monotonic_seconds() - begin;
}

void Job::look_at_witnesses(size_t chunk) const {
  if (chunks[chunk].lazy_bytes == 0) return;
  if (const uint32_t record = witnesses->find_changed(chunk); record != kStructure) throw changed_error(*this, record);
}

bool Job::look_at_probes(size_t index) {
  if (!probes || !probes->covers(index)) return true;
  std::unique_lock<std::mutex> lock(monitor->mutex);
  monitor->changed.wait(lock, [&] { return probing == 0 || failed(); });
  if (failed()) return false;
  lock.unlock();
  const DeviceProbe* changed = probes->find_changed(chunks[index], index);
  if (changed == nullptr) return true;
  lock.lock();
  stats.changed_device = changed->device;
  throw changed_error(*this, changed->record);
}

Checksums Job::sum_up() const {
  Checksums sums;
  for (const Chunk& chunk : chunks) {
    if (chunk.written) sums.written = crc32_combine(sums.written, chunk.crc, chunk.content);
  }
  if (spec.share.whole()) {
    add_pieces(sums, chunks, spec.sums_every);
    return sums;
  }
  sums.only_read = part_only_read(chunks);
  sums.last_written = last_part_written(chunks);
  return sums;
}

bool Job::has_device(int device) const {
  return std::any_of(devices.begin(), devices.end(), [&](const DeviceProgress& each) { return each.device == device; });
}

void Job::note_captured() {
  if (!captured() || failed() || stats.captured_at != 0) return;
  stats.captured_at = monotonic_seconds();
  monitor->settled.notify_all();
}

void Job::fail(const Error& first_error) {
  if (failed() || finished()) return;
  error = first_error;
  uncaptured = 0;  // nothing will be published, so nothing needs protection any more
  // What nobody holds is dropped here; who holds a chunk drops it on coming back.
  for (size_t i = next; i < published; ++i) {
    Chunk& chunk = chunks[i];
    if (chunk.state != ChunkState::kPending) continue;
    chunk.state = ChunkState::kDone;
    chunk.release_memory();
  }
  crcs.give_up();
  monitor->changed.notify_all();
  monitor->settled.notify_all();
}

// ---- Errors ------------------------------------------------------------------------------------------------------

Error deadline_error(const Job& job, const std::string& what, double waited_s) {
  return Error(ErrorKind::kDeadline,
               what + " for '" + job.file->path() + "' did not happen within " + std::to_string(waited_s) +
                   " s; the storage is too slow or hangs: raise the timeout, enlarge arena_bytes, or save less often",
               0, job.file->path());
}

Error changed_error(const Job& job, uint32_t record) {
  return Error(ErrorKind::kChanged, "the bytes of record " + std::to_string(record) + " changed before they were captured",
               static_cast<int>(record), job.file->path());
}

}  // namespace lazyckpt
