#include "bindings/engine.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/crc32.h"
#include "bindings/errors.h"
#include "engine/engine.h"
#include "engine/save_request.h"
#include "format/file_spec.h"
#include "format/torch_zip.h"
#include "format/torch_zip_sequence.h"
#include "jobs/replica_sample.h"
#include "os/file.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

// Leaks the engine where its threads cannot be joined: in a forked child, where they do not exist, and when one of them
// hangs in the kernel, so that the process can still end.
struct EngineDeleter {
  void operator()(Engine* engine) const {
    if (engine->forked() || engine->in_flight() > 0) return;
    py::gil_scoped_release release;
    delete engine;
  }
};

Engine& usable(Engine& engine) {
  if (engine.forked()) {
    throw Error(ErrorKind::kForked,
                "this checkpoint engine belongs to the parent process; a forked child must make its own Checkpointer");
  }
  return engine;
}

using Blobs = std::vector<std::pair<std::string, py::bytes>>;

// Small ones may be temporaries of the caller: they are copied whatever copy_at_most says.
constexpr size_t kAlwaysCopied = 4096;

std::vector<NamedBytes> to_named(const Blobs& blobs, size_t copy_at_most) {
  copy_at_most = std::max(copy_at_most, kAlwaysCopied);
  std::vector<NamedBytes> named;
  for (const auto& [name, bytes] : blobs) {
    const auto length = static_cast<size_t>(PyBytes_GET_SIZE(bytes.ptr()));
    const auto* begin = reinterpret_cast<const std::byte*>(PyBytes_AS_STRING(bytes.ptr()));
    named.push_back({name, begin, length, length > copy_at_most ? Source::kOwned : Source::kCopy});
  }
  return named;
}

std::vector<StorageBytes> to_storages(const std::vector<uintptr_t>& addresses, const std::vector<uint64_t>& sizes,
                                      const py::bytes& kinds, const std::vector<int>& devices) {
  const auto count = static_cast<size_t>(PyBytes_GET_SIZE(kinds.ptr()));
  if (addresses.size() != sizes.size() || count != sizes.size()) {
    throw py::value_error("addresses, sizes and kinds must have one entry for each storage");
  }
  if (!devices.empty() && devices.size() != sizes.size()) {
    throw py::value_error("devices must have one entry for each storage, or none at all");
  }
  const char* kind = PyBytes_AS_STRING(kinds.ptr());
  std::vector<StorageBytes> storages;
  storages.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const auto on_host = static_cast<Source>(kind[i]);
    if (!is_kind_of_record(on_host)) throw py::value_error("a storage's kind is 0 (copy), 1 (lazy) or 2 (owned)");
    const int device = devices.empty() || devices[i] < 0 ? kHost : devices[i];
    const auto of_device = on_host == Source::kCopy ? Source::kDeviceCopy : Source::kDeviceLazy;
    const auto source = device == kHost ? on_host : of_device;
    storages.push_back({reinterpret_cast<const std::byte*>(addresses[i]), sizes[i], source, device});
  }
  return storages;
}

// (pickles, of each archive the number of its pickle, of each archive the number of its storages)
using Archives = std::tuple<std::vector<py::bytes>, std::vector<uint32_t>, std::vector<uint32_t>>;

TorchZipSequence to_sequence(const Archives& archives, std::vector<StorageBytes> storages) {
  TorchZipSequence sequence;
  for (const py::bytes& pickle : std::get<0>(archives)) {
    sequence.pickles.emplace_back(PyBytes_AS_STRING(pickle.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(pickle.ptr())));
  }
  sequence.pickle_of = std::get<1>(archives);
  sequence.storages_of = std::get<2>(archives);
  sequence.storages = std::move(storages);
  return sequence;
}

// Python's hold on a baseline. It is let go of by a call: the last descriptor of a file that has been removed gives its blocks back,
// which may take long, and must not happen with the GIL, nor wait for whoever still keeps this object.
struct HeldBaseline {
  std::shared_ptr<Baseline> baseline;

  void let_go() {
    std::shared_ptr<Baseline> taken = std::move(baseline);
    py::gil_scoped_release release;
    taken.reset();
  }
};

