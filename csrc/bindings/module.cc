// The Python face of the core: (address, bytes) in, jobs out. It checks what Python hands over, makes the file and its layout
// of that, and says in Python what became of it.
//
// Lifetime contract: submit() reads kinds "copy" before it returns; the memory of kind "lazy" must stay allocated until
// the job is captured or finished, that of kind "owned" until it is finished; memory of a device, whatever its kind, until the
// job is released. The GIL is released in every call that can wait.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/crc32.h"
#include "base/error.h"
#include "base/fault.h"
#include "engine/engine.h"
#include "format/torch_zip.h"
#include "os/file.h"
#include "os/memory_node.h"
#include "pickle/saved_storage.h"
#include "pickle/state_pickler.h"
#include "reading/range_reader.h"
#include "reading/record_file.h"

namespace py = pybind11;
using namespace lazyckpt;

namespace {

// ---- Errors ------------------------------------------------------------------------------------------------------

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kStorage: return "StorageError";
    case ErrorKind::kChanged: return "CaptureError";
    case ErrorKind::kCorrupt: return "CorruptError";
    case ErrorKind::kDeadline: return "DeadlineError";
    case ErrorKind::kClosed: return "ClosedError";
    case ErrorKind::kForked: return "ForkedError";
    case ErrorKind::kCancelled: return "CancelledError";
    case ErrorKind::kDevice: return "DeviceError";
  }
  return "CheckpointError";
}

// Names of files and of records in a damaged file need not be UTF-8.
py::str to_text(const std::string& bytes) {
  const auto length = static_cast<Py_ssize_t>(bytes.size());
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(bytes.data(), length, "backslashreplace"));
}

py::object to_python(const Error& error) {
  const py::object type = py::module_::import("ckpt.errors").attr(class_of(error.kind()));
  if (error.kind() == ErrorKind::kStorage) return type(error.code(), to_text(error.what()), to_text(error.path()));
  const py::object exception = type(to_text(error.what()));
  if (error.kind() == ErrorKind::kChanged) exception.attr("record") = error.code();
  if (error.kind() == ErrorKind::kDevice) exception.attr("code") = error.code();
  return exception;
}

void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const Error& error) {
    const py::object exception = to_python(error);
    PyErr_SetObject(py::type::of(exception).ptr(), exception.ptr());
  }
}

// Lets Python's signal handlers run during a wait (Ctrl-C); they only run on the main thread.
void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// ---- Engine ------------------------------------------------------------------------------------------------------

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
    if (kind[i] < 0 || kind[i] > 2) throw py::value_error("a storage's kind is 0 (copy), 1 (lazy) or 2 (owned)");
    const int device = devices.empty() || devices[i] < 0 ? kHost : devices[i];
    const auto of_device = kind[i] == 0 ? Source::kDeviceCopy : Source::kDeviceLazy;
    const auto source = device == kHost ? static_cast<Source>(kind[i]) : of_device;
    storages.push_back({reinterpret_cast<const std::byte*>(addresses[i]), sizes[i], source, device});
  }
  return storages;
}

std::shared_ptr<Job> submit(Engine& engine, const std::string& path, bool direct, const std::string& archive,
                            const Blobs& head, const std::vector<uintptr_t>& addresses,
                            const std::vector<uint64_t>& sizes, const py::bytes& kinds, const Blobs& tail,
                            size_t copy_at_most, uint32_t uniform_alignment, bool verify, double timeout_s,
                            uint32_t share_index, uint32_t share_count, const std::vector<int>& devices,
                            const Streams& streams, const std::optional<std::pair<uint32_t, uint32_t>>& expected,
                            bool with_directory, const std::string& like, int directory) {
  usable(engine);
  const TorchFile file{archive, to_named(head, copy_at_most), to_storages(addresses, sizes, kinds, devices),
                       to_named(tail, copy_at_most), uniform_alignment, direct};
  py::gil_scoped_release release;
  if (share_index >= share_count) throw py::value_error("share_index must be less than share_count");
  const Share share{share_index, share_count};
  const auto limits = expected ? std::optional<IoLimits>({expected->first, expected->second}) : std::nullopt;
  auto target = std::make_unique<WritableFile>(path, direct, !share.whole(), limits, with_directory, like, directory);
  ZipLayout layout;
  FileSpec spec;
  try {
    spec = describe(file, target->limits(), share, layout);
  } catch (...) {
    target->discard();
    throw;
  }
  auto job = engine.submit(std::move(target), std::move(spec), verify, timeout_s, check_signals, streams);
  if (!share.whole()) job->layout = std::make_unique<ZipLayout>(std::move(layout));
  return job;
}

