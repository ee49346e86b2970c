#include "bindings/files.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/crc32.h"
#include "base/fault.h"
#include "os/file.h"
#include "os/memory_node.h"

namespace py = pybind11;

namespace lazyckpt {

void bind_files(py::module_& module) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  module.def("write_small_file", [](const std::string& path, const py::bytes& bytes) {
    const std::string content = bytes;
    py::gil_scoped_release release;
    write_small_file(path, content);
  });
  module.def("make_durable", [](const std::vector<std::pair<std::string, py::bytes>>& files,
                                const std::vector<std::string>& directories) {
    std::vector<std::pair<std::string, std::string>> contents;
    contents.reserve(files.size());
    for (const auto& [path, bytes] : files) contents.emplace_back(path, bytes);
    py::gil_scoped_release release;
    make_durable(contents, directories);
  }, py::arg("files"), py::arg("directories"));
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
  module.def("crc32_with", [](const std::string& kernel, const py::buffer& buffer, uint32_t crc,
                              const std::optional<py::buffer>& to) {
    const py::buffer_info view = buffer.request();
    const auto length = static_cast<size_t>(view.size * view.itemsize);
    if (!to) return crc32_with(kernel, crc, view.ptr, length);
    const py::buffer_info target = to->request(true);
    if (static_cast<size_t>(target.size * target.itemsize) < length) throw std::invalid_argument("there is no room in `to`");
    return crc32_copy_with(kernel, crc, target.ptr, view.ptr, length);
  }, py::arg("kernel"), py::arg("bytes"), py::arg("crc") = 0, py::arg("to") = py::none());
  module.def("crc32_combine", &crc32_combine);
  module.def("crc32_kernels", &crc32_kernels);
}

void bind_leak(py::module_& module) {
  module.def("leak", [](const py::object& object) { object.inc_ref(); }, "Keeps the object until the process is gone.");
}

void bind_faults(py::module_& module) {
  module.def("crash_point", [](const std::string& name) { fault::crash_point(name.c_str()); });
  module.def("consult_fault", [](const std::string& call, const std::string& path) {
    py::gil_scoped_release release;  // it may be told to wait
    const fault::Verdict verdict = fault::consult(call.c_str(), path);
    return std::pair(verdict.error, verdict.short_bytes);
  });
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

}  // namespace lazyckpt
