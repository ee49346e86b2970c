// On which processors threads run.
#pragma once

#include <pthread.h>

#include <string>

namespace lazyckpt {

// Those near a PCI device, as sysfs lists them ("0-15,32-47"); empty if it does not tell. Arguments as for numa_node_of().
std::string cpus_near(const std::string& sysfs, std::string pci_id);

// Lets the thread run on these; on all that the process may have, if the list is empty or names none of them. The kernel leaves
// out those that the cpuset of the process does not have. A thread inherits what its maker was bound to: with OpenMP's binding
// that is one processor, the one on which training computes.
void run_on(pthread_t thread, const std::string& cpus);

}  // namespace lazyckpt
