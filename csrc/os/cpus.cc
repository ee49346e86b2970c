#include "os/cpus.h"

#include <sched.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <vector>

#include "os/file.h"

namespace lazyckpt {
namespace {

constexpr size_t kLongestList = 4096;
constexpr size_t kMostCpus = 8192;  // of the kernel
constexpr size_t kBitsInWord = 8 * sizeof(unsigned long);

using Mask = std::vector<unsigned long>;

// An empty mask if it is no list.
Mask parse(const std::string& list) {
  Mask mask(kMostCpus / kBitsInWord, 0);
  const char* at = list.c_str();
  while (std::isdigit(static_cast<unsigned char>(*at)) != 0) {
    char* end = nullptr;
    const unsigned long first = std::strtoul(at, &end, 10);
    const unsigned long last = *end == '-' ? std::strtoul(end + 1, &end, 10) : first;
    for (unsigned long cpu = first; cpu <= std::min<unsigned long>(last, kMostCpus - 1); ++cpu) {
      mask[cpu / kBitsInWord] |= 1UL << (cpu % kBitsInWord);
    }
    at = *end == ',' ? end + 1 : end;
  }
  return mask;
}

bool bind(pthread_t thread, const Mask& mask) {
  return ::pthread_setaffinity_np(thread, mask.size() * sizeof(Mask::value_type), reinterpret_cast<const cpu_set_t*>(mask.data())) == 0;
}

}  // namespace

std::string cpus_near(const std::string& sysfs, std::string pci_id) {
  // The driver writes capitals.
  std::transform(pci_id.begin(), pci_id.end(), pci_id.begin(), [](unsigned char each) { return std::tolower(each); });
  return pci_id.empty() ? "" : read_some(sysfs + "/bus/pci/devices/" + pci_id + "/local_cpulist", kLongestList);
}

void run_on(pthread_t thread, const std::string& cpus) {
  if (bind(thread, parse(cpus))) return;
  bind(thread, Mask(kMostCpus / kBitsInWord, ~0UL));  // refused: then it stays where it is
}

}  // namespace lazyckpt
