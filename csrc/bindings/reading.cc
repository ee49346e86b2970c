#include "bindings/reading.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/device.h"
#include "bindings/errors.h"
#include "os/file.h"
#include "reading/range_reader.h"
#include "reading/record_file.h"

namespace py = pybind11;

namespace lazyckpt {
namespace {

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

using Ranges = std::vector<std::tuple<uint64_t, uint64_t, uintptr_t>>;

// (bytes of the file, CRC-32 of each range, bytes that were read): of ranges (offset, length, address in memory of the host; 0: only
// checksummed).
py::tuple read_file_ranges(const std::string& path, const Ranges& wanted, bool direct, int threads, double timeout_s,
                           const py::object& keep) {
  std::vector<ReadRange> ranges;
  ranges.reserve(wanted.size());
  for (const auto& [offset, length, address] : wanted) {
    ranges.push_back({offset, length, reinterpret_cast<std::byte*>(address), kHost});
  }
  const ReadOptions options = reading(threads, timeout_s, kPieceBytes, keep);
  std::vector<uint32_t> crcs;
  uint64_t size = 0, read = 0;
  {
    py::gil_scoped_release release;
    const auto file = std::make_shared<ReadableFile>(path, direct);
    crcs = read_ranges(file, ranges, options);
    size = file->size();
    read = file->bytes_read();
  }
  return py::make_tuple(size, crcs, read);
}

using Places = std::vector<std::tuple<uint64_t, uint64_t, uintptr_t, int>>;

// The CRC-32 of each range (offset, length, address or 0, device or -1) of a file whose records are known elsewhere.
std::vector<uint32_t> read_places(const std::shared_ptr<ReadableFile>& file, const Places& wanted, int threads, double timeout_s,
                                  const py::object& keep, const std::optional<std::string>& driver, const Streams& streams) {
  std::vector<ReadRange> ranges;
  ranges.reserve(wanted.size());
  for (const auto& [offset, length, address, device] : wanted) {
    ranges.push_back({offset, length, reinterpret_cast<std::byte*>(address), device < 0 ? kHost : device});
  }
  const ReadOptions options = reading(threads, timeout_s, kPieceBytes, keep, driver, streams);
  py::gil_scoped_release release;
  return read_ranges(file, ranges, options);
}

void bind_range_file(py::module_& module) {
  py::class_<ReadableFile, std::shared_ptr<ReadableFile>>(module, "RangeFile")
      .def(py::init([](const std::string& path, bool direct) {
             py::gil_scoped_release release;
             return std::make_shared<ReadableFile>(path, direct);
           }),
           py::arg("path"), py::arg("direct"))
      .def_property_readonly("size", &ReadableFile::size)
      .def_property_readonly("bytes_read", &ReadableFile::bytes_read)
      .def("read_bytes", [](const ReadableFile& file, uint64_t offset, size_t length) {
        std::string bytes(length, '\0');
        {
          py::gil_scoped_release release;
          file.read_at(bytes.data(), length, offset);
        }
        return py::bytes(bytes);
      }, py::arg("offset"), py::arg("length"))
      .def("read", &read_places, py::arg("places"), py::kw_only(), py::arg("threads"), py::arg("timeout_s"), py::arg("keep"),
           py::arg("driver") = py::none(), py::arg("streams") = Streams());
}

}  // namespace

void bind_reading(py::module_& module) {
  bind_range_file(module);
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
      .def("claimed_crc32", [](const RecordFile& file, int threads, double timeout_s) {
        const ReadOptions options = reading(threads, timeout_s, kPieceBytes, py::none());
        py::gil_scoped_release release;
        return file.claimed_crc(options);
      }, py::arg("threads"), py::arg("timeout_s"))
      .def_property_readonly("directory_crc32", &RecordFile::directory_crc)
      .def_property_readonly("bytes_read", [](const RecordFile& file) { return file.file().bytes_read(); });
  module.def("read_file_ranges", &read_file_ranges, py::arg("path"), py::arg("ranges"), py::kw_only(), py::arg("direct"),
             py::arg("threads"), py::arg("timeout_s"), py::arg("keep"));
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

}  // namespace lazyckpt
