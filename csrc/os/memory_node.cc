#include "os/memory_node.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "os/file.h"

namespace lazyckpt {
namespace {

constexpr size_t kLongestAnswer = 256;

std::string& sysfs_path() {
  static std::string path = "/sys";
  return path;
}

}  // namespace

const std::string& sysfs() { return sysfs_path(); }

void override_sysfs(const std::string& path) { sysfs_path() = path; }

int numa_node_of(const std::string& sysfs, std::string pci_id) {
  const std::string online = read_some(sysfs + "/devices/system/node/online", kLongestAnswer);
  if (online.find_first_of("-,") == std::string::npos) return kNoNode;  // of several: "0-1", "0,2"
  // The driver writes capitals.
  std::transform(pci_id.begin(), pci_id.end(), pci_id.begin(), [](unsigned char each) { return std::tolower(each); });
  const std::string answer = read_some(sysfs + "/bus/pci/devices/" + pci_id + "/numa_node", kLongestAnswer);
  char* end = nullptr;
  const long node = std::strtol(answer.c_str(), &end, 10);
  return end == answer.c_str() || node < 0 || node > 1023 ? kNoNode : static_cast<int>(node);
}

}  // namespace lazyckpt