// {device: (bytes of the block, bytes of it in use, why there is none)}
py::dict device_caches_of(Engine& engine) {
  py::dict dict;
  for (const Stager::CacheState& cache : usable(engine).device_caches()) {
    dict[py::int_(cache.device)] = py::make_tuple(cache.bytes, cache.used, to_text(cache.failure));
  }
  return dict;
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
  return job.monitor->changed.wait_for(lock, std::chrono::duration<double>(timeout_s), done);
}

py::object error_of(const Job& job) {
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
  dict["bytes_zero_copy"] = stats.bytes_zero_copy;
  dict["bytes_copied_in_save"] = stats.bytes_copied_in_save;
  dict["bytes_copied_at_fence"] = stats.bytes_copied_at_fence;
  dict["arena_wait_s"] = stats.arena_wait_s;
  dict["witness_s"] = stats.witness_s;
  dict["fence_s"] = stats.fence_s;
  dict["captured_at"] = stats.captured_at;
  dict["flushed_at"] = stats.flushed_at;
  dict["direct_io"] = stats.direct_io;
  dict["bytes_from_devices"] = stats.bytes_from_devices;
  dict["device_cached_bytes"] = stats.device_cached_bytes;
  dict["arena_pinned"] = stats.arena_pinned;
  dict["pin_failure"] = to_text(stats.pin_failure);
  return dict;
}

// ---- Files that several processes write together -----------------------------------------------------------------

const ZipLayout& shared_layout(const Job& job) {
  if (job.layout == nullptr) throw py::value_error("this file is not shared");
  return *job.layout;
}

// Of everything that must be the same in all processes for their parts to make one file.
uint32_t layout_checksum(const ZipLayout& layout) {
  const uint32_t crc = crc32(0, layout.payload_offsets.data(), layout.payload_offsets.size() * sizeof(uint64_t));
  return crc32(crc, &layout.file_size, sizeof layout.file_size);
}

// Of the records whose first CRC field lies in the job's share; the job must be finished.
std::vector<uint32_t> checksums_of(const Job& job) {
  std::vector<uint32_t> found;
  for (const uint32_t record : job.field_records) found.push_back(job.crcs.record_crcs()[record]);
  return found;
}

