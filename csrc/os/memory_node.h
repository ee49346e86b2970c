// On which memory node a device of this machine lies.
#pragma once

#include <string>

namespace lazyckpt {

constexpr int kNoNode = -1;

// The node of the PCI device, as sysfs tells it. kNoNode: it does not tell, or there is only one node, or the device is near to
// none in particular. `sysfs` is where that file system is mounted; `pci_id` is one as the CUDA driver writes them.
int numa_node_of(const std::string& sysfs, std::string pci_id);

// "/sys", but where tests put another one in its place; before a device is opened.
const std::string& sysfs();
void override_sysfs(const std::string& path);

}  // namespace lazyckpt