std::shared_ptr<Job> submit_file(Engine& engine, const std::string& path, bool direct, const std::string& archive,
                                 const Blobs& head, const std::vector<uintptr_t>& addresses,
                                 const std::vector<uint64_t>& sizes, const py::bytes& kinds, const Blobs& tail,
                                 size_t copy_at_most, uint32_t uniform_alignment, bool verify, double timeout_s,
                                 uint32_t share_index, uint32_t share_count, const std::vector<int>& devices,
                                 const Streams& streams, const std::optional<std::pair<uint32_t, uint32_t>>& expected,
                                 bool with_directory, const std::string& like, int directory, bool probe, bool sum,
                                 const std::optional<Archives>& archives, bool alike, bool packed,
                                 const HeldBaseline* baseline, bool reuse, bool share_blocks,
                                 const std::vector<uint32_t>& frozen, const std::vector<uint32_t>& supposed,
                                 const std::vector<uint32_t>& numbers) {
  usable(engine);
  SaveRequest request;
  request.file = {archive, to_named(head, copy_at_most), to_storages(addresses, sizes, kinds, devices),
                  to_named(tail, copy_at_most), uniform_alignment, direct, alike, numbers};
  if (!numbers.empty() && (numbers.size() != sizes.size() || archives || packed)) {
    throw py::value_error("numbers must have one entry for each storage of a file of one archive");
  }
  if (archives) request.sequence = to_sequence(*archives, std::move(request.file.storages));
  if (share_index >= share_count) throw py::value_error("share_index must be less than share_count");
  if (packed && share_count > 1) throw py::value_error("a packed file is written by one process");
  request.packed = packed;
  request.share = {share_index, share_count};
  request.checks = {verify, probe, sum};
  request.reuse = {reuse, share_blocks, baseline == nullptr ? nullptr : baseline->baseline, frozen, supposed};
  request.timeout_s = timeout_s;
  request.streams = streams;
  request.path = path;
  if (expected) request.expected_limits = IoLimits{expected->first, expected->second};
  request.with_directory = with_directory;
  request.like = like;
  request.directory = directory;
  py::gil_scoped_release release;
  return submit(engine, request, check_signals);
}

// {device: (bytes of the block, bytes of it in use, why there is none)}
py::dict device_caches_of(Engine& engine) {
  py::dict dict;
  for (const Stager::CacheState& cache : usable(engine).device_caches()) {
    dict[py::int_(cache.device)] = py::make_tuple(cache.bytes, cache.used, to_text(cache.failure));
  }
  return dict;
}

// A checksum for each record, four bytes each in the machine's order.
py::bytes sample_records(const std::vector<uintptr_t>& addresses, const std::vector<uint64_t>& sizes, uint64_t seed) {
  if (addresses.size() != sizes.size()) throw py::value_error("addresses and sizes must have one entry for each record");
  std::vector<Replica> records;
  records.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) records.push_back({reinterpret_cast<const std::byte*>(addresses[i]), sizes[i]});
  std::vector<uint32_t> found;
  {
    py::gil_scoped_release release;
    found = sample_replicas(records, seed);
  }
  return {reinterpret_cast<const char*>(found.data()), found.size() * sizeof(uint32_t)};
}

// ---- Job ---------------------------------------------------------------------------------------------------------

template <typename Read>
auto locked(const Job& job, Read read) {
  std::lock_guard<std::mutex> lock(job.monitor->mutex);
  return read();
}

// For background threads: signals are not looked at.
template <typename Done>
bool wait_for(const Job& job, double timeout_s, Done done) {
  py::gil_scoped_release release;
  std::unique_lock<std::mutex> lock(job.monitor->mutex);
  return job.monitor->settled.wait_for(lock, std::chrono::duration<double>(timeout_s), done);
}

py::object exception_of(const Job& job) {
  const std::optional<Error> error = locked(job, [&] { return job.error; });
  return error ? to_python(*error) : py::none();
}

// Once captured, and as long as the memory is there. The number of a record whose lazy bytes are others than at submit(); None
// if no witness tells of any.
std::optional<uint32_t> find_changed_record(const Job& job) {
  const uint32_t record = job.witnesses ? job.witnesses->find_changed() : kStructure;
  return record == kStructure ? std::nullopt : std::make_optional(record);
}