void bind_job(py::module_& module) {
  py::class_<Job, std::shared_ptr<Job>>(module, "Job")
      .def_property_readonly("captured", [](const Job& job) { return locked(job, [&] { return job.captured(); }); })
      .def_property_readonly("released", [](const Job& job) { return locked(job, [&] { return job.released(); }); })
      .def_property_readonly("finished", [](const Job& job) { return locked(job, [&] { return job.finished(); }); })
      .def_property_readonly("error", error_of)
      .def("find_changed", find_changed_record)
      .def_property_readonly("stats", stats_of)
      .def_property_readonly("written", [](const Job& job) { return py::make_tuple(job.range.begin, job.range.end); })
      .def_property_readonly("checksums", [](const Job& job) { return py::make_tuple(job.field_records, checksums_of(job)); })
      .def_property_readonly("layout_crc32", [](const Job& job) { return layout_checksum(shared_layout(job)); })
      .def("directory", [](const Job& job, const std::vector<uint32_t>& record_crcs) {
        if (record_crcs.size() != job.spec.record_count) throw py::value_error("one checksum for each record");
        const ZipLayout& layout = shared_layout(job);
        return py::make_tuple(layout.directory_offset, py::bytes(fill_directory(layout, record_crcs)));
      }, py::arg("record_crcs"))
      .def_property_readonly("limits", limits_of)
      .def_property_readonly("record_count", [](const Job& job) { return job.spec.record_count; })
      .def_property_readonly("size", [](const Job& job) { return job.spec.size; })
      .def_property_readonly("crc32", [](const Job& job) { return locked(job, [&] { return job.file_crc; }); })
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

void bind_engine(py::module_& module) {
  py::class_<Engine, std::unique_ptr<Engine, EngineDeleter>>(module, "Engine")
      .def(py::init([](size_t arena_bytes, size_t chunk_bytes, int writers, const std::optional<std::string>& cuda_library,
                       size_t device_cache_bytes, size_t device_window_bytes) {
             const EngineOptions options{arena_bytes, chunk_bytes, writers, cuda_library.value_or(""), device_cache_bytes,
                                         device_window_bytes};
             return std::unique_ptr<Engine, EngineDeleter>(new Engine(options));
           }),
           py::arg("arena_bytes"), py::arg("chunk_bytes"), py::arg("writers"), py::arg("cuda_library") = py::none(),
           py::arg("device_cache_bytes") = 0, py::arg("device_window_bytes") = EngineOptions().device_window_bytes)
      .def("submit", &submit, py::kw_only(), py::arg("path"), py::arg("direct"), py::arg("archive"), py::arg("head"),
           py::arg("addresses"), py::arg("sizes"), py::arg("kinds"), py::arg("tail"), py::arg("copy_at_most"),
           py::arg("uniform_alignment"), py::arg("verify"), py::arg("timeout_s"),
           py::arg("share_index") = 0, py::arg("share_count") = 1,
           py::arg("devices") = std::vector<int>(), py::arg("streams") = Streams(),
           py::arg("expected_limits") = py::none(), py::arg("with_directory") = false,
           py::arg("like") = "", py::arg("directory") = -1)
      .def("fence", [](Engine& engine, const Streams& streams) {
        usable(engine);
        py::gil_scoped_release release;
        engine.fence(check_signals, streams);
      }, py::arg("streams") = Streams())
      .def("open_devices", [](Engine& engine, const std::vector<int>& devices) {
        usable(engine);
        py::gil_scoped_release release;
        engine.open_devices(devices);
      }, py::arg("devices"))
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

void bind_files(py::module_& module) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  module.def("write_small_file", [](const std::string& path, const py::bytes& bytes) {
    const std::string content = bytes;
    py::gil_scoped_release release;
    write_small_file(path, content);
  });
  module.def("write_end", [](const std::string& path, uint64_t offset, const py::bytes& bytes) {
    const std::string content = bytes;
    py::gil_scoped_release release;
    write_end(path, offset, content);
  }, py::arg("path"), py::arg("offset"), py::arg("bytes"));
  module.def("rename_path", &rename_path, nogil);
  module.def("sync_directory", &sync_directory, nogil);
  module.def("make_directory", &make_directory, nogil);
  module.def("remove_file", &remove_file, nogil);
  module.def("remove_directory", &remove_directory, nogil);
  module.def("crc32", [](const py::buffer& buffer, uint32_t crc) {
    const py::buffer_info view = buffer.request();
    return crc32(crc, view.ptr, static_cast<size_t>(view.size * view.itemsize));
  }, py::arg("bytes"), py::arg("crc") = 0);
  module.def("crc32_table", [](const py::buffer& buffer, uint32_t crc) {
    const py::buffer_info view = buffer.request();
    return crc32_table(crc, view.ptr, static_cast<size_t>(view.size * view.itemsize));
  }, py::arg("bytes"), py::arg("crc") = 0);
  module.def("crc32_combine", &crc32_combine);
  module.def("crc32_kernel", &crc32_kernel);
}

// ---- Reading -----------------------------------------------------------------------------------------------------

// `keep` is what owns the destinations: it is leaked if a thread hangs that may still write to them.
ReadOptions reading(int threads, double timeout_s, size_t piece_bytes, const py::object& keep,
                    const std::optional<std::string>& driver = {}, const Streams& streams = {}) {
  ReadOptions options{threads, timeout_s, piece_bytes, check_signals, {}, driver.value_or(""), streams};
  options.abandon = [kept = keep.ptr()] {
    py::gil_scoped_acquire gil;
    Py_INCREF(kept);
  };
  return options;
}

constexpr size_t kPieceBytes = size_t{4} << 20;

using Destinations = std::vector<std::tuple<size_t, uintptr_t, int>>;

RecordFile::Wanted to_wanted(const RecordFile& file, const Destinations& destinations) {
  RecordFile::Wanted wanted;
  for (const auto& [index, address, device] : destinations) {
    if (index >= file.entries().size()) throw py::index_error("there is no such record");
    wanted.push_back({index, reinterpret_cast<std::byte*>(address), device < 0 ? kHost : device});
  }
  return wanted;
}

py::list records_of(const RecordFile& file) {
  py::list records;
  for (const ZipEntry& entry : file.entries()) {
    records.append(py::make_tuple(to_text(entry.name), entry.payload_offset, entry.size));
  }
  return records;
}

std::optional<uint32_t> read_records(const RecordFile& file, const Destinations& destinations, bool whole, int threads,
                                     double timeout_s, size_t piece_bytes, const py::object& keep,
                                     const std::optional<std::string>& driver, const Streams& streams) {
  const RecordFile::Wanted wanted = to_wanted(file, destinations);
  const ReadOptions options = reading(threads, timeout_s, piece_bytes, keep, driver, streams);
  py::gil_scoped_release release;
  if (whole) return file.read_whole(wanted, options);
  file.read(wanted, options);
  return std::nullopt;
}

uint32_t read_share(const RecordFile& file, const Destinations& destinations, uint64_t begin, uint64_t end, int threads,
                    double timeout_s, size_t piece_bytes, const py::object& keep) {
  if (begin > end) throw py::value_error("a share ends before it begins");
  const RecordFile::Wanted wanted = to_wanted(file, destinations);
  const ReadOptions options = reading(threads, timeout_s, piece_bytes, keep);
  py::gil_scoped_release release;
  return file.read_share(wanted, begin, end, options);
}

void bind_reading(py::module_& module) {
  py::class_<RecordFile>(module, "RecordFile")
      .def(py::init([](const std::string& path, bool direct, int threads, double timeout_s) {
             const ReadOptions options = reading(threads, timeout_s, kPieceBytes, py::none());
             py::gil_scoped_release release;
             return std::make_unique<RecordFile>(path, direct, options);
           }),
           py::arg("path"), py::arg("direct"), py::arg("threads"), py::arg("timeout_s"))
      .def_property_readonly("size", [](const RecordFile& file) { return file.file().size(); })
      .def_property_readonly("checksummed", &RecordFile::checksummed)
      .def_property_readonly("records", &records_of)
      .def("read", &read_records, py::arg("destinations"), py::kw_only(), py::arg("whole"), py::arg("threads"),
           py::arg("timeout_s"), py::arg("piece_bytes") = kPieceBytes, py::arg("keep") = py::none(),
           py::arg("driver") = py::none(), py::arg("streams") = Streams())
      .def("read_share", &read_share, py::arg("destinations"), py::arg("begin"), py::arg("end"), py::kw_only(),
           py::arg("threads"), py::arg("timeout_s"), py::arg("piece_bytes") = kPieceBytes, py::arg("keep") = py::none())
      .def("check", [](const RecordFile& file, const Destinations& in_memory, int threads) {
        const RecordFile::Wanted wanted = to_wanted(file, in_memory);
        py::gil_scoped_release release;
        file.check(wanted, threads);
      }, py::arg("in_memory"), py::arg("threads"))
      .def_property_readonly("directory_crc32", &RecordFile::directory_crc)
      .def_property_readonly("bytes_read", [](const RecordFile& file) { return file.file().bytes_read(); });
  module.def("verify_torch_file", [](const std::string& path, int threads) {
    const ReadOptions options = reading(threads, ReadOptions().timeout_s, kPieceBytes, py::none());
    py::gil_scoped_release release;
    return verify_torch_file(path, options);
  }, py::arg("path"), py::arg("threads"));
  module.def("digest_file", [](const std::string& path, int threads, double timeout_s) {
    const ReadOptions options = reading(threads, timeout_s, kPieceBytes, py::none());
    FileDigest digest;
    {
      py::gil_scoped_release release;
      digest = digest_file(path, options);
    }
    return py::make_tuple(digest.size, digest.crc);
  }, py::arg("path"), py::arg("threads"), py::arg("timeout_s") = ReadOptions().timeout_s);
}

void bind_leak(py::module_& module) {
  module.def("leak", [](const py::object& object) { object.inc_ref(); }, "Keeps the object until the process is gone.");
}

void bind_faults(py::module_& module) {
  module.def("crash_point", [](const std::string& name) { fault::crash_point(name.c_str()); });
#if LAZYCKPT_FAULT_HOOKS
  module.def("set_fault", [](const std::string& call, const std::string& path_part, int64_t skip, int64_t count,
                             int error, int64_t short_bytes, double delay_s) {
    fault::add({call, path_part, skip, count, error, short_bytes, delay_s});
  }, py::arg("call"), py::arg("path_part") = "", py::arg("skip") = 0, py::arg("count") = -1, py::arg("error") = 0,
     py::arg("short_bytes") = -1, py::arg("delay_s") = 0.0);
  module.def("clear_faults", [](const std::string& call) {
    fault::clear(call);
    if (call.empty()) override_limits({0, 0});
  }, py::arg("call") = "");
  module.def("set_crash_point", &fault::set_crash_point, py::arg("name"), py::arg("skip") = 0);
  module.def("override_sysfs", &override_sysfs);
  module.def("numa_node_of", &numa_node_of, py::arg("sysfs"), py::arg("pci_id"));
  module.def("override_io_limits", [](uint32_t memory_align, uint32_t offset_align) {
    override_limits({memory_align, offset_align});
  });
#endif
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The engine of ckpt. Private: its names change without notice.";
  py::register_exception_translator(&translate);
  bind_job(module);
  bind_engine(module);
  bind_files(module);
  bind_reading(module);
  bind_records(module);
  bind_pickling(module);
  bind_leak(module);
  bind_faults(module);
}