// (of addresses and lengths, of offsets), bytes; None before the file was created. Both 1: no direct I/O.
std::optional<std::pair<uint32_t, uint32_t>> limits_of(const Job& job) {
  return locked(job, [&]() -> std::optional<std::pair<uint32_t, uint32_t>> {
    if (job.phase < Phase::kWriting || !job.file->found()) return std::nullopt;
    return {{job.file->found()->memory_align, job.file->found()->offset_align}};
  });
}

py::dict stats_of(const Job& job) {
  const JobStats stats = locked(job, [&] { return job.stats; });
  py::dict dict;
  dict["bytes_total"] = stats.bytes_total;
  dict["bytes_from_tensors"] = stats.bytes_from_tensors;
  dict["bytes_copied_in_save"] = stats.bytes_copied_in_save;
  dict["bytes_of_structure"] = stats.bytes_of_structure;
  dict["bytes_copied_at_fence"] = stats.bytes_copied_at_fence;
  dict["arena_wait_s"] = stats.arena_wait_s;
  dict["witness_s"] = stats.witness_s;
  dict["fence_s"] = stats.fence_s;
  dict["captured_at"] = stats.captured_at;
  dict["written_at"] = stats.written_at;
  dict["flushed_at"] = stats.flushed_at;
  dict["direct_io"] = stats.direct_io;
  dict["bytes_from_devices"] = stats.bytes_from_devices;
  dict["device_cached_bytes"] = stats.device_cached_bytes;
  dict["arena_pinned"] = stats.arena_pinned;
  dict["pin_failure"] = to_text(stats.pin_failure);
  dict["arena_bytes"] = stats.arena_bytes;
  dict["probed_bytes"] = stats.probed_bytes;
  dict["changed_device"] = stats.changed_device;
  dict["reused_bytes"] = stats.reused_bytes;
  dict["reuse_refused"] = stats.reuse_refused;
  dict["unread_bytes"] = stats.unread_bytes;
  dict["frozen_changed"] = stats.frozen_changed;
  dict["unread_refused"] = stats.unread_refused;
  return dict;
}

// To be called once a checkpoint names the file: for the next save of it. None if that could share nothing, or if the job did not
// end well; and the second time.
std::unique_ptr<HeldBaseline> take_baseline(Job& job) {
  py::gil_scoped_release release;
  std::shared_ptr<Baseline> taken;
  locked(job, [&] { taken.swap(job.baseline); });
  if (taken == nullptr || !taken->settle()) return nullptr;
  return std::make_unique<HeldBaseline>(HeldBaseline{std::move(taken)});
}

// Of a file that no checkpoint names.
void drop_baseline(Job& job) {
  py::gil_scoped_release release;
  std::shared_ptr<Baseline> taken;
  locked(job, [&] { taken.swap(job.baseline); });
}

// (sum, bytes that are in it) of each record.
std::vector<std::pair<uint64_t, uint64_t>> word_sums_of(const Job& job) {
  const std::vector<WordSum> sums = locked(job, [&] { return job.word_sums; });
  std::vector<std::pair<uint64_t, uint64_t>> found;
  for (const WordSum& each : sums) found.emplace_back(each.sum, each.bytes);
  return found;
}

// ---- Files that several processes write together -----------------------------------------------------------------

const ZipLayout& shared_layout(const Job& job) {
  if (job.layout == nullptr) throw py::value_error("this file is not shared");
  return *job.layout;
}

// (offset, length) of each archive of a file that holds several.
std::vector<std::pair<uint64_t, uint64_t>> archives_of(const Job& job) {
  std::vector<std::pair<uint64_t, uint64_t>> places;
  places.reserve(job.archives.size());
  for (const ByteRange& place : job.archives) places.emplace_back(place.begin, place.end - place.begin);
  return places;
}

// (bytes of a piece, the CRC-32 of each piece of the file), once finished.
std::pair<uint64_t, std::vector<uint32_t>> pieces_of(const Job& job) {
  return locked(job, [&] { return std::make_pair(job.checksums.piece_bytes, job.checksums.pieces); });
}

// Of everything that must be the same in all processes for their parts to make one file.
uint32_t layout_checksum(const ZipLayout& layout) {
  const uint32_t crc = crc32(0, layout.payload_offsets.data(), layout.payload_offsets.size() * sizeof(uint64_t));
  return crc32(crc, &layout.file_size, sizeof layout.file_size);
}

// (record, bytes, CRC-32) each: what was only read, and what was written of the last record; 0 bytes where there is nothing.
py::tuple edges_of(const Job& job) {
  const Checksums checksums = locked(job, [&] { return job.checksums; });
  const auto part = [](const RecordPart& each) { return py::make_tuple(each.record, each.length, each.crc); };
  return py::make_tuple(part(checksums.only_read), part(checksums.last_written));
}

// Of the records whose first CRC field lies in the job's share; the job must be finished.
std::vector<uint32_t> checksums_of(const Job& job) {
  std::vector<uint32_t> found;
  for (const uint32_t record : job.field_records) found.push_back(job.crcs.record_crcs()[record]);
  return found;
}

}  // namespace

void bind_job(py::module_& module) {
  py::class_<HeldBaseline>(module, "Baseline").def("let_go", &HeldBaseline::let_go);
  py::class_<Job, std::shared_ptr<Job>>(module, "Job")
      .def_property_readonly("captured", [](const Job& job) { return locked(job, [&] { return job.captured(); }); })
      .def_property_readonly("released", [](const Job& job) { return locked(job, [&] { return job.released(); }); })
      .def_property_readonly("finished", [](const Job& job) { return locked(job, [&] { return job.finished(); }); })
      .def_property_readonly("error", exception_of)
      .def("find_changed", find_changed_record)
      .def_property_readonly("stats", stats_of)
      .def_property_readonly("written", [](const Job& job) { return py::make_tuple(job.range.begin, job.range.end); })
      .def_property_readonly("checksums", [](const Job& job) { return py::make_tuple(job.field_records, checksums_of(job)); })
      .def_property_readonly("edges", edges_of)
      .def_property_readonly("archives", archives_of)
      .def_property_readonly("payloads", [](const Job& job) { return job.payloads; })
      .def_property_readonly("piece_checksums", pieces_of)
      .def_property_readonly("layout_crc32", [](const Job& job) { return layout_checksum(shared_layout(job)); })
      .def("directory", [](const Job& job, const std::vector<uint32_t>& record_crcs) {
        if (record_crcs.size() != job.spec.record_count) throw py::value_error("one checksum for each record");
        const ZipLayout& layout = shared_layout(job);
        return py::make_tuple(layout.directory_offset, py::bytes(fill_directory(layout, record_crcs)));
      }, py::arg("record_crcs"))
      .def("take_baseline", take_baseline)
      .def_readonly("doubted", &Job::doubted)
      .def("drop_baseline", drop_baseline)
      .def_property_readonly("word_sums", word_sums_of)
      .def_property_readonly("limits", limits_of)
      .def_property_readonly("record_count", [](const Job& job) { return job.spec.record_count; })
      .def_property_readonly("size", [](const Job& job) { return job.spec.size; })
      .def_property_readonly("crc32", [](const Job& job) { return locked(job, [&] { return job.checksums.written; }); })
      .def("wait_captured", [](const Job& job, double timeout_s) {
        return wait_for(job, timeout_s, [&] { return job.captured() || job.failed(); });
      })
      .def("wait_released", [](const Job& job, double timeout_s) {
        return wait_for(job, timeout_s, [&] { return job.released(); });
      })
      .def("wait_finished", [](const Job& job, double timeout_s) {
        return wait_for(job, timeout_s, [&] { return job.finished(); });
      })
      .def("fail", [](Job& job, const std::string& why) {
        locked(job, [&] { job.fail(Error(ErrorKind::kChanged, why, -1, job.file->path())); });
      });
}

// Numbers, because the kinds of all records are one bytearray.
void bind_kinds(py::module_& module) {
  module.attr("COPY") = static_cast<int>(Source::kCopy);
  module.attr("LAZY") = static_cast<int>(Source::kLazy);
  module.attr("OWNED") = static_cast<int>(Source::kOwned);
}

void bind_samples(py::module_& module) {
  module.def("sample_records", &sample_records, py::kw_only(), py::arg("addresses"), py::arg("sizes"), py::arg("seed"));
}

void bind_engine(py::module_& module) {
  py::class_<Engine, std::unique_ptr<Engine, EngineDeleter>>(module, "Engine")
      .def(py::init([](size_t arena_bytes, size_t chunk_bytes, int writers, const std::optional<std::string>& cuda_library,
                       size_t device_cache_bytes, size_t device_window_bytes, size_t pinned_slab_bytes,
                       size_t smallest_pinned_slab_bytes, bool device_batches, size_t most_arena_bytes,
                       size_t device_rate) {
             const EngineOptions options{arena_bytes, chunk_bytes, writers, cuda_library.value_or(""), device_cache_bytes,
                                         device_window_bytes, pinned_slab_bytes, smallest_pinned_slab_bytes, device_batches,
                                         device_rate, most_arena_bytes};
             return std::unique_ptr<Engine, EngineDeleter>(new Engine(options));
           }),
           py::arg("arena_bytes"), py::arg("chunk_bytes"), py::arg("writers"), py::arg("cuda_library") = py::none(),
           py::arg("device_cache_bytes") = 0, py::arg("device_window_bytes") = EngineOptions().device_window_bytes,
           py::arg("pinned_slab_bytes") = EngineOptions().pinned_slab_bytes,
           py::arg("smallest_pinned_slab_bytes") = EngineOptions().smallest_pinned_slab_bytes, py::arg("device_batches") = false,
           py::arg("most_arena_bytes") = 0, py::arg("device_rate") = 0)
      .def("submit", &submit_file, py::kw_only(), py::arg("path"), py::arg("direct"), py::arg("archive"), py::arg("head"),
           py::arg("addresses"), py::arg("sizes"), py::arg("kinds"), py::arg("tail"), py::arg("copy_at_most"),
           py::arg("uniform_alignment"), py::arg("verify"), py::arg("timeout_s"),
           py::arg("share_index") = 0, py::arg("share_count") = 1,
           py::arg("devices") = std::vector<int>(), py::arg("streams") = Streams(),
           py::arg("expected_limits") = py::none(), py::arg("with_directory") = false,
           py::arg("like") = "", py::arg("directory") = -1, py::arg("probe") = false, py::arg("sum") = false,
           py::arg("archives") = py::none(), py::arg("alike") = false, py::arg("packed") = false,
           py::arg("baseline") = py::none(), py::arg("reuse") = false, py::arg("share_blocks") = true,
           py::arg("frozen") = std::vector<uint32_t>(), py::arg("supposed") = std::vector<uint32_t>(),
           py::arg("numbers") = std::vector<uint32_t>())
      .def("fence", [](Engine& engine, const Streams& streams) {
        usable(engine);
        py::gil_scoped_release release;
        engine.fence(check_signals, streams);
      }, py::arg("streams") = Streams())
      .def("order", [](Engine& engine, const Streams& streams) {
        usable(engine);
        py::gil_scoped_release release;
        engine.order(check_signals, streams);
      }, py::arg("streams"))
      .def("open_devices", [](Engine& engine, const std::vector<int>& devices) {
        usable(engine);
        py::gil_scoped_release release;
        engine.open_devices(devices);
      }, py::arg("devices"))
      .def("grow_arena", [](Engine& engine, size_t bytes) { usable(engine).grow_arena(bytes); }, py::arg("bytes"))
      .def_property_readonly("most_arena_bytes", [](const Engine& engine) { return engine.arena().most(); })
      .def_property_readonly("arena_pinned", [](Engine& engine) { return usable(engine).arena_pinned(); })
      .def_property_readonly("pin_failure", [](Engine& engine) { return usable(engine).pin_failure(); })
      .def_property_readonly("device_caches", device_caches_of)
      .def("close", [](Engine& engine, double timeout_s) {
        usable(engine);
        py::gil_scoped_release release;
        return engine.close(timeout_s, check_signals);
      })
      .def_property_readonly("in_flight", [](Engine& engine) { return usable(engine).in_flight(); })
      .def_property_readonly("chunk_bytes", &Engine::chunk_bytes)
      .def_property_readonly("arena_bytes", [](const Engine& engine) { return engine.arena().size(); })
      .def_property_readonly("arena_used", [](Engine& engine) { return usable(engine).arena().used(); })
      .def_property_readonly("arena_peak", [](Engine& engine) { return usable(engine).arena().peak(); });
}

}  // namespace lazyckpt
